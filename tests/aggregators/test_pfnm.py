"""Probabilistic federated neural matching: what comes of the clients' networks, and what the next round sends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_nonparametric import PAPER, matched_by_loops, members, sweeping
from torch import Tensor, nn
from torch.func import functional_call
from toys import fingerprint, following

from aggregators.alignment.pfnm import PFNM
from aggregators.core.exchange import Exchange
from aggregators.core.registry import parse
from aggregators.core.seed import derive_seed
from aggregators.core.symmetry import Product, Symmetry
from aggregators.core.tracing import trace
from aggregators.core.update import ClientUpdate, GlobalModel, Merged, Request, Tensors

PERCEPTRON = Symmetry(
    {
        **{"0.weight": ("0", None), "0.bias": ("0",)},
        **{"2.weight": ("2", "0"), "2.bias": ("2",)},
        "4.weight": (None, "2"),
    }
)
CONVOLUTIONAL = Symmetry(
    {
        **{"0.weight": ("0", None, None, None), "0.bias": ("0",)},
        **{f"1.{name}": ("0",) for name in ("weight", "bias", "running_mean", "running_var")},
        **{"3.weight": ("3", "0", None, None), "3.bias": ("3",)},
        **{"6.weight": ("6", Product(("3", 4))), "6.bias": ("6",)},
        "8.weight": (None, "6"),
    }
)
SHALLOW = Symmetry({"0.weight": ("0", None), "0.bias": ("0",), "2.weight": (None, "0")})


def perceptron(first: int = 5, second: int = 4) -> nn.Module:
    layers = nn.Linear(6, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 3)
    return nn.Sequential(*layers)


def convolutional(first: int = 3, second: int = 4, third: int = 5) -> nn.Module:
    convolutions = nn.Conv2d(1, first, 3), nn.BatchNorm2d(first), nn.ReLU(), nn.Conv2d(first, second, 3), nn.ReLU()
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(second * 4, third), nn.ReLU(), nn.Linear(third, 3))


def shallow(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))


EXAMPLES = {perceptron: (7, 6), convolutional: (7, 1, 6, 6)}
every_network = pytest.mark.parametrize(
    ("make", "symmetry"),
    [(perceptron, PERCEPTRON), (convolutional, CONVOLUTIONAL)],
    ids=["perceptron", "convolutional"],
)


def at_random(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of the module, every one at random, variances positive."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(name: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return torch.tensor(seed)
        noise = torch.randn(value.shape, generator=generator)
        return noise.abs() + 0.5 if name.endswith("var") else noise

    return {name: drawn(name, value) for name, value in module.state_dict().items()}


def model_of(params: Tensors, symmetry: Symmetry) -> GlobalModel:
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    return GlobalModel(
        params=params, trainable=frozenset(n for n in params if not n.endswith(buffers)), symmetry=symmetry
    )


def updates(cohort: Sequence[Tensors], numbers: Sequence[int] = (), counts: Any = None) -> list[ClientUpdate]:
    numbers = numbers or [4] * len(cohort)
    counts = counts or [torch.tensor([number]) for number in numbers]
    return [
        ClientUpdate(client_id=k, num_examples=number, params=params, class_counts=torch.as_tensor(count))
        for k, (params, number, count) in enumerate(zip(cohort, numbers, counts, strict=True))
    ]


def merged(method: PFNM, cohort: Sequence[Tensors], symmetry: Symmetry, **told: Any) -> Merged:
    return method.aggregate(model_of(cohort[0], symmetry), updates(cohort, **told))


def sent(model: GlobalModel, client_id: int) -> Tensors:
    """What a client receives at the beginning of a round."""
    exchange: Exchange[Any] = next(PFNM().round(model))
    params = exchange.sent(client_id)
    assert params is not None
    return params


def permuted(symmetry: Symmetry, params: Tensors, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = symmetry.sizes(params)
    return symmetry.permute(params, {g: torch.randperm(n, generator=generator) for g, n in sizes.items()})


def units(merge: Merged, client: int) -> Mapping[str, Tensor]:
    known = merge.memory["units"]
    assert isinstance(known, Mapping)
    own = known[str(client)]
    assert isinstance(own, Mapping)
    return {group: at for group, at in own.items() if isinstance(at, Tensor)}


# --- copies and widths -----------------------------------------------------------------------------------------------


@every_network
def test_the_same_network_permuted_merges_to_itself(make: Callable[[], nn.Module], symmetry: Symmetry) -> None:
    params = at_random(make())
    merge = merged(PFNM(), [params, *(permuted(symmetry, params, seed) for seed in range(3))], symmetry)
    assert fingerprint(merge.params) == fingerprint(params)
    assert merge.metrics["growth"] == merge.metrics["shared_share"] == 1


@every_network
def test_networks_that_have_nothing_in_common_grow_and_stay_a_network(
    make: Callable[..., nn.Module], symmetry: Symmetry
) -> None:
    cohort = [at_random(make(), seed) for seed in range(3)]
    merge = merged(PFNM(sigma=0.01), cohort, symmetry)
    sizes = symmetry.sizes(merge.params)
    assert sizes == {group: 3 * units for group, units in symmetry.sizes(cohort[0]).items()}
    assert merge.metrics["growth"] == 3
    assert merge.metrics["shared_share"] == 0
    outputs = functional_call(make(*sizes.values()).eval(), dict(merge.params), torch.randn(EXAMPLES[make]))
    assert outputs.isfinite().all()


def test_a_network_grown_from_strangers_computes_the_mean_of_them() -> None:
    cohort = [at_random(shallow(width), width) for width in (3, 2)]
    merge = merged(PFNM(sigma=0.01), cohort, SHALLOW)
    x = torch.randn(5, 4)
    outputs = [functional_call(shallow(), dict(params), x) for params in (*cohort, merge.params)]
    torch.testing.assert_close(outputs[2], (outputs[0] + outputs[1]) / 2)


@every_network
def test_a_narrower_copy_finds_its_units_and_is_sent_them_again(
    make: Callable[[], nn.Module], symmetry: Symmetry
) -> None:
    params = at_random(make())
    generator = torch.Generator().manual_seed(0)
    kept = {g: torch.randperm(n, generator=generator)[: n - 1] for g, n in symmetry.sizes(params).items()}
    narrow = symmetry.take(params, kept)
    model = model_of(params, symmetry)
    cohort = updates([params, narrow])
    merge = PFNM(sigma=4.0).aggregate(model, cohort)
    assert symmetry.sizes(merge.params) == symmetry.sizes(params)
    assert all(torch.equal(units(merge, 1)[group], places) for group, places in kept.items())
    after = following(model, merge)
    assert {name: value.shape for name, value in sent(after, 1).items()} == {n: v.shape for n, v in narrow.items()}
    assert fingerprint(sent(after, 1)) == fingerprint(symmetry.take(merge.params, kept))


def test_a_client_that_is_not_remembered_is_sent_nothing_once_others_are() -> None:
    cohort = [at_random(perceptron(), seed) for seed in range(2)]
    model = model_of(cohort[0], PERCEPTRON)
    after = following(model, PFNM(sigma=0.1).aggregate(model, updates(cohort)))
    assert PERCEPTRON.sizes(sent(after, 0)) == PERCEPTRON.sizes(cohort[0])
    assert next(PFNM().round(after)).sent(7) is None
    assert fingerprint(sent(model, 0)) == fingerprint(model.params)


# --- clients that are away -------------------------------------------------------------------------------------------


def rounds(method: PFNM, cohort: Sequence[Tensors], *present: Sequence[int]) -> GlobalModel:
    """The model after a round of all, and rounds in which these answer with what they are sent."""
    model = replace(model_of(cohort[0], PERCEPTRON), round=1)
    model = following(model, method.aggregate(model, updates(cohort)))
    for clients in present:
        asked = next(method.round(model))
        answers = [replace(update, params=asked.sent(update.client_id) or {}) for update in updates(cohort)]
        model = following(model, method.aggregate(model, [answers[k] for k in clients]))
    return model


def test_a_client_that_is_away_finds_its_units_as_they_were() -> None:
    """All strangers, of three widths: even what reads the units is the same."""
    cohort = [at_random(perceptron(*widths), seed) for seed, widths in enumerate([(5, 4), (7, 3), (6, 6)])]
    method = PFNM(sigma=0.01)
    before, after = rounds(method, cohort), rounds(method, cohort, [0, 1], [1], [0, 1])
    assert PERCEPTRON.sizes(after.params) == {"0": 18, "2": 13}
    for k in range(3):
        own = sent(after, k)
        assert PERCEPTRON.sizes(own) == PERCEPTRON.sizes(cohort[k])
        for name in own.keys() - {"4.weight", "4.bias"}:
            torch.testing.assert_close(own[name], cohort[k][name])
    torch.testing.assert_close(sent(after, 2)["4.weight"], sent(before, 2)["4.weight"])


def test_units_of_clients_that_are_away_stay_for_so_many_rounds_and_no_longer() -> None:
    cohort = [at_random(perceptron(), seed) for seed in range(3)]
    stays, goes = (rounds(PFNM(sigma=0.01, absence=absence), cohort, [0, 1], [0, 1]) for absence in (2, 1))
    assert PERCEPTRON.sizes(stays.params) == {"0": 15, "2": 12}
    assert PERCEPTRON.sizes(goes.params) == {"0": 10, "2": 8}
    assert next(PFNM().round(goes)).sent(2) is None


def test_what_present_clients_have_too_is_theirs_alone() -> None:
    params = at_random(perceptron())
    model = replace(model_of(params, PERCEPTRON), round=1)
    model = following(model, PFNM().aggregate(model, updates([params, permuted(PERCEPTRON, params, 1), params])))
    moved = {name: value + 0.02 for name, value in sent(model, 0).items()}
    after = following(model, PFNM().aggregate(model, updates([moved])))
    assert PERCEPTRON.sizes(after.params) == PERCEPTRON.sizes(params)
    torch.testing.assert_close(sent(after, 0), moved)
    torch.testing.assert_close(sent(after, 2), {n: value + 0.02 for n, value in sent(model, 2).items()})


def test_widths_that_only_settled_tensors_tell_are_known() -> None:
    """What reads two groups together, when the layers that tell their sizes are settled: at widths not traced."""

    class Joined(nn.Module):
        def __init__(self, a: int = 5, b: int = 6, c: int = 4) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, a), nn.Linear(4, b), nn.Linear(a + b, c)
            self.last = nn.Linear(a + b + c, 3)

        def forward(self, x: Tensor) -> Tensor:
            a, b = torch.relu(self.a(x)), torch.relu(self.b(x))
            y: Tensor = self.last(torch.cat([a, torch.relu(self.c(torch.cat([a, b], 1))), b], 1))
            return y

    symmetry, params = trace(Joined(), torch.zeros(2, 4)), at_random(Joined(7, 8, 4))
    merge = merged(PFNM(), [params, permuted(symmetry, params, 1)], symmetry)
    torch.testing.assert_close(merge.params, params)


# --- one round after another -----------------------------------------------------------------------------------------


def test_a_client_that_trains_no_more_finds_its_units_where_they_were() -> None:
    cohort = [at_random(perceptron(), seed) for seed in range(3)]
    model = model_of(cohort[0], PERCEPTRON)
    merge = PFNM().aggregate(model, updates(cohort))
    after = following(model, merge)
    again = PFNM().aggregate(after, updates([sent(after, k) for k in range(3)]))
    assert again.metrics["units.0"] == merge.metrics["units.0"] > 5
    first = [torch.cat([units(one, k)["0"] for k in range(3)]) for one in (merge, again)]
    same = [own[:, None] == own for own in first]
    assert torch.equal(*same)


# --- what a unit becomes ---------------------------------------------------------------------------------------------


def near(params: Tensors, seed: int) -> dict[str, Tensor]:
    """A copy with a little noise."""
    noise = at_random(convolutional(), seed)
    return {n: v + 0.01 * noise[n].abs() if v.is_floating_point() else v for n, v in params.items()}


def test_units_are_means_by_examples() -> None:
    params = at_random(convolutional())
    cohort = [params, near(params, 1), near(params, 2)]
    merge = merged(
        PFNM(), [cohort[0], *(permuted(CONVOLUTIONAL, c, 3) for c in cohort[1:])], CONVOLUTIONAL, numbers=[1, 2, 5]
    )
    for name, value in merge.params.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (cohort[0][name] + 2 * cohort[1][name] + 5 * cohort[2][name]) / 8)
    assert merge.params["1.num_batches_tracked"] == 0


def test_precisions_may_be_equal_and_then_only_the_last_layer_goes_by_examples() -> None:
    params = at_random(convolutional())
    cohort = [params, near(params, 1)]
    merge = merged(PFNM(weighted=False), cohort, CONVOLUTIONAL, numbers=[1, 3])
    for name in CONVOLUTIONAL.axes.keys() - {"8.weight"}:
        torch.testing.assert_close(merge.params[name], (cohort[0][name] + cohort[1][name]) / 2)
    torch.testing.assert_close(merge.params["8.weight"], (cohort[0]["8.weight"] + 3 * cohort[1]["8.weight"]) / 4)


def test_a_unit_of_one_client_is_that_clients() -> None:
    cohort = [at_random(perceptron(), seed) for seed in range(2)]
    merge = merged(PFNM(sigma=0.01), cohort, PERCEPTRON, numbers=[1, 9])
    for k, params in enumerate(cohort):
        taken = PERCEPTRON.take(merge.params, units(merge, k))
        for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
            torch.testing.assert_close(taken[name], params[name])


@pytest.mark.parametrize("relative", [True, False])
def test_shrunk_atoms_are_posterior_means_and_norms_are_not_shrunk(relative: bool) -> None:
    params = at_random(convolutional())
    merge = merged(PFNM(shrunk=True, sigma=1.0, sigma0=0.5, gamma=0.1, relative=relative), [params] * 2, CONVOLUTIONAL)
    torch.testing.assert_close(merge.params["0.weight"], params["0.weight"] * 2 / (2 + 4))
    torch.testing.assert_close(merge.params["6.bias"], params["6.bias"] * 2 / (2 + 4))
    for name in ("1.weight", "1.bias", "1.running_mean", "1.running_var", "8.weight"):
        torch.testing.assert_close(merge.params[name], params[name])


def test_norms_take_no_part_in_the_matching() -> None:
    params = at_random(convolutional())
    other = {name: 100 * value if name.startswith("1.") else value for name, value in params.items()}
    merge = merged(PFNM(), [params, other], CONVOLUTIONAL)
    assert merge.metrics["growth"] == 1
    torch.testing.assert_close(merge.params["1.running_mean"], 50.5 * params["1.running_mean"])


@pytest.mark.parametrize("relative", [True, False])
def test_the_scale_of_all_weights_matters_only_where_sigma_is_absolute(relative: bool) -> None:
    cohort = [at_random(perceptron(), seed) for seed in range(3)]
    larger = [{name: 8 * value for name, value in params.items()} for params in cohort]
    sizes = [merged(PFNM(relative=relative), some, PERCEPTRON).metrics["units.0"] for some in (cohort, larger)]
    assert (sizes[0] == sizes[1]) == relative


def test_the_last_layer_is_a_mean_by_classes() -> None:
    params = at_random(shallow())
    other = {n: v + 1 if n.startswith("2.") else v for n, v in params.items()}
    merge = merged(PFNM(), [params, other], SHALLOW, numbers=[4, 6], counts=[[1, 3], [3, 3]])
    shares = torch.tensor([3 / 4, 1 / 2])
    torch.testing.assert_close(merge.params["2.bias"], params["2.bias"] + shares)
    torch.testing.assert_close(merge.params["2.weight"], params["2.weight"] + shares[:, None])


def test_the_last_layer_may_go_by_examples_of_which_no_classes_are_asked() -> None:
    params = at_random(shallow())
    cohort = [params, {n: v + 1 if n.startswith("2.") else v for n, v in params.items()}]
    given = [replace(update, class_counts=None) for update in updates(cohort, [4, 6])]
    method, model = PFNM(by_class=False), model_of(params, SHALLOW)
    assert [question.request for question in method.questions()] == [Request()]
    assert next(method.round(model)).request == Request()
    torch.testing.assert_close(method.aggregate(model, given).params["2.bias"], params["2.bias"] + 0.6)


def test_a_class_without_examples_is_a_mean_by_examples() -> None:
    params = at_random(shallow())
    other = {n: v + 1 if n.startswith("2.") else v for n, v in params.items()}
    merge = merged(PFNM(), [params, other], SHALLOW, numbers=[1, 3], counts=[[1, 0], [3, 0]])
    torch.testing.assert_close(merge.params["2.bias"], params["2.bias"] + 0.75)


def test_what_a_client_knows_alone_survives() -> None:
    """One client has seen no example of the second class: that class is the other's."""
    params = at_random(shallow())
    other = {n: v + 1 if n.startswith("2.") else v for n, v in params.items()}
    merge = merged(PFNM(), [params, other], SHALLOW, numbers=[4, 4], counts=[[4, 0], [2, 2]])
    assert torch.equal(merge.params["2.weight"][1], other["2.weight"][1])


# --- the published method --------------------------------------------------------------------------------------------


def merged_by_loops(cohort: Sequence[Tensors], seed: int) -> dict[str, Tensor]:
    """A network of one hidden layer by the published formulas, atom by atom, with μ0 = 0."""
    rows = [torch.cat([one["0.weight"], one["0.bias"][:, None]], 1).double() for one in cohort]
    found = matched_by_loops(rows, [1.0] * len(cohort), PAPER, 5, sweeping(seed))
    atoms = members(found)
    hidden = torch.stack(
        [torch.stack([rows[k][unit] for k, unit in pairs]).sum(0) / (1 + len(pairs)) for pairs in atoms]
    )
    last = torch.zeros(2, len(atoms), dtype=torch.float64)
    for atom, pairs in enumerate(atoms):
        for k, unit in pairs:
            last[:, atom] += cohort[k]["2.weight"][:, unit] / len(cohort)
    bias = torch.stack([one["2.bias"] for one in cohort]).mean(0)
    return {"0.weight": hidden[:, :-1], "0.bias": hidden[:, -1], "2.weight": last, "2.bias": bias}


@pytest.mark.parametrize("seed", range(4))
def test_the_published_values_give_what_the_published_formulas_do(seed: int) -> None:
    cohort = [at_random(shallow(width), 10 * seed + width) for width in (4, 3, 4)]
    cohort = [{name: 2 * value.double() for name, value in params.items()} for params in cohort]
    merge = merged(PFNM.paper(seed=seed), cohort, SHALLOW)
    expected = merged_by_loops(cohort, derive_seed(seed, 0, "0", "matching"))
    x = torch.randn(5, 4, dtype=torch.float64)
    assert merge.params["0.bias"].shape == expected["0.bias"].shape
    torch.testing.assert_close(merge.params["0.bias"].sort().values, expected["0.bias"].sort().values)
    outputs = [functional_call(shallow(), params, x) for params in (dict(merge.params), expected)]
    torch.testing.assert_close(*outputs)


def test_the_published_values_are_what_they_are_and_can_be_changed() -> None:
    paper = PFNM.paper(sigma0=2.0)
    assert (paper.gamma, paper.sigma, paper.sigma0, paper.sweeps) == (7.0, 1.0, 2.0, 5)
    assert paper.shrunk
    assert not paper.weighted
    assert not paper.relative
    assert parse(paper.model_dump_json()) == paper


# --- the round -------------------------------------------------------------------------------------------------------


def test_the_metrics_tell_the_units_before_and_after() -> None:
    cohort = [at_random(perceptron(5, 4), 0), at_random(perceptron(3, 2), 1)]
    metrics = merged(PFNM(sigma=0.01), cohort, PERCEPTRON).metrics
    assert metrics == {
        **{"units_before.0": 5, "units_before.2": 4, "units.0": 8, "units.2": 6},
        **{"growth": 14 / 9, "shared_share": 0, "exchanges": 1},
    }


def test_other_random_numbers_change_no_bit() -> None:
    cohort = [at_random(perceptron(), seed) for seed in range(4)]
    torch.manual_seed(1)
    one = merged(PFNM(), cohort, PERCEPTRON)
    torch.manual_seed(2)
    assert fingerprint(merged(PFNM(), cohort, PERCEPTRON)) == fingerprint(one)


def test_the_order_of_clients_goes_by_seed_and_round() -> None:
    cohort = [at_random(perceptron(12, 12), seed) for seed in range(6)]
    model = model_of(cohort[0], PERCEPTRON)

    def bits(seed: int, round: int) -> str:
        return fingerprint(PFNM.paper(seed=seed).aggregate(replace(model, round=round), updates(cohort)).params)

    assert len({bits(0, 0), bits(0, 1), bits(1, 0)}) == 3


@pytest.mark.parametrize("symmetry", [None, Symmetry({})])
def test_a_network_without_units_to_match_is_refused(symmetry: Symmetry | None) -> None:
    model = replace(model_of(at_random(shallow()), SHALLOW), symmetry=symmetry)
    with pytest.raises(ValueError, match="pfnm needs the symmetry of the task's network, with units to match"):
        next(PFNM().round(model))


def test_a_network_without_an_order_is_refused_before_anyone_is_asked() -> None:
    recurrent = Symmetry({"0.weight": ("0", "0")})
    with pytest.raises(ValueError, match="pfnm: units follow from themselves, '0' from '0'"):
        next(PFNM().round(model_of(at_random(shallow()), recurrent)))
