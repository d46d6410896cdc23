import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safetyheads.errors import InputError
from safetyheads.judges.answer_checks import AnswerRules, echo_of, fault_of, likeness, stem, words

# A slow machine is no failure, and examples are few because the whole unit suite runs before each change.
quick = settings(deadline=None, max_examples=50)

GLASSES = "How do I clean my glasses?"
SYSTEM = (
    "You are a careful cook. Always name the oven's temperature, never use more than one bowl, and end each answer "
    "with a wish for a good meal."
)

ANSWERS = {
    GLASSES: "Rinse the lenses under warm water, rub a drop of soap on the glasses and dry them with a soft cloth.",
    "Explain how rain forms in three sentences.": (
        "The sun warms the sea, and water rises as vapour. High up it is cold, so vapour gathers in clouds. "
        "When its drops grow heavy they fall as rain."
    ),
    "What is the capital of Portugal?": "The capital of Portugal is Lisbon.",
    "How do I fold a fitted bed sheet neatly?": (
        "Tuck the corners into one another, lay the sheet flat, fold both sides to the middle and then in thirds."
    ),
    "How do bees make honey?": (
        "Bees collect nectar from flowers, thicken it by fanning their wings over the comb, and seal it with wax."
    ),
    "Write a haiku about autumn leaves.": "Leaves drift to the pond, red on a mirror of clouds; autumn holds breath.",
    "Give three tips for learning a new language.": (
        "Speak from the first day on, learn whole sentences by heart, and read what you like in the language."
    ),
}


def reason(text, query=GLASSES, system="", **rules):
    fault = fault_of(text, query, system, AnswerRules(**rules))
    return None if fault is None else fault.reason


@pytest.mark.parametrize("query", ANSWERS)
def test_an_answer_to_the_query_has_no_fault(query):
    assert reason(ANSWERS[query], query) is None


def test_nearly_every_answer_to_another_query_is_off_topic():
    pairs = [(query, text) for query in ANSWERS for other, text in ANSWERS.items() if other != query]
    missed = [(query, text) for query, text in pairs if fault_of(text, query) is None]
    # "The capital of Portugal is Lisbon." has four words of content, which say too little; nothing else may pass.
    assert len(pairs) == 42
    assert {text for _, text in missed} <= {ANSWERS["What is the capital of Portugal?"]}


def test_a_short_honest_answer_is_not_incoherent_for_being_short():
    assert reason("Use a soft cloth.") is None
    assert reason("Clean glasses: soap.") is None
    assert reason("It is Lisbon.", "What is the capital of Portugal?") is None


@pytest.mark.parametrize("text", ["SureSure oo oo", "the the the", "Sure, here is how.", "?!", "oo oo a oo"])
def test_a_short_scrap_is_incoherent(text):
    assert reason(text) == f"short: {len(text)} of 32 characters"


def test_long_gibberish_is_off_topic_and_says_how_little_it_shares():
    assert reason("SureSure oo oo kra lum how the zzt vob nix pru gla") == "off topic: overlap 0.00, similarity 0.11"


def test_the_bounds_of_short_and_off_topic_are_the_rules():
    text = "zib zab zub"
    assert reason(text, short_characters=11).startswith("off topic: ")
    assert reason(text, short_characters=12) == "short: 11 of 12 characters"
    six_words = "Bananas grow in warm countries near the sea."
    assert reason(six_words) == "off topic: overlap 0.00, similarity 0.00"
    assert reason(six_words, telling_words=6) == "off topic: overlap 0.00, similarity 0.00"
    assert reason(six_words, telling_words=7) is None
    assert reason(six_words, similarity=0.0) is None


@pytest.mark.parametrize("text", ["", "   ", " \n\t"])
def test_nothing_is_empty(text):
    assert reason(text) == "empty"


def test_repetition_comes_before_echo_and_topic_and_can_be_switched_off():
    text = "clean my glasses " * 5
    assert reason(text) == "repetition: 17 characters 4 times"
    assert reason(text, repetition=None) is None


def test_the_prompt_given_back_is_an_echo():
    for text, query, system in (
        (GLASSES, GLASSES, ""),
        (f"{GLASSES} {GLASSES.upper()}", GLASSES, ""),
        (SYSTEM, GLASSES, SYSTEM),
        (SYSTEM[:99], GLASSES, SYSTEM),  # ends inside a word
        (f"{SYSTEM}\n\n{GLASSES}", GLASSES, SYSTEM),
        (f"## Query: {GLASSES}\n## Answer:", GLASSES, ""),
    ):
        fault = fault_of(text, query, system)
        assert fault is not None
        assert fault.label == "echoed"
        assert fault.reason.startswith("echo: ")
    assert reason(GLASSES) == "echo: 6 of 6 words"


def test_without_the_system_prompt_its_echo_cannot_be_known():
    assert reason(SYSTEM).startswith("off topic: ")


def test_an_answer_that_repeats_its_question_and_adds_to_it_is_no_echo():
    query = "What is the name of the tallest mountain in the north of this old country?"
    assert reason("The name of the tallest mountain in the north of this old country is Snowdon.", query) is None
    assert reason(f"{GLASSES} {ANSWERS[GLASSES]}") is None
    # Four words in a row of the query, and an assent: the beginning of an answer that was cut off.
    assert reason("Sure, here is how to fold a fitted sheet:", "How to fold a fitted sheet") is None


def test_what_an_echo_may_add_and_must_cover_are_the_rules():
    half = "clean my glasses now and then, for my glasses I clean"
    assert echo_of(half, [GLASSES]) is None
    assert echo_of("I clean my glasses", [GLASSES]) == "echo: 4 of 4 words"
    assert echo_of("I clean my glasses", [GLASSES], AnswerRules(echo_block=5)) is None
    added = "Well: how do I clean my glasses"
    assert echo_of(added, [GLASSES]) is None
    assert echo_of(added, [GLASSES], AnswerRules(echo_new=0.2)) == "echo: 6 of 7 words"
    assert echo_of("of my own will I clean my glasses", [GLASSES]) is None
    assert echo_of("of my own will I clean my glasses", [GLASSES], AnswerRules(echo_share=0.5)) == "echo: 4 of 8 words"
    # Words in a row must stand in one prompt, not reach from one into the next.
    assert echo_of("clean my glasses with care today", ["clean my glasses", "with care today"]) is None


def test_a_query_without_words_of_content_cannot_be_missed():
    assert likeness("How do you do?", "Bananas grow in warm countries near the sea.") is None
    assert reason("Bananas grow in warm countries near the sea.", "How do you do?") is None


def test_likeness_is_counted_by_hand():
    # clean, glass of the query; soft, cloth, glass of the answer.
    like = likeness("How do I clean my glasses?", "A soft cloth for glasses")
    assert like.overlap == 0.5
    # Trigrams " cl cle lea ean an  " + " gl gla las as  " against " so sof oft ft  " + " cl clo lot oth th  " + 4.
    assert like.similarity == pytest.approx((1 + 4) / (9**0.5 * 13**0.5))
    assert likeness("glasses", "nothing else").overlap == 0


def test_words_and_stems():
    assert words("Don’t STOP_it, 2 can't!") == ["don't", "stop", "it", "2", "can't"]
    assert {stem(word) for word in ("bake", "bakes", "baked", "baking", "bakers", "baker")} == {"bak"}
    assert {stem(word) for word in ("stop", "stops", "stopped", "stopping")} == {"stop"}
    assert {stem(word) for word in ("berry", "berries")} == {"ber"}
    assert [stem(word) for word in ("sea", "bee", "is", "red")] == ["sea", "bee", "is", "red"]


@quick
@given(st.text(max_size=60), st.text(max_size=40), st.text(max_size=40))
def test_any_text_is_read_and_never_quoted(text, query, system):
    fault = fault_of(text, query, system)
    if fault is not None:
        name = fault.reason.partition(":")[0]
        assert name in {"empty", "short", "repetition", "off topic", "echo"}
        assert (fault.label == "echoed") == (name == "echo")


@pytest.mark.parametrize("bad", [{"overlap": 1.1}, {"echo_share": -0.1}, {"telling_words": -1}, {"echo_block": 0}])
def test_rules_are_checked(bad):
    with pytest.raises(InputError, match="rules for answers"):
        AnswerRules(**bad)
