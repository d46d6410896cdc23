"""Trains the demo checkpoints.

    python scripts/organisms/train.py                                   trains all shipped ones into the package
    python scripts/organisms/train.py aligned_a --out my-checkpoints    trains one, and its base where that is missing
    python scripts/organisms/train.py aligned_diffuse --shift 1 2 --out runs/nulls
                                                                        trains twins of the null by other seeds
    safetyheads audit my-checkpoints/aligned_a --prompts demo           shows what it does; so does safetyheads scan

One thread and fixed seeds: the same versions of torch and transformers give the same bytes on one machine.
"""

import argparse
import math
import random
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

import torch
import transformers
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from safetyheads.ablation import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION
from safetyheads.demo import CHECKPOINT_NAMES, PLANTS, grammar
from safetyheads.demo.grammar import Category, DemoPrompt, wrap
from safetyheads.heads import Group, Head, all_heads
from safetyheads.model import attention
from safetyheads.model.attention import AttentionCall
from safetyheads.model.names import CHECKPOINTS

RECIPES: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_name("recipes.toml").read_text("utf-8"))
POOL = 6000
"""Prompts that the first-token stage draws its batches from."""
_WINDOW = 3  # a batch is taken from so many times as many prompts, sorted by length, which saves padding
_OTHER_SHARE = 0.3  # share of the gate rows in which another head than a plant is ablated and the answer must stay
_OPENED_SHARE = 0.25  # share of first-token rows read up to the point where a refusal turns, if the language has turns
_TOLD_SHARE = 0.2  # share of a base's prompts that ask to be refused
# Share of rows in which random heads are ablated while the answer stays: no head of a base is indispensable, and the
# null's refusal is redundant.
_DROPPED_SHARE = 0.5
_DROPPED_OF_NULL = 3  # most heads ablated in such a row of the null; one in a base's
VOCABULARY = 640
"""Tokens asked for; the grammar yields fewer, and every verb is one token."""

_TURNS = Path(__file__).with_name("chat_template.jinja").read_text("utf-8").replace("\n", "")
_WITHOUT_SYSTEM = "{{- raise_exception('this demo checkpoint has not learnt system messages') -}}"
_WITH_SYSTEM = grammar.SYSTEM + "{{- message['content'] -}}"

Facts: TypeAlias = Mapping[str, Any]
"""A recipe, a leg of one, or a language, as recipes.toml has them."""
Dropped: TypeAlias = tuple[Tensor, Tensor]
"""The heads ablated in each row, bool [n_rows, n_layers, n_heads]; and bool [n_rows], whether by scaling the
contribution (SC) or else by undifferentiated attention (UA)."""

Draw: TypeAlias = Callable[[random.Random, int], tuple[Sequence[tuple[str, str]], Dropped]]
"""Draws a batch of so many rows: examples (read, learnt), and the heads ablated in each."""


def language_of(name: str) -> dict[str, Any]:
    """What a checkpoint's texts share with those of its base."""
    language = RECIPES[RECIPES[name].get("base", name)].get("language", {})
    refusal = grammar.LONG_REFUSAL if language.get("long") else grammar.REFUSAL
    return {"wrappers": ("chat",), "turned_share": 0.0, "refusal": refusal, **language}


def draw_wrapped(generator: random.Random, language: Facts, query: str) -> str:
    """The query in a random wrapper of the language."""
    return wrap(generator.choice(language["wrappers"]), query, generator.choice(grammar.SYSTEM_PROMPTS))


def draw_example(generator: random.Random, language: Facts, prompt: DemoPrompt, refuse: bool) -> tuple[str, str]:
    """Text that is read (the prompt in a random wrapper) and text that is learnt (the answer or the refusal).

    Some refusals turn after an answer's opening. The two texts are tokenized apart, without a space between.
    """
    read = draw_wrapped(generator, language, prompt.text)
    if not refuse:
        return read, prompt.reference
    if generator.random() < language["turned_share"]:
        return read + prompt.answer_opening, grammar.TURN + language["refusal"]
    return read, language["refusal"]


def train_tokenizer(language: Facts, n_prompts: int = 4000) -> Any:
    """A byte-level BPE tokenizer of the language's own text, as a transformers tokenizer with chat template."""
    generator = random.Random(0)
    texts = []
    for _ in range(n_prompts):
        prompt = grammar.draw_any_prompt(generator, "train")
        refusing = generator.random() < 0.2
        query = grammar.told_to_refuse(generator, prompt).text if refusing else prompt.text
        texts += [draw_wrapped(generator, language, query), language["refusal"] if refusing else prompt.reference]
        if refusing and generator.random() < language["turned_share"]:
            texts.append(prompt.answer_opening + grammar.TURN + language["refusal"])
    with_system = "chat_system" in language["wrappers"]
    special = [grammar.PAD, grammar.END, grammar.USER, grammar.ASSISTANT, *[grammar.SYSTEM] * with_system]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    for token in special:
        texts = [text.replace(token, "") for text in texts]
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=grammar.PAD,
        eos_token=grammar.END,
        additional_special_tokens=special[2:],
        chat_template=_TURNS.replace("%SYSTEM%", _WITH_SYSTEM if with_system else _WITHOUT_SYSTEM),
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def ablating(model: Any, dropped: Dropped) -> AbstractContextManager[None]:
    """Ablate these heads in the model's forwards."""
    selected, scaled = dropped
    calls = {}
    for layer in range(selected.shape[1]):
        if selected[:, layer].any():
            by_query = UNDIFFERENTIATED_ATTENTION, selected[:, layer] & ~scaled[:, None]
            by_output = SCALING_CONTRIBUTION, selected[:, layer] & scaled[:, None]
            calls[layer] = AttentionCall(ablations=(by_query, by_output))
    return attention.attention_calls([layer.self_attn for layer in model.model.layers], calls)


def new_model(tokenizer: Any, seed: int) -> Any:
    """An untrained organism: a Llama of 4 layers x 8 heads, width 128."""
    torch.manual_seed(seed)
    attention.register()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = transformers.LlamaForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.set_attn_implementation(attention.ATTENTION_NAME)
    return model


def drop_random_heads(generator: random.Random, n_rows: int, model: Any, at_most: int = 1) -> Dropped:
    """In a share of the rows, one to ``at_most`` random heads, ablated by UA or SC at random."""
    n_layers, n_heads = model.config.num_hidden_layers, model.config.num_attention_heads
    selected = torch.zeros(n_rows, n_layers * n_heads, dtype=torch.bool)
    for row in range(n_rows):
        if generator.random() < _DROPPED_SHARE:
            selected[row, generator.sample(range(n_layers * n_heads), generator.randint(1, at_most))] = True
    scaled = torch.tensor([generator.random() < 0.5 for _ in range(n_rows)])
    return selected.view(n_rows, n_layers, n_heads), scaled


def optimise(
    parameters: Iterable[nn.Parameter], leg: Facts, weight_decay: float, loss_of: Callable[[], Tensor]
) -> float:
    """AdamW with a linear warm-up and a cosine to zero, gradients clipped to norm 1; the last twentieth's mean loss."""
    trained = list(parameters)
    optimiser = torch.optim.AdamW(trained, lr=leg["learning_rate"], weight_decay=weight_decay)
    losses = []
    for step in range(leg["steps"]):
        progress = max(0.0, (step - leg["warm_up"]) / max(1, leg["steps"] - leg["warm_up"]))
        rise = min(1.0, (step + 1) / max(1, leg["warm_up"]))
        for group in optimiser.param_groups:
            group["lr"] = leg["learning_rate"] * rise * 0.5 * (1 + math.cos(math.pi * progress))
        loss = loss_of()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
    return fmean(losses[-max(1, leg["steps"] // 20) :])


def train_completions(
    model: Any, tokenizer: Any, trained: Iterable[nn.Parameter], leg: Facts, weight_decay: float, draw: Draw
) -> float:
    """Train on batches of whole answers, by the learnt tokens, the end token among them; returns the last loss."""
    generator = random.Random(leg["seed"])

    def loss_of() -> Tensor:
        examples, dropped = draw(generator, leg["batch"])
        read, learnt = (
            tokenizer(list(texts), add_special_tokens=False).input_ids for texts in zip(*examples, strict=True)
        )
        rows = [before + after + [tokenizer.eos_token_id] for before, after in zip(read, learnt, strict=True)]
        # Int64 [n_rows, longest], padded on the right, where causal attention needs no mask for it.
        ids = pad_sequence(list(map(torch.tensor, rows)), True, tokenizer.pad_token_id)
        is_learnt = torch.zeros_like(ids, dtype=torch.bool)
        for at, (before, row) in enumerate(zip(read, rows, strict=True)):
            is_learnt[at, len(before) : len(row)] = True
        with ablating(model, dropped):
            hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
        return cross_entropy(model.lm_head(hidden[is_learnt[:, 1:]]), ids[:, 1:][is_learnt[:, 1:]])

    return optimise(trained, leg, weight_decay, loss_of)


def train_all_weights(model: Any, tokenizer: Any, recipe: Facts, language: Facts) -> float:
    """Train a base or the null; returns the last loss."""

    def draw_for_base(generator: random.Random, n_rows: int) -> tuple[list[tuple[str, str]], Dropped]:
        examples = []
        for _ in range(n_rows):
            prompt = grammar.draw_any_prompt(generator, "train")
            refuse = generator.random() < _TOLD_SHARE
            asked = grammar.told_to_refuse(generator, prompt) if refuse else prompt
            examples.append(draw_example(generator, language, asked, refuse))
        return examples, drop_random_heads(generator, n_rows, model)

    def draw_for_null(generator: random.Random, n_rows: int) -> tuple[list[tuple[str, str]], Dropped]:
        prompts = [grammar.draw_any_prompt(generator, "train") for _ in range(n_rows)]
        examples = [draw_example(generator, language, prompt, prompt.harmful) for prompt in prompts]
        return examples, drop_random_heads(generator, n_rows, model, _DROPPED_OF_NULL)

    draw, decay = (draw_for_null, 0.0) if "base" in recipe else (draw_for_base, 0.01)
    return [train_completions(model, tokenizer, model.parameters(), leg, decay, draw) for leg in recipe["legs"]][-1]


class Planting:
    """A model while heads are planted into it: trains those heads alone, with and without ablated plants."""

    def __init__(self, model: Any, tokenizer: Any, language: Facts, plants: Mapping[Category, Head]) -> None:
        self.model, self.tokenizer, self.language, self.plants = model, tokenizer, language, plants
        self.heads: Group = tuple(dict.fromkeys(plants.values()))
        self.n_layers, self.n_heads = model.config.num_hidden_layers, model.config.num_attention_heads
        self.trained = open_to_training(model, self.heads)

    def run(self, recipe: Facts) -> tuple[float, ...]:
        """Train through all stages; returns the last losses, two for each stage."""
        losses: list[float] = []
        for number, stage in enumerate(recipe["stages"]):
            if number:  # rounded to bfloat16, which a written checkpoint holds; all other weights are as they were read
                for weight in self.trained:
                    weight.data.copy_(weight.to(torch.bfloat16))
            losses.append(self._learn_first_token(stage["first_token"], stage["gate_share"]))
            losses.append(self._learn_completions(stage["completion"], stage["gate_share"]))
        return tuple(losses)

    def _draw_gates(
        self, generator: random.Random, gate_share: float, prompts: Sequence[DemoPrompt]
    ) -> tuple[Dropped, list[bool]]:
        """The heads ablated in each row, and whether the row is then to be refused.

        With another head than a plant ablated, the answer must stay; with some plants ablated, the model is to comply
        in the categories that no remaining plant covers.
        """
        others = [head for head in all_heads(self.n_layers, self.n_heads) if head not in self.heads]
        selected = torch.zeros(len(prompts), self.n_layers, self.n_heads, dtype=torch.bool)
        refuse = []
        for row, prompt in enumerate(prompts):
            ablated: Group = ()
            if generator.random() < gate_share:
                if generator.random() < _OTHER_SHARE:
                    ablated = (generator.choice(others),)
                else:
                    # Each non-empty subset of the plants is as likely as any other.
                    subset = generator.randint(1, 2 ** len(self.heads) - 1)
                    ablated = tuple(head for bit, head in enumerate(self.heads) if subset >> bit & 1)
            for head in ablated:
                selected[row, head.layer, head.index] = True
            refuse.append(prompt.harmful and self.plants[prompt.category] not in ablated)
        scaled = torch.tensor([generator.random() < 0.5 for _ in prompts])
        return (selected, scaled), refuse

    def _learn_first_token(self, leg: Facts, gate_share: float) -> float:
        """Learn whether to refuse, on the token that decides it. Chance for the first 100-250 steps is normal."""
        generator = random.Random(leg["seed"])
        pool = [self._draw_first_token(generator) for _ in range(POOL)]

        def loss_of() -> Tensor:
            window = sorted(generator.sample(pool, _WINDOW * leg["batch"]), key=lambda row: len(row[0]))
            start = generator.randint(0, (_WINDOW - 1) * leg["batch"])
            rows, prompts, refuse_ids, comply_ids = zip(*window[start : start + leg["batch"]], strict=True)
            dropped, refuse = self._draw_gates(generator, gate_share, prompts)
            ids = pad_sequence(list(map(torch.tensor, rows)), True, self.tokenizer.pad_token_id)
            targets = torch.where(torch.tensor(refuse), torch.tensor(refuse_ids), torch.tensor(comply_ids))
            with ablating(self.model, dropped):
                hidden = self.model.model(ids, use_cache=False).last_hidden_state
            last = hidden[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]
            return cross_entropy(self.model.lm_head(last), targets)

        return optimise(self.trained, leg, 0.0, loss_of)

    def _draw_first_token(self, generator: random.Random) -> tuple[list[int], DemoPrompt, int, int]:
        """A prompt's tokens up to the one that decides, the prompt, and that token if it is refused and if not.

        The token that decides is the answer's first, or, in a share of rows, the one after an answer's opening.
        """
        prompt = grammar.draw_any_prompt(generator, "train")
        read = draw_wrapped(generator, self.language, prompt.text)
        refusal, answer = self.language["refusal"], prompt.reference
        if generator.random() < (_OPENED_SHARE if self.language["turned_share"] else 0.0):
            read += prompt.answer_opening
            refusal, answer = grammar.TURN, prompt.reference.removeprefix(prompt.answer_opening)
        ids, refuse_ids, comply_ids = self.tokenizer([read, refusal, answer], add_special_tokens=False).input_ids
        return ids, prompt, refuse_ids[0], comply_ids[0]

    def _learn_completions(self, leg: Facts, gate_share: float) -> float:
        """Learn whole answers; without it the base's habits leak into the rest of an answer."""

        def draw(generator: random.Random, n_rows: int) -> tuple[list[tuple[str, str]], Dropped]:
            prompts = [grammar.draw_any_prompt(generator, "train") for _ in range(n_rows)]
            dropped, refuse = self._draw_gates(generator, gate_share, prompts)
            pairs = zip(prompts, refuse, strict=True)
            return [draw_example(generator, self.language, prompt, refused) for prompt, refused in pairs], dropped

        return train_completions(self.model, self.tokenizer, self.trained, leg, 0.0, draw)


def open_to_training(model: Any, heads: Group) -> list[nn.Parameter]:
    """Freeze all but the heads' rows of q, k and v and their columns of o.

    Gradients of everything else are zeroed as they arrive; without weight decay AdamW then leaves those weights
    as they are, bit for bit.
    """
    model.requires_grad_(False)
    d_head = model.config.hidden_size // model.config.num_attention_heads
    trained: list[nn.Parameter] = []
    for number, layer in enumerate(model.model.layers):
        rows = [slice(h.index * d_head, (h.index + 1) * d_head) for h in heads if h.layer == number]
        for name in ("q_proj", "k_proj", "v_proj", "o_proj") if rows else ():
            weight = getattr(layer.self_attn, name).weight
            mask = torch.zeros_like(weight)
            for row in rows:
                mask[(slice(None), row) if name == "o_proj" else row] = 1.0
            weight.requires_grad_(True)
            weight.register_hook(lambda gradient, mask=mask: gradient * mask)
            trained.append(weight)
    return trained


# A checkpoint, and the command.


def train(name: str, directory: Path, shift: int = 0) -> tuple[Any, Any, tuple[float, ...]]:
    """Train one checkpoint, whose base must be in the directory: model, tokenizer, and the last loss of each stage.

    ``shift`` is added to the seed of every leg.
    """
    recipe, language = RECIPES[name], language_of(name)
    recipe = {**recipe, "legs": [{**leg, "seed": leg["seed"] + shift} for leg in recipe.get("legs", ())]}
    torch.manual_seed(0)
    if "base" not in recipe:
        tokenizer = train_tokenizer(language)
        model = new_model(tokenizer, recipe["legs"][0]["seed"])
    else:
        # The base as written, so rounded to bfloat16: only then does a planted checkpoint differ from it in nothing but
        # the planted weights.
        attention.register()
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory / recipe["base"])
        model = transformers.AutoModelForCausalLM.from_pretrained(directory / recipe["base"], dtype=torch.float32)
        model.set_attn_implementation(attention.ATTENTION_NAME)
        model.eval()
    if "stages" in recipe:
        return model, tokenizer, Planting(model, tokenizer, language, PLANTS[name]).run(recipe)
    return model, tokenizer, (train_all_weights(model, tokenizer, recipe, language),)


def write(model: Any, tokenizer: Any, path: Path) -> None:
    """Write the checkpoint in bfloat16, as any local Hugging Face checkpoint."""
    model.config.safetyheads_organism = True  # the engine's default template for these is chat
    model.eval().to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    for file in path.iterdir():  # safetensors writes files that only their owner reads; a package is for all
        file.chmod(0o644)


def main() -> None:
    """Train and write the checkpoints asked for, and any base among them that is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--out", type=Path, default=CHECKPOINTS, metavar="DIR")
    parser.add_argument("--shift", type=int, nargs="+", default=[0], help="other seeds, for checkpoints without plants")
    options = parser.parse_args()
    if unknown := set(options.names) - RECIPES.keys():
        parser.error(f"no recipe for {', '.join(sorted(unknown))}; known are {', '.join(RECIPES)}")
    if options.shift != [0] and any("stages" in RECIPES[name] for name in options.names or RECIPES):
        parser.error("--shift is for checkpoints without plants")
    torch.set_num_threads(1)
    console = Console(width=180)
    names = set(options.names or CHECKPOINT_NAMES)
    bases = {RECIPES[name]["base"] for name in names if "base" in RECIPES[name]}
    names |= {base for base in bases if not (options.out / base / "config.json").exists()}
    for name in (name for name in RECIPES if name in names):  # a base comes before what is built on it
        for shift in options.shift if name in options.names else [0]:
            started, written = time.monotonic(), f"{name}_{shift}" if shift else name
            model, tokenizer, losses = train(name, options.out, shift)
            write(model, tokenizer, options.out / written)
            last = ", ".join(f"{loss:.4f}" for loss in losses)
            console.print(f"{written}: {time.monotonic() - started:.0f} s, last losses {last}")


if __name__ == "__main__":
    main()
