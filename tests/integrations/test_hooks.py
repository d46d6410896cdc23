"""Other tools' hooks: a plain model is ablated as the engine does it, and wrong hooks are named."""

import pytest
import torch
from tiny_models import model_of

from safetyheads import (
    Ablation,
    Engine,
    Head,
    InputError,
    head_columns,
    hooks_for,
    parse_heads,
    transformer_lens_hooks,
    verify_hook,
)
from safetyheads.demo import checkpoint_path

HEAD, D_HEAD = Head(1, 3), 16


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint_path("aligned_a"), dtype=torch.float32)


def on_input(model, change, layer=1):
    """A hook on the input of the output projection, as a function that gives its handle."""

    def hook(_, arguments):
        z = arguments[0].clone()
        change(z)
        return (z, *arguments[1:])

    return lambda: model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(hook)


def on_output(model, change, layer=1):
    def hook(_, __, output):
        out = output.clone()
        change(out)
        return out

    return lambda: [model.model.layers[layer].self_attn.o_proj.register_forward_hook(hook)]


COLUMNS = slice(3 * D_HEAD, 4 * D_HEAD)
WRONG = {
    "nothing happens": (on_input, lambda z: None),
    "head 1-2 ablated where head 1-3": (on_input, lambda z: z[..., 2 * D_HEAD : 3 * D_HEAD].zero_()),
    "axis of tokens": (on_input, lambda z: z[:, 3].zero_()),
    "instead of [heads, d_head]": (on_input, lambda z: z.view(*z.shape[:2], D_HEAD, 8)[..., 3].zero_()),
    "after the output projection": (on_output, lambda out: out[..., COLUMNS].zero_()),
    "something else": (on_output, lambda out: out.add_(0.1)),
}


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_hook_is_named(model, said):
    place, change = WRONG[said]
    found = verify_hook(model, place(model, change), HEAD)
    assert not found.right
    (fault,) = found.faults
    assert fault.startswith("layer 1: ")
    assert said in fault


def test_a_right_hook_is_right_and_one_layer_too_many_is_told(model):
    right = on_input(model, lambda z: z[..., COLUMNS].zero_())
    found = verify_hook(model, right, "1-3")
    assert (found.right, found.faults) == (True, ())
    assert found.error < 1e-4

    further = on_input(model, lambda z: z[..., COLUMNS].zero_(), layer=2)
    found = verify_hook(model, lambda: [right(), further()], HEAD)
    assert found.faults == ("layer 2: head 2-3 ablated where no head should be",)
    with pytest.raises(InputError, match="a hook is a context manager"):
        verify_hook(model, lambda: None, HEAD)


@pytest.mark.parametrize("ablation", ["ua", "sc", "ua_key", "mean_query"])
def test_a_plain_model_is_ablated_as_the_engine_does_it_and_put_back(model, engine, ablation):
    tokens = torch.randint(5, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    before, function = model(tokens).logits, model.config._attn_implementation
    with hooks_for(model, "1-3,2-5", ablation) as ablated, torch.inference_mode():
        found = ablated(tokens).logits
    with engine.ablated("1-3,2-5", ablation) as expected, torch.inference_mode():
        assert torch.equal(found, expected(tokens).logits)
    assert model.config._attn_implementation == function
    assert torch.equal(before, model(tokens).logits)
    with pytest.raises(InputError, match="out of range"), hooks_for(model, "9-9", ablation):
        pass


@pytest.mark.parametrize("ablation", ["ua", "sc", "mean_head_output"])
def test_hooks_of_ours_pass_under_every_ablation(model, ablation):
    assert verify_hook(model, lambda: Engine(model, None).ablated("1-3,2-5", ablation), "1-3,2-5", ablation).right


def test_columns_are_the_heads_own(model):
    found = head_columns(model, "1-3,2-0")
    assert found == {
        HEAD: ("model.layers.1.self_attn.o_proj", COLUMNS),
        Head(2, 0): ("model.layers.2.self_attn.o_proj", slice(0, 16)),
    }


def test_grouped_heads_are_query_heads():
    model = model_of("llama_gqa")
    path, columns = head_columns(model, "1-2")[Head(1, 2)]

    def hook(_, arguments):
        z = arguments[0].clone()
        z[..., columns] = 0
        return (z,)

    assert verify_hook(model, lambda: model.get_submodule(path).register_forward_pre_hook(hook), "1-2").right


def test_hook_points_of_transformer_lens():
    (name, scale), (second, _) = transformer_lens_hooks("2-1,1-3,1-0", Ablation("scaling_contribution", 0.5))
    assert (name, second) == ("blocks.1.attn.hook_z", "blocks.2.attn.hook_z")
    z = torch.ones(2, 5, 8, 16)
    scaled = scale(z)
    assert (z == 1).all()
    assert scaled[0, 0, :, 0].tolist() == [0.5, 1, 1, 0.5, 1, 1, 1, 1]
    assert transformer_lens_hooks("0-1", "ua")[0][0] == "blocks.0.attn.hook_rot_q"
    assert transformer_lens_hooks("0-1", "ua", rotary=False)[0][0] == "blocks.0.attn.hook_q"
    with pytest.raises(InputError, match="use ua or sc"):
        transformer_lens_hooks("0-1", "mean_query")
    # Pairs of layer and head are what TransformerLens users have.
    assert parse_heads([(2, 26), (3, 1)]) == (Head(2, 26), Head(3, 1))
