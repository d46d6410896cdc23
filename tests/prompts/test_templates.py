"""Templates, on chat templates written for these tests: turns, BOS tokens, think blocks, prefills, URIAL."""

import json
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safetyheads.errors import InputError
from safetyheads.judges.base import Completion
from safetyheads.judges.keywords import KeywordJudge
from safetyheads.judges.phrases import PhraseJudge
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
SWITCHED = CHAT + (
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}"
)
BEGUN = TURNS + "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
STRIPS_HISTORY = CHAT + "{# answers of before are cut at </think> #}"
OTHER_SWITCH = TURNS + (
    "{% if add_generation_prompt %}[assistant]{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}"
)
# "thinking" stands here for something else.
CHANNELS = CHAT + "{% if messages[0].thinking %}<|channel|>analysis<|message|>{{ messages[0].thinking }}{% endif %}"
NO_MARKS = "{% if thinking %}Think first.{% endif %}" + CHAT


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


def rendered(chat_template, query="hi", system=None, **options):
    return Template.parse("chat", system, **options).render(query, tokenizer(chat_template))


def words(template, adopted):
    return adopted.convert_ids_to_tokens(template.bound(adopted).encode("hi"))


# Named texts


def test_the_named_templates_are_the_papers_to_the_letter():
    assert {
        name: Template.parse(name).render("Q?", None) for name in ("direct", "query_answer", "query_answer_space")
    } == {
        "direct": "Q?",
        "query_answer": "## Query:Q?\n## Answer:",
        "query_answer_space": "## Query: Q?\n## Answer:",
    }
    template = Template.parse("llama2")
    assert template.render("Q?", None) == "[INST] <<SYS>>\nYou are a helpful assistant.\n<</SYS>>\n\nQ? [/INST]"
    assert template.system == "You are a helpful assistant."
    brief = Template.parse("llama2", "Be brief.")
    assert brief.render("Q?", None) == "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nQ? [/INST]"
    assert Template.parse("llama2", "").render("Q?", None) == "[INST] Q? [/INST]"


def test_urial_shows_its_shots_and_leaves_the_answer_to_the_model():
    template = Template.parse("urial")
    text = template.render("How do I fold a sheet?", None)
    assert text.startswith(template.system + "\n\n# Query:\nWhich planets")
    assert text.endswith("# Query:\nHow do I fold a sheet?\n\n# Answer:\n")
    assert text.count("# Query:") == text.count("# Answer:") == 4
    assert template.stops == ("# Query:",)
    assert Template.parse("urial", "").render("a", None).startswith("# Query:\nWhich planets")
    assert Template.parse("urial", "Be brief.").render("a", None).startswith("Be brief.\n\n# Query:\nWhich")


def test_of_urials_shots_one_declines_and_judges_take_no_other_for_a_refusal():
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


@pytest.mark.parametrize("text", ["", "chatt", "{Query}", "{ query }", "## Query:"])
def test_a_template_without_query_is_refused(text):
    with pytest.raises(InputError, match=r"has no \{query\}.*query_answer"):
        Template.parse(text)


def test_a_text_may_have_a_place_for_a_system_prompt():
    assert Template.parse("{system}|{query}", "be brief").render("hi", None) == "be brief|hi"
    assert Template.parse("{system}|{query}", "").render("hi", None) == "|hi"
    assert Template.parse("{system}|{query}").render("hi", None) == "{system}|hi"
    for text in ("direct", "Q: {query}"):
        with pytest.raises(InputError, match=r"needs the template chat.*has no place for it"):
            Template.parse(text, "be brief")


# Special tokens


def test_the_bos_token_is_the_tokenizers_own_and_never_doubled():
    assert words(Template.parse("llama2", ""), tokenizer())[0] == "<s>"
    assert words(Template.parse("llama2", ""), tokenizer(adds="$A"))[0] != "<s>"
    # The user's text and the tokenizer both write one; so do a chat template and a text in it.
    assert words(Template.parse("<s> be {query}"), tokenizer()) == ["<s>", "be", "hi"]
    assert words(Template.parse("<s> be {query}"), tokenizer(adds="$A")) == ["<s>", "be", "hi"]
    twice = "{{ bos_token }} {{ bos_token }} [user] {{ messages[0].content }}"
    assert words(Template.parse("chat"), tokenizer(twice)) == ["<s>", "[user]", "hi"]
    assert words(Template.parse("chat"), tokenizer("[user] {{ messages[0].content }}")) == ["[user]", "hi"]


def test_an_end_token_that_the_tokenizer_adds_is_left_out_and_one_in_the_text_is_not():
    assert words(Template.parse("be {query}"), tokenizer(adds="<s> $A </s>")) == ["<s>", "be", "hi"]
    assert words(Template.parse("{query} </s>"), tokenizer(adds="<s> $A")) == ["<s>", "hi", "</s>"]
    assert words(Template.parse("direct"), tokenizer(adds="$A </s>")) == ["hi"]


def test_a_chat_prompt_has_the_tokens_of_the_tokenizers_own_call():
    for chat_template in ("{{ bos_token }} [user] {{ messages[0].content }} [assistant]", CHAT):
        adopted = tokenizer(chat_template)
        own = adopted.apply_chat_template(
            [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=True
        )
        assert Template.parse("chat").bound(adopted).encode("hi") == list(own["input_ids"])


def test_a_prompt_without_a_token_is_refused():
    with pytest.raises(InputError, match="no token"):
        Template.parse("direct").bound(lambda text, add_special_tokens: {"input_ids": []}).encode("a")


# Turns


def test_a_chat_template_gets_the_system_prompt_as_a_turn_or_in_the_users():
    assert rendered(CHAT) == "[user]hi[end][assistant]"
    assert rendered(CHAT, system="be brief") == "[system]be brief[end][user]hi[end][assistant]"
    assert rendered(CHAT, system="") == "[system][end][user]hi[end][assistant]"
    folded = "[user]be brief\n\nhi[end][assistant]"
    assert rendered(NO_SYSTEM, system="be brief", folds_system=True) == folded
    assert rendered(NO_SYSTEM) == "[user]hi[end][assistant]"


@pytest.mark.parametrize(
    ("chat_template", "why"), [(NO_SYSTEM, "rejects the system prompt: no system role here"), (DROPS_SYSTEM, "drops")]
)
def test_a_system_prompt_that_has_no_turn_is_refused_by_name_and_never_folded_by_itself(chat_template, why):
    with pytest.raises(InputError, match=why) as refused:
        rendered(chat_template, system="be brief")
    said = str(refused.value)
    assert said.startswith("the chat template of maker/model ")
    assert "--fold-system" in said
    assert "\n" not in said


def test_folding_needs_a_chat_template_and_something_to_fold():
    for text, system in (("llama2", "be brief"), ("chat", None), ("{system} {query}", "be brief")):
        with pytest.raises(InputError, match="--fold-system needs"):
            Template.parse(text, system, folds_system=True)


def test_of_several_chat_templates_the_default_counts_and_none_is_a_refusal():
    assert rendered({"default": CHAT, "tools": NO_SYSTEM}) == "[user]hi[end][assistant]"
    with pytest.raises(InputError, match="the chat template of maker/model rejects the prompt"):
        rendered({"rag": CHAT, "tools": CHAT})
    with pytest.raises(InputError, match="the tokenizer of maker/model has no chat template"):
        rendered(None)


LISTED = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endfor %}[assistant]"
)


def test_a_template_that_wants_content_in_parts_gets_the_query_so():
    assert rendered(LISTED) == "[user]hi[assistant]"
    assert rendered(LISTED, system="be brief") == "[system]be brief[user]hi[assistant]"
    assert rendered(LISTED + "{{ messages[0].content[0].text }}") == "[user]hi[assistant]hi"
    assert rendered(LISTED, prefill="Sure") == "[user]hi[assistant]Sure"


@pytest.mark.parametrize("chat_template", ["[user][assistant]", "{{ messages[0].content | upper }}"])
def test_a_query_that_is_dropped_or_changed_is_refused(chat_template):
    with pytest.raises(InputError) as refused:
        rendered(chat_template)
    assert str(refused.value) == (
        "the chat template of maker/model drops the query, or changes it; choose --template query_answer or direct"
    )


@pytest.mark.parametrize(
    ("chat_template", "why"),
    [
        ("{{ 'x' + 5 }}", 'can only concatenate str (not "int") to str'),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ [1][messages] }}{{ messages | sum }}", "unsupported operand"),
    ],
)
def test_what_a_templates_code_trips_over_is_one_line(chat_template, why):
    with pytest.raises(InputError) as refused:
        rendered(chat_template)
    said = str(refused.value)
    assert said.startswith(f"the chat template of maker/model rejects the prompt: {why}")
    assert "\n" not in said


DATED = "{{ strftime_now('%d %b %Y') }}" + CHAT


def test_a_template_that_writes_the_date_says_so():
    note = "the chat template writes today's date into the prompts; the same command on another day is another run"
    assert Template.parse("chat").bound(tokenizer(DATED)).note == note
    unasked = (CHAT, "{% if strftime_now is defined %}{% set date = 'today' %}{% endif %}" + CHAT, NO_SYSTEM)
    for chat_template in unasked:
        assert Template.parse("chat").bound(tokenizer(chat_template)).note is None
    assert Template.parse("direct").bound(tokenizer(DATED)).note is None


# Think blocks


@pytest.mark.parametrize(
    ("chat_template", "closed", "opened", "begins"),
    [
        (SWITCHED, "<think>\n\n</think>\n\n", "", False),
        (BEGUN, "<think>\n\n</think>\n\n", "<think>\n", True),
        (STRIPS_HISTORY, "<think>\n\n</think>\n\n", "", False),
        (OTHER_SWITCH, "</think>", "<think>", True),
        (CHANNELS, "<|channel|>final<|message|>", "", False),
    ],
)
def test_a_think_block_is_closed_unless_it_is_to_be_open(chat_template, closed, opened, begins):
    prompt = "[user]hi[end][assistant]"
    adopted = tokenizer(chat_template)
    for template in (Template.parse("chat"), Template.parse("chat", thinking="closed")):
        assert template.render("hi", adopted) == prompt + closed
        assert template.bound(adopted).template.thinking == "closed"
        assert template.bound(adopted).block is None
    bound = Template.parse("chat", thinking="open").bound(adopted)
    assert bound.render("hi") == prompt + opened
    assert bound.begins_in_block is begins
    assert bound.block == bound.chat.block


def test_a_query_that_holds_a_mark_changes_nothing():
    for chat_template in (SWITCHED, BEGUN, STRIPS_HISTORY):
        plain = rendered(chat_template).replace("hi[end]", "why </think> or <think>[end]")
        assert rendered(chat_template, "why </think> or <think>") == plain


def test_a_switch_without_marks_is_turned_off_and_nothing_is_written():
    assert rendered(NO_MARKS) == "[user]hi[end][assistant]"
    assert rendered(NO_MARKS, thinking="open") == "Think first.[user]hi[end][assistant]"
    assert Template.parse("chat").bound(tokenizer(NO_MARKS)).template.thinking == "closed"


def test_where_there_is_no_think_block_none_can_be_closed_but_one_may_be_left_open():
    assert Template.parse("chat").bound(tokenizer(CHAT)).template.thinking is None
    with pytest.raises(InputError, match=r"the chat template of maker/model has no think block to close"):
        rendered(CHAT, thinking="closed")
    assert rendered(CHAT, thinking="open") == rendered(CHAT)
    for text in ("chat", "query_answer"):
        bound = Template.parse(text, thinking="open").bound(tokenizer(CHAT))
        assert (bound.block.opener, bound.block.closer) == ("<think>", "</think>")
    with pytest.raises(InputError, match="closed by the template chat alone"):
        Template.parse("query_answer", thinking="closed")
    with pytest.raises(InputError, match="closed or open; got 'maybe'"):
        Template.parse("chat", thinking="maybe")


# Answers that are begun


@pytest.mark.parametrize(
    ("text", "chat_template", "joint"),
    [
        ("chat", CHAT, ""),
        ("chat", BLANK_BEFORE_ANSWERS, " "),
        ("chat", SWITCHED, ""),
        ("chat", BEGUN, ""),
        ("query_answer", None, " "),
        ("llama2", None, " "),
        ("urial", None, ""),
        ("Q: {query} A:", None, ""),
    ],
)
def test_a_prefill_stands_where_the_template_puts_answers(text, chat_template, joint):
    adopted = tokenizer(chat_template)
    prompt = Template.parse(text).render("hi", adopted)
    assert Template.parse(text, prefill="Sure, here is").render("hi", adopted) == f"{prompt}{joint}Sure, here is"
    # A blank of the user's own is the only one.
    assert Template.parse(text, prefill="\nSure").render("hi", adopted) == f"{prompt}\nSure"


def test_a_prefill_comes_after_the_think_block():
    closed = Template.parse("chat", prefill="Sure").render("hi", tokenizer(BEGUN))
    assert closed == "[user]hi[end][assistant]<think>\n\n</think>\n\nSure"
    with pytest.raises(InputError, match="thinking must be closed"):
        Template.parse("chat", thinking="open", prefill="Sure")


# Manifests


def test_a_template_is_read_back_from_its_settings():
    templates = [
        *(Template.parse(name) for name in FORMS),
        Template.parse("chat", "be brief", folds_system=True, thinking="closed", prefill="Sure"),
        Template.parse("chat", thinking="open"),
        Template.parse("llama2", "", prefill="Sure, here is"),
        Template.parse("S: {system} Q: {query}", "be brief"),
    ]
    for template in templates:
        stored = json.loads(json.dumps(template.settings()))
        again = Template.parse(
            stored["template"],
            stored["system"],
            folds_system=stored["fold_system"],
            thinking=stored["thinking"],
            prefill=stored["prefill"],
        )
        assert again == template
        assert stored["stops"] == list(template.stops)
