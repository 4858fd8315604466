"""The self-supervised objective, against autograd, dense matrices and enumeration."""

from __future__ import annotations

from itertools import combinations, repeat

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from aggregators.core.exchange import LostRound
from aggregators.core.masked import Mask, MaskedLoss, MaskSize, Precision, conditional, descend, draw, minimise
from aggregators.core.posterior import Block

ALPHA = 0.3
PRIOR = Normal(torch.zeros((), dtype=torch.float64), torch.tensor(ALPHA, dtype=torch.float64) ** -0.5)


def cohort(clients: int = 3, size: int = 5, rank: int = 2, seed: int = 0, correlation: float = 1.0) -> Block:
    """K posteriors that contain the prior N(0, 1/ALPHA)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    diagonal = normal(clients, size).square() + ALPHA
    return Block(normal(clients, size), diagonal, correlation * normal(clients, size, rank))


def precisions(block: Block) -> Tensor:
    return torch.diag_embed(block.diagonal) + block.factor @ block.factor.mT


def centre(block: Block) -> Tensor:
    return torch.zeros_like(block.mean[0])


def every_mask(size: int) -> list[Mask]:
    """All sets of each number of coordinates: a mask's number is then uniform on 1 … D."""
    return [Mask(torch.tensor(list(combinations(range(size), m)))) for m in range(1, size + 1)]


def drawn(block: Block, masked: MaskSize, window: int | None = None, masks: int = 4) -> list[Mask]:
    return draw(torch.Generator().manual_seed(1), block.mean.shape[1], masks, masked, window)


def loss(block: Block, masks: list[Mask], precision: Precision = "marginal") -> MaskedLoss:
    return MaskedLoss.of(block, masks, centre(block), ALPHA, precision)


def dense_loss(block: Block, masks: list[Mask], theta: Tensor, precision: Precision) -> Tensor:
    """Eq. 7 by its letters: conditionals of dense Gaussians, one mask and client at a time."""
    size, clients = block.mean.shape[1], len(block.mean)
    groups = []
    for group in masks:
        values = []
        for number, masked in enumerate(group.masked):
            others = [j for j in range(size) if j not in masked.tolist()]
            rest = torch.tensor(others, dtype=torch.int64) if group.rest is None else group.rest[number]
            for mean, full in zip(block.mean, precisions(block), strict=True):
                among = full[masked][:, masked]
                shift = torch.linalg.solve(among, full[masked][:, rest] @ (theta - mean)[rest])
                p = among.diagonal() if precision == "paper" else 1 / torch.linalg.inv(among).diagonal()
                client = Normal(mean[masked] - shift, p**-0.5).log_prob(theta[masked])
                prior = PRIOR.log_prob(theta[masked])
                values.append((client - (clients - 1) / clients * prior).sum() / len(masked))
        groups.append(torch.stack(values).sum() / len(group.masked))
    return -torch.stack(groups).mean()


windows = st.sampled_from([None, 3, 4])
sizes = st.sampled_from([1, 2, 3, 0.4, 1.0, "uniform"])
kinds = st.sampled_from(["marginal", "paper"])


@given(sizes, windows, kinds, st.integers(0, 100), st.integers(0, 3))
def test_the_loss_is_that_of_dense_gaussians(
    masked: MaskSize, window: int | None, precision: Precision, seed: int, rank: int
) -> None:
    block = cohort(seed=seed, rank=rank)
    masks, theta = drawn(block, masked, window), torch.linspace(-1, 1, 5, dtype=torch.float64)
    torch.testing.assert_close(
        loss(block, masks, precision).value(theta), dense_loss(block, masks, theta, precision), rtol=1e-9, atol=1e-9
    )


@given(sizes, windows, kinds, st.integers(0, 100))
def test_the_gradient_is_autograds(masked: MaskSize, window: int | None, precision: Precision, seed: int) -> None:
    objective = loss(cohort(seed=seed), drawn(cohort(), masked, window), precision)
    theta = torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad(objective.value(theta), theta)
    torch.testing.assert_close(objective.gradient(theta.detach()), expected, rtol=1e-9, atol=1e-10)


def test_the_loss_over_all_masks_of_uniform_number_is_the_log_density() -> None:
    block = cohort()
    objective = loss(block, every_mask(5))
    for theta in torch.randn(3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64):
        full = [
            MultivariateNormal(mean, precision_matrix=p) for mean, p in zip(block.mean, precisions(block), strict=True)
        ]
        prior = PRIOR.log_prob(theta).sum()
        density = sum(gaussian.log_prob(theta) for gaussian in full) - 2 * prior
        torch.testing.assert_close(-5 * objective.value(theta), density, rtol=1e-10, atol=1e-10)


def test_over_all_masks_of_uniform_number_the_minimum_is_the_product() -> None:
    block = cohort()
    matrix = precisions(block).sum(0) - 2 * ALPHA * torch.eye(5)
    product = torch.linalg.solve(matrix, torch.einsum("kij,kj->i", precisions(block), block.mean))
    found = minimise(loss(block, every_mask(5)), centre(block))
    torch.testing.assert_close(found, product, rtol=1e-8, atol=1e-10)


def test_with_all_masked_and_the_papers_precision_the_minimum_is_diagonal_fisher_merging() -> None:
    block = cohort()
    diagonals = precisions(block).diagonal(dim1=1, dim2=2)
    merged = (diagonals * block.mean).sum(0) / (diagonals.sum(0) - 2 * ALPHA)
    found = minimise(loss(block, [Mask(torch.arange(5)[None])], "paper"), centre(block))
    torch.testing.assert_close(found, merged, rtol=1e-8, atol=1e-10)


def test_descent_ends_where_conjugate_gradients_do() -> None:
    objective = loss(cohort(), drawn(cohort(), 2, masks=30))
    theta = descend(repeat(objective), centre(cohort()), steps=3000, learning_rate=0.05, momentum=0.9)
    torch.testing.assert_close(theta, minimise(objective, centre(cohort())), rtol=1e-6, atol=1e-7)


def test_descent_that_diverges_is_a_lost_round_in_words() -> None:
    with pytest.raises(LostRound, match="diverged at learning rate 1e\\+06: lower it"):
        descend(repeat(loss(cohort(), drawn(cohort(), 2))), centre(cohort()), 200, 1e6, 0.9)


def test_a_loss_without_a_minimum_is_a_lost_round_in_words() -> None:
    block = cohort(clients=2, rank=1, correlation=8.0)
    block = block._replace(diagonal=torch.full((2, 5), ALPHA, dtype=torch.float64))
    with pytest.raises(LostRound, match="no minimum: mask more coordinates"):
        minimise(loss(block, [Mask(torch.tensor([[0], [1], [2], [3], [4]]))]), centre(block))


def test_masks_are_distinct_coordinates_within_their_window() -> None:
    (mask,) = draw(torch.Generator().manual_seed(0), 50, 6, 4, 10)
    assert mask.masked.shape == (6, 4)
    assert mask.rest is not None
    assert mask.rest.shape == (6, 6)
    rows = torch.cat([mask.masked, mask.rest], 1).sort(1).values
    assert (rows.diff(dim=1) > 0).all()


def test_uniform_masks_have_every_number_of_coordinates() -> None:
    masks = draw(torch.Generator().manual_seed(0), 4, 200, "uniform", None)
    assert {mask.masked.shape[1] for mask in masks} == {1, 2, 3, 4}
    assert all(mask.rest is None for mask in masks)


def test_a_share_masks_at_least_one_coordinate() -> None:
    (mask,) = draw(torch.Generator().manual_seed(0), 10, 2, 0.01, None)
    assert mask.masked.shape == (2, 1)


def test_conditionals_form_no_matrix_of_the_masked() -> None:
    block, sizes = cohort(clients=1, size=400, rank=1), []

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
            return out

    (mask,) = draw(torch.Generator().manual_seed(0), 400, 1, 300, None)
    with Watched():
        conditional(block, mask, "marginal")
    assert max(sizes) <= 400


def test_descent_to_where_the_loss_is_no_number_is_a_lost_round_though_theta_is_finite() -> None:
    objective = loss(cohort(), drawn(cohort(), 2))
    with pytest.raises(LostRound, match="diverged"):
        descend(repeat(objective), centre(cohort()), steps=2, learning_rate=1e160, momentum=0.0)
