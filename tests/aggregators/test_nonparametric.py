"""BBP-MAP matching of units, and the order in which a network's groups are matched."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from math import factorial, log

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from aggregators.core.nonparametric import Atoms, Matched, Prior, assigned, gains, match_units

PAPER = Prior(gamma=7.0, sigma0=1.0)
WIDE = Prior(gamma=1.0, sigma0=100.0)

seeds = st.integers(0, 2**31)
widths = st.lists(st.integers(1, 6), min_size=1, max_size=4)
priors = st.builds(
    Prior, st.floats(0.1, 10), st.floats(0.3, 100), st.integers(1, 4), st.none() | st.integers(1, 12)
)  # with every setting


def cohort(sizes: Sequence[int], seed: int, d: int = 3) -> list[Tensor]:
    """Clients of these widths with weights at random."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, d, generator=generator, dtype=torch.float64) for size in sizes]


def precisions(weights: Sequence[Tensor], seed: int) -> list[float]:
    return [float(s) for s in np.random.default_rng(seed).uniform(0.3, 3, len(weights))]


def sweeping(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- the formulas, unit by unit --------------------------------------------------------------------------------------


def members(units: Sequence[Tensor], but: int | None = None) -> list[list[tuple[int, int]]]:
    """Of each atom its (client, unit) pairs, without those of a client, and without atoms that only that one has."""
    found: dict[int, list[tuple[int, int]]] = {}
    for j, own in enumerate(units):
        for row, atom in enumerate(own.tolist()):
            found.setdefault(atom, []).extend([(j, row)] if j != but else [])
    return [found[atom] for atom in sorted(found) if found[atom]]


def odds(count: int, clients: int, prior: Prior) -> float:
    popular = min(count, prior.popularity)
    return log(popular / (clients - popular))


def gain_by_loops(
    weights: Sequence[Tensor], s: Sequence[float], atoms: Sequence[Sequence[tuple[int, int]]], j: int, prior: Prior
) -> np.ndarray:
    """The gains of client j as the definition has them, with as many new atoms as it has units."""
    s0, clients = 1 / prior.sigma0**2, len(weights)
    table = []
    for row in weights[j]:
        hat, values = s[j] * row, []
        for pairs in atoms:
            g = sum((s[k] * weights[k][unit] for k, unit in pairs), torch.zeros_like(row))
            total = s0 + sum(s[k] for k, _ in pairs)
            fit = (hat + g).square().sum() / (s[j] + total) - g.square().sum() / total
            values.append(float(fit) + 2 * odds(len(pairs), clients, prior))
        for q in range(1, len(weights[j]) + 1):
            values.append(float(hat.square().sum() / (s0 + s[j])) - 2 * log(q) + 2 * log(prior.gamma / clients))
        table.append(values)
    return np.array(table)


def objective(weights: Sequence[Tensor], s: Sequence[float], units: Sequence[Tensor], prior: Prior) -> float:
    """Twice the log posterior, from the definition."""
    clients, total = len(weights), 0.0
    for pairs in members(units):
        g = torch.stack([s[k] * weights[k][unit] for k, unit in pairs]).sum(0)
        total += float(g.square().sum()) / (prior.sigma0**-2 + sum(s[k] for k, _ in pairs))
        total += 2 * log(prior.gamma / clients) + 2 * sum(odds(c, clients, prior) for c in range(1, len(pairs)))
    alone = [sum(pairs[0][0] == k for pairs in members(units) if len(pairs) == 1) for k in range(clients)]
    return total - 2 * sum(log(factorial(n)) for n in alone)


def atoms_of(weights: Sequence[Tensor], s: Sequence[float], pairs: Sequence[Sequence[tuple[int, int]]]) -> Atoms:
    found = Atoms.none(weights[0])
    for atom, several in enumerate(pairs):
        for k, unit in several:
            found = found.add(weights[k][unit : unit + 1], torch.tensor([atom]), s[k])
    return found


def matched_by_loops(
    weights: Sequence[Tensor], s: Sequence[float], prior: Prior, sweeps: int, generator: np.random.Generator
) -> list[Tensor]:
    """The published algorithm, unit by unit, that keeps what a sweep would make worse."""
    clients = range(len(weights))
    units = [torch.zeros(0, dtype=torch.int64) for _ in clients]
    visits = sorted(clients, key=lambda k: -len(weights[k]))
    for j in [*visits, *(k for _ in range(sweeps) for k in generator.permutation(len(weights)).tolist())]:
        others = members(units, but=j)
        gain = gain_by_loops(weights, s, others, j, prior)
        own = torch.from_numpy(linear_sum_assignment(gain, maximize=True)[1])
        where = {pair: atom for atom, pairs in enumerate(others) for pair in pairs}
        rest = [torch.tensor([where[k, u] for u in range(len(units[k]))], dtype=torch.int64) for k in clients if k != j]
        found = [*rest[:j], own, *rest[j:]]
        if not len(units[j]) or objective(weights, s, found, prior) > objective(weights, s, units, prior) + 1e-9:
            units = found
    return units


def partition(units: Sequence[Tensor]) -> set[frozenset[tuple[int, int]]]:
    """Which units share an atom, whatever its number."""
    return {frozenset(pairs) for pairs in members(units)}


@given(widths, seeds, priors)
def test_gains_are_those_of_the_definition(sizes: list[int], seed: int, prior: Prior) -> None:
    weights = cohort([*sizes, 3], seed)
    s = precisions(weights, seed)
    pairs, j = members(match_units(weights[:-1], s[:-1], prior).units), len(sizes)
    found = gains(atoms_of(weights, s, pairs), weights[j], s[j], len(weights), prior).numpy()
    expected = gain_by_loops(weights, s, pairs, j, prior)
    assert found.shape[1] >= max(len(pairs), 3)
    assert found == pytest.approx(expected[:, : found.shape[1]], rel=1e-9, abs=1e-9)


@given(seeds, st.integers(2, 4), st.booleans())
def test_the_published_values_match_as_loops_over_units_do(seed: int, clients: int, apart: bool) -> None:
    weights = cohort([4, 3, 5, 4][:clients], seed)
    weights = [3 * one for one in weights] if apart else weights
    found = match_units(weights, [1.0] * clients, PAPER, sweeps=3, generator=sweeping(seed))
    expected = matched_by_loops(weights, [1.0] * clients, PAPER, 3, sweeping(seed))
    assert partition(found.units) == partition(expected)


@given(seeds, priors)
def test_an_assignment_is_the_best_of_all(seed: int, prior: Prior) -> None:
    weights = cohort([3, 2], seed)
    s = precisions(weights, seed)
    first = torch.arange(3)
    gain = gains(Atoms.none(weights[0]).add(weights[0], first, s[0]), weights[1], s[1], 2, prior)
    best = assigned(gain, 3)
    value = float(gain[torch.arange(2), best].sum())
    tried = [float(gain[0, a] + gain[1, b]) for a, b in permutations(range(gain.shape[1]), 2)]
    assert value == pytest.approx(max(tried))


@given(seeds, st.integers(0, 4), st.integers(1, 4), st.booleans())
def test_an_assignment_is_the_best_of_all_where_units_are_alike(
    seed: int, atoms: int, units: int, copies: bool
) -> None:
    """Gains that are whole numbers, or one for all: several numbers of new atoms are as good as one another."""
    known = torch.randn(units, atoms, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).round()
    known = known[:1].expand(units, atoms) if copies else known
    gain = torch.cat([known, -2 * torch.arange(1, units + 1).double().log().expand(units, units)], 1)
    tried = [float(gain[range(units), one].sum()) for one in permutations(range(gain.shape[1]), units)]
    assert float(gain[range(units), assigned(gain, atoms)].sum()) == pytest.approx(max(tried))


def test_weights_that_overflow_say_nothing() -> None:
    weights = [1e30 * own.float() for own in cohort([4, 3, 4], 0)]
    found = match_units(weights, [1.0, 1.0, 1.0], PAPER)
    assert [len({*own.tolist()}) for own in found.units] == [4, 3, 4]
    assert found.atoms.sums.isfinite().all()


# --- what the matching promises --------------------------------------------------------------------------------------


def check_is_an_assignment(found: Matched, weights: Sequence[Tensor]) -> None:
    for own, rows in zip(found.units, weights, strict=True):
        assert len(own) == len(rows)
        assert len({*own.tolist()}) == len(own)
    assert {*torch.cat(found.units).tolist()} == {*range(found.size)}


@given(widths, seeds, priors)
def test_there_are_no_fewer_atoms_than_the_widest_client_has_units_and_no_more_than_all_have(
    sizes: list[int], seed: int, prior: Prior
) -> None:
    weights = cohort(sizes, seed)
    found = match_units(weights, precisions(weights, seed), prior, generator=sweeping(seed))
    check_is_an_assignment(found, weights)
    assert max(sizes) <= found.size <= sum(sizes)
    assert prior.max_units is None or found.size <= max(prior.max_units, *sizes, 1)


@given(widths, seeds, priors)
def test_the_objective_is_that_of_the_definition_and_never_falls(sizes: list[int], seed: int, prior: Prior) -> None:
    weights = cohort(sizes, seed)
    s = precisions(weights, seed)
    found = match_units(weights, s, prior, generator=sweeping(seed))
    assert found.objectives == sorted(found.objectives)
    assert found.objectives[-1] == pytest.approx(objective(weights, s, found.units, prior), rel=1e-9, abs=1e-9)


@given(st.integers(1, 7), st.integers(2, 6), seeds, st.floats(0.01, 1), st.floats(0.1, 100), st.booleans())
def test_permuted_copies_do_not_grow(
    units: int, clients: int, seed: int, gamma: float, sigma0: float, near: bool
) -> None:
    (weights,) = cohort([units], seed)
    weights = weights / 10 if near else weights
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(units, generator=generator) for _ in range(clients)]
    copies = [weights[order] for order in orders]
    found = match_units(copies, precisions(copies, seed), Prior(gamma, sigma0), generator=sweeping(seed))
    assert found.size == units
    inverse = found.units[0][orders[0].argsort()]
    assert all(torch.equal(own[order.argsort()], inverse) for own, order in zip(found.units, orders, strict=True))


def test_the_widest_client_gives_the_first_atoms_their_order() -> None:
    weights = cohort([2, 4, 4], 0)
    found = match_units([weights[1][:2], weights[1], weights[1].flip(0)], [1.0] * 3, WIDE)
    assert [own.tolist() for own in found.units] == [[0, 1], [0, 1, 2, 3], [3, 2, 1, 0]]


def test_units_that_have_nothing_in_common_grow_to_their_sum() -> None:
    eye = 20 * torch.eye(9)
    found = match_units([eye[:2], eye[2:5], eye[5:]], [1.0] * 3, WIDE)
    assert found.size == 9


def test_a_bound_keeps_units_together_that_have_nothing_in_common() -> None:
    eye = 20 * torch.eye(9)
    bound = WIDE._replace(max_units=6)
    assert match_units([eye[:2], eye[2:5], eye[5:]], [1.0] * 3, bound).size == 6
    assert match_units([eye[:2], eye[2:5], eye[5:]], [1.0] * 3, bound._replace(max_units=1)).size == 4


@given(seeds, st.lists(st.floats(0.05, 50), min_size=2, max_size=4))
def test_the_larger_gamma_the_more_atoms_are_new(seed: int, gammas: list[float]) -> None:
    weights = cohort([5, 5], seed)
    sizes = [match_units(weights, [1.0, 2.0], Prior(gamma, 1.0), sweeps=0).size for gamma in sorted(gammas)]
    assert sizes == sorted(sizes)


def test_few_atoms_are_new_at_a_small_gamma_and_many_at_a_large_one() -> None:
    weights = cohort([5, 5], 0)
    assert match_units(weights, [1.0, 1.0], Prior(1e-6, 1.0)).size == 5
    assert match_units(weights, [1.0, 1.0], Prior(1e6, 1.0)).size == 10


def test_popularity_counts_up_to_its_bound() -> None:
    atoms = Atoms(torch.ones(3, 2).double(), torch.ones(3).double(), torch.tensor([2, 3, 4]))
    capped = gains(atoms, torch.ones(1, 2), 1.0, 6, Prior(1.0, 1.0, popularity=3))[0, :3]
    assert capped.diff().tolist() == pytest.approx([2 * log(3 / 3) - 2 * log(2 / 4), 0.0])


def test_float32_weights_match_as_their_doubles_do() -> None:
    weights = [one.float() for one in cohort([6, 5, 6], 3)]
    single, double = (match_units(w, [1.0] * 3, WIDE) for w in (weights, [one.double() for one in weights]))
    assert [own.tolist() for own in single.units] == [own.tolist() for own in double.units]


def test_a_sweep_brings_together_what_the_first_turns_kept_apart() -> None:
    found = [match_units(cohort([6, 6, 6, 6], seed), [1.0] * 4, PAPER).objectives for seed in range(5)]
    assert any(objectives[-1] > objectives[0] for objectives in found)


def test_a_client_alone_keeps_its_units() -> None:
    found = match_units(cohort([5], 0), [1.0], PAPER)
    assert found.units[0].tolist() == [0, 1, 2, 3, 4]
