"""Systems of sums of Kronecker products against dense solves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aggregators.core.kronecker import Pair, solve
from aggregators.core.solve import cg


def positive(size: int, seed: int, spread: float = 1.0) -> Tensor:
    """A matrix whose eigenvalues span `spread` orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(size, size, generator=generator).double()).Q
    return torch.einsum("ij,j,kj->ik", vectors, torch.logspace(0, -spread, size, dtype=torch.float64), vectors)


def dense(pairs: list[Pair], right: Tensor, damping: float) -> Tensor:
    total = torch.stack([torch.kron(pair.b, pair.a) for pair in pairs]).sum(0)
    total += damping * total.trace() / len(total) * torch.eye(len(total))
    solved: Tensor = torch.linalg.solve(total, right.reshape(-1))
    return solved.reshape(right.shape)


def right(rows: int, columns: int, seed: int = 9) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double()


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    num=st.integers(1, 4),
    damping=st.sampled_from([0.0, 1e-3, 1.0]),
    seed=st.integers(0, 99),
)
def test_it_is_the_dense_solution(rows: int, columns: int, num: int, damping: float, seed: int) -> None:
    pairs = [Pair(positive(rows, seed + k, 3), positive(columns, seed - k, 2)) for k in range(num)]
    found = solve(pairs, right(rows, columns), damping, 1e-14, 2000)
    torch.testing.assert_close(found.x, dense(pairs, right(rows, columns), damping), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shared", ["a", "b", "both, by factors"])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_pairs_that_share_a_factor_are_solved_in_one_iteration(shared: str, damping: float) -> None:
    a, b = positive(7, 0, 5), positive(4, 1, 5)
    pairs = {
        "a": [Pair(positive(4, k, 3), (k + 1) * a) for k in range(3)],
        "b": [Pair((k + 1) * b, positive(7, k, 3)) for k in range(3)],
        "both, by factors": [Pair((k + 1) * b, (5 - k) * a) for k in range(3)],
    }[shared]
    found = solve(pairs, right(4, 7), damping, 1e-9, 100)
    assert found.iterations == 1
    torch.testing.assert_close(found.x, dense(pairs, right(4, 7), damping), rtol=1e-5, atol=1e-5)


def test_it_converges_where_plain_conjugate_gradients_do_not() -> None:
    """Four pairs, each 10 % its own, of condition number 1e10."""
    pairs = [Pair(positive(20, 0, 5) + 0.1 * positive(20, k, 5), positive(30, 1, 5)) for k in range(2, 6)]
    pairs = [Pair(pair.b, pair.a + 0.1 * positive(30, k, 5)) for k, pair in enumerate(pairs, 7)]
    plain = cg(lambda v: torch.stack([pair(v) for pair in pairs]).sum(0), right(20, 30), 1e-8, 150)
    assert plain.residual > 0.1
    found = solve(pairs, right(20, 30), 0.0, 1e-8, 150)
    assert found.residual <= 1e-8


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_directions_that_no_a_reaches_are_zero(damping: float) -> None:
    alive = torch.tensor([1.0, 0, 1, 1, 0]).double()
    pairs = [Pair(positive(3, k), positive(5, k) * torch.outer(alive, alive)) for k in range(2)]
    pull = torch.stack([pair(right(3, 5)) for pair in pairs]).sum(0)
    found = solve(pairs, pull, damping, 1e-12, 500)
    assert found.x[:, alive == 0].abs().max() < 1e-12
    if not damping:
        torch.testing.assert_close(found.x[:, alive == 1], right(3, 5)[:, alive == 1])


@given(seed=st.integers(0, 99))
def test_what_rounding_to_float32_adds_to_a_low_rank_is_no_direction(seed: int) -> None:
    axes = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)).double()).Q
    seen, unseen = axes[:6].view(2, 3, 8), axes[6:]
    pairs = [Pair(positive(4, seed + k), (rows.T @ rows).float().double()) for k, rows in enumerate(seen)]
    pull = torch.stack([pair(right(4, 8, seed + k)) for k, pair in enumerate(pairs)]).sum(0)
    found = solve(pairs, pull, 0.0, 1e-9, 150).x
    assert (found @ unseen.T).abs().max() < 1e-5
    assert (found @ axes[:6].T).abs().max() > 0.1


@pytest.mark.parametrize("zero", ["a", "b"])
def test_without_any_information_it_is_zero(zero: str) -> None:
    pair = Pair(positive(3, 0), positive(5, 1))._replace(
        **{zero: torch.zeros(*((5, 5) if zero == "a" else (3, 3))).double()}
    )
    found = solve([pair], pair(right(3, 5)), 0.1, 1e-9, 100)
    assert (found.iterations, found.residual, found.x.any().item()) == (0, 0, False)
