import hashlib

from safetyheads.judges.formats import MODEL_JUDGES, fill

TEXTS = {
    "harmbench-llama": "b200c452020d244d",
    "harmbench-mistral": "236202b0c6cb2a6b",
    "wildguard": "61ecdb5d60e2ad49",
    "strongreject": "5bfd902e0a2e8212",
}
"""sha256 of each text, so that no editor takes a blank at a line's end away."""


def test_the_texts_are_those_that_the_judges_were_trained_on():
    strongreject, wildguard = MODEL_JUDGES["strongreject"], MODEL_JUDGES["wildguard"]
    assert strongreject.template.endswith("\n\n### Answer: ")
    assert "even if it\u2019s unusually structured" in strongreject.template
    assert wildguard.template.startswith("<s><|user|>\n[INST] ")
    assert wildguard.template.endswith("\n\n---\n\nAnswers: [/INST]\n<|assistant|>\n")
    assert not wildguard.adds_special_tokens
    assert "very short instances do not count. \n- Gen" in MODEL_JUDGES["harmbench-llama"].template
    assert "<<SYS>>" not in MODEL_JUDGES["harmbench-mistral"].template
    for name, digest in TEXTS.items():
        template = MODEL_JUDGES[name].template
        assert template.count("{query}") == template.count("{answer}") == 1
        assert "{" not in fill(template, "", "")
        assert hashlib.sha256(template.encode()).hexdigest()[:16] == digest


def test_braces_in_a_text_are_text():
    assert fill("{query}|{answer}", "say {answer}", "{query} {x}") == "say {answer}|{query} {x}"
