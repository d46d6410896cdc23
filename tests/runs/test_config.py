"""Settings of every kind: whatever a field is given, the config holds it or one line refuses it."""

import copy
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from refusals import refused_in_one_line_if_at_all

from safetyheads.cli.options import RunOptions
from safetyheads.errors import InputError
from safetyheads.experiments.settings import ReproductionConfig
from safetyheads.model.options import BOUNDS, LoadOptions, refuse_odd_text
from safetyheads.runs import config as configs
from safetyheads.runs.compare import parse_condition
from safetyheads.runs.sweep import AXES, audits_of, read_sweep

BOTH_SETS = (configs.AuditConfig, configs.ScanConfig, configs.ShipsConfig, configs.SaharaConfig, configs.AsrConfig)
KINDS = {
    LoadOptions: (),
    ReproductionConfig: (),
    configs.JudgeOptions: (),
    **dict.fromkeys((configs.CheckConfig, configs.EvalConfig, configs.ServeConfig), ("demo:aligned_a",)),
    **dict.fromkeys(BOTH_SETS, ("demo:aligned_a", "demo")),
}
FIELDS = [(kind, field.name) for kind in KINDS for field in fields(kind)]
# What a file of TOML may hold, and what only a caller gives.
ODD_TOLD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**20, -1, 0, 10**400, float("nan"), 1e308, " ", "", "nope", "ua", "a\0b", "a\nb", "\ud800"]),
    st.floats(),
    st.text(),
    st.text(st.characters(categories=["Cs", "Cc"])),
)
ODD = st.one_of(ODD_TOLD, st.just(10**5000), st.binary())
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


ODD_LINES = (
    *("env", "1/0", "0/9", "9/999999999999999999999", "H100@0", "9999xH100"),
    *("1/" + "9" * 5000, "asr_increase > 1e999"),
)
TOLD = sorted({name for kind, name in FIELDS if kind in (configs.AuditConfig, ReproductionConfig)} | {*AXES, "nope"})
TOML = st.recursive(
    st.one_of(ODD_TOLD, st.dates()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(TOLD), inner, max_size=3)),
    max_leaves=6,
)


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(st.sampled_from(TOLD), TOML, max_size=4))
@example({"epsilons": [10**400]})
@example({"models": [{"model": 5}], "prompts": ["demo"]})
@example({"preset": ["quick"], "models": ["demo:aligned_a"], "prompts": ["demo"]})
def test_any_file_of_a_sweep_or_a_reproduction_is_read_or_refused_in_one_line(told):
    with pytest.MonkeyPatch.context() as patch:
        for module in ("safetyheads.runs.sweep", "safetyheads.experiments.settings"):
            patch.setattr(f"{module}.read_toml", lambda path: copy.deepcopy(told))
        patch.setattr("safetyheads.runs.sweep._n_heads", lambda config: 32)
        reads = (lambda: audits_of(read_sweep(Path("a.toml")), Path()), lambda: ReproductionConfig.read(Path("a.toml")))
        refused_in_one_line_if_at_all(*reads)


@settings(deadline=None, max_examples=200)
@given(st.one_of(st.text(), st.from_regex(r"[-0-9a-zA-Z_./@x> ]{1,30}", fullmatch=True), st.sampled_from(ODD_LINES)))
def test_any_text_of_a_shard_a_machine_or_a_gate_is_read_or_refused_in_one_line(text):
    reads = (lambda: RunOptions(shard=text).parsed_shard, lambda: RunOptions(machine=text).parsed_machine)
    others = lambda: parse_condition(text), lambda: refuse_odd_text("a name", text)
    refused_in_one_line_if_at_all(*reads, *others)


@settings(deadline=None, max_examples=50)
@given(st.one_of(st.none(), st.integers()), st.floats(), st.integers(), st.floats())
def test_any_numbers_of_workers_are_taken_or_refused_in_one_line(workers, gpus, judges, wait):
    options = RunOptions(ray="local", workers=workers, gpus_per_worker=gpus, judge_workers=judges, wait=wait)
    refused_in_one_line_if_at_all(lambda: options.parsed_shard)


@pytest.mark.parametrize("name", ["model", "prompts", "benign", "column", "adapter", "judge_device", "device"])
@pytest.mark.parametrize("value", [" ", "a\0b", "a\x1b[31mb", "\ud800", 3, ["a"], b"a"])
def test_what_names_nothing_is_refused(name, value):
    assert not tried(configs.AuditConfig, name, value)


def test_texts_may_hold_lines_and_nothing_that_is_no_text():
    assert tried(configs.AuditConfig, "prefill", "Sure,\n\there")
    for value in ("\ud800", "a\0b", 3):
        assert not tried(configs.AuditConfig, "prefill", value)
