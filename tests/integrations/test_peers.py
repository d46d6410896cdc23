"""TransformerLens and nnsight give what the engine gives, under ablations that are exported to them.

They need an environment of their own: ``scripts/peers.sh`` makes it.
"""

import pytest
import torch

from safetyheads import Ablation, Engine, Head, head_columns, hooks_for, transformer_lens_hooks
from safetyheads.demo import checkpoint_path

pytestmark = pytest.mark.long
CHECKPOINT = str(checkpoint_path("aligned_a"))
GROUP = "1-3,2-5,2-1"
TOKENS = torch.randint(5, 200, (2, 9), generator=torch.Generator().manual_seed(0))
EXACT = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def engine():
    return Engine.load(CHECKPOINT)


@pytest.fixture
def plain():
    """A model of its own: nnsight gives the model that it wraps another forward method, which an engine refuses."""
    return Engine.load(CHECKPOINT, check=False).model


def ours(engine, ablation):
    with engine.ablated(GROUP, ablation) as model, torch.inference_mode():
        return model(TOKENS).logits


@pytest.mark.parametrize("ablation", ["sc", "ua"])
def test_transformer_lens_hooks_ablate_the_same_heads(engine, ablation):
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
    ablation = Ablation.parse(ablation, epsilon=0.25)
    theirs = bridge.boot_transformers(CHECKPOINT, tokenizer=engine.tokenizer, device="cpu", dtype=torch.float32)
    with torch.inference_mode():
        plain = theirs(TOKENS)
        found = theirs.run_with_hooks(TOKENS, fwd_hooks=transformer_lens_hooks(GROUP, ablation))
    torch.testing.assert_close(found, ours(engine, ablation), **EXACT)
    assert (found - plain).abs().max() > 0.1


def test_nnsight_reads_and_writes_a_heads_columns(engine, plain):
    nnsight = pytest.importorskip("nnsight")
    model = nnsight.NNsight(plain)
    places = [head_columns(plain, GROUP)[head] for head in (Head(1, 3), Head(2, 1), Head(2, 5))]
    by_path = {path: [columns for other, columns in places if other == path] for path, _ in places}
    with torch.inference_mode(), model.trace(TOKENS):
        for path, columns in by_path.items():
            for column in columns:
                model.get(path).input[..., column] = 0
        found = model.lm_head.output.save()
    torch.testing.assert_close(found, ours(engine, Ablation("scaling_contribution", 0.0)), **EXACT)


def test_a_plain_ablation_holds_inside_a_trace_of_nnsight(engine, plain):
    nnsight = pytest.importorskip("nnsight")
    expected = ours(engine, "ua")
    model = nnsight.NNsight(plain)
    with hooks_for(plain, GROUP, "ua"), torch.inference_mode(), model.trace(TOKENS):
        found = model.lm_head.output.save()
    torch.testing.assert_close(found, expected, **EXACT)
