"""Weight matching in a round: what the inner method is given, what the record tells, where it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import permutations
from typing import Any, ClassVar, Literal, cast

import pytest
import torch
import toys
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import NETWORKS
from torch import Tensor, nn
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import TensorDataset

from aggregators.alignment.git_rebasin import GitReBasin
from aggregators.core.base import CohortAggregator
from aggregators.core.matching import inner
from aggregators.core.registry import parse
from aggregators.core.symmetry import Symmetry
from aggregators.core.tensors import norm, steps
from aggregators.core.tracing import trace
from aggregators.core.update import ClientUpdate, GlobalModel, Gradients, Merged, Probe, Request, Tensors
from aggregators.robust.median import Median
from client.statistics import measure
from client.task import Examples, Node, Task, tensors
from server import loopback

EVERYTHING = toys.EVERYTHING.model_copy(
    update={"gradients": Gradients(sums=True, squares=True, sketches=2, estimator="empirical")}
)
NAMES = ("MLP", "1-d", "ResNet-20", "LSTM")
REFERENCES = ("cohort", "first", "global")
every_network = pytest.mark.parametrize("name", NAMES)
every_reference = pytest.mark.parametrize("reference", REFERENCES)
seeds = st.integers(0, 2**31)


class Seen(CohortAggregator):
    """Keeps what it is given, in `updates`."""

    kind: Literal["test_git_rebasin:Seen"] = "test_git_rebasin:Seen"
    asked: Request = Request()
    updates: ClassVar[dict[int, ClientUpdate]] = {}

    @property
    def request(self) -> Request:
        return self.asked

    @property
    def min_updates(self) -> int:
        return 1

    def merge(self, model: GlobalModel, updates: Sequence[ClientUpdate]) -> Merged:
        type(self).updates = {update.client_id: update for update in updates}
        return Merged(model.params)


def given_to_inner(method: GitReBasin, model: GlobalModel, updates: Sequence[ClientUpdate]) -> dict[int, ClientUpdate]:
    method.aggregate(model, updates)
    return Seen.updates


# --- networks, clients and their statistics -------------------------------------------------------------------------


@cache
def traced(name: str) -> tuple[nn.Module, Symmetry]:
    network = NETWORKS[name].network.eval()
    return network, trace(network, NETWORKS[name].example)


def drawn(name: str, seed: int) -> dict[str, Tensor]:
    """A model of the network with every number at random; variances are positive, counters stay."""
    generator = torch.Generator().manual_seed(seed)

    def one(name: str, value: Tensor) -> Tensor:
        noise = 0.3 * torch.randn(value.shape, generator=generator)
        return (noise.abs() + 0.5 if "var" in name else noise) if value.is_floating_point() else value.clone()

    return {key: one(key, value) for key, value in tensors(traced(name)[0]).items()}


def model_of(name: str, seed: int = 0) -> GlobalModel:
    network, symmetry = traced(name)
    trainable = frozenset(key for key, _ in network.named_parameters())
    return GlobalModel(params=drawn(name, seed), trainable=trainable, symmetry=symmetry)


def symmetry_of(model: GlobalModel) -> Symmetry:
    assert model.symmetry is not None
    return model.symmetry


def shuffled(model: GlobalModel, params: Tensors, seed: int) -> dict[str, Tensor]:
    """The same network in another order of units."""
    generator = torch.Generator().manual_seed(seed)
    sizes = symmetry_of(model).sizes(params)
    places = {group: torch.randperm(size, generator=generator) for group, size in sizes.items()}
    return symmetry_of(model).permute(params, places)


def stretched(model: GlobalModel, params: Tensors, seed: int) -> dict[str, Tensor]:
    """The same network at another scale of units."""
    generator = torch.Generator().manual_seed(seed)
    sizes = symmetry_of(model).sizes(params)
    factors = {group: torch.exp(torch.randn(sizes[group], generator=generator)) for group in symmetry_of(model).scaled}
    return symmetry_of(model).scale(params, factors)


def client(client_id: int, params: Tensors, **fields: Any) -> ClientUpdate:
    return ClientUpdate(client_id=client_id, num_examples=10, params=params, **fields)


def noisy(params: Tensors, seed: int, scale: float = 0.05) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + scale * torch.rand(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in params.items()
    }


def squares(params: Tensors, seed: int) -> dict[str, Tensor]:
    """Sums of squares as far apart as they get."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.exp(3 * torch.randn(value.shape, generator=generator)) for name, value in params.items()}


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


class Labels(Task):
    num_classes: ClassVar[int | None] = 3

    def model(self) -> nn.Module:
        raise NotImplementedError

    def data(self, node: Node) -> tuple[Examples, Examples]:
        raise NotImplementedError


def measured(name: str, client_id: int, params: Tensors, request: Request) -> ClientUpdate:
    """What a client with these parameters finds on the same examples as all others."""
    network, example = traced(name)[0], NETWORKS[name].example
    generator = torch.Generator().manual_seed(0)
    shape = (12, *example.shape[1:])
    inputs = torch.rand(shape, generator=generator)
    inputs = inputs if example.is_floating_point() else torch.randint(0, 20, shape, generator=generator)
    examples = cast(Examples, TensorDataset(inputs, torch.arange(12) % 3))
    before = {key: value.clone() for key, value in tensors(network).items()}
    network.load_state_dict(dict(params))
    fields = measure(Labels(), network, examples, request, seed=1, anchor=drawn(name, 9))
    network.load_state_dict(before)
    return client(client_id, params, **fields)


# --- what the inner method is given ---------------------------------------------------------------------------------


@every_network
@every_reference
def test_a_permuted_twin_comes_back_exactly(name: str, reference: Any) -> None:
    model = model_of(name)
    twin = shuffled(model, model.params, 1)
    assert not same(twin, model.params)
    found = given_to_inner(
        GitReBasin(inner=Seen(), reference=reference), model, [client(1, model.params), client(2, twin)]
    )
    assert same(found[2].params, model.params)


@pytest.mark.parametrize("name", ["MLP", "1-d"])
@every_reference
def test_a_twin_at_another_scale_comes_back(name: str, reference: Any) -> None:
    model = model_of(name)
    twin = stretched(model, shuffled(model, model.params, 1), 2)
    found = given_to_inner(
        GitReBasin(inner=Seen(), reference=reference), model, [client(1, model.params), client(2, twin)]
    )
    for key, value in model.params.items():
        torch.testing.assert_close(found[2].params[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["MLP", "1-d", "ResNet-20"])
@every_reference
def test_a_twin_brings_every_statistic_along(name: str, reference: Any) -> None:
    model = model_of(name)
    twin = stretched(model, shuffled(model, model.params, 1), 2)
    updates = [measured(name, number, params, EVERYTHING) for number, params in ((1, model.params), (2, twin))]
    found = given_to_inner(GitReBasin(inner=Seen(asked=EVERYTHING), reference=reference), model, updates)
    one, two = ({**vars(found[number])} for number in (1, 2))
    for field in ("grad_sum", "sq_grad_sum", "grad_sketch", "gram", "grad_gram", "moments", "cross_moments"):
        assert one[field]
        for key, value in one[field].items():
            for mine, theirs in zip(tree_leaves(value), tree_leaves(two[field][key]), strict=True):
                torch.testing.assert_close(
                    theirs, mine, rtol=1e-3, atol=1e-3 * float(torch.as_tensor(mine).abs().max())
                )


@every_network
@every_reference
def test_an_aligned_client_computes_what_it_computed(name: str, reference: Any) -> None:
    model, (network, _) = model_of(name), traced(name)
    cohort = [client(number, drawn(name, number)) for number in (1, 2, 3)]
    found = given_to_inner(GitReBasin(inner=Seen(), reference=reference), model, cohort)
    moved = 0
    for update in cohort:
        aligned = found[update.client_id].params
        outputs = [
            functional_call(network, dict(one), (NETWORKS[name].example,)).detach() for one in (update.params, aligned)
        ]
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-3, atol=1e-3 * float(outputs[0].abs().max()))
        moved += not same(aligned, update.params)
    assert moved == (3 if reference == "global" else 2)


@every_reference
def test_the_outputs_of_the_last_layer_stay(reference: Any) -> None:
    for name in NAMES:
        model = model_of(name)
        cohort = [client(number, drawn(name, number)) for number in (1, 2, 3)]
        found = given_to_inner(GitReBasin(inner=Seen(), reference=reference), model, cohort)
        last = NETWORKS[name].outputs[-1]
        assert all(torch.equal(found[one.client_id].params[last], one.params[last]) for one in cohort)


@every_reference
@settings(max_examples=15)
@given(seed=seeds, number=st.integers(1, 4))
def test_clients_that_agree_stay_as_they_are_whatever_their_information(reference: Any, seed: int, number: int) -> None:
    model = model_of("MLP", seed)
    cohort = [client(k, model.params, sq_grad_sum=squares(model.params, seed + k), num_grads=3) for k in range(number)]
    found = given_to_inner(GitReBasin(inner=Seen(), reference=reference), model, cohort)
    assert len(found) == number
    assert all(same(found[k].params, model.params) for k in range(number))
    assert all(same(found[k].sq_grad_sum, cohort[k].sq_grad_sum) for k in range(number))


@pytest.mark.parametrize("reference", ["cohort", "first"])
def test_the_first_client_by_id_keeps_its_order(reference: Any) -> None:
    model = model_of("MLP")
    cohort = [client(number, drawn("MLP", number)) for number in (5, 2, 9)]
    found = given_to_inner(GitReBasin(inner=Seen(), reference=reference), model, cohort)
    assert found[2] is cohort[1]


def test_short_floats_come_back_exactly() -> None:
    model = model_of("MLP")
    half = {name: value.bfloat16() for name, value in model.params.items()}
    model = replace(model, params=half)
    for reference in REFERENCES:
        cohort = [client(1, half), client(2, shuffled(model, half, 1))]
        found = given_to_inner(GitReBasin(inner=Seen(), reference=reference), model, cohort)
        assert same(found[2].params, half)
        assert found[2].params["1.weight"].dtype == torch.bfloat16


@every_reference
def test_units_of_which_nothing_trains_stay(reference: Any) -> None:
    """And those that are scaled without it: with the last layer alone, only the units it reads move."""
    model = model_of("MLP")
    cohort = [client(1, model.params), client(2, shuffled(model, model.params, 1))]
    for trainable, moving in (({"5.weight"}, "3"), ({"1.bias"}, "1"), ({"5.bias"}, "")):
        frozen = replace(model, trainable=frozenset(trainable))
        found = given_to_inner(GitReBasin(inner=Seen(), reference=reference), frozen, cohort)
        for group, name in (("1", "1.bias"), ("3", "3.bias")):
            expected = cohort[0] if group == moving else cohort[1]
            assert torch.equal(found[2].params[name], expected.params[name])


# --- what it is matched to ------------------------------------------------------------------------------------------


def test_matching_to_the_global_model_depends_on_no_other_client() -> None:
    model = model_of("ResNet-20")
    cohort = [client(number, drawn("ResNet-20", number)) for number in (1, 2, 3)]
    method = GitReBasin(inner=Seen(), reference="global", restarts=2)
    together = given_to_inner(method, model, cohort)
    backwards = given_to_inner(method, model, cohort[::-1])
    for update in cohort:
        alone = given_to_inner(method, model, [update])[update.client_id].params
        assert same(alone, together[update.client_id].params)
        assert same(alone, backwards[update.client_id].params)


def test_the_cohort_is_matched_to_one_another_and_not_to_the_global_model() -> None:
    cohort = [client(number, drawn("MLP", number)) for number in (1, 2, 3)]
    for reference in ("cohort", "first"):
        method = GitReBasin(inner=Seen(), reference=reference)
        one, other = (given_to_inner(method, model_of("MLP", seed), cohort) for seed in (0, 1))
        assert all(same(one[k].params, other[k].params) for k in one)


def test_seed_and_round_choose_the_orders_and_nothing_else() -> None:
    model = model_of("ResNet-20")
    cohort = [client(number, drawn("ResNet-20", number)) for number in (1, 2)]

    def found(seed: int, round: int) -> Tensors:
        torch.manual_seed(len(seen))
        method = GitReBasin(inner=Seen(), seed=seed, restarts=1)
        return given_to_inner(method, replace(model, round=round), cohort)[2].params

    seen: list[Tensors] = []
    for seed, round in ((0, 0), (0, 0), (1, 0), (2, 0), (0, 1), (0, 2)):
        seen.append(found(seed, round))
    assert same(seen[0], seen[1])
    assert not all(same(seen[0], one) for one in seen[2:4])
    assert not all(same(seen[0], one) for one in seen[4:])


# --- information and scale ------------------------------------------------------------------------------------------

ONE_HIDDEN = Symmetry(
    {"1.weight": ("h", None), "1.bias": ("h",), "2.weight": (None, "h")},
    scaled=["h"],
)
SHAPES = {"1.weight": (5, 3), "1.bias": (5,), "2.weight": (2, 5), "2.bias": (2,)}


def hidden(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def one_hidden(params: Tensors) -> GlobalModel:
    return GlobalModel(params=params, trainable=frozenset(params), symmetry=ONE_HIDDEN)


def weighted(update: ClientUpdate) -> dict[str, Tensor]:
    """θ (F^¼ / mean F^¼ + 1 %) of what the group moves."""
    roots = {name: (update.sq_grad_sum[name].double() / update.num_grads) ** 0.25 for name in ONE_HIDDEN.axes}
    mean = torch.cat([value.flatten() for value in roots.values()]).mean()
    return {name: update.params[name] * (value / mean + 0.01) for name, value in roots.items()}


@settings(max_examples=30)
@given(seed=seeds)
def test_the_cost_is_of_weights_times_the_fourth_root_of_information(seed: int) -> None:
    a, b = hidden(seed), hidden(seed + 1)
    cohort = [client(k, one, sq_grad_sum=squares(one, seed + k), num_grads=k + 2) for k, one in enumerate((a, b))]
    metrics = GitReBasin(inner=Seen(), reference="first", rescale=False).aggregate(one_hidden(a), cohort).metrics
    first, second = map(weighted, cohort)
    every = [{"h": torch.tensor(places)} for places in permutations(range(5))]
    best = max(every, key=lambda one: inner(first, ONE_HIDDEN.permute(second, one)))
    assume(inner(a, ONE_HIDDEN.permute(b, best)) > inner(a, b) + 1e-3)
    assert same(Seen.updates[1].params, ONE_HIDDEN.permute(b, best))
    objective = inner(first, ONE_HIDDEN.permute(second, best))
    assert metrics["matching_objective"] == pytest.approx(objective, rel=1e-4)


@pytest.mark.parametrize("reference", ["cohort", "first"])
@pytest.mark.parametrize("silent", [4, 8])
def test_units_without_information_are_told_apart_by_their_weights(reference: Any, silent: int) -> None:
    """Some, or all: units behind a ReLU that no example passes."""
    model = model_of("MLP")
    information = squares(model.params, 2)
    information["1.weight"][:silent] = information["1.bias"][:silent] = information["3.weight"][:, :silent] = 0
    one = client(1, model.params, sq_grad_sum=information, num_grads=1)
    two = replace(one, client_id=2, params=shuffled(model, one.params, 1), sq_grad_sum=shuffled(model, information, 1))
    found = given_to_inner(GitReBasin(inner=Seen(), reference=reference, rescale=False), model, [one, two])
    assert same(found[2].params, model.params)


def test_clients_that_learnt_nothing_of_their_weights_are_matched_by_them() -> None:
    model = model_of("MLP")
    nothing = {name: torch.zeros_like(value) for name, value in model.params.items()}
    cohort = [client(k, shuffled(model, model.params, k), sq_grad_sum=nothing, num_grads=1) for k in (1, 2, 3)]
    found = given_to_inner(GitReBasin(inner=Seen()), model, cohort)
    assert all(same(found[k].params, cohort[0].params) for k in (1, 2, 3))


def test_information_can_be_left_aside() -> None:
    cohort = [client(k, hidden(k), num_grads=1) for k in (0, 1)]
    informed = [replace(update, sq_grad_sum=squares(update.params, 3)) for update in cohort]
    for options, differs in (({}, True), ({"fisher": False}, False)):
        method = GitReBasin(inner=Seen(), reference="first", **options)
        plain, weighted = (
            method.aggregate(one_hidden(hidden(0)), one).metrics["matching_objective"] for one in (cohort, informed)
        )
        assert (plain != weighted) == differs


@pytest.mark.parametrize("information", [False, True])
@settings(max_examples=10)
@given(seed=seeds)
def test_a_clients_own_scale_changes_nothing(information: bool, seed: int) -> None:
    model = one_hidden(hidden(seed))
    cohort = [client(k, hidden(seed + k), num_grads=2) for k in (0, 1)]
    if information:
        cohort = [replace(one, sq_grad_sum=squares(one.params, seed + one.client_id)) for one in cohort]
    factors = {"h": torch.exp(torch.randn(5, generator=torch.Generator().manual_seed(seed)))}
    other = [cohort[0], ONE_HIDDEN.scale_update(cohort[1], factors)]
    method = GitReBasin(inner=Seen(), reference="first")
    one, two = (given_to_inner(method, model, updates)[1] for updates in (cohort, other))
    for field in ("params", "sq_grad_sum"):
        for name, value in getattr(one, field).items():
            torch.testing.assert_close(getattr(two, field)[name], value, rtol=1e-4, atol=1e-5)


def test_scales_can_be_left_as_they_are() -> None:
    model = model_of("MLP")
    other = stretched(model, model.params, 1)
    cohort = [client(1, model.params), client(2, other)]
    for reference in REFERENCES:
        method = GitReBasin(inner=Seen(), reference=reference, rescale=False)
        assert same(given_to_inner(method, model, cohort)[2].params, other)


# --- the record -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reference", "clients"), [("first", 1), ("cohort", 1), ("global", 2)])
def test_the_record_tells_what_matching_did(reference: Any, clients: int) -> None:
    """The means over clients: to the first there is one, to the global model there are two, of which one stays."""
    model = model_of("MLP")
    turned = {"1": torch.tensor([1, 2, 0, *range(3, 8)]), "3": torch.arange(9)}
    twin = symmetry_of(model).permute(model.params, turned)
    method = GitReBasin(inner=parse("fedavg"), reference=reference, rescale=False)
    metrics = method.aggregate(model, [client(1, model.params), client(2, twin)]).metrics
    theta = {name: value for name, value in model.params.items() if name in symmetry_of(model).axes}
    apart = float(norm(steps(model.names, twin, model.params).values()))
    assert metrics["units_moved"] == pytest.approx(3 / 17 / clients)
    assert metrics["distance_before"] == pytest.approx(apart / clients)
    assert metrics["distance"] == 0
    before = inner(theta, twin) if clients == 1 else (inner(theta, twin) + inner(theta, theta)) / 2
    assert metrics["matching_objective_before"] == pytest.approx(before)
    assert metrics["matching_objective"] == pytest.approx(inner(theta, theta))
    assert "barrier" not in metrics


@every_reference
def test_the_barrier_is_the_loss_above_the_straight_line_between_the_first_client_and_the_merge(
    reference: Any,
) -> None:
    """Of −½‖θ − θ_1‖² it is d² / 8 at the middle, d being how far the merge is; of its negative there is none."""
    first, second = drawn("MLP", 1), drawn("MLP", 2)
    model = model_of("MLP", 1)

    def bowl(params: Tensors) -> float:
        return float(norm(steps(model.names, params, first).values())) ** 2 / 2

    for sign in (-1, 1):
        probe = Probe(loss=lambda params, sign=sign: sign * bowl(params), score=lambda params: 0.0)
        method = GitReBasin(inner=parse("fedavg"), reference=reference)
        merged = method.aggregate(replace(model, probe=probe), [client(1, first), client(2, second)])
        expected = bowl(merged.params) / 4 if sign < 0 else 0
        assert merged.metrics["barrier"] == pytest.approx(expected, rel=1e-4)
        assert bowl(merged.params) > 1


def test_the_inner_methods_metrics_stay() -> None:
    model = model_of("MLP")
    cohort = [client(k, drawn("MLP", k), sq_grad_sum=squares(model.params, k), num_grads=1) for k in (1, 2)]
    metrics = GitReBasin(inner=parse("fisher")).aggregate(model, cohort).metrics
    assert {"damped_share", "units_moved", "distance"} <= metrics.keys()


# --- memory and devices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("probe", "most"), [(False, 1), (True, 2)])
def test_matching_to_the_global_model_holds_one_update(probe: bool, most: int) -> None:
    """And the first client's parameters where there is a probe to look for a barrier with."""
    model = toys.global_model()
    model = model if probe else replace(model, probe=None)
    alive: list[int] = []
    replies: list[list[StorageWeakRef]] = []

    def arriving() -> Iterator[ClientUpdate]:
        for one in toys.clients(model):
            update = toys.updates(model, Request(gradients=Gradients(squares=True)), [one])[0]
            leaves = [leaf for leaf in tree_leaves(dict(vars(update))) if isinstance(leaf, Tensor)]
            replies.append([StorageWeakRef(leaf.untyped_storage()) for leaf in leaves])  # type: ignore[no-untyped-call]
            alive.append(sum(not all(map(StorageWeakRef.expired, reply)) for reply in replies))
            yield update
            del update, leaves

    GitReBasin(inner=parse("fisher"), reference="global").aggregate(model, arriving())
    assert len(alive) == 4
    assert max(alive) == most


class There(Tensor):
    """A tensor on a device that we do not have: it says `meta`, and has numbers."""

    @staticmethod
    def __new__(cls, value: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(cls, value.shape, value.stride(), dtype=value.dtype, device="meta")  # type: ignore[attr-defined]
        return cast(There, made)

    def __init__(self, value: Tensor) -> None:
        self.value = value

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return there(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes tensors for `meta` there, and refuses operations on tensors from both sides."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return there(func, args, kwargs or {})


def there(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation's result, where its operands are or where it is asked for."""
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    away = [leaf for leaf in leaves if isinstance(leaf, There)]
    if away and any(leaf.ndim for leaf in leaves if not isinstance(leaf, There)):
        raise RuntimeError(f"{func} met tensors on two devices")
    asked = kwargs.get("device")
    stays = bool(away) if asked is None else torch.device(asked).type == "meta"
    kwargs = {**kwargs, **({} if asked is None else {"device": torch.device("cpu")})}
    here_args, here_kwargs = tree_map_only(There, lambda one: one.value, (args, kwargs))
    found = func(*here_args, **here_kwargs)
    return tree_map_only(Tensor, There, found) if stays else found


@every_reference
@pytest.mark.parametrize("name", ["MLP", "LSTM"])
def test_a_merge_on_another_device_gives_the_same(name: str, reference: Any) -> None:
    model = model_of(name)
    cohort = [
        client(k, drawn(name, k), sq_grad_sum=squares({n: model.params[n] for n in model.names}, k), num_grads=3)
        for k in (1, 2, 3)
    ]
    method = GitReBasin(inner=parse("fisher"), reference=reference, restarts=1)  # others are threads, without the mode
    here = method.aggregate(model, cohort).params
    moved = replace(model, params={key: There(value) for key, value in model.params.items()})
    with Elsewhere():  # type: ignore[no-untyped-call]
        found = method.aggregate(moved, [update.to(torch.device("meta")) for update in cohort]).params
    for key, value in here.items():
        assert isinstance(found[key], There)
        torch.testing.assert_close(cast(There, found[key]).value, value)


# --- refusals, and a federation -------------------------------------------------------------------------------------


def test_a_model_without_symmetry_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the symmetry of the task's network"):
        next(parse({"kind": "git_rebasin", "inner": "fedavg"}).round(replace(model_of("MLP"), symmetry=None)))


class Points(Task):
    """Points on a line."""

    num_classes: ClassVar[int | None] = None

    def model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def data(self, node: Node) -> tuple[Examples, Examples]:
        inputs = torch.linspace(-1, 1, 8)[:, None]
        examples = cast(Examples, TensorDataset(inputs, 2 * inputs))
        return examples, examples

    def example(self) -> Tensor:
        return torch.ones(2, 1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum(1)

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.ones(len(outputs))


class Branching(nn.Module):
    """Which layer an input goes through depends on its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(1, 1), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.left(x) if float(x.sum()) > 0.3 else self.right(x)
        return y


class Untraceable(Points):
    def model(self) -> nn.Module:
        return Branching()


ALIGNED = {"kind": "git_rebasin", "inner": "fedavg"}


def test_a_network_without_units_to_permute_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="Points's model has no units that could be permuted: use another method"):
        loopback.run(Points(), ALIGNED, rounds=1)


def test_a_network_that_cannot_be_traced_is_refused_and_runs_under_fedavg() -> None:
    with pytest.raises(ValueError, match=r"the model \(Branching\)"):
        loopback.run(Untraceable(), ALIGNED, rounds=1)
    found = loopback.run(Untraceable(), "fedavg", clients=2, rounds=1, training={"epochs": 1})
    assert len(found.records) == 1
    assert all(value.isfinite().all() for value in found.model.params.values())


class Backbone(Points):
    """A frozen layer, the same for all, in front of two that train."""

    def model(self) -> nn.Module:
        layers = nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1)
        layers[0].requires_grad_(False)
        return nn.Sequential(*layers)


def test_frozen_weights_which_clients_share_stay_in_place() -> None:
    found = loopback.run(Backbone(), ALIGNED, clients=3, rounds=1, training={"epochs": 3, "learning_rate": 0.1})
    start = loopback.run(Backbone(), "fedavg", clients=1, rounds=1).model.params
    symmetry = found.model.symmetry
    assert symmetry is not None
    assert symmetry.groups == ["2"]
    assert torch.equal(found.model.params["0.weight"], start["0.weight"])


@every_reference
@pytest.mark.parametrize(("number", "size"), [(1, 1e20), (1, 3e38), (3, 3e38)])
def test_a_client_whose_weights_overflow_loses_nothing_for_the_others(reference: Any, number: int, size: float) -> None:
    model = model_of("MLP")
    lost = {name: torch.full_like(value, size) for name, value in model.params.items()}
    cohort = [client(k, lost if k == number else noisy(model.params, k)) for k in range(1, 5)]
    merged = GitReBasin(inner=Median(), reference=reference).aggregate(model, cohort).params
    assert all(float(value.abs().max()) < 10 for value in merged.values())


def digits(method: Any, rounds: int) -> list[dict[str, Any]]:
    """The records of four clients that start from their own initialisations."""
    training = {"epochs": 20, "learning_rate": 0.1}
    task = {"kind": "digits", "partition": "iid"}
    return loopback.run(task, method, clients=4, rounds=rounds, seed=1, start="own", training=training).records


def test_clients_of_four_initialisations_are_merged_round_after_round() -> None:
    plain, aligned = digits("fedavg", 1), digits(ALIGNED, 2)
    assert plain[0]["test"]["accuracy"] < 0.7
    assert aligned[0]["test"]["accuracy"] > 0.85
    assert aligned[1]["test"]["accuracy"] > 0.9
    first, second = (record["metrics"] for record in aligned)
    assert first["units_moved"] > 0.9
    assert first["distance"] < first["distance_before"]
    assert first["matching_objective"] > first["matching_objective_before"]
    assert second["units_moved"] < 0.1
