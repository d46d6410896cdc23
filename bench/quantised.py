"""Quantised checkpoints of the real libraries, proved: ``python bench/quantised.py``.

A small random Llama is quantised by each method whose library is installed, saved, loaded again through ``Engine.load``
and held to the proofs at load. One JSON line a method: how far the proofs held in its layers and over all of them,
whether the weights have one fingerprint, and the largest Ships. Methods that are not there are named. GPTQ and AWQ
checkpoints are packed by hand, since their libraries quantise on a GPU only.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from scan import commit, machine
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from safetyheads import UNDIFFERENTIATED_ATTENTION, Engine, InputError, PromptSet, ships
from safetyheads.runs.provenance import fingerprint

_GROUP = 32
# The order in which AWQ packs eight numbers into one.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FP8_SCHEME = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "strategy": "token",
                "dynamic": True,
                "symmetric": True,
            },
        }
    },
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Words that are ids."""
    made = Tokenizer(models.WordLevel({f"w{number}": number for number in range(64)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", eos_token="w63")


def plain(path: Path, dtype: torch.dtype) -> Any:
    """A random model, saved."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=128,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=63,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return model


def by_library(path: Path, settings: Any) -> None:
    """Let transformers quantise while it loads, and save what comes out."""
    plain(path / "plain", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        path / "plain", quantization_config=settings, dtype=torch.float32, device_map={"": "cpu"}
    )
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)


def by_hand(path: Path, described: dict[str, Any], dtype: torch.dtype, pack: Callable[[str, Tensor], dict]) -> None:
    """Replace each projection's weight by what the format keeps of it."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in plain(path, dtype).state_dict().items():
        if name.endswith("proj.weight"):
            tensors |= pack(name.removesuffix("weight"), tensor.float())
        else:
            tensors[name] = tensor.clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": described}))


def _packed(numbers: Tensor, dimension: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight numbers of 4 bits in one of 32, along a dimension."""
    parts = numbers.to(torch.int64).unflatten(dimension, (-1, 8)).movedim(dimension + 1, 0)[list(order)]
    joined = sum(part << (4 * place) for place, part in enumerate(parts))
    return torch.where(joined >= 2**31, joined - 2**32, joined).to(torch.int32)


def _in_four_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers 0 to 15 [in, out] around 8, with scales and zero points [in / group, out]."""
    groups = weight.T.contiguous().unflatten(0, (-1, _GROUP))
    scales = groups.abs().amax(dim=1) / 7
    numbers = ((groups / scales[:, None]).round() + 8).clamp(0, 15).flatten(0, 1)
    return numbers, scales.half(), torch.full_like(scales, 8)


def gptq(prefix: str, weight: Tensor) -> dict[str, Tensor]:
    """GPTQ's tensors of one projection; zero points are kept less one."""
    numbers, scales, zeros = _in_four_bits(weight)
    return {
        f"{prefix}qweight": _packed(numbers, 0),
        f"{prefix}qzeros": _packed(zeros - 1, 1),
        f"{prefix}scales": scales,
        f"{prefix}g_idx": (torch.arange(len(numbers)) // _GROUP).to(torch.int32),
    }


def awq(prefix: str, weight: Tensor) -> dict[str, Tensor]:
    """AWQ's tensors of one projection."""
    numbers, scales, zeros = _in_four_bits(weight)
    return {
        f"{prefix}qweight": _packed(numbers, 1, _AWQ_ORDER),
        f"{prefix}qzeros": _packed(zeros, 1, _AWQ_ORDER),
        f"{prefix}scales": scales,
    }


def fp8(prefix: str, weight: Tensor) -> dict[str, Tensor]:
    """FP8 with a scale for each row; activations are rounded while it runs."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 448
    return {
        f"{prefix}weight": (weight / scale).to(torch.float8_e4m3fn),
        f"{prefix}weight_scale": scale.to(torch.bfloat16),
    }


def _torchao(name: str) -> Any:
    settings = getattr(import_module("torchao.quantization"), name)
    return transformers.TorchAoConfig(settings(version=2))


def _four_bits() -> Any:
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": _GROUP, "desc_act": False, "sym": True}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": _GROUP, "zero_point": True, "version": "gemm"}
METHODS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "bitsandbytes, 8 bits": (
        "bitsandbytes",
        lambda path: by_library(path, transformers.BitsAndBytesConfig(load_in_8bit=True)),
    ),
    "bitsandbytes, 4 bits": ("bitsandbytes", lambda path: by_library(path, _four_bits())),
    "torchao, int8 weights": ("torchao", lambda path: by_library(path, _torchao("Int8WeightOnlyConfig"))),
    "torchao, int8 weights and activations": (
        "torchao",
        lambda path: by_library(path, _torchao("Int8DynamicActivationInt8WeightConfig")),
    ),
    "GPTQ, 4 bits": ("gptqmodel", lambda path: by_hand(path, _GPTQ, torch.float16, gptq)),
    "AWQ, 4 bits": ("gptqmodel", lambda path: by_hand(path, _AWQ, torch.float16, awq)),
    "compressed-tensors, FP8 weights and activations": (
        "compressed_tensors",
        lambda path: by_hand(path, _FP8_SCHEME, torch.bfloat16, fp8),
    ),
}
"""Name -> the library, and what writes a checkpoint."""


def measured(path: Path, write: Callable[[Path], None]) -> dict[str, Any]:
    """What ``Engine.load`` makes of a checkpoint."""
    write(path)
    engine = Engine.load(str(path))
    proofs = engine.check().proofs
    prompts = PromptSet.from_queries(["w5 w9 w12 w40 w41 w8 w3", "w5 w9 w12 w7 w33"], "direct")
    again = Engine.load(str(path))
    return {
        "dtype": str(engine.dtype),
        "projection": type(engine.architecture.query_projections[0]).__name__,
        "in_a_layer": max(proof.error for proof in proofs if proof.decisive),
        "over_all_layers": max(proof.error for proof in proofs if not proof.decisive),
        "one_fingerprint": fingerprint(engine) == fingerprint(again),
        "largest_ships": float(ships(engine, prompts, UNDIFFERENTIATED_ATTENTION).values.max()),
        "notes": list(engine.notes),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print one JSON line a method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="methods whose name holds this text")
    options = parser.parse_args(arguments)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    about = {"bench": Path(__file__).stem, "commit": commit(), "machine": machine(None)}
    for name, (library, write) in METHODS.items():
        if options.only and options.only not in name:
            continue
        try:
            import_module(library)
        except ImportError:
            print(json.dumps({**about, "method": name, "skipped": f"{library} is not installed"}))
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = measured(Path(folder), write)
            except (InputError, RuntimeError, ValueError, ImportError, OSError) as error:
                found = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        print(json.dumps({**about, "method": name, **found}))


if __name__ == "__main__":
    main()
