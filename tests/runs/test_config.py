"""Settings of every kind: whatever a field is given, the config holds it or one line refuses it."""

from dataclasses import MISSING, fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safetyheads.errors import InputError
from safetyheads.experiments.settings import ReproductionConfig
from safetyheads.model.options import BOUNDS, LoadOptions
from safetyheads.runs import config as configs

BOTH_SETS = (configs.AuditConfig, configs.ScanConfig, configs.ShipsConfig, configs.SaharaConfig, configs.AsrConfig)
KINDS = {
    LoadOptions: (),
    ReproductionConfig: (),
    **dict.fromkeys((configs.CheckConfig, configs.EvalConfig), ("demo:aligned_a",)),
    **dict.fromkeys(BOTH_SETS, ("demo:aligned_a", "demo")),
}
FIELDS = [(kind, field.name) for kind in KINDS for field in fields(kind)]
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**20, -1, 0, 10**5000, float("nan"), float("inf"), 1e308, " ", "", "nope", "a\0b", "\ud800"]),
    st.floats(),
    st.text(),
    st.text(st.characters(categories=["Cs", "Cc"])),
    st.binary(),
)
VALUES = st.one_of(
    ODD, st.lists(ODD, max_size=3), st.lists(ODD, max_size=2).map(tuple), st.dictionaries(st.text(), ODD)
)


def tried(kind, name, value):
    """Whether a config took a value; a refusal has to be one printable line."""
    known = dict(zip([field.name for field in fields(kind) if field.default is MISSING], KINDS[kind], strict=False))
    try:
        kind(**known | {name: value})
    except InputError as error:
        said = str(error)
        assert "\n" not in said
        said.encode()
        return False
    return True


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(FIELDS), VALUES)
def test_any_value_of_any_field_is_taken_or_refused_in_one_line(field, value):
    tried(*field, value)


def test_every_number_has_bounds_of_its_own_and_no_number_beyond_them_is_taken():
    for kind, name in FIELDS:
        annotation = str(kind.__dataclass_fields__[name].type)
        if "int" in annotation or "float" in annotation:
            least, most = BOUNDS[name]
            for value in (least - 1, most + 1, most * 10**30, float("nan"), -1e308, 1e308):
                beyond = (value,) if annotation.startswith("tuple") else value
                assert not tried(kind, name, beyond), (kind, name, value)


@pytest.mark.parametrize("name", ["model", "prompts", "benign", "column", "adapter", "judge_device", "device"])
@pytest.mark.parametrize("value", [" ", "a\0b", "a\x1b[31mb", "\ud800", 3, ["a"], b"a"])
def test_what_names_nothing_is_refused(name, value):
    assert not tried(configs.AuditConfig, name, value)


def test_texts_may_hold_lines_and_nothing_that_is_no_text():
    assert tried(configs.AuditConfig, "prefill", "Sure,\n\there")
    for value in ("\ud800", "a\0b", 3):
        assert not tried(configs.AuditConfig, "prefill", value)
