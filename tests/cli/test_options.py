"""Options come from the configs: each has its sentence, and means the same wherever it is taken."""

from dataclasses import fields
from typing import Annotated, Any

import pytest
from cyclopts import App

from safetyheads.cli.app import app
from safetyheads.cli.options import Given, OutputOptions, _sentences, options_from_dataclasses
from safetyheads.experiments.settings import ReproductionConfig
from safetyheads.runs import config
from safetyheads.runs.config import AnswerOptions

CONFIGS = [kind for kind in vars(config).values() if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__")]
COMMANDS = [name for name in app if not name.startswith("-")]
# The same idea on another scale: eval counts documents, and a scan's groups are compared only when they are asked for.
DIFFERING = {"--limit", "--n-random", "--prompts"}
# Defaults of their own: tasks are asked without a template, and a server's clients mostly want whole answers. A sweep
# takes several kinds of ablation.
OWN_DEFAULTS = {("eval", "--template"), ("serve", "--max-new-tokens"), ("sweep", "--ablation")}


def options(name):
    """Option -> its help, of a command."""
    found = {}
    for argument in app[name].assemble_argument_collection(parse_docstring=True):
        if argument.name.startswith("--"):
            found[argument.name] = argument.parameter.help
    return found


@pytest.mark.parametrize("kind", [*CONFIGS, ReproductionConfig], ids=lambda kind: kind.__name__)
def test_every_field_has_its_sentence(kind):
    for field in fields(kind):
        part = next(base for base in kind.__mro__ if field.name in vars(base).get("__annotations__", ()))
        sentence = _sentences(part.__module__)[part.__name__].get(field.name, "")
        assert sentence.endswith("."), field.name


def test_an_option_means_the_same_in_every_command():
    seen = {}
    for name in COMMANDS:
        if name == "reproduce":  # a lab of many experiments has settings of its own
            continue
        for option, help_text in options(name).items():
            if option not in DIFFERING and (name, option) not in OWN_DEFAULTS:
                assert seen.setdefault(option, help_text) == help_text, (name, option)
    assert {"--judge", "--heads", "--template", "--seed", "--out", "--ablation", "--size", "--screen"} <= set(seen)


def called(annotation, *arguments):
    """What a command of such a parameter is called with."""
    taken = []

    def command(part, output: OutputOptions) -> None:
        taken.append(part)

    command.__annotations__["part"] = annotation
    own = App(result_action="return_value")
    own.default(options_from_dataclasses(command))
    own(arguments, exit_on_error=False, print_error=False)()
    return taken[0]


def test_fields_are_taken_as_options_and_only_those_that_were_given_where_that_is_asked():
    options = ("--max-new-tokens", "5", "--judge", "a", "--judge", "b", "--no-completions")
    taken = {"max_new_tokens": 5, "judges": ("a", "b"), "store_completions": False}
    assert called(AnswerOptions) == AnswerOptions()
    assert called(AnswerOptions, *options) == AnswerOptions(**taken)
    given = Annotated[dict[str, Any], Given(AnswerOptions, ("seed",))]
    assert called(given, *options) == taken
    with pytest.raises(Exception, match="Unknown option"):
        called(given, "--seed", "5")
