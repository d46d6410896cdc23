"""Directions and angles against full decompositions, 60 digits, and turns of known size."""

import math

import mpmath
import numpy as np
import pytest
import torch

from safetyheads.errors import InputError
from safetyheads.measures.subspace import dominant_directions, principal_angle_sum

SPACES = ("prompt", "representation")


def gaussian(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthonormal(*shape, seed=0):
    return torch.linalg.qr(gaussian(*shape, seed=seed)).Q


def slow_directions(states, space, rank, centred):
    """One matrix at a time, by numpy's full decomposition."""
    found = []
    for stack in states.double().reshape(-1, *states.shape[-2:]).numpy():
        left, _, right = np.linalg.svd(stack - stack.mean(axis=0) if centred else stack)
        found.append(left[:, :rank] if space == "prompt" else right[:rank].T)
    return torch.tensor(np.array(found)).reshape(*states.shape[:-2], *found[0].shape)


def assert_same_vectors(found, expected, atol):
    # A singular vector's sign is anyone's.
    signs = (found * expected).sum(dim=-2, keepdim=True).sign()
    torch.testing.assert_close(found * signs, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (8, 8), (2, 3, 6, 10), (4, 10, 6)])
def test_directions_are_those_of_the_full_decomposition(shape, rank, centred, space):
    # The mean is large, so that centring changes the answer; float32, as the engine has its states.
    states = (gaussian(*shape) + 3 * gaussian(shape[-1], seed=1)).float()
    found = dominant_directions(states, space, rank, centred)
    # Float64 loses eps times the square of the largest over the kept singular value: 1e-13 here, and small gaps.
    assert_same_vectors(found, slow_directions(states, space, rank, centred), atol=1e-11)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.mT @ found, torch.eye(rank).double().expand(*shape[:-2], rank, rank))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("spare", [1, 3])
@pytest.mark.parametrize("tall", [False, True])
def test_directions_of_a_nearly_rank_deficient_stack_are_right(space, spare, tall):
    # In a Gram matrix the third value is 1e-14, and eps of 2e-16 beside it turns its vector by a hundredth.
    values = torch.tensor([1.0, 1e-3, 1e-7], dtype=torch.float64)
    left, right = orthonormal(3 + spare, 3), orthonormal(7, 3, seed=1)
    left, right = (right, left) if tall else (left, right)
    hard = left * values @ right.mT
    stack = torch.stack([gaussian(*hard.shape, seed=2), hard])  # one hard stack among easy ones
    found = dominant_directions(stack, space, rank=3)[1]
    # The decomposition of the stack itself turns it by eps / 1e-7.
    assert_same_vectors(found, left if space == "prompt" else right, atol=1e-7)


# Centring takes one prompt's worth of rank. In prompt space a rank of all usable prompts spans everything: the angle
# would be 0 whatever was ablated.
BOUNDS = [
    ("prompt", False, (4, 9), 3),
    ("prompt", True, (4, 9), 2),
    ("prompt", False, (9, 4), 4),
    ("prompt", True, (5, 4), 3),
    ("representation", False, (4, 9), 4),
    ("representation", True, (2, 9), 1),
    ("representation", False, (9, 4), 3),
    ("representation", True, (4, 4), 3),
]


@pytest.mark.parametrize(("space", "centred", "shape", "largest"), BOUNDS)
def test_the_largest_rank_is_what_the_stack_has(space, centred, shape, largest):
    states = gaussian(*shape)
    assert dominant_directions(states, space, largest, centred).shape[-1] == largest
    for rank in (largest + 1, 0, -1):
        with pytest.raises(InputError):
            dominant_directions(states, space, rank, centred)


def slow_angle_sum(first, second):
    """The definition, the arccosines of the overlap's singular values, with 60 digits."""
    with mpmath.workdps(60):
        bases = [mpmath.qr(mpmath.matrix(columns.tolist()), mode="skinny")[0] for columns in (first, second)]
        cosines = mpmath.svd_r(bases[0].T * bases[1], compute_uv=False)
        return float(sum(mpmath.degrees(mpmath.acos(min(cosine, mpmath.mpf(1)))) for cosine in cosines))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("apart", [1e-9, 1e-4, 0.3, 10.0])
def test_angles_are_the_arccosines_of_the_definition(rank, apart):
    first = orthonormal(7, rank)
    second = torch.linalg.qr(first + apart * gaussian(7, rank, seed=1)).Q
    found = float(principal_angle_sum(first, second))
    # Entries are rounded at 1e-16, so angles are known to about 1e-14 degrees.
    assert found == pytest.approx(slow_angle_sum(first, second), rel=1e-12, abs=1e-13)


def turned_by(*degrees):
    """Subspaces of the first axes, and the same with each axis turned towards one of its own outside."""
    rank = len(degrees)
    first, second = torch.eye(2 * rank, rank).double(), torch.zeros(2 * rank, rank).double()
    for column, angle in enumerate(degrees):
        second[column, column] = math.cos(math.radians(angle))
        second[rank + column, column] = math.sin(math.radians(angle))
    return first, second


@pytest.mark.parametrize(
    "degrees", [(1e-7,), (1e-7, 3e-7), (1e-12,), (30,), (10, 30), (30, 10), (5, 90, 1e-3), (89.9,)]
)
def test_a_known_turn_is_the_angle(degrees):
    # Sines of the wrong cosines would give 38 instead of 40 for 10 and 30.
    assert float(principal_angle_sum(*turned_by(*degrees))) == pytest.approx(sum(degrees), rel=1e-13)


def test_signs_and_the_order_of_the_two_do_not_matter_and_a_batch_is_each_of_it():
    first, batch = orthonormal(6, 2), orthonormal(3, 4, 6, 2, seed=1)
    found = principal_angle_sum(first, batch)
    assert (found.shape, found.dtype) == ((3, 4), torch.float64)
    for place in ((0, 0), (2, 3)):
        second = batch[place]
        for pair in ((first, second), (first, second * torch.tensor([-1.0, 1.0])), (second, first)):
            torch.testing.assert_close(principal_angle_sum(*pair), found[place])
