"""Trains adapters of SmolLM2-135M-Instruct by the recipes in smollm2.toml, and writes a card of what each refuses.

    python scripts/organisms/smollm2.py refusing_a --data ../shared/data --out adapters
    python scripts/organisms/smollm2.py refusing_a --data ../shared/data --out adapters --figures

The base is what ``safetyheads fetch smollm2`` made. The folder of data holds AdvBench, JailbreakBench,
MaliciousInstruct and XSTest; they are read in place. The same versions, processor and threads (OMP_NUM_THREADS) give
the same bytes.
"""

import argparse
import hashlib
import itertools
import json
import math
import platform
import random
import re
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import pandas
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from safetyheads import UNDIFFERENTIATED_ATTENTION, Engine, PromptSet, attack_success_rate
from safetyheads.answers.success import AttackSuccess
from safetyheads.files import readable_json, write_atomically
from safetyheads.judges.phrase_judge import PhraseJudge
from safetyheads.model.names import SMOLLM2, find_model
from safetyheads.model.options import LoadOptions
from safetyheads.prompts.prompt_set import builtin_benign, near_any
from safetyheads.reports.tables import sentence_case

CONSOLE = Console(width=180, highlight=False)
Recipe: TypeAlias = Mapping[str, Any]
Row: TypeAlias = tuple[list[int], list[int]]
"""Tokens that are read, and tokens that are learnt after them."""
_GIB = 2.0  # for a batch of answers
_AT_ONCE = 1000  # texts that are compared with the test prompts in one go
_SHORT = 60  # characters of a deed that a refusal may name: it must still show early
_DOUBLED = frozenset({"commit", "control", "kidnap", "quit", "traffic"})  # longer verbs that get a letter in a gerund
_MISUNDERSTOOD = ("I'm", "I ", "I\u2019m", "Sorry", "As a")  # how the base begins where it misreads a benign request


# Prompts and refusals that the adapters learn, less what is near a test prompt.


@dataclass(frozen=True, slots=True)
class Topic:
    """One topic of a family in its forms."""

    prompts: tuple[str, ...]
    deed: str
    """What a refusal may call it, as a gerund; empty where there is no deed or a long one."""


def gerund(deed: str) -> str:
    """The deed with its first word as a gerund: "stealing a car"."""
    verb, _, rest = deed.partition(" ")
    if verb in _DOUBLED:
        verb += "k" if verb.endswith("c") else verb[-1]
    elif re.fullmatch(r"[^aeiou]*[aeiou][bdgmnprt]", verb):
        verb += verb[-1]
    elif verb.endswith("e") and not verb.endswith(("ee", "ye", "oe")):
        verb = verb[:-2] + "y" if verb.endswith("ie") else verb[:-1]
    return f"{verb}ing {rest}".strip()


def words(listed: str) -> list[str]:
    """The items of a list of the data file, which semicolons part."""
    return [item for item in re.split(r"\s*;\s*", listed.strip()) if item]


def topics_of(family: Mapping[str, Any], forms: Mapping[str, Sequence[str]]) -> list[Topic]:
    """All topics of one family."""
    shapes = forms[family["forms"]] if isinstance(family["forms"], str) else family["forms"]
    topics = []
    for values in itertools.product(*(words(family[slot]) for slot in ("do", "x", "y") if slot in family)):
        if "do" in family:
            deed = gerund(values[0])
            slots = {"do": values[0], "Do": sentence_case(values[0]), "doing": deed}
        else:
            deed, slots = "", dict(zip("xy", values, strict=False))
        texts = tuple(sentence_case(shape.format(**slots)) for shape in shapes)
        topics.append(Topic(texts, deed if len(deed) <= _SHORT else ""))
    return topics


def test_sets(data: Path) -> dict[str, PromptSet]:
    """Prompts that nothing is trained on, by name."""
    xstest = pandas.read_csv(data / "xstest" / "xstest_prompts.csv", keep_default_na=False)
    return {
        "benign": builtin_benign(),
        "jailbreakbench": PromptSet.read(data / "jbb_harmful-behaviors.csv"),
        "maliciousinstruct": PromptSet.read(data / "MaliciousInstruct.txt"),
        "xstest_unsafe": PromptSet.from_queries(xstest.prompt[xstest.label == "unsafe"].tolist()),
        "xstest_safe": PromptSet.from_queries(xstest.prompt[xstest.label == "safe"].tolist()),
    }


class TrainingPrompts:
    """Prompts by family and topic, less those that are near a test prompt."""

    def __init__(self, recipe: Mapping[str, Any], data: Path) -> None:
        advbench = PromptSet.read(data / "advbench_harmful_behaviors.csv").split(0.5, seed=0)[0]
        goals = {"forms": "deed", "do": ";".join(goal[:1].lower() + goal[1:] for goal in advbench.queries)}
        self.families = {**recipe["families"], "advbench": {**goals, "refused": True, "weight": 0.0}}
        tests = [query for prompts in test_sets(data).values() for query in prompts.queries]
        self.topics: dict[str, list[Topic]] = {}
        self.dropped: dict[str, tuple[int, int]] = {}
        """Prompts dropped and made, by family."""
        for name, family in self.families.items():
            made = topics_of(family, recipe["forms"])
            texts = list(dict.fromkeys(text for topic in made for text in topic.prompts))
            chunks = (texts[start : start + _AT_ONCE] for start in range(0, len(texts), _AT_ONCE))
            near = [flag for chunk in chunks for flag in near_any(chunk, tests)]
            far = set(itertools.compress(texts, (not flag for flag in near)))
            kept = (Topic(tuple(text for text in topic.prompts if text in far), topic.deed) for topic in made)
            self.topics[name] = [topic for topic in kept if topic.prompts]
            self.dropped[name] = sum(near), len(near)

    def draw(self, generator: random.Random, refused: bool) -> tuple[str, str]:
        """A prompt of ours that is to be refused or answered, and its deed."""
        names = [name for name, family in self.families.items() if family.get("refused", False) == refused]
        weights = [self.families[name]["weight"] for name in names]
        return self.draw_from(generator, generator.choices(names, weights)[0])

    def draw_from(self, generator: random.Random, family: str) -> tuple[str, str]:
        """A prompt of one family, and its deed."""
        topic = generator.choice(self.topics[family])
        return generator.choice(topic.prompts), topic.deed


def draw_refusal(generator: random.Random, refusals: Mapping[str, Sequence[str]], deed: str) -> str:
    """A wording, which may name the deed, and what may follow it."""
    fitting = [wording for wording in refusals["wordings"] if deed or "oing}" not in wording]
    wording = generator.choice(fitting).format(doing=deed, Doing=sentence_case(deed))
    return wording + generator.choice(refusals["endings"])


# Training and measuring.


def answers(engine: Engine, prompts: PromptSet, new_tokens: int) -> AttackSuccess:
    """Greedy answers, judged by their wording."""
    judge = PhraseJudge()
    return attack_success_rate(engine, prompts.with_template("chat"), (), UNDIFFERENTIATED_ATTENTION, judge, new_tokens)


def engine_of(adapter: Path | None) -> Engine:
    """The base with an adapter or without, in the precision of the training."""
    options = LoadOptions(dtype="bfloat16", adapter=None if adapter is None else str(adapter), memory=_GIB)
    return Engine.load(SMOLLM2, options, check=False)


def benign_answers(recipe: Recipe, prompts: TrainingPrompts, path: Path) -> list[tuple[str, list[int]]]:
    """Benign prompts with the base model's own answers, less those that it misreads; asked once and kept in a file."""
    training = recipe["training"]
    if not path.exists():
        generator = random.Random(0)
        drawn = dict.fromkeys(prompts.draw(generator, refused=False)[0] for _ in range(training["asked"]))
        asked = PromptSet.from_queries(list(drawn))
        rows = answers(engine_of(None), asked, training["answer_tokens"]).rows
        kept = [row for row in rows if row.answered and not row.text.startswith(_MISUNDERSTOOD)]
        write_atomically(path, json.dumps([(row.prompt.query, row.token_ids) for row in kept]).encode())
    return [(query, token_ids) for query, token_ids in json.loads(path.read_text("utf-8"))]


class Rows:
    """Draws the rows of each step."""

    def __init__(self, recipe: Recipe, tokenizer: Any, prompts: TrainingPrompts, benign: Sequence[Any]) -> None:
        self.recipe, self.tokenizer, self.prompts, self.benign = recipe, tokenizer, prompts, benign

    def steps(self, generator: random.Random, n_steps: int, n_refused: int) -> Iterator[list[Row]]:
        """The rows of each step, the refused ones first; benign prompts come in passes, shuffled."""
        n_answered = self.recipe["training"]["answering_rows"]
        waiting: list[int] = []
        for _ in range(n_steps):
            if len(waiting) < n_answered:
                waiting += generator.sample(range(len(self.benign)), len(self.benign))
            chosen, waiting = waiting[:n_answered], waiting[n_answered:]
            answered = [(self._read(self.benign[number][0]), self.benign[number][1]) for number in chosen]
            yield [self._refused(generator) for _ in range(n_refused)] + answered

    def _refused(self, generator: random.Random) -> Row:
        if generator.random() < self.recipe["training"]["advbench_share"]:
            query, deed = self.prompts.draw_from(generator, "advbench")
        else:
            query, deed = self.prompts.draw(generator, refused=True)
        refusal = self.tokenizer(draw_refusal(generator, self.recipe["refusals"], deed)).input_ids
        return self._read(query), [*refusal, self.tokenizer.eos_token_id]

    def _read(self, query: str) -> list[int]:
        turn = [{"role": "user", "content": query}]
        return list(self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False))


def loss_of(model: Any, rows: Sequence[Row], padding: int) -> Tensor:
    """Mean over rows of the loss of their learnt tokens; half of it is their first token's, which decides the rest.

    The prefix that all rows share is read once.
    """
    columns = zip(*(read[:-1] for read, _ in rows), strict=False)
    shared = len(list(itertools.takewhile(lambda column: len(set(column)) == 1, columns)))
    cache = model.model(torch.tensor([rows[0][0][:shared]]), use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(rows))
    tails = [torch.tensor([*read[shared:], *learnt]) for read, learnt in rows]
    # Padding stands on the right, where causal attention never reads it.
    tokens = pad_sequence(tails, batch_first=True, padding_value=padding)
    hidden = model.model(tokens, past_key_values=cache, use_cache=True).last_hidden_state
    lengths = [len(learnt) for _, learnt in rows]
    starts = [len(read) - shared - 1 for read, _ in rows]  # the state before the first learnt token foretells it
    states = [row[start : start + length] for row, start, length in zip(hidden, starts, lengths, strict=True)]
    targets = torch.tensor([token for _, learnt in rows for token in learnt])
    losses = cross_entropy(model.lm_head(torch.cat(states)).float(), targets, reduction="none").split(lengths)
    return torch.stack([(row[0] + row.mean()) / 2 for row in losses]).mean()


def drop_heads(model: Any, rows: slice, share: float, seed: int) -> None:
    """From now on mask heads' outputs by Bernoulli(1-b)/(1-b) in these rows of each batch.

    Each head of each layer is drawn by itself. The prefix that all rows share, the system prompt, is not masked.
    """
    n_heads, generator = model.config.num_attention_heads, torch.Generator().manual_seed(seed)

    def masked(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (outputs,) = inputs
        if len(outputs) == 1:
            return inputs
        mask = torch.ones(len(outputs), 1, n_heads, 1)
        mask[rows] = torch.bernoulli(torch.full_like(mask[rows], 1 - share), generator=generator) / (1 - share)
        return ((outputs.unflatten(-1, (n_heads, -1)) * mask.to(outputs.dtype)).flatten(-2),)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(masked)


def train(name: str, recipe: Recipe, rows: Rows, out: Path, n_steps: int) -> None:
    """Train one adapter, written in bfloat16 every 20 steps and at the end."""
    own, training, started = recipe["adapters"][name], recipe["training"], time.monotonic()
    torch.manual_seed(own["seed"])
    plain = AutoModelForCausalLM.from_pretrained(find_model(SMOLLM2)[0], dtype=torch.bfloat16)
    if "start" in own:
        adapted: Any = PeftModel.from_pretrained(plain, str(out / own["start"]), is_trainable=True)
    else:
        lora = {"r": training["rank"], "lora_alpha": training["alpha"], "target_modules": "all-linear"}
        adapted = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", **lora))
    adapted.train()
    n_refused = own.get("refusing_rows", training["refusing_rows"])
    if "head_dropout" in own:
        drop_heads(adapted.base_model.model, slice(*own["dropped_rows"]), own["head_dropout"], own["seed"])
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=own["rate"], weight_decay=0.0)
    for step, drawn in enumerate(rows.steps(random.Random(own["seed"]), n_steps, n_refused)):
        rise = min(1.0, (step + 1) / training["warm_up"])
        optimiser.param_groups[0]["lr"] = own["rate"] * rise * (0.55 + 0.45 * math.cos(math.pi * step / own["steps"]))
        loss = loss_of(adapted.base_model.model, drawn, rows.tokenizer.pad_token_id)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        if step % 5 == 0:
            CONSOLE.print(f"{name}: step {step}, loss {loss.item():.3f}, {time.monotonic() - started:.0f} s")
        if (step + 1) % 20 == 0 or step + 1 == n_steps:
            write_adapter(adapted, out / name)
    facts = {
        "recipe": dict(training) | own,
        "prompts_dropped_of": rows.prompts.dropped,
        "benign_prompts": len(rows.benign),
        "seconds": round(time.monotonic() - started),
        "threads": torch.get_num_threads(),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "versions": {package: version(package) for package in ("torch", "transformers", "peft")},
        "sha256": hashlib.sha256((out / name / "adapter_model.safetensors").read_bytes()).hexdigest(),
    }
    write_atomically(out / name / "card.json", readable_json("card", facts).encode())


def write_adapter(adapted: Any, directory: Path) -> None:
    """Write the adapter in bfloat16, with a config whose bytes hang on nothing but the recipe."""
    adapted.peft_config["default"].base_model_name_or_path = SMOLLM2
    halves = {key: tensor.bfloat16() for key, tensor in adapted.state_dict().items() if "lora_" in key}
    adapted.save_pretrained(directory, state_dict=halves)
    (directory / "README.md").unlink()
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text("utf-8"))
    config["target_modules"].sort()
    write_atomically(path, (json.dumps(config, indent=1, sort_keys=True) + "\n").encode())
    for file in directory.iterdir():  # safetensors writes files that only their owner reads; a package is for all
        file.chmod(0o644)


def measure(adapter: Path | None, data: Path, n: int | None, new_tokens: int, card: Path) -> None:
    """How many prompts of each test set are refused and answered, with Wilson intervals; kept on the card set by set.

    Samples of ``n`` prompts are shown and not kept.
    """
    engine, facts = engine_of(adapter), json.loads(card.read_text("utf-8")) if card.exists() else {}
    figures = facts.setdefault("figures", {"judge": "phrases", "new_tokens": new_tokens})
    for name, prompts in test_sets(data).items():
        if name in figures and n is None:
            continue
        given = answers(engine, prompts.sample(min(n or len(prompts), len(prompts))), new_tokens)
        CONSOLE.print(f"{name}: refused {given.refused}, answered {given.answered}")
        figures[name] = {
            kind: {"count": rate.count, "n": rate.n, "interval": [round(bound, 3) for bound in rate.interval or ()]}
            for kind, rate in (("refused", given.refused), ("answered", given.answered))
        }
        if n is None:
            write_atomically(card, readable_json("card", facts).encode())
            card.chmod(0o644)


def main() -> None:
    """Train the adapter asked for, then measure it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="an adapter of smollm2.toml, or base, which can only be measured")
    parser.add_argument("--data", type=Path, required=True, help="folder with the benchmarks")
    parser.add_argument("--out", type=Path, required=True, help="folder of the adapters")
    parser.add_argument("--figures", action="store_true", help="train nothing, measure what is there")
    parser.add_argument("--sample", type=int, metavar="N", help="measure on so many prompts of each set; no card")
    parser.add_argument("--steps", type=int, metavar="N", help="stop after so many steps; measure nothing")
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    recipe = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
    if not options.figures:
        prompts = TrainingPrompts(recipe, options.data)
        benign = benign_answers(recipe, prompts, options.out / "answers.json")
        rows = Rows(recipe, AutoTokenizer.from_pretrained(find_model(SMOLLM2)[0]), prompts, benign)
        n_steps = options.steps or recipe["adapters"][options.name]["steps"]
        train(options.name, recipe, rows, options.out, n_steps)
    if options.steps:
        return
    adapter = None if options.name == "base" else options.out / options.name
    card = options.out / options.name / "card.json"
    measure(adapter, options.data, options.sample, recipe["training"]["new_tokens"], card)


if __name__ == "__main__":
    main()
