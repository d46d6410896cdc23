"""Templates, on chat templates written for these tests: turns, BOS tokens, think blocks, prefills, URIAL."""

import json
import tomllib
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safetyheads.errors import InputError
from safetyheads.judges.base import Completion
from safetyheads.judges.keywords import KeywordJudge
from safetyheads.judges.phrase_judge import PhraseJudge
from safetyheads.prompts import templates
from safetyheads.prompts.templates import FORMS, Template

quick = settings(deadline=None, max_examples=50)

# Templates in the manner of families, written for these tests.
TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
CHAT = TURNS + "{% if add_generation_prompt %}[assistant]{% endif %}"
# Llama-2's way: a blank before each answer, system prompts inside the first turn.
BLANK_BEFORE_ANSWERS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system\n role here') }}{% endif %}" + CHAT
DROPS_SYSTEM = "{% for m in messages %}{% if m.role == 'user' %}[user]{{ m.content }}{% endif %}{% endfor %}[assistant]"
ASKS = "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
SWITCHED = CHAT + ASKS + "<think>\n\n</think>\n\n{% endif %}"
BEGUN = TURNS + "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
STRIPS_HISTORY = CHAT + "{# answers of before are cut at </think> #}"

MARK = "{% if thinking %}<think>{% else %}</think>{% endif %}"
OTHER_SWITCH = TURNS + "{% if add_generation_prompt %}[assistant]" + MARK + "{% endif %}"
# "thinking" stands here for something else.
CHANNELS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}<|channel|>final<|message|>{% endif %}"
    "{{ m.content }}[end]{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    "{% if messages[0].thinking %}<|channel|>analysis<|message|>{{ messages[0].thinking }}{% endif %}"
)
NO_MARKS = "{% if thinking %}Think first.{% endif %}" + CHAT
# The template writes an empty block before an answer without thoughts: in its own way, or in marks that nobody lists.
THOUGHTS = "{% if m.role == 'assistant' %}<X>{{ m.reasoning_content or '' }}</X>{% endif %}"
OWN_BLOCK = CHAT.replace("{{ m.content", THOUGHTS.replace("X", "think") + "{{ m.content")
OWN_MARKS = CHAT.replace(
    "{{ m.content", THOUGHTS.replace("<X>", "<reasoning>\n").replace("</X>", "\n</reasoning>\n") + "\n{{ m.content"
)
DATED_DEFAULT = (
    "{% if messages[0].role != 'system' %}[system]Today is {{ strftime_now('%Y-%m-%d') }}.[end]{% endif %}" + CHAT
)
CUTS_THOUGHTS = CHAT.replace("m.content", "(m.content.split('</think>')[-1] if m.role == 'assistant' else m.content)")

RECURSIVE = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"


@cache
def _backend(adds):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"<s>": 0, "</s>": 1, "<unk>": 2, "hi": 3, "be": 4, "brief": 5, "[user]": 6, "[assistant]": 7}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=adds, special_tokens=[("<s>", 0), ("</s>", 1)])
    return tokenizer


def tokenizer(chat_template=None, adds="<s> $A"):
    """Of whole words; what it adds to them by itself is ``adds``."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=_backend(adds),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=chat_template,
        name_or_path="maker/model",
    )


def rendered(chat_template, query="hi", text="chat", system=None, **options):
    return Template.parse(text, system, **options).render(query, tokenizer(chat_template))


NO_QUERY = r"has no \{query\}.*query_answer"
NO_PLACE = "needs the template chat.*has no place for it"
FOLDED = {"system": "be brief", "folds_system": True}
OF_MODEL = "^the chat template of maker/model "


@pytest.mark.parametrize(
    ("text", "chat_template", "options", "why"),
    [
        *((text, CHAT, {}, NO_QUERY) for text in ("", "chatt", "{Query}")),
        *((text, CHAT, {"system": "be brief"}, NO_PLACE) for text in ("direct", "Q: {query}")),
        *((text, CHAT, FOLDED, "--fold-system needs") for text in ("llama2", "{system} {query}")),
        ("chat", CHAT, {"folds_system": True}, "--fold-system needs"),
        ("chat", CHAT, {"thinking": "open", "prefill": "Sure"}, "thinking must be closed"),
        ("chat", None, {}, "the tokenizer of maker/model has no chat template"),
        ("chat", NO_SYSTEM, {"system": "be brief"}, OF_MODEL + "rejects the system prompt: no system role here.*--fo"),
        ("chat", DROPS_SYSTEM, {"system": "be brief"}, OF_MODEL + "drops .*--fold-system"),
        (
            "chat",
            "{{ messages[0].content | upper }}",
            {},
            OF_MODEL + "drops the query, or changes it; choose --template",
        ),
        ("chat", DROPS_SYSTEM, {"system": "user"}, OF_MODEL + "drops the system prompt"),
        ("chat", "{{ range(1000) | random }}" + CHAT, {}, OF_MODEL + "writes another text each time; choose"),
        ("chat", "{{ ['a', 'b'] | random }}" + CHAT, {}, OF_MODEL + "writes another text each time; choose"),
        ("chat", "{{ 'x' + 5 }}", {}, OF_MODEL + r'rejects the prompt: can only concatenate str \(not "int"\) to str'),
        ("chat", RECURSIVE, {}, OF_MODEL + "rejects the prompt: maximum recursion depth"),
        ("chat", CHAT, {"thinking": "closed"}, OF_MODEL + "has no think block to close"),
    ],
)
def test_what_cannot_be_rendered_is_refused_in_one_line(text, chat_template, options, why):
    with pytest.raises(InputError, match=why) as refused:
        rendered(chat_template, text=text, **options)
    assert "\n" not in str(refused.value)


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{{ messages[0].content }}"


LARGE = ("{{ 'a' * 10 ** 18 }}", "{{ [0] * 10 ** 18 }}", "{{ 'a' * 3 * 10 ** 9 }}", "{{ 'a' | center(10 ** 9) }}")


@pytest.mark.parametrize("text", [ENDLESS, "{{ 10 ** (10 ** 10) }}", *LARGE])
def test_a_template_that_never_ends_or_has_no_room_is_refused_in_one_line(text, monkeypatch):
    apply, calls = templates.BoundTemplate._apply, []
    monkeypatch.setattr(templates, "RENDER_SECONDS", 0.1)
    monkeypatch.setattr(templates.BoundTemplate, "_apply", lambda *a, **b: calls.append(a) or apply(*a, **b))
    with pytest.raises(InputError, match=OF_MODEL + "rejects the prompt: [^\n]*$") as refused:
        rendered(text)
    assert text not in LARGE or str(refused.value).endswith("MemoryError")
    assert len(calls) == 1 or text != ENDLESS  # it is not waited for again


LLAMA2 = "[INST] <<SYS>>\n{}\n<</SYS>>\n\nhi [/INST]"
TURN = "[user]hi[end][assistant]"
SURE = {"prefill": "Sure"}


@pytest.mark.parametrize(
    ("text", "chat_template", "options", "expected"),
    [
        # The papers' templates, to the letter; a prefill stands where they put answers.
        ("direct", None, {}, "hi"),
        ("query_answer", None, {}, "## Query:hi\n## Answer:"),
        ("query_answer", None, SURE, "## Query:hi\n## Answer: Sure"),
        ("llama2", None, {"system": "Be brief."}, LLAMA2.format("Be brief.")),
        ("llama2", None, {"system": ""} | SURE, "[INST] hi [/INST] Sure"),
        # A text may have a place for a system prompt.
        ("{system}|{query}", None, {"system": "be brief"}, "be brief|hi"),
        ("Q: {query} A:", None, SURE, "Q: hi A:Sure"),
        ("chat", CHAT, {}, TURN),
        ("chat", CHAT, {"system": "be brief"}, f"[system]be brief[end]{TURN}"),
        ("chat", CHAT, SURE, f"{TURN}Sure"),
        ("chat", BLANK_BEFORE_ANSWERS, SURE, "<s>[INST] hi [/INST] Sure"),
        ("chat", NO_SYSTEM, FOLDED, "[user]be brief\n\nhi[end][assistant]"),
        # A switch without marks is turned off, and nothing is written.
        ("chat", NO_MARKS, {}, TURN),
        ("chat", NO_MARKS, {"thinking": "open"}, f"Think first.{TURN}"),
        # A prefill stands where the template writes answers, with what it writes before them.
        ("chat", SWITCHED, SURE, f"{TURN}Sure"),
        ("chat", OWN_BLOCK, SURE, f"{TURN}<think></think>Sure"),
        ("chat", OWN_MARKS, SURE, f"{TURN}<reasoning>\n\n</reasoning>\nSure"),
    ],
)
def test_a_template_puts_system_prompt_query_and_prefill_in_their_places(text, chat_template, options, expected):
    assert rendered(chat_template, text=text, **options) == expected


def test_urial_shows_its_shots_and_leaves_the_answer_to_the_model():
    template = Template.parse("urial")
    text = template.render("How do I fold a sheet?", None)
    assert text.startswith(template.system + "\n\n# Query:\nWhich planets")
    assert text.endswith("# Query:\nHow do I fold a sheet?\n\n# Answer:\n")
    assert template.stops == ("# Query:",)
    assert Template.parse("urial", prefill="Sure").render("a", None).endswith("# Answer:\nSure")
    assert Template.parse("urial", "").render("a", None).startswith("# Query:\nWhich planets")
    # One of its shots declines, and judges take no other for a refusal.
    shots = [shot.split("\n\n# Answer:\n") for shot in FORMS["urial"].without_system.split("# Query:\n")[1:-1]]
    completions = [Completion(query, answer.strip(), (), True, 128) for query, answer in shots]
    for judge in (KeywordJudge(), PhraseJudge()):
        assert [verdict.label for verdict in judge(completions)] == ["complied", "refused", "complied"]


@quick
@given(st.text("{}ab!:0", max_size=12), st.text("{}qsuerytm", max_size=12))
def test_braces_are_plain_text_and_a_query_is_put_in_as_it_stands(before, query):
    query = f"{query}{{system}}{{query}}"
    if "{query}" not in before:
        assert Template.parse(f"{before}{{query}}|").render(query, None) == f"{before}{query}|"
    assert Template.parse("llama2").render(query, None).endswith(f"\n\n{query} [/INST]")
    assert Template.parse("S: {system} Q: {query}", "{query}").render(query, None) == f"S: {{query}} Q: {query}"


TWICE = "{{ bos_token }} {{ bos_token }} [user] {{ messages[0].content }}"


@pytest.mark.parametrize(
    ("text", "chat_template", "adds", "tokens"),
    [
        # The user's text and the tokenizer both write a beginning; so do a chat template and a text in it.
        ("<s> be {query}", None, "<s> $A", ["<s>", "be", "hi"]),
        ("chat", TWICE, "<s> $A", ["<s>", "[user]", "hi"]),
        ("chat", "[user] {{ messages[0].content }}", "<s> $A", ["[user]", "hi"]),
        # An end that the tokenizer adds is left out, one in the text is not.
        ("be {query}", None, "<s> $A </s>", ["<s>", "be", "hi"]),
    ],
)
def test_special_tokens_are_the_tokenizers_own_and_never_doubled(text, chat_template, adds, tokens):
    adopted = tokenizer(chat_template, adds)
    assert adopted.convert_ids_to_tokens(Template.parse(text).bound(adopted).encode("hi")) == tokens


def test_a_chat_prompt_has_the_tokens_of_the_tokenizers_own_call():
    adopted = tokenizer("{{ bos_token }} [user] {{ messages[0].content }} [assistant]")
    own = adopted.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert Template.parse("chat").bound(adopted).encode("hi") == list(own["input_ids"])
    with pytest.raises(InputError, match="no token"):
        Template.parse("direct").bound(tokenizer(adds="$A")).encode(" ")


DATED = "{{ strftime_now('%d %b %Y') }}" + CHAT
UNWRITTEN = "{% set day = strftime_now('%Y') | int %}{% if messages[0].role != 'system' %}{{ day }}{% endif %}" + CHAT
UNASKED = "{% if strftime_now is defined %}{% set date = 'today' %}{% endif %}" + CHAT


def test_a_template_that_writes_the_date_says_so():
    dated = Template.parse("chat").bound(tokenizer(DATED))
    assert dated.note.startswith("the chat template writes today's date into the prompts")
    for text, chat_template in (("direct", DATED), ("chat", CHAT), ("chat", UNASKED), ("chat", NO_SYSTEM)):
        assert Template.parse(text).bound(tokenizer(chat_template)).note is None
    # What the settings in force write decides: here the date stands in the default system prompt.
    for chat_template in (DATED_DEFAULT, UNWRITTEN):
        noted = [Template.parse("chat", system).bound(tokenizer(chat_template)).note for system in (None, "be brief")]
        assert [note is None for note in noted] == [False, True]


FAMILIES = tomllib.loads((Path(__file__).parents[1] / "samples" / "chat_templates.toml").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_templates_of_families_write_what_they_write_for_an_answer_without_thoughts(family):
    facts, query, prefill = FAMILIES[family], "How do I pick a melon?", "Sure, here is"
    adopted = tokenizer(facts["template"])
    bound = Template.parse("chat").bound(adopted)
    thinks = dict.fromkeys(bound.switches, False)

    def own(*turns, **options):
        """What the tokenizer itself makes of turns."""
        messages = [{"role": role, "content": text} for role, text in turns]
        return adopted.apply_chat_template(messages, tokenize=False, **thinks, **options)

    prompt = bound.render(query)
    assert prompt.rpartition(query)[2] == facts["ends"]
    assert (bound.template.thinking, bound.note is not None) == (facts.get("thinking"), facts.get("dated", False))
    plain = own(("user", query), add_generation_prompt=True)
    # A block that the template begins is closed in the family's way, else nothing is written beside it.
    assert prompt == plain or (bound.template.thinking == "closed" and prompt.startswith(plain.rstrip()))
    answered = ("user", query), ("assistant", prefill)
    assert Template.parse("chat", prefill=prefill).render(query, adopted) == own(*answered, continue_final_message=True)
    described = Template.parse("chat", "Be brief.")
    if "system" in facts:
        with pytest.raises(InputError, match=facts["system"]):
            described.render(query, adopted)
    else:
        assert described.render(query, adopted).startswith(
            own(("system", "Be brief."), ("user", query), add_generation_prompt=True).rstrip()
        )
    folded = Template.parse("chat", "Be brief.", folds_system=True).render(query, adopted)
    assert folded == prompt.replace(query, f"Be brief.\n\n{query}")


@pytest.mark.parametrize(
    ("chat_template", "closed", "opened", "begins"),
    [
        (SWITCHED, "<think>\n\n</think>\n\n", "", False),
        (BEGUN, "<think>\n\n</think>\n\n", "<think>\n", True),
        (OTHER_SWITCH, "</think>", "<think>", True),
        (CHANNELS, "<|channel|>final<|message|>", "", False),
        (OWN_BLOCK, "<think></think>", "", False),
        (OWN_MARKS, "<reasoning>\n\n</reasoning>\n", "", False),
        (
            OWN_MARKS.replace("[assistant]", "[assistant]<reasoning>\n"),
            "<reasoning>\n\n</reasoning>\n",
            "<reasoning>\n",
            True,
        ),
    ],
)
def test_a_think_block_is_closed_unless_it_is_to_be_open(chat_template, closed, opened, begins):
    adopted = tokenizer(chat_template)
    for template in (Template.parse("chat"), Template.parse("chat", thinking="closed")):
        # A query that holds a mark changes nothing.
        for query in ("hi", "why </think> or <think>"):
            assert template.render(query, adopted) == f"[user]{query}[end][assistant]{closed}"
        assert template.bound(adopted).template.thinking == "closed"
        assert template.bound(adopted).block is None
    bound = Template.parse("chat", thinking="open").bound(adopted)
    assert bound.render("hi") == TURN + opened
    assert bound.begins_in_block is begins
    assert bound.block == bound.known_block


def test_marks_in_the_history_of_answers_alone_close_nothing_and_a_block_that_comes_is_not_judged():
    for chat_template in (STRIPS_HISTORY, "{# </think> #}" + CHAT, CUTS_THOUGHTS):
        adopted = tokenizer(chat_template)
        bound = Template.parse("chat").bound(adopted)
        asked = [{"role": "user", "content": "hi"}]
        expected = adopted.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        assert (bound.render("hi"), bound.template.thinking) == (expected, None)
        assert bound.block.closer == "</think>"
        closed = Template.parse("chat", thinking="closed").bound(adopted)
        assert (closed.render("hi"), closed.block) == (expected + "<think>\n\n</think>\n\n", None)


def test_a_template_is_read_back_from_its_settings():
    for template in (
        Template.parse("urial", ""),
        Template.parse("chat", "be brief", folds_system=True, thinking="closed", prefill="Sure"),
        Template.parse("S: {system} Q: {query}", "be brief"),
    ):
        stored = json.loads(json.dumps(template.settings()))
        assert stored.pop("stops") == list(template.stops)
        text, system, folds = (stored.pop(name) for name in ("template", "system", "fold_system"))
        assert Template.parse(text, system, folds_system=folds, **stored) == template


TURNS_BEFORE = (("user", "Name a tree."), ("assistant", "Oak."))


def test_a_conversation_stands_before_its_last_turn_as_it_is():
    bound = Template.parse("chat", "be brief").bound(tokenizer(CHAT))
    whole = "[system]be brief[end][user]Name a tree.[end][assistant]Oak.[end][user]Another.[end][assistant]"
    assert bound.render("Another.", TURNS_BEFORE) == whole
    own_system = (("system", "be brief"), *TURNS_BEFORE)
    assert Template.parse("chat").bound(tokenizer(CHAT)).render("Another.", own_system) == whole
    assert Template.parse("chat").bound(tokenizer(CHAT)).render("Another.") == "[user]Another.[end][assistant]"
    with pytest.raises(InputError, match="their system prompt is the one"):
        bound.render("Another.", own_system)
    with pytest.raises(InputError, match="only the template chat"):
        Template.parse("direct").bound(tokenizer(CHAT)).render("Another.", TURNS_BEFORE)
    with pytest.raises(InputError, match="drops an earlier turn, or changes it"):
        Template.parse("chat").bound(tokenizer(DROPS_SYSTEM)).render("Another.", TURNS_BEFORE)
    # Each earlier turn stands in the last one's words.
    last_alone = "{% for m in messages[-1:] %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    with pytest.raises(InputError, match="drops an earlier turn, or changes it"):
        Template.parse("chat").bound(tokenizer(last_alone)).render("Name a tree. Not Oak.", TURNS_BEFORE)
