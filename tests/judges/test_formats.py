import hashlib

from safetyheads.judges.formats import MODEL_JUDGES

TEXTS = {
    "harmbench-llama": "b200c452020d244d",
    "harmbench-mistral": "236202b0c6cb2a6b",
    "wildguard": "61ecdb5d60e2ad49",
    "strongreject": "5bfd902e0a2e8212",
}
"""sha256 of the text that each judge was trained on, so that no editor takes a blank at a line's end away."""


def test_the_texts_are_those_that_the_judges_were_trained_on():
    assert {name for name, ready in MODEL_JUDGES.items() if ready.template} == TEXTS.keys()
    for name, digest in TEXTS.items():
        template = MODEL_JUDGES[name].template
        assert template.count("{query}") == template.count("{answer}") == 1
        assert hashlib.sha256(template.encode()).hexdigest()[:16] == digest
