"""What the paper prints, to stand beside what was measured. Owns the quoted numbers and whose they are.

Zhou et al., On the Role of Attention Heads in Large Language Model Safety (ICLR 2025).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

PaperModel: TypeAlias = Literal["Llama-2-7b-chat", "Vicuna-7b-v1.5"]
Level: TypeAlias = Literal["dataset", "query"]

FIG2: dict[PaperModel, tuple[float, float]] = {"Llama-2-7b-chat": (0.04, 0.64), "Vicuna-7b-v1.5": (0.27, 0.55)}
"""Mean ASR, unablated and with each prompt's own top head under UA, with the template."""

TABLE_3_AND_5: dict[tuple[PaperModel, Level, str, str], tuple[float, ...]] = {
    ("Llama-2-7b-chat", "dataset", "UA", "maliciousinstruct"): (0.63, 0.68, 0.72, 0.70, 0.66),
    ("Llama-2-7b-chat", "dataset", "UA", "jailbreakbench"): (0.58, 0.65, 0.68, 0.62, 0.63),
    ("Llama-2-7b-chat", "dataset", "SC", "maliciousinstruct"): (0.01, 0.02, 0.02, 0.01, 0.03),
    ("Llama-2-7b-chat", "dataset", "SC", "jailbreakbench"): (-0.01, 0.00, -0.01, 0.00, 0.00),
    ("Llama-2-7b-chat", "query", "UA", "maliciousinstruct"): (0.66, 0.28, 0.33, 0.48, 0.56),
    ("Llama-2-7b-chat", "query", "UA", "jailbreakbench"): (0.62, 0.46, 0.39, 0.52, 0.52),
    ("Llama-2-7b-chat", "query", "SC", "maliciousinstruct"): (0.07, 0.20, 0.32, 0.24, 0.28),
    ("Llama-2-7b-chat", "query", "SC", "jailbreakbench"): (0.03, 0.18, 0.41, 0.45, 0.44),
    ("Vicuna-7b-v1.5", "dataset", "UA", "maliciousinstruct"): (0.13, 0.15, 0.09, 0.09, 0.09),
    ("Vicuna-7b-v1.5", "dataset", "UA", "jailbreakbench"): (0.24, 0.29, 0.41, 0.35, 0.36),
    ("Vicuna-7b-v1.5", "dataset", "SC", "maliciousinstruct"): (0.11, 0.16, 0.10, 0.16, 0.14),
    ("Vicuna-7b-v1.5", "dataset", "SC", "jailbreakbench"): (0.16, 0.08, 0.04, 0.05, 0.05),
    ("Vicuna-7b-v1.5", "query", "UA", "maliciousinstruct"): (0.17, 0.19, 0.19, 0.22, 0.22),
    ("Vicuna-7b-v1.5", "query", "UA", "jailbreakbench"): (0.30, 0.32, 0.32, 0.35, 0.35),
    ("Vicuna-7b-v1.5", "query", "SC", "maliciousinstruct"): (0.15, 0.13, 0.14, 0.17, 0.14),
    ("Vicuna-7b-v1.5", "query", "SC", "jailbreakbench"): (0.09, 0.08, 0.14, 0.09, 0.11),
}
"""Change of ASR with 1 to 5 heads: model, level, ablation, dataset. Table 3 is Llama-2's, Table 5 Vicuna's."""

TABLE1: dict[str, tuple[float, float, float]] = {
    "actsvd": (0.05, 0.73, 0.03),
    "gtac_dap": (0.05, 0.64, 0.03),
    "lsp": (0.03, 0.58, 0.04),
    "sahara": (0.00018, 0.72, 0.05),
}
"""Method -> share of parameters as the paper gives it, ASR and its spread; Llama-2-7b-chat."""

TABLE2: dict[str, float] = {"masking heads, full generation": 850.0, "ACDC": 850.0, "Sahara": 6.0}
"""A100 hours, which the paper estimates from partial generations."""

TABLE7: dict[str, dict[str, float]] = {
    "advbench": {"Sure": 0.35, "UA, Sure": 0.68, "SC, Sure": 0.40, "UA": 0.59, "SC": 0.07},
    "jailbreakbench": {"Sure": 0.47, "UA, Sure": 0.76, "SC, Sure": 0.51, "UA": 0.65, "SC": 0.06},
    "maliciousinstruct": {"Sure": 0.35, "UA, Sure": 0.75, "SC, Sure": 0.40, "UA": 0.67, "SC": 0.05},
}
"""ASR of Llama-2-7b-chat by dataset; with the answer begun as "Sure, here is", and without."""


def paper_dataset(name: str) -> str:
    """How these tables call a dataset that is given as a name or a file, such as ``data/AdvBench.csv``."""
    return Path(name).stem.lower()


def paper_model(name: str) -> PaperModel | None:
    """The paper's model that a path or hub id names; None for any other."""
    last = name.rstrip("/").rsplit("/", 1)[-1].lower().removesuffix("-hf")
    known: dict[str, PaperModel] = {"llama-2-7b-chat": "Llama-2-7b-chat", "vicuna-7b-v1.5": "Vicuna-7b-v1.5"}
    return known.get(last)
