"""Matching units by their weights: assignment, coordinate descent, many models at once, equal scales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import EIGHT, NETWORKS
from torch import Tensor
from torch.func import functional_call

from aggregators.core.matching import Matching, assign, balance, gains, inner, match, match_many
from aggregators.core.symmetry import Product, Symmetry, inverse
from aggregators.core.tracing import trace
from aggregators.core.update import Tensors

SMALL = ("MLP", "LeNet", "LSTM", "grouped", "DenseNet", "padded ResNet-20")
seeds = st.integers(0, 2**31)


@cache
def traced(name: str) -> Symmetry:
    return trace(NETWORKS[name].network, NETWORKS[name].example)


def model(name: str, seed: int) -> dict[str, Tensor]:
    """Its parameters, every entry at random."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.5 * torch.randn(value.shape, generator=generator)
        for name, value in NETWORKS[name].network.named_parameters()
    }


def shuffled(symmetry: Symmetry, params: Tensors, seed: int) -> dict[str, Tensor]:
    """A permutation of every group."""
    generator = torch.Generator().manual_seed(seed)
    return {group: torch.randperm(size, generator=generator) for group, size in symmetry.sizes(params).items()}


def every_permutation(symmetry: Symmetry, params: Tensors) -> Iterator[dict[str, Tensor]]:
    """All permutations of a symmetry of one group."""
    ((group, size),) = symmetry.sizes(params).items()
    yield from ({group: torch.tensor(places)} for places in permutations(range(size)))


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def agreement(cohort: Sequence[Tensors]) -> float:
    """Σ_{k<l} ⟨θ_k, θ_l⟩."""
    return sum(inner(a, b) for a, b in combinations(cohort, 2))


def matched(symmetry: Symmetry, cohort: Sequence[Tensors], found: Sequence[Matching]) -> list[dict[str, Tensor]]:
    return [symmetry.permute(one, matching.permutation) for one, matching in zip(cohort, found, strict=True)]


# --- one group ------------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 6), seed=seeds, tied=st.booleans())
def test_no_assignment_gains_more_for_up_to_six_units(size: int, seed: int, tied: bool) -> None:
    gain = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gain = gain.round() if tied else gain
    found = assign(gain)
    assert sorted(found.tolist()) == [*range(size)]
    best = max(sum(gain[i, j].item() for i, j in enumerate(places)) for places in permutations(range(size)))
    assert gain.gather(1, found[:, None]).sum().item() == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("name", ["MLP", "VGG-9", "ResNet-20", "ViT", "DenseNet", "GRU", "tied BERT"])
def test_gains_are_what_the_objective_gains_from_each_pair(name: str) -> None:
    """But from tensors in which the group meets itself."""
    symmetry, a, b = traced(name), model(name, 0), model(name, 1)
    for group, members in symmetry.members.items():
        once = [name for name, number in Counter(name for name, _ in members if name in a).items() if number == 1]
        touched = {name: a[name] for name in once}
        permutation = shuffled(symmetry, b, 2)[group]
        gain = gains(symmetry, group, touched, b)
        rise = inner(touched, symmetry.permute(b, {group: permutation})) - inner(touched, b)
        assert float(gain.gather(1, permutation[:, None]).sum() - gain.trace()) == pytest.approx(rise, abs=1e-3)


def test_a_unit_is_a_row_of_all_its_blocks() -> None:
    symmetry = Symmetry({"a": (Product(("heads", 2)), None), "b": (None, Product(("heads", 2)))})
    a, b = ({"a": torch.randn(6, 3), "b": torch.randn(4, 6)} for _ in range(2))
    blocks = [torch.cat([m["a"].view(3, 6), m["b"].view(4, 3, 2).transpose(0, 1).reshape(3, 8)], 1) for m in (a, b)]
    torch.testing.assert_close(gains(symmetry, "heads", a, b), blocks[0] @ blocks[1].T)


ONE_HIDDEN = Symmetry({"1.weight": ("h", None), "1.bias": ("h",), "2.weight": (None, "h")})
MEETS_ITSELF = Symmetry({"into": ("h", None), "back": ("h", "h"), "out": (None, "h")})


def of_shapes(seed: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@settings(max_examples=30)
@given(size=st.integers(1, 6), seed=seeds)
def test_a_network_of_one_group_is_matched_as_well_as_can_be(size: int, seed: int) -> None:
    shapes = {"1.weight": (size, 3), "1.bias": (size,), "2.weight": (2, size)}
    a, b = of_shapes(seed, shapes), of_shapes(seed + 1, shapes)
    best = max(inner(a, ONE_HIDDEN.permute(b, one)) for one in every_permutation(ONE_HIDDEN, b))
    assert match(ONE_HIDDEN, a, b).after == pytest.approx(best, rel=1e-5, abs=1e-5)


@settings(max_examples=30)
@given(size=st.integers(1, 5), seed=seeds)
def test_a_group_that_meets_itself_is_never_matched_worse_than_it_is(size: int, seed: int) -> None:
    shapes = {"into": (size, 1), "back": (size, size), "out": (1, size)}
    a, b = of_shapes(seed, shapes), of_shapes(seed + 1, shapes)
    found = match(MEETS_ITSELF, a, b, restarts=3)
    every = [inner(a, MEETS_ITSELF.permute(b, one)) for one in every_permutation(MEETS_ITSELF, b)]
    assert found.before - 1e-5 <= found.after <= max(every) + 1e-5
    assert found.after == pytest.approx(inner(a, MEETS_ITSELF.permute(b, found.permutation)), abs=1e-5)


# --- whole networks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*EIGHT, "padded ResNet-20", "tied BERT", "grouped", "DenseNet", "U-Net", "3-d"])
def test_a_permuted_twin_comes_back_exactly(name: str) -> None:
    symmetry, a = traced(name), model(name, 0)
    permutation = shuffled(symmetry, a, 1)
    found = match(symmetry, a, symmetry.permute(a, permutation), restarts=5)
    assert same(found.permutation, inverse(permutation))
    assert found.after == pytest.approx(inner(a, a))


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=8)
@given(seed=seeds)
def test_the_objective_never_falls(name: str, seed: int) -> None:
    symmetry, a, b = traced(name), model(name, seed), model(name, seed + 1)
    found = match(symmetry, a, b)
    assert found.before == inner(a, b)
    assert found.after >= found.before
    assert found.after == pytest.approx(inner(a, symmetry.permute(b, found.permutation)), rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_no_group_can_be_matched_better_with_the_others_held(name: str) -> None:
    symmetry, a, b = traced(name), model(name, 0), model(name, 1)
    moved = symmetry.permute(b, match(symmetry, a, b).permutation)
    for group, members in symmetry.members.items():
        step = assign(gains(symmetry, group, a, moved))
        better = symmetry.permute(moved, {group: step})
        assert inner(a, better) <= inner(a, moved) + 1e-4, members


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=4)
@given(seed=seeds)
def test_more_restarts_never_match_worse(name: str, seed: int) -> None:
    symmetry, a, b = traced(name), model(name, seed), model(name, seed + 1)
    found = [match(symmetry, a, b, restarts=restarts).after for restarts in (1, 2, 4, 8)]
    assert found == sorted(found)


def test_restarts_find_what_one_run_does_not() -> None:
    symmetry, models = traced("ResNet-20"), [model("ResNet-20", seed) for seed in range(5)]
    once, often = ([match(symmetry, models[0], b, restarts=n).after for b in models[1:]] for n in (1, 4))
    assert sum(often) > sum(once) + 1


def test_groups_of_which_no_tensor_is_given_stay() -> None:
    symmetry, a, b = traced("MLP"), model("MLP", 0), model("MLP", 1)
    first = {"1.weight", "1.bias"}
    found = match(symmetry, {n: a[n] for n in first}, {n: b[n] for n in first})
    assert [*found.permutation] == ["1"]
    assert match(symmetry, {}, {}) == Matching({}, 0, 0)


def test_matching_draws_from_its_own_generator_only() -> None:
    symmetry, a, b = traced("ResNet-20"), model("ResNet-20", 0), model("ResNet-20", 1)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        found.append(match(symmetry, a, b, restarts=2, generator=np.random.default_rng(7)))
        assert torch.equal(before[0], torch.get_rng_state())
        assert np.array_equal(before[1], np.random.get_state()[1])
    assert same(found[0].permutation, found[1].permutation)


def test_the_share_of_moved_units_counts_those_that_change_places() -> None:
    permutation = {"a": torch.tensor([0, 2, 1, 3]), "b": torch.tensor([0, 1])}
    assert Matching(permutation, 0, 0).moved_share == pytest.approx(2 / 6)
    assert Matching({}, 0, 0).moved_share == 0


# --- many models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["MLP", "LSTM", "grouped"])
@settings(max_examples=5)
@given(seed=seeds, number=st.integers(1, 5))
def test_many_models_never_agree_less(name: str, seed: int, number: int) -> None:
    symmetry, cohort = traced(name), [model(name, seed + k) for k in range(number)]
    found = match_many(symmetry, cohort, restarts=2)
    assert agreement(matched(symmetry, cohort, found)) >= agreement(cohort) - 1e-4
    assert all(torch.equal(places, torch.arange(len(places))) for places in found[0].permutation.values())


@pytest.mark.parametrize("name", ["MLP", "LeNet", "LSTM", "ResNet-20"])
def test_many_permuted_twins_come_back_to_the_first_ones_order(name: str) -> None:
    symmetry, a = traced(name), model(name, 0)
    cohort = [symmetry.permute(a, shuffled(symmetry, a, seed)) for seed in range(4)]
    found = match_many(symmetry, cohort, restarts=3)
    assert all(same(one, cohort[0]) for one in matched(symmetry, cohort, found))


def test_the_objective_of_many_is_with_the_mean_of_the_others() -> None:
    symmetry, cohort = traced("MLP"), [model("MLP", seed) for seed in range(3)]
    found = match_many(symmetry, cohort)
    moved = matched(symmetry, cohort, found)
    for k, matching in enumerate(found):
        others = [j for j in range(3) if j != k]
        assert matching.before == pytest.approx(sum(inner(cohort[j], cohort[k]) for j in others) / 2, abs=1e-4)
        assert matching.after == pytest.approx(sum(inner(moved[j], moved[k]) for j in others) / 2, abs=1e-4)
    assert sum(one.after for one in found) > sum(one.before for one in found)


def test_models_that_are_alike_and_a_model_alone_stay() -> None:
    symmetry, a = traced("MLP"), model("MLP", 0)
    for number in (1, 2, 5):
        found = match_many(symmetry, [a] * number, restarts=2)
        assert len(found) == number
        assert all(matching.moved_share == 0 for matching in found)
        assert all(matching.before == matching.after == pytest.approx(inner(a, a)) for matching in found)


def test_two_models_are_matched_as_by_match() -> None:
    symmetry, a, b = traced("LeNet"), model("LeNet", 0), model("LeNet", 0)
    b = {name: value + 0.1 * model("LeNet", 1)[name] for name, value in b.items()}
    b = symmetry.permute(b, shuffled(symmetry, b, 2))
    assert same(match_many(symmetry, [a, b])[1].permutation, match(symmetry, a, b).permutation)


# --- equal scales ---------------------------------------------------------------------------------------------------

RELU = ("MLP", "LeNet", "VGG-9", "U-Net", "3-d", "1-d")


def lengths(params: Tensors, layer: str, following: str) -> tuple[Tensor, Tensor]:
    """Of each unit of a layer ‖w_in, b‖ and ‖w_out‖."""
    weight, bias = params[f"{layer}.weight"], params[f"{layer}.bias"]
    outgoing = params[f"{following}.weight"].transpose(0, 1).reshape(len(bias), -1)
    return torch.cat([weight.flatten(1), bias[:, None]], 1).norm(dim=1), outgoing.norm(dim=1)


@pytest.mark.parametrize(("name", "layers"), [("MLP", "1 3 5"), ("LeNet", "0 3 7 9 11"), ("1-d", "0 3 6")])
def test_balanced_units_are_brought_forth_by_weights_as_long_as_those_that_read_them(name: str, layers: str) -> None:
    symmetry, params = traced(name), model(name, 0)
    balanced = symmetry.scale(params, balance(symmetry, params))
    for layer, following in pairwise(layers.split()):
        incoming, outgoing = lengths(balanced, layer, following)
        torch.testing.assert_close(incoming, outgoing, rtol=1e-5, atol=0)
        assert not torch.allclose(*lengths(params, layer, following), rtol=0.1)


@pytest.mark.parametrize("name", RELU)
def test_balance_leaves_what_the_network_computes(name: str) -> None:
    case, symmetry, params = NETWORKS[name], traced(name), model(name, 0)
    balanced = symmetry.scale(params, balance(symmetry, params))
    outputs = [functional_call(case.network.eval(), one, (case.example,)).detach() for one in (params, balanced)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4 * float(outputs[0].abs().max()))


@pytest.mark.parametrize("name", RELU)
@settings(max_examples=3)
@given(seed=seeds)
def test_networks_that_differ_in_scale_only_are_equal_when_balanced(name: str, seed: int) -> None:
    symmetry, params = traced(name), model(name, 0)
    generator = torch.Generator().manual_seed(seed)
    factors = {
        group: torch.exp(torch.randn(size, generator=generator)) for group, size in symmetry.sizes(params).items()
    }
    other = symmetry.scale(params, factors)
    first, second = (symmetry.scale(one, balance(symmetry, one)) for one in (params, other))
    for one, value in first.items():
        torch.testing.assert_close(second[one], value, rtol=1e-4, atol=1e-5)


def test_units_that_are_dead_or_unread_keep_their_scale() -> None:
    symmetry, params = traced("MLP"), model("MLP", 0)
    params["1.weight"][2], params["1.bias"][2], params["3.weight"][:, 5] = 0, 0, 0
    factors = balance(symmetry, params)["1"]
    assert factors[[2, 5]].tolist() == [1, 1]
    assert (factors[[0, 1, 3, 4, 6, 7]] != 1).all()


def test_groups_that_cannot_be_scaled_or_are_not_given_whole_have_no_factors() -> None:
    assert balance(traced("LSTM"), model("LSTM", 0)) == {}
    params = model("MLP", 0)
    given = {name: params[name] for name in ("1.weight", "1.bias", "3.weight")}
    assert [*balance(traced("MLP"), given)] == ["1"]
