import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safetyheads.errors import InputError
from safetyheads.judges.keywords import PAPER_KEYWORDS
from safetyheads.prompts.sets import TEMPLATE_FORMATS, Prompt, PromptSet, Template

# A slow machine is no failure, and examples are few because the whole unit suite runs before each change.
quick = settings(deadline=None, max_examples=50)

queries = st.text(min_size=1, max_size=40).filter(str.strip)


class LetterTokenizer:
    """One token a character; BOS (1) in front where special tokens are asked for."""

    chat_template = None
    name_or_path = "letters"

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [1] * add_special_tokens + [ord(character) for character in text]}


@pytest.fixture(scope="module")
def chat_tokenizer():
    """A real tokenizer of whole words that adds <s> by itself, so that a chat template could double it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "<unk>", "user", "system", "assistant", "be", "brief", "hi"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return lambda chat_template: PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", chat_template=chat_template
    )


PLAIN_CHAT = (
    "{{ bos_token }}{% for m in messages %} {{ m.role }} {{ m.content | trim }}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)
USER_ONLY = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}hi"


# Templates


def test_the_named_templates_are_the_papers_to_the_letter():
    bare = [name for name, text in TEMPLATE_FORMATS.items() if text and "{system}" not in text]
    assert {name: Template.parse(name).render("Q?", None) for name in bare} == {
        "direct": "Q?",
        "query_answer": "## Query:Q?\n## Answer:",
        "query_answer_space": "## Query: Q?\n## Answer:",
    }


@quick
@given(st.text("{}ab!:0", max_size=12), st.text("{}ab!:0", max_size=12), queries)
def test_braces_are_plain_text_in_template_and_query(before, after, query):
    template = Template.parse(f"{before}{{query}}{after}")
    if "{query}" not in before + after:
        assert template.render(query, None) == f"{before}{query}{after}"


def test_a_query_that_holds_the_placeholder_is_not_filled_in_again():
    assert Template.parse("<{query}|{query}>").render("{query}{0}{", None) == "<{query}{0}{|{query}{0}{>"


@quick
@given(st.one_of(st.sampled_from(sorted(TEMPLATE_FORMATS)), st.text(max_size=20).map(lambda t: t + "{query}")))
def test_what_a_template_prints_parses_back(text):
    template = Template.parse(text)
    assert str(template) == text or template.format == TEMPLATE_FORMATS.get(str(template))
    assert Template.parse(str(template)).format == template.format


@pytest.mark.parametrize("text", ["", "chatt", "{Query}", "{ query }", "## Query:"])
def test_a_template_without_query_is_refused(text):
    with pytest.raises(InputError, match=r"has no \{query\}.*query_answer"):
        Template.parse(text)


def test_a_system_prompt_needs_the_chat_template():
    assert Template.parse("chat", "be brief").system == "be brief"
    for text in ("direct", "Q: {query}"):
        with pytest.raises(InputError, match="needs the template chat"):
            Template.parse(text, "be brief")


def test_a_format_string_gets_the_special_tokens_the_tokenizer_adds_itself():
    assert Template.parse("<{query}>").encode("a", LetterTokenizer()) == [1, ord("<"), ord("a"), ord(">")]


def test_a_chat_prompt_has_its_bos_token_once(chat_tokenizer):
    tokenizer = chat_tokenizer(PLAIN_CHAT)
    words = tokenizer.convert_ids_to_tokens(Template.parse("chat").encode("hi", tokenizer))
    assert words == ["<s>", "user", "hi", "assistant"]
    words = tokenizer.convert_ids_to_tokens(Template.parse("chat", " be brief ").encode("hi", tokenizer))
    assert words == ["<s>", "system", "be", "brief", "user", "hi", "assistant"]
    assert tokenizer.convert_ids_to_tokens(Template.parse("direct").encode("hi", tokenizer)) == ["<s>", "hi"]


def test_chat_without_chat_template_says_what_to_choose(chat_tokenizer):
    with pytest.raises(InputError, match="letters has no chat template; choose --template query_answer or direct"):
        Template.parse("chat").encode("hi", LetterTokenizer())
    with pytest.raises(InputError, match="has no chat template"):
        Template.parse("chat").encode("hi", chat_tokenizer(None))


def test_a_chat_template_that_refuses_or_drops_the_system_prompt_is_named(chat_tokenizer):
    with pytest.raises(InputError, match="rejects the system prompt: no system role here"):
        Template.parse("chat", "be brief").encode("hi", chat_tokenizer(NO_SYSTEM))
    with pytest.raises(InputError, match="drops the system prompt"):
        Template.parse("chat", "be brief").encode("hi", chat_tokenizer(USER_ONLY))
    assert Template.parse("chat").render("hi", chat_tokenizer(USER_ONLY)) == "hi"


def test_a_prompt_without_a_token_is_refused():
    class NoTokens(LetterTokenizer):
        def __call__(self, text, add_special_tokens):
            return {"input_ids": []}

    with pytest.raises(InputError, match="no token"):
        Template.parse("direct").encode("a", NoTokens())


# Sets


def test_the_built_in_benign_prompts_hold_no_word_that_a_refusal_holds():
    prompts = PromptSet.read("benign", "direct")
    assert (len(prompts), len(set(prompts.queries)), prompts.dropped) == (100, 100, 0)
    assert [query for query in prompts.queries if any(keyword in query for keyword in PAPER_KEYWORDS)] == []
    assert all(query == query.strip() and query[-1] in ".?" for query in prompts.queries)
    assert str(prompts.template) == "direct"


def test_the_fingerprint_tells_text_and_order_and_not_the_template():
    one = PromptSet.from_queries(["a", "b"]).sha256
    assert one == PromptSet.from_queries([Prompt("a", "kind"), "b"], "chat", name="other").sha256
    others = (["b", "a"], ["a"], ["a", "b", "b"], ["ab"], ['a", "b'])
    assert one not in {PromptSet.from_queries(queries).sha256 for queries in others}


def test_a_set_indexes_slices_selects_and_limits(tmp_path):
    prompts = PromptSet.from_queries("abcde", "direct")
    assert prompts[1] == Prompt("b")
    assert prompts[1:3].queries == ("b", "c")
    assert prompts.select([4, 0, 4]).queries == ("e", "a", "e")
    assert [prompt.query for prompt in prompts] == list("abcde")
    path = tmp_path / "a.txt"
    path.write_text("a\nb\nc", encoding="utf-8")
    assert PromptSet.read(path, limit=2).queries == ("a", "b")
    assert len(PromptSet.read(path, limit=9)) == 3
    with pytest.raises(InputError, match="limit"):
        PromptSet.read(path, limit=0)
    with pytest.raises(InputError, match="prompt 5 is out of range"):
        prompts.select([0, 5])
    with pytest.raises(InputError, match="-1 is out of range"):
        prompts.select([-1])
    for empty in (lambda: prompts.select([]), lambda: prompts[5:], lambda: PromptSet.from_queries([])):
        with pytest.raises(InputError, match="holds no prompts"):
            empty()
    with pytest.raises(InputError, match="blank"):
        PromptSet.from_queries(["a", " "])


def test_a_template_left_open_is_resolved_and_a_chosen_one_kept():
    undecided = PromptSet.from_queries(["a"])
    assert undecided.template is None
    assert str(undecided.resolved("query_answer").template) == "query_answer"
    assert undecided.with_template("direct").resolved("query_answer").template == Template.parse("direct")
    assert PromptSet.from_queries(["a"], system="be brief").template == Template.parse("chat", "be brief")
    assert undecided.with_template(Template.parse("chat"), "be brief").template.system == "be brief"


def test_the_manifest_entry_is_json_without_the_queries():
    prompts = PromptSet.from_queries(["secret"], "Q: {query}")
    written = json.dumps(prompts.describe())
    assert "secret" not in written
    assert json.loads(written)["template"] == "Q: {query}"
    assert json.loads(written)["sha256"] == prompts.sha256


@quick
@given(st.lists(queries, min_size=2, max_size=30), st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_a_split_divides_all_prompts_in_order_and_shares_no_query(texts, fraction, seed):
    prompts = PromptSet.from_queries(texts)
    if len(set(texts)) < 2:
        with pytest.raises(InputError, match="fewer than two distinct"):
            prompts.split(fraction, seed)
        return
    search, test = prompts.split(fraction, seed)
    assert sorted(search.queries + test.queries) == sorted(texts)
    assert not set(search.queries) & set(test.queries)
    for part in (search, test):
        remaining = iter(texts)
        assert all(query in remaining for query in part.queries)
    assert (search, test) == prompts.split(fraction, seed)
    wanted = min(max(int(len(set(texts)) * fraction + 0.5), 1), len(set(texts)) - 1)
    assert len(set(search.queries)) == wanted


def test_a_split_is_the_same_on_every_machine_and_another_for_another_seed():
    prompts = PromptSet.from_queries("jihgfedcba")
    search, test = prompts.split()
    # numpy's default_rng(0).permutation(10) is 4 6 2 7 3 5 9 0 8 1; its first five, in the order of the file.
    assert "".join(search.queries) == "hgfdc"
    assert (search.name, test.name) == ("prompts/search", "prompts/test")
    assert {prompts.split(seed=seed)[0].queries for seed in range(5)} != {search.queries}
    for fraction in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(InputError, match="above 0 and below 1"):
            prompts.split(fraction)
