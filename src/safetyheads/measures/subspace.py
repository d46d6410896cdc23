"""Computes the angles of Eq 11 between the dominant directions of two stacks of states, in float64."""

from typing import Literal

import torch
from torch import Tensor

from safetyheads.errors import InputError

Space = Literal["prompt", "representation"]
"""``prompt``: left singular vectors (the released code); ``representation``: right ones (the text, Sec 4.1)."""

# Below this ratio of the last kept to the first singular value, a Gram matrix loses the last vector's digits: its
# eigenvalues have the square of the ratio, against float64's 1e-16. The full decomposition is used instead.
_GRAM_RATIO = 1e-5


def dominant_directions(states: Tensor, space: Space, rank: int = 1, centred: bool = False) -> Tensor:
    """The first singular vectors of each stack of last-token states [..., n_prompts, d_model].

    Orthonormal columns, float64: [..., n_prompts, rank] or [..., d_model, rank].
    """
    n_prompts, d_model = states.shape[-2:]
    refuse_rank(rank, n_prompts, space, centred, d_model)
    stack = states.double()
    if centred:
        stack = stack - stack.mean(dim=-2, keepdim=True)
    # The Gram matrix of the shorter side: its vectors are the left ones of a wide stack, the right ones of a tall one.
    wide = n_prompts <= d_model
    eigenvalues, eigenvectors = torch.linalg.eigh(stack @ stack.mT if wide else stack.mT @ stack)  # ascending
    found = eigenvectors[..., -rank:].flip(-1)
    first, last = eigenvalues[..., -1], eigenvalues[..., -rank]
    if not bool((last <= first * _GRAM_RATIO**2).any()):
        return found if wide == (space == "prompt") else torch.linalg.qr((stack.mT if wide else stack) @ found).Q
    left, _, right = torch.linalg.svd(stack, full_matrices=False)
    return left[..., :rank] if space == "prompt" else right.mT[..., :rank]


def refuse_rank(rank: int, n_prompts: int, space: Space, centred: bool, d_model: int | None = None) -> None:
    """Refuse a rank that a stack of ``n_prompts`` cannot have, or at which every angle is 0.

    Centring takes one dimension away. As many vectors as a space has dimensions span all of it, with and without the
    ablation.
    """
    if n_prompts < 2:
        raise InputError("Generalized Ships needs at least two prompts: with one, every singular vector is the same")
    largest = n_prompts - centred - (space == "prompt")
    if d_model is not None:
        largest = min(largest, d_model - (space == "representation"))
    if not 1 <= rank <= largest:
        what = f"{n_prompts} prompts{', centred,' if centred else ''} in {space} space"
        allowed = f"allow 1 to {largest}" if largest else "are too few for any"
        raise InputError(f"rank {rank} is out of range: {what} {allowed}")


def principal_angle_sum(first: Tensor, second: Tensor) -> Tensor:
    """Sum of the principal angles between subspaces with orthonormal columns [..., n, rank], in degrees (Eq 11).

    Each angle is atan2(sine, cosine), the sine from the part of ``second`` outside ``first``: the arccosine alone
    cannot resolve small angles (in float32, none under 0.02 degrees).
    """
    overlap = first.mT @ second
    outside = second - first @ overlap
    cosines = torch.linalg.svdvals(overlap)  # descending
    sines = torch.linalg.svdvals(outside).flip(-1)  # ascending, so the pairs belong together
    return torch.rad2deg(torch.atan2(sines, cosines)).sum(dim=-1)
