"""PEFT adapters on a base. Owns finding one, refusing one that is not for this base, and its fingerprint.

The adapter stays beside the base's weights and is not merged, so a fine-tune is audited as it was published. Its
modules stand where the projections stood; that heads are ablated exactly through them is proved at load, as always.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from safetyheads.errors import InputError
from safetyheads.files import read_json
from safetyheads.model.hub import first_line, look_at_hub
from safetyheads.model.placement import hooked_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_FILE = "adapter_config.json"
"""What makes a directory an adapter."""
_NAME, _PREFIX = "default", "base_model.model."
_WEIGHTS, _PICKLED_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
# AdaLoRA's number of ranks, which peft sets by the config.
_IS_SAVED_NOWHERE = ".ranknum."
# What a config says of where things lay and not of what the adapter does.
_WHEREABOUTS = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
_FILES_TO_FETCH = (
    CONFIG_FILE,
    _WEIGHTS,
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "vocab*",
    "merges*",
)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter, found and looked at, before it is put on a base."""

    name: str
    """A path or hub id, as it was given."""
    directory: Path
    """Where its files are."""
    config: Mapping[str, Any]
    """Its adapter_config.json."""
    sha256: str
    """Of what it does: its settings, whereabouts aside, and its weights."""

    @property
    def base(self) -> str | None:
        """The base that it names, by a path or hub id of whoever trained it."""
        named = self.config.get("base_model_name_or_path")
        return str(named) if named else None

    @property
    def has_tokenizer(self) -> bool:
        """Whether it brings a tokenizer of its own, as fine-tunes with a new chat template do."""
        named = ("tokenizer.json", "tokenizer.model", "vocab.json")
        return any((self.directory / name).is_file() for name in named)


def refuse_as_model(path: str) -> None:
    """Refuse an adapter given as a model: transformers would take it in without a word, or not, as peft is there."""
    from transformers.utils import find_adapter_config_file

    if find_adapter_config_file(path) is not None:
        raise InputError(f"{path} is an adapter; give its base as the model, and --adapter {path}")


def find_adapter(name: str, allow_pickle: bool = False, revision: str | None = None) -> Adapter:
    """Look at a local adapter, or fetch one from the hub.

    Raises:
        InputError: it is not there, is no adapter, has pickled weights only, or peft is not installed.
    """
    directory = Path(name) if os.path.exists(name) else _fetched(name, revision)
    if not directory.is_dir():
        raise InputError(f"the adapter {name} is a file; an adapter is a directory with {CONFIG_FILE}, or a hub id")
    if not (directory / CONFIG_FILE).is_file():
        raise InputError(f"{name} has no {CONFIG_FILE}, so it is not an adapter")
    config = read_json(directory / CONFIG_FILE)
    weights = directory / _WEIGHTS
    if not weights.is_file():
        if not (directory / _PICKLED_WEIGHTS).is_file():
            raise InputError(f"the adapter {name} has no weights ({_WEIGHTS})")
        if not allow_pickle:
            raise InputError(
                f"the adapter {name} has pickled weights only, which can run code when read; to allow it, give "
                "--allow-pickle"
            )
        weights = directory / _PICKLED_WEIGHTS
    if find_spec("peft") is None:
        raise InputError(f"{name} is an adapter; to read it, install safetyheads[peft]")
    _refuse_kind(name, config)
    return Adapter(name, directory, config, _sha256(config, weights))


def _fetched(name: str, revision: str | None) -> Path:
    """An adapter of the hub, on this machine."""
    from huggingface_hub import snapshot_download

    look_at_hub(name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_FILES_TO_FETCH)))
    except OSError as error:
        raise InputError(f"the adapter {name} cannot be fetched: {first_line(error)}") from error


def _refuse_kind(name: str, config: Mapping[str, Any]) -> None:
    """Refuse adapters that are more than changes of modules: they would need the prompt, or be left out silently."""
    from peft import PeftType, PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in {known.value for known in PeftType}:
        raise InputError(f"the adapter {name} is of a kind that this peft does not know: {kind}")
    if getattr(PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType(kind)), "uses_shared_state", False):
        raise InputError(
            f"the adapter {name} is a {kind}: its modules share weights that stand in none of them, so it cannot be "
            "put on a base module by module; merge it into its base and give the merged model"
        )
    if issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)], PromptLearningConfig):
        raise InputError(
            f"the adapter {name} is a {kind}: it adds virtual tokens and changes no module, so it is not read"
        )
    if config.get("alora_invocation_tokens"):
        raise InputError(
            f"the adapter {name} acts from certain tokens on only (aLoRA), which replayed layers cannot see"
        )


def _sha256(config: Mapping[str, Any], weights: Path) -> str:
    settings = {name: value for name, value in config.items() if name not in _WHEREABOUTS}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    with weights.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _bring_back(model: PreTrainedModel) -> None:
    """Give factors that peft made beside offloaded weights, so on no device, room where these are brought to run."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapped: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in wrapped:
        base = layer.get_base_layer()
        place = hooked_device(base)
        for name, module in layer.named_modules():
            if module is base or name.startswith("base_layer"):
                continue
            for own, parameter in module._parameters.items():
                if place is not None and parameter is not None and parameter.is_meta:
                    empty = torch.empty_like(parameter, device=place)
                    module._parameters[own] = nn.Parameter(empty, requires_grad=False)


def _share_config(model: PreTrainedModel) -> None:
    """Give layers that peft copied the model's own config, which says how to attend; copies would not hear of it."""
    own = model.config.get_text_config(decoder=True)
    for module in model.modules():
        if type(getattr(module, "config", None)) is type(own):
            module.config = own


def put_on(model: PreTrainedModel, adapter: Adapter, base: str) -> None:
    """Load the adapter into its base, unmerged; through peft itself, since transformers knows fewer kinds of them.

    Raises:
        InputError: it is not for this base; the message says what does not fit.
    """
    from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.tuners_utils import cast_adapter_dtype
    from peft.utils import load_peft_weights
    from safetensors import SafetensorError

    said = f"the adapter {adapter.name} is not for {base}"
    try:
        config = PeftConfig.from_pretrained(str(adapter.directory))
        config.inference_mode = True
        inject_adapter_in_model(config, model, _NAME)
        if adapter.config.get("layer_replication"):
            _share_config(model)
        _bring_back(model)
        # As peft does by itself: in half precision the two small factors would lose most.
        cast_adapter_dtype(model, _NAME)
        tensors = load_peft_weights(str(adapter.directory), device="cpu")
        # What stands for whole modules is looked up by names without peft's prefix, factors by names with it.
        tensors = {name if ".lora_" in name else name.removeprefix(_PREFIX): each for name, each in tensors.items()}
        report: Any = set_peft_model_state_dict(model, tensors, _NAME)
    except KeyError as error:
        raise InputError(f"{said}: it lacks {error.args[0] if error.args else 'something'}") from error
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise InputError(f"{said}: tensors have other shapes") from error
    except (SafetensorError, UnpicklingError) as error:
        raise InputError(f"the weights of the adapter {adapter.name} are broken: {first_line(error)}") from error
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise InputError(f"{said}: {first_line(error)}") from error
    # What belongs to the adapter bears its name; the rest is the base's, wherever it was moved to.
    lacked = {name for name in report.missing_keys if _NAME in name.split(".") and _IS_SAVED_NOWHERE not in name}
    for found, what in ((lacked, "lacks"), (set(report.unexpected_keys), "holds, where the base has none,")):
        if found:
            raise InputError(f"{said}: it {what} {len(found)} tensors, {min(found)} among them")
    model._hf_peft_config_loaded = True  # so that transformers knows
