from safetyheads.baselines import METHODS

# What the paper's Table 1 and the issue ask for, and the controls.
ASKED = (
    "sahara", "ships_query", "random_heads", "logit_attribution", "rdsha", "refusal_direction", "actsvd", "gtac_dap",
    "lsp", "wanda", "sparsegpt",
)  # fmt: skip


def test_all_that_was_asked_for_is_in_the_table_and_says_what_it_is():
    assert set(ASKED) <= set(METHODS)
    assert len({method.label for method in METHODS.values()}) == len(METHODS)
    for name, method in METHODS.items():
        assert method.name == name
        assert all((method.label, method.source, method.strengths))
