"""Products of Gaussian posteriors, against dense matrices and against the pooled posterior of linear regression."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aggregators.core import posterior
from aggregators.core.posterior import Block, Posterior, Prior, Product, Span, damped, posteriors, product, unflat

SHAPES = {"weight": torch.Size([2, 3]), "none": torch.Size([0, 4]), "scale": torch.Size([])}
D = 7


def random_blocks(clients: int, rank: int, seed: int = 0) -> list[Block]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [Block(normal(D), normal(D).square(), normal(D, rank)) for _ in range(clients)]


def on_spans(block: Block) -> Posterior:
    """A client that holds `block` as parameters of SHAPES."""

    def read(span: Span) -> Block:
        offset = {"weight": 0, "none": 6, "scale": 6}[span.name]
        return Block(*(field[offset + span.start : offset + span.stop] for field in block))

    return read


def fixed(centre: Tensor, precision: float, shared: bool) -> Prior:
    return Prior(lambda span: span.of(unflat(centre, SHAPES)), precision, shared)


def whole(merged: Product) -> Tensor:
    return posterior.flat(merged.mean, SHAPES)


def dense_product(blocks: list[Block], centre: Tensor, precision: float, shared: bool) -> Tensor:
    """[Σ Λ_k − (K − 1) λI]^{-1} [Σ Λ_k θ_k − (K − 1) λ c] where Λ_k contains the prior; once λ and λc else."""
    eye = torch.eye(D, dtype=torch.float64)
    own = precision * eye if shared else 0 * eye
    precisions = [block.diagonal.diag() + block.factor @ block.factor.T + own for block in blocks]
    times = -(len(blocks) - 1) if shared else 1
    matrix = torch.stack(precisions).sum(0) + times * precision * eye
    right = sum(p @ block.mean for p, block in zip(precisions, blocks, strict=True)) + times * precision * centre
    return torch.linalg.solve(matrix, right)


@given(st.integers(1, 4), st.integers(0, 5), st.booleans(), st.floats(1e-3, 10), st.integers(0, 1000))
def test_the_product_is_the_dense_solve(clients: int, rank: int, shared: bool, precision: float, seed: int) -> None:
    blocks = random_blocks(clients, rank, seed)
    centre = torch.linspace(-1, 1, D, dtype=torch.float64)
    merged = product([on_spans(block) for block in blocks], fixed(centre, precision, shared), SHAPES)
    torch.testing.assert_close(whole(merged), dense_product(blocks, centre, precision, shared), rtol=1e-9, atol=1e-10)


def test_the_product_does_not_depend_on_the_size_of_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = [on_spans(block) for block in random_blocks(3, 2)]
    prior = fixed(torch.zeros(D, dtype=torch.float64), 0.5, shared=False)
    at_once = whole(product(clients, prior, SHAPES))
    monkeypatch.setattr(posterior, "BLOCK", 2)
    torch.testing.assert_close(whole(product(clients, prior, SHAPES)), at_once, rtol=1e-12, atol=1e-14)


def test_linear_regression_on_subsets_gives_the_pooled_posterior_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, D, generator=generator, dtype=torch.float64)
    targets = inputs @ torch.randn(D, generator=generator, dtype=torch.float64) + 0.1
    alpha, beta, eye = 0.3, 5.0, torch.eye(D, dtype=torch.float64)

    def fitted(rows: slice) -> Tensor:
        x, y = inputs[rows], targets[rows]
        return torch.linalg.solve(alpha * eye + beta * x.T @ x, beta * x.T @ y)

    rows = [slice(0, 15), slice(15, 30), slice(30, 40)]
    blocks = [Block(fitted(r), torch.zeros(D).double(), beta**0.5 * inputs[r].T) for r in rows]
    clients = [lambda span, block=block: on_spans(padded(block, 15))(span) for block in blocks]
    merged = whole(product(clients, fixed(torch.zeros(D).double(), alpha, shared=True), SHAPES))
    assert (merged - fitted(slice(0, 40))).norm() < 1e-10 * merged.norm()


def padded(block: Block, rank: int) -> Block:
    return block._replace(factor=torch.nn.functional.pad(block.factor, (0, rank - block.factor.shape[1])))


@pytest.mark.parametrize("shared", [True, False])
def test_coordinates_without_information_take_the_centre(shared: bool) -> None:
    blocks = [Block(block.mean, block.diagonal.clone(), block.factor.clone()) for block in random_blocks(3, 2)]
    for block in blocks:
        block.diagonal[2], block.factor[2] = 0, 0
    centre = torch.arange(D, dtype=torch.float64)
    merged = whole(product([on_spans(block) for block in blocks], fixed(centre, 0.7, shared), SHAPES))
    assert merged[2] == centre[2]
    assert (merged[[0, 1, 3]] != centre[[0, 1, 3]]).all()


def test_without_any_information_the_product_is_its_prior() -> None:
    blocks = [Block(block.mean, 0 * block.diagonal, 0 * block.factor) for block in random_blocks(2, 1)]
    clients = [on_spans(block) for block in blocks]
    centre = torch.ones(D, dtype=torch.float64)
    merged = product(clients, fixed(centre, damped(clients, SHAPES, 0.0), shared=False), SHAPES)
    assert torch.equal(whole(merged), centre)
    assert merged.damped_share == 1


def test_damping_is_relative_to_the_mean_precision() -> None:
    blocks = random_blocks(3, 2)
    clients = [on_spans(block) for block in blocks]
    total = sum(float((block.diagonal + (block.factor @ block.factor.T).diagonal()).sum()) for block in blocks)
    assert damped(clients, SHAPES, 0.25) == pytest.approx(0.25 * total / D, rel=1e-12)


def test_undamped_singular_posteriors_are_still_solved() -> None:
    blocks = [block._replace(diagonal=0 * block.diagonal) for block in random_blocks(2, 1)]
    clients = [on_spans(block) for block in blocks]
    prior = fixed(torch.zeros(D, dtype=torch.float64), damped(clients, SHAPES, 0.0), shared=False)
    merged = whole(product(clients, prior, SHAPES))
    for block in blocks:  # along its own factor, each client gets what it wants
        torch.testing.assert_close(block.factor.T @ merged, block.factor.T @ block.mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_the_product_of_posteriors_with_their_prior_is_the_product(shared: bool) -> None:
    blocks, centre, precision = random_blocks(3, 2), torch.ones(D, dtype=torch.float64), 0.4
    clients = [on_spans(block) for block in blocks]
    prior = fixed(centre, precision, shared)
    with_prior = posteriors(clients, prior, SHAPES)
    likelihoods = [
        Block(with_prior.mean[k], with_prior.diagonal[k] - precision, with_prior.factor[k]) for k in range(3)
    ]
    expected = dense_product(likelihoods, centre, precision, shared=True)
    torch.testing.assert_close(whole(product(clients, prior, SHAPES)), expected, rtol=1e-9, atol=1e-10)


def test_flat_and_unflat_are_inverse() -> None:
    vector = torch.arange(D, dtype=torch.float64)
    assert torch.equal(posterior.flat(unflat(vector, SHAPES), SHAPES), vector)
    parts = partial(torch.full, fill_value=2.0)
    assert torch.equal(posterior.flat({name: parts(shape) for name, shape in SHAPES.items()}, SHAPES), parts((D,)))
