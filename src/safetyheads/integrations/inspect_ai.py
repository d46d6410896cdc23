"""For inspect_ai: a provider of models with heads ablated, a scorer of each of our judges, and the task ``asr``.

inspect_ai, the extra ``inspect``, imports this module by its entry point. Nothing else here may.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio.to_thread
from inspect_ai import Task, task
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import TaskState, generate

from safetyheads.errors import InputError, refuse_unknown
from safetyheads.heads import format_heads
from safetyheads.judges.base import Completion, verdicts_of
from safetyheads.judges.named import judges_named, writes
from safetyheads.runs.config import AnswerOptions, JudgeOptions, Progress, PromptOptions, ServeConfig

_NUMBERS = ("epsilon", "memory")
_TOKENS = 128
_NOT_FOLLOWED = ("top_p", "frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "response_schema")


@contextmanager
def _in_one_line() -> Iterator[None]:
    """An InputError as inspect's own kind, which it shows without a traceback."""
    try:
        yield
    except InputError as error:
        raise PrerequisiteError(str(error)) from error


def model_config(model: str, arguments: dict[str, Any]) -> ServeConfig:
    """The settings that ``-M`` gives: ``heads``, and the options of ``safetyheads serve`` with underscores.

    inspect splits values at commas and leaves numbers such as 1e-5 as texts; both are undone.
    """
    settings: dict[str, Any] = {
        name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in arguments.items()
    }
    heads = settings.pop("heads", None)
    known = [name for name in ServeConfig.__dataclass_fields__ if name not in ("groups", "port", "model")]
    refuse_unknown(settings, ["heads", *known], "safetyheads takes no -M")
    try:
        settings |= {name: float(settings[name]) for name in _NUMBERS if isinstance(settings.get(name), str)}
    except ValueError as error:
        raise InputError(f"-M epsilon and memory are numbers: {error}") from error
    return ServeConfig(model, groups=() if heads is None else (heads,), **settings)


class AblatedModel(ModelAPI):  # type: ignore[misc]
    """A model with one group of heads ablated; conversations that wait are answered in one batch."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 - as in its base class
        **arguments: Any,
    ) -> None:
        """Load the model and prove it."""
        from safetyheads.integrations.chat_server import AblatedChats
        from safetyheads.runs.run import refuse_groups
        from safetyheads.runs.start import load_engine

        super().__init__(model_name, base_url, api_key, [], config)
        with _in_one_line():
            self.settings = model_config(model_name, arguments)
            engine = load_engine(self.settings, Progress())
            refuse_groups(engine, self.settings)
        self.group = next(iter(self.settings.parsed_groups), ())
        self.chats = AblatedChats(engine, self.settings.parsed_ablation, self.settings.parsed_template)

    async def generate(
        self, input: list[ChatMessage], tools: list[Any], tool_choice: Any, config: GenerateConfig
    ) -> ModelOutput:
        """Answer a conversation, ``num_choices`` times."""
        if unmet := [name for name in _NOT_FOLLOWED if getattr(config, name, None) not in (None, False)]:
            raise InputError(f"{unmet[0]} is not followed by safetyheads")
        if tools or any(getattr(message, "tool_calls", None) for message in input):
            raise InputError("models of safetyheads use no tools")
        if any(part.type != "text" for message in input for part in message.content if not isinstance(part, str)):
            raise InputError("models of safetyheads read text alone")
        answered = await self.chats.answers(
            [{"role": message.role, "content": message.text} for message in input],
            self.group,
            config.num_choices or 1,
            config.seed,
            max_new_tokens=config.max_tokens or self.max_tokens(),
            temperature=config.temperature,
            top_k=config.top_k,
            stops=config.stop_seqs or (),
        )
        choices = [
            ChatCompletionChoice(
                message=ChatMessageAssistant(content=chat.text, model=self.model_name, source="generate"),
                stop_reason="stop" if chat.finished else "max_tokens",
            )
            for chat in answered
        ]
        read, written = len(answered[0].request.token_ids), sum(chat.n_tokens for chat in answered)
        return ModelOutput(
            model=self.model_name,
            choices=choices,
            usage=ModelUsage(input_tokens=read, output_tokens=written, total_tokens=read + written),
            metadata={
                "heads": format_heads(self.group),
                "ablation": self.settings.ablation,
                "epsilon": self.settings.epsilon,
                "unclosed": answered[0].read is not None and answered[0].read.unclosed,
            },
        )

    def max_tokens(self) -> int:
        """Longest answer where nobody asks for another."""
        return self.settings.max_new_tokens

    def max_connections(self) -> int:
        """Conversations that may wait for one batch; batches that do not fit the memory are divided."""
        return 64


@modelapi(name="safetyheads")  # type: ignore[untyped-decorator]
def safetyheads() -> type[ModelAPI]:
    """The provider: ``--model safetyheads/PATH -M heads=2-26 -M ablation=ua``."""
    return AblatedModel


@scorer(metrics=[mean(), stderr()])  # type: ignore[untyped-decorator]
def judge(name: str = "phrases", device: str = "cpu", tokens: int | None = None) -> Scorer:
    """1 where the answer complies by a judge of ours, else 0; no score where the judge fails. The mean is the ASR."""
    with _in_one_line():
        options = JudgeOptions(judges=(name,), judge_device=device, judge_tokens=tokens)
        (own,) = judges_named(options.judges, device, tokens)

    async def score(state: TaskState, target: Target) -> Score:
        output, metadata = state.output, state.output.metadata or {}
        length = state.metadata.get("max_new_tokens", _TOKENS)
        unclosed = bool(metadata.get("unclosed"))
        completion = Completion(
            state.input_text, output.completion, (), output.stop_reason == "stop", length, unclosed=unclosed
        )
        (verdict,) = await anyio.to_thread.run_sync(verdicts_of, own, [completion])
        more = {"label": verdict.label, "judge": own.name, "score": verdict.score}
        if not verdict.scored:
            return Score.unscored(explanation=verdict.reason, metadata=more)
        return Score(value=float(verdict.complied), explanation=verdict.reason, metadata=more)

    return score


@task  # type: ignore[untyped-decorator]
def asr(
    prompts: str = "advbench",
    column: str | None = None,
    judges: str | list[str] = "phrases",
    judge_device: str = "cpu",
    judge_tokens: int | None = None,
    max_new_tokens: int = _TOKENS,
) -> Task:
    """Attack success rate (Eq 10), greedily, as ``safetyheads asr`` measures it; ``-T prompts=FILE``."""
    from safetyheads.runs.run import read_set

    with _in_one_line():
        names = (judges,) if isinstance(judges, str) else judges
        given: dict[str, Any] = {"judges": names, "judge_device": judge_device, "judge_tokens": judge_tokens}
        options = AnswerOptions(max_new_tokens=max_new_tokens, **given)
        read = read_set("harmful", prompts, PromptOptions(prompts, column=column))
        pairs = zip(options.judges, judges_named(options.judges, judge_device, judge_tokens), strict=True)
        scorers = [
            judge(name, judge_device if hasattr(named, "look") else "cpu", judge_tokens if writes(named) else None)
            for name, named in pairs
        ]
    samples = [
        Sample(
            input=[
                *({"role": role, "content": text} for role, text in prompt.earlier),
                {"role": "user", "content": prompt.query},
            ],
            id=number,
            metadata={"category": prompt.category, "max_new_tokens": max_new_tokens},
        )
        for number, prompt in enumerate(read, start=1)
    ]
    return Task(
        dataset=MemoryDataset(samples, name=read.name),
        solver=[generate()],
        scorer=scorers,
        config=GenerateConfig(max_tokens=max_new_tokens, temperature=0),
    )
