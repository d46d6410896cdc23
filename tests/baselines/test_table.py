import pytest

from safetyheads import InputError
from safetyheads.baselines.table import METHODS, method_named

# What the issue asks for by name.
ASKED = (
    "sahara", "ships_query", "random_heads", "output_norm", "logit_attribution", "rdsha", "refusal_direction", "actsvd",
    "gtac_dap", "lsp", "wanda", "sparsegpt",
)  # fmt: skip


def test_all_that_was_asked_for_is_in_the_table():
    assert set(ASKED) <= set(METHODS)
    assert len({method.label for method in METHODS.values()}) == len(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_an_entry_says_what_it_is(name):
    method = METHODS[name]
    assert method.name == name
    assert all((method.label, method.source, method.strengths))
    assert method.touches in ("heads", "weights", "activations")


def test_methods_are_found_by_name():
    assert method_named(" Refusal-Direction ") is METHODS["refusal_direction"]
    with pytest.raises(InputError, match="unknown baseline 'sahra'; known are sahara, ships_query"):
        method_named("sahra")
    with pytest.raises(TypeError):
        METHODS["mine"] = METHODS["sahara"]
