"""Quantised checkpoints: loaded as their config says, ablated at the activations, fingerprinted whatever they hold.

The libraries of the trade need a GPU or are too large for the tests, so two stand-ins take their places: weights in
int8 behind a quantizer of transformers' own kind, which takes the same way through loading as bitsandbytes or GPTQ, and
torch's dynamic quantisation, which rounds activations as LLM.int8 and FP8 do. The real ones: docs/loading.md.
"""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from families import built
from oracle import Oracle
from safetensors.torch import load_file, save_file
from tiny_models import COMMON, build, model_of, prompts_of, saved, tokenizer
from torch import nn
from torch.ao.quantization import quantize_dynamic
from transformers import LlamaConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from safetyheads import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION, Engine, Head, generate, ships
from safetyheads.errors import UnsupportedModelError
from safetyheads.model import attention
from safetyheads.model.architecture import Capabilities
from safetyheads.model.loading import bases_shared, quantisation
from safetyheads.model.proofs import ROUNDED, tolerances
from safetyheads.runs.config import AuditConfig
from safetyheads.runs.provenance import fingerprint, settings_of

METHOD = "int8_stand_in"
ASKED = []  # dtypes that transformers was asked to load in
FLOAT32 = 1e-5
PROMPT = (5, 9, 12, 40, 7, 7, 19, 33, 50, 21)
PROMPTS = prompts_of((5, 9, 12, 40, 41, 8, 3, 22), PROMPT)
GROUPS = [(), (Head(0, 2),), (Head(1, 0), Head(1, 1), Head(2, 3))]


class Int8Linear(nn.Module):
    """Weights in int8 with a scale for each row; activations stay as they are."""

    def __init__(self, in_features, out_features, bias):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(out_features, 1))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, given):
        return nn.functional.linear(given, self.weight * self.scale, self.bias)


@register_quantization_config(METHOD)
class StandInConfig(QuantizationConfigMixin):
    def __init__(self, **_):
        self.quant_method = METHOD


@register_quantizer(METHOD)
class StandIn(HfQuantizer):
    """What transformers asks of a method: here, modules in the place of all projections but the head."""

    def update_dtype(self, dtype):
        ASKED.append(dtype)
        return dtype

    def _process_model_before_weight_loading(self, model, **_):
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name.endswith("proj"):
                parent, _, own = name.rpartition(".")
                made = Int8Linear(module.in_features, module.out_features, module.bias is not None)
                setattr(model.get_submodule(parent), own, made.to("meta"))

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return False


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A quantised checkpoint with biases: path, and the same model in plain numbers, as int8 holds each projection."""
    config = LlamaConfig(**COMMON, num_key_value_heads=2, attention_bias=True)
    plain, folder = build(config), tmp_path_factory.mktemp("quantised")
    saved(plain, folder)
    tensors = {name: each.clone() for name, each in plain.state_dict().items()}
    for key in [key for key in tensors if key.endswith("proj.weight")]:
        scale = tensors[key].abs().amax(dim=1, keepdim=True) / 127
        whole = (tensors[key] / scale).round()
        with torch.no_grad():
            plain.get_parameter(key).copy_(whole * scale)
        tensors |= {key: whole.to(torch.int8), f"{key.removesuffix('weight')}scale": scale}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.quantization_config = {"quant_method": METHOD}
    config.to_json_file(folder / "config.json", use_diff=False)
    return str(folder), plain


@pytest.fixture
def path(checkpoint):
    return checkpoint[0]


def test_a_quantised_checkpoint_is_proved_and_ablated_at_the_activations(checkpoint):
    path, plain = checkpoint
    engine, oracle = Engine.load(path), Oracle(plain)
    assert quantisation(engine.model) == METHOD
    assert isinstance(engine.architecture.query_projections[0], Int8Linear)
    # Quantised models are held to a wide tolerance for those that round activations; these need none of it.
    assert max(proof.error for proof in engine.check().proofs) < FLOAT32
    assert engine.capabilities == Capabilities()
    for ablation in (UNDIFFERENTIATED_ATTENTION, SCALING_CONTRIBUTION):
        for group in GROUPS:
            with torch.no_grad(), engine.ablated(group, ablation) as model:
                ours = model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0, -1]
            slow = oracle.run(PROMPT, group, ablation).logits
            assert float((ours - slow).abs().max() / slow.abs().max()) < FLOAT32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_its_own_dtype_is_kept_whatever_is_asked_and_it_is_never_moved(path, dtype, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "to", None)  # bitsandbytes and GPTQ refuse to be moved
    ASKED.clear()
    engine = Engine.load(path, dtype=dtype)
    assert engine.dtype == torch.float32
    assert set(ASKED) == {torch.float32}
    assert engine.model.get_parameter("model.layers.0.self_attn.q_proj.weight").dtype == torch.int8
    stored = settings_of(engine, AuditConfig("m", "p", dtype=dtype), {"all": PROMPTS})
    assert (stored["quantisation"], stored["dtype"]) == (METHOD, "float32")


def test_what_is_loaded_twice_from_one_quantised_base_shares_its_weights(path):
    with bases_shared():
        first, second = Engine.load(path), Engine.load(path)
    assert set(first.model.parameters()) == set(second.model.parameters())
    assert set(first.model.modules()).isdisjoint(second.model.modules())
    alone, *shared = (ships(each, PROMPTS, UNDIFFERENTIATED_ATTENTION) for each in (Engine.load(path), first, second))
    assert all(table.values.equal(alone.values) for table in shared)


def test_fingerprints_tell_quantised_weights_and_their_scales_wherever_they_lie(path, tmp_path):
    first = Engine.load(path)
    for change in ("weight", "scale"):
        other = Path(shutil.copytree(path, tmp_path / change))
        tensors = load_file(f"{path}/model.safetensors")
        tensors[f"model.layers.1.self_attn.q_proj.{change}"][0, 0] += 1
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
        assert fingerprint(Engine.load(str(other), check=False)) != fingerprint(first)
    kept = ("embed_tokens", "norm", "rotary_emb", "layers.0", "layers.2")
    places = {**dict.fromkeys((f"model.{part}" for part in kept), "cpu"), "model.layers.1": "disk", "lm_head": "cpu"}
    offloaded = Engine.load(path, device_map=places)
    assert offloaded.model.get_parameter("model.layers.1.self_attn.q_proj.weight").is_meta
    assert fingerprint(offloaded) == fingerprint(first)
    tables = [ships(engine, PROMPTS, UNDIFFERENTIATED_ATTENTION).values for engine in (first, offloaded)]
    assert torch.allclose(*tables, atol=1e-6, rtol=0)


# Methods that round activations too


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_rounded_activations_pass_the_proofs_within_their_rounding():
    """A model of torch's dynamic quantisation: each activation is rounded by the largest of its batch."""
    plain = model_of("llama_gqa")
    with torch.no_grad():  # no head to be rounded, as everywhere
        model = quantize_dynamic(plain, {name for name, _ in plain.named_modules() if name.endswith("proj")})
    for module in model.modules():
        if hasattr(module, "_packed_params"):
            module.version = 3  # 8 bits, as ROUNDED is for; torch's later versions round activations to 7
    model.is_quantized, model.quantization_method = True, "dynamic"
    engine = Engine(model, tokenizer())
    report = engine.check()
    assert report.passed
    errors = [proof.error for proof in report.proofs]
    assert 1e-3 < max(errors) < ROUNDED  # as plain float32 it would lose its quick paths; a wrong head is off by 1
    # What the heads say is exact: the rounding is in the projections around them.
    words = ("other heads", "uniform", "before what the heads say is projected")
    exact = [proof for proof in report.proofs if any(word in proof.name for word in words)]
    assert len(exact) == 8  # six kinds leave the other heads alone
    assert max(proof.error for proof in exact) < FLOAT32
    assert {proof.tolerance for proof in exact} == {1e-2}
    # Packed parameters have a fingerprint too.
    first = fingerprint(engine)
    assert len(generate(engine, PROMPTS, 4, [(Head(0, 1),), ()], UNDIFFERENTIATED_ATTENTION)) == 2
    assert fingerprint(engine) == first != fingerprint(Engine(model_of("llama_gqa"), tokenizer()))


def test_a_wrong_head_is_refused_in_a_quantised_model_too(path, monkeypatch):
    ablate = attention._ablate

    def next_head(tensor, before, ablation, selected, head_dimension):
        return ablate(tensor, before, ablation, selected.roll(1, dims=1), head_dimension)

    monkeypatch.setattr(attention, "_ablate", next_head)
    with pytest.raises(UnsupportedModelError, match="silences it"):
        Engine.load(path)


def quantised_by(method, model, **settings):
    """A model that says of itself that it is quantised, which changes none of its numbers."""
    model = copy.deepcopy(model)
    model.is_quantized, model.quantization_method = True, method
    model.config.quantization_config = settings
    return Engine(model, tokenizer())


def test_only_methods_that_may_round_activations_are_held_to_a_wide_tolerance():
    model = model_of("llama_gqa")
    narrow = [quantised_by("gptq", model), quantised_by("bitsandbytes", model, load_in_4bit=True)]
    wide = [quantised_by("bitsandbytes", model), quantised_by("fbgemm_fp8", model)]
    wide.append(quantised_by("quanto", model, activations="int8"))
    assert {tolerances(engine) for engine in narrow} == {(1e-2, 1e-2)}
    assert {tolerances(engine) for engine in wide} == {(1e-2, ROUNDED)}
    assert tolerances(Engine(model, tokenizer())) == (1e-4, 1e-4)


@pytest.mark.parametrize("method", ["gptq", "fbgemm_fp8"])
def test_weak_sinks_that_are_dropped_are_refused_in_quantised_models_too(method, monkeypatch):
    """Their share is some percent of what heads say, less than rounded activations move a block's output."""
    model = copy.deepcopy(built("gpt_oss"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.sub_(3.0)
    assert quantised_by(method, model).check().passed

    def without_sinks(module, query, key, value, mask, scaling, dropout, keywords):
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)

    monkeypatch.setattr(attention, "_attend", without_sinks)
    with pytest.raises(UnsupportedModelError, match="eager attention, layer by layer, before what the heads say"):
        quantised_by(method, model).check()


def test_a_part_that_is_wrong_by_some_percent_is_refused_where_only_weights_are_rounded():
    model = model_of("llama_gqa")
    for layer in model.model.layers:  # a block whose output is no sum of its heads' parts
        layer.self_attn.register_forward_hook(lambda _, __, given: (given[0] + 0.05 * given[0].abs(), *given[1:]))
    assert quantised_by("fbgemm_fp8", model).check()
    with pytest.raises(UnsupportedModelError, match="by its own part alone"):
        quantised_by("gptq", model).check()
