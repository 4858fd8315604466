"""Fusion by optimal transport: clients of any widths become one model, and each stays as wide as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar, Literal, cast

import pytest
import torch
import toys
from networks import NETWORKS
from torch import Tensor, nn

from aggregators.alignment.ot_fusion import OtFusion
from aggregators.core.base import Aggregator, CohortAggregator
from aggregators.core.exchange import Exchange, LostRound, Question, Round, run
from aggregators.core.fitting import fit
from aggregators.core.registry import parse
from aggregators.core.symmetry import Symmetry
from aggregators.core.tensors import norm, steps
from aggregators.core.tracing import trace
from aggregators.core.transport import Planner, reverse, transport, transport_update
from aggregators.core.update import ClientUpdate, GlobalModel, Gradients, Merged, Probe, Request, Tensors
from client.task import tensors
from server import loopback

EVERYTHING = Request(gradients=Gradients(sums=True, squares=True, sketches=2), gram=True, grad_gram=True, moments=True)


class Seen(CohortAggregator):
    """Keeps what it is given, in `updates`, and the model that it starts from; ends with the first client's."""

    kind: Literal["test_ot_fusion:Seen"] = "test_ot_fusion:Seen"
    asked: Request = Request()
    fewest: int = 1
    updates: ClassVar[dict[int, ClientUpdate]] = {}
    model: ClassVar[list[GlobalModel]] = []

    @property
    def request(self) -> Request:
        return self.asked

    @property
    def min_updates(self) -> int:
        return self.fewest

    def merge(self, model: GlobalModel, updates: Sequence[ClientUpdate]) -> Merged:
        type(self).updates = {update.client_id: update for update in updates}
        type(self).model = [model]
        return Merged(updates[0].params)


# --- networks of any width ------------------------------------------------------------------------------------------


def perceptron(a: int = 6, b: int = 5) -> nn.Module:
    layers = (nn.Linear(12, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, 4))
    return nn.Sequential(nn.Flatten(), *layers)


def convolutional(a: int = 4, b: int = 6) -> nn.Module:
    """LeNet-like, with batch norms, and a linear layer that reads channels as blocks of positions."""
    first = (nn.Conv2d(1, a, 2), nn.BatchNorm2d(a), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*first, nn.Linear(6 * a, b), nn.BatchNorm1d(b), nn.ReLU(), nn.Linear(b, 4))


X = NETWORKS["MLP"].example.double()
NETS: dict[str, Callable[..., nn.Module]] = {"perceptron": perceptron, "convolutional": convolutional}
READERS = {"perceptron": ("3.weight", "5.weight"), "convolutional": ("4.weight", "7.weight")}
every_net = pytest.mark.parametrize("name", NETS)


@cache
def net(name: str) -> tuple[nn.Module, Symmetry]:
    module = NETS[name]().eval()
    return module, trace(module, NETWORKS["MLP"].example)


def drawn(name: str, seed: int, *widths: int) -> dict[str, Tensor]:
    """A network of these widths with every parameter and running statistic at random."""
    generator = torch.Generator().manual_seed(seed)

    def one(key: str, value: Tensor) -> Tensor:
        noise: Tensor = torch.randn(value.shape, generator=generator) / max(1, value[:1].numel()) ** 0.5
        return noise.abs() + 0.5 if "var" in key else noise

    values = tensors(NETS[name](*widths))
    return {key: one(key, value) if value.is_floating_point() else value for key, value in values.items()}


def model_of(name: str, params: Tensors | None = None) -> GlobalModel:
    module, symmetry = net(name)
    trainable = frozenset(key for key, _ in module.named_parameters())
    return GlobalModel(params=params or drawn(name, 0), trainable=trainable, symmetry=symmetry, round=1)


def computed(name: str, params: Tensors) -> Tensor:
    """What the network puts out with tensors of whatever widths."""
    module = NETS[name]().eval()
    fit(module, params)
    module.load_state_dict(dict(params))
    y: Tensor = module.double()(X)
    return y.detach()


def sizes(name: str, params: Tensors) -> dict[str, int]:
    return net(name)[1].sizes(params)


def duplicated(name: str, params: Tensors, times: int, seed: int = 3) -> dict[str, Tensor]:
    """The same function with every unit so many times, each read by an equal part, in an order at random."""
    symmetry, generator = net(name)[1], torch.Generator().manual_seed(seed)
    units = {g: torch.arange(n).repeat(times) for g, n in symmetry.sizes(params).items()}
    order = {g: index[torch.randperm(len(index), generator=generator)] for g, index in units.items()}
    wide = symmetry.take(params, order)
    return {key: value / times if key in READERS[name] else value for key, value in wide.items()}


def shuffled(name: str, params: Tensors, seed: int = 3) -> dict[str, Tensor]:
    """A permutation at random."""
    generator = torch.Generator().manual_seed(seed)
    return {g: torch.randperm(n, generator=generator) for g, n in sizes(name, params).items()}


def client(client_id: int, params: Tensors, **statistics: Any) -> ClientUpdate:
    return ClientUpdate(client_id=client_id, num_examples=10, params=params, **statistics)


class Cohort:
    """Clients that have trained to these models, or what they were sent; keeps the exchanges and what was sent."""

    def __init__(self, models: Mapping[int, Tensors], **statistics: Any) -> None:
        self.models, self.statistics = models, statistics
        self.asked: list[Exchange[Any]] = []
        self.sent: dict[int, Tensors] = {}

    def __call__(self, exchange: Exchange[Any]) -> Iterator[ClientUpdate]:
        self.asked.append(exchange)
        for client_id, params in self.models.items():
            sent = exchange.sent(client_id)
            assert sent is not None
            if exchange.task == "train":
                self.sent[client_id] = sent
            yield client(client_id, params, **self.statistics)


def ended(method: OtFusion, model: GlobalModel, models: Mapping[int, Tensors], **statistics: Any) -> Merged:
    return run(method.round(model), Cohort(models, **statistics))


def following(model: GlobalModel, merged: Merged) -> GlobalModel:
    return replace(model, params=merged.params, memory=merged.memory, round=model.round + 1)


def fusion(inner: Any = None, **settings: Any) -> OtFusion:
    return OtFusion(inner=parse(inner or "fedavg"), **settings)


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], value) for name, value in b.items())


def close(a: Tensors, b: Tensors) -> None:
    torch.testing.assert_close(dict(a), dict(b), rtol=1e-4, atol=1e-5)


# --- equal widths ---------------------------------------------------------------------------------------------------


@every_net
@pytest.mark.parametrize("settings", [{}, {"passes": 2}, {"iterations": 2}, {"marginals": "importance"}])
def test_permuted_twins_come_back_exactly(name: str, settings: Mapping[str, Any]) -> None:
    model = model_of(name)
    first = drawn(name, 1)
    symmetry = net(name)[1]
    twins = {k: symmetry.permute(first, shuffled(name, first, k)) for k in (2, 3)}
    merged = ended(OtFusion(inner=Seen(), **settings), model, {1: first, **twins})
    for k in (1, 2, 3):
        assert same(Seen.updates[k].params, first)
    assert merged.metrics["distance"] == pytest.approx(0, abs=1e-5)


INNERS = [
    "fedavg",
    "median",
    "fisher",
    "regmean",
    "kfac",
    {"kind": "ssf", "precision": "sketch"},
    {"kind": "norm_clip", "inner": "fedavg", "max_norm": 0.4},
    {"kind": "fedavgm", "inner": "fisher"},
    {"kind": "repair", "inner": "fedavg"},
]


@pytest.mark.parametrize("inner", INNERS, ids=str)
def test_any_inner_method_merges_permuted_twins_as_it_merges_the_same_clients(inner: Any) -> None:
    """Every statistic follows its units."""
    model = toys.global_model()
    cohort, symmetry = toys.clients(model), toys.SYMMETRY

    def turned(update: ClientUpdate) -> ClientUpdate:
        generator = torch.Generator().manual_seed(update.client_id % 100)
        return symmetry.permute_update(update, {g: torch.randperm(6, generator=generator) for g in symmetry.groups})

    def asked(exchange: Exchange[Any]) -> Iterator[ClientUpdate]:
        replies = toys.ask(cohort)(exchange)
        first = min(client.client_id for client in cohort)
        yield from (u if exchange.task != "train" or u.client_id == first else turned(u) for u in replies)

    method = OtFusion(inner=parse(inner))
    straight, merged = (run(method.round(model), ask) for ask in (toys.ask(cohort), asked))
    for key, value in straight.params.items():
        torch.testing.assert_close(merged.params[key], value, rtol=1e-5, atol=1e-6)
    assert merged.metrics["units_moved"] > 0.5
    assert (merged.metrics["approximate_statistics"], merged.metrics["left_out"]) == (0, 0)


def test_the_record_tells_what_transport_did() -> None:
    name, model = "perceptron", model_of("perceptron")
    first, second = drawn(name, 1), drawn(name, 2)
    found = Planner(net(name)[1], model.names).plans(second, first)
    metrics = ended(fusion(), model, {1: first, 2: second}).metrics
    moved = transport(net(name)[1], second, found.plans)
    assert metrics["matching_objective_before"] == pytest.approx(-found.before)
    assert metrics["matching_objective"] == pytest.approx(-found.after)
    assert metrics["units_moved"] == pytest.approx(found.moved_share)
    for key, params in (("distance_before", second), ("distance", moved)):
        assert metrics[key] == pytest.approx(float(norm(steps(model.names, params, first).values())))
    assert metrics["distance"] < metrics["distance_before"]
    wide = ended(fusion(), model, {1: first, 2: drawn(name, 2, 9, 8)}).metrics
    assert "distance_before" not in wide
    assert wide["matching_objective"] > wide["matching_objective_before"]


def test_the_barrier_is_looked_for_from_the_first_client_in_the_references_units() -> None:
    name = "perceptron"
    wide = drawn(name, 2, 9, 8)

    def bump(params: Tensors) -> float:
        return -(float(norm(steps(wide, params, wide).values())) ** 2)

    model = replace(model_of(name), probe=Probe(loss=bump, score=bump))
    merged = ended(fusion(), model, {1: drawn(name, 1), 2: wide})
    start = transport(
        net(name)[1], drawn(name, 1), Planner(net(name)[1], model.names).plans(drawn(name, 1), wide).plans
    )
    apart = float(norm(steps(wide, start, merged.params).values())) ** 2
    assert merged.metrics["barrier"] == pytest.approx(apart / 4, rel=1e-3)


# --- the reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "widths", "chosen"),
    [("widest", (6, 9, 7), 2), ("widest", (9, 6, 9), 1), ("first", (6, 9, 7), 1), ("first", (9, 6, 7), 1)],
)
@every_net
def test_different_widths_merge_into_the_references(
    name: str, reference: Any, widths: Sequence[int], chosen: int
) -> None:
    models = {k: drawn(name, k, width, width) for k, width in enumerate(widths, 1)}
    merged = ended(fusion(Seen(), reference=reference), model_of(name), models)
    assert same(Seen.updates[chosen].params, models[chosen])
    for k, params in models.items():
        plans = Planner(net(name)[1], model_of(name).names).plans(params, models[chosen]).plans
        if k != chosen:
            assert same(Seen.updates[k].params, transport(net(name)[1], params, plans))
    assert sizes(name, merged.params) == sizes(name, models[chosen])


@every_net
def test_the_mean_of_any_number_of_clients_is_that_of_the_carried(name: str) -> None:
    models = {k: drawn(name, k, 4 + k, 5) for k in (1, 2, 3, 4, 5)}
    merged = ended(fusion(), model_of(name), models)
    ended(fusion(Seen()), model_of(name), models)
    for key, value in merged.params.items():
        if value.is_floating_point():
            mean = torch.stack([update.params[key].double() for update in Seen.updates.values()]).mean(0)
            torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-6)


def test_a_barycentre_takes_the_mean_of_the_carried_for_its_next_reference() -> None:
    name, model = "perceptron", model_of("perceptron")
    symmetry, models = net(name)[1], {k: drawn(name, k, 4 + k, 5) for k in (1, 2, 3)}
    ended(fusion(Seen()), model, models)
    reference = {key: torch.stack([u.params[key] for u in Seen.updates.values()]).mean(0) for key in models[1]}
    ended(fusion(Seen(), iterations=2), model, models)
    for k, params in models.items():
        plans = Planner(symmetry, model.names).plans(params, reference).plans
        close(Seen.updates[k].params, transport_update(symmetry, client(k, params), plans).params)


def test_the_inner_method_starts_from_the_model_in_the_references_widths() -> None:
    name, model = "perceptron", model_of("perceptron")
    models = {1: drawn(name, 1, 9, 8), 2: drawn(name, 2)}
    ended(fusion(Seen()), model, models)
    (seen,) = Seen.model
    plans = Planner(net(name)[1], model.names).plans(model.params, models[1]).plans
    assert same(seen.params, transport(net(name)[1], model.params, plans))
    ended(fusion(Seen()), model, {1: drawn(name, 1), 2: drawn(name, 2)})
    assert Seen.model[0].params is model.params


WIDE_INNERS = [
    "fedavg",
    "median",
    {"kind": "fisher", "prior": "bayes"},
    {"kind": "norm_clip", "inner": "fedavg"},
    {"kind": "fedavgm", "inner": "fedavg"},
    {"kind": "wise_ft", "inner": "fedavg", "alpha": 0.5},
]


@pytest.mark.parametrize("inner", WIDE_INNERS, ids=str)
def test_inner_methods_that_remember_or_compare_follow_the_widths_round_after_round(inner: Any) -> None:
    name, model = "perceptron", model_of("perceptron")
    method = fusion(inner)
    widths = {1: (6, 5), 2: (9, 8), 3: (7, 8)}
    for number in range(3):
        models = {k: drawn(name, 10 * number + k, *both) for k, both in widths.items()}
        squares = {k: {key: params[key].square() for key in model.names} for k, params in models.items()}
        cohort = [client(k, p, sq_grad_sum=squares[k], num_grads=3) for k, p in models.items()]
        merged = run(method.round(model), lambda exchange, cohort=cohort: iter(cohort))  # type: ignore[misc]
        assert sizes(name, merged.params) == {"1": 9, "3": 8}
        assert all(value.isfinite().all() for value in merged.params.values())
        model = following(model, merged)


# --- widths of their own --------------------------------------------------------------------------------------------


@every_net
@pytest.mark.parametrize("outgoing", ["sum", "mean"])
@pytest.mark.parametrize("reference", ["widest", "first"])
def test_clients_of_duplicated_units_are_each_sent_a_model_of_their_width_that_computes_the_same(
    name: str, outgoing: Any, reference: Any
) -> None:
    """Carried there by sums; carried back by sums whatever the outgoing weights were."""
    base = drawn(name, 1, 4, 3)
    models = {1: duplicated(name, base, 2), 2: base, 3: duplicated(name, base, 3)}
    model = model_of(name)
    method = fusion(outgoing=outgoing, reference=reference)
    merged = ended(method, model, models)
    if outgoing == "sum":
        torch.testing.assert_close(computed(name, merged.params), computed(name, base), rtol=1e-4, atol=1e-5)
    after = following(model, merged)
    cohort = Cohort(models)
    run(method.round(after), cohort)
    for k, params in models.items():
        assert {key: value.shape for key, value in cohort.sent[k].items()} == {
            key: value.shape for key, value in params.items()
        }
        if outgoing == "sum":
            torch.testing.assert_close(computed(name, cohort.sent[k]), computed(name, base), rtol=1e-4, atol=1e-5)
            close(cohort.sent[k], params)


@every_net
def test_what_a_client_is_sent_is_the_model_carried_back_by_its_plans(name: str) -> None:
    models = {1: drawn(name, 1), 2: drawn(name, 2, 9, 8), 3: drawn(name, 3, 9, 8)}
    model = model_of(name)
    after = following(model, ended(fusion(), model, models))
    assert after.memory["plans"].keys() == {"1"}  # type: ignore[union-attr]
    plans = Planner(net(name)[1], model.names).plans(models[1], models[2]).plans
    cohort = Cohort(models)
    run(fusion().round(after), cohort)
    close(cohort.sent[1], transport(net(name)[1], after.params, reverse(plans)))
    assert cohort.sent[2] is cohort.sent[3] is after.params


def test_clients_of_one_width_are_all_sent_one_model() -> None:
    name, model = "perceptron", model_of("perceptron")
    models = {k: drawn(name, k) for k in (1, 2, 3)}
    after = following(model, ended(fusion(), model, models))
    exchange = next(fusion().round(after))
    assert exchange.params is after.params


def test_the_model_keeps_its_widths_while_its_widest_client_is_away() -> None:
    """And the plans of those who are."""
    name, model = "perceptron", model_of("perceptron")
    models = {1: drawn(name, 1), 2: drawn(name, 2, 9, 8), 3: drawn(name, 3, 7, 7)}
    first = ended(fusion(), model, models)
    second = ended(fusion(), following(model, first), {1: drawn(name, 4)})
    assert sizes(name, second.params) == {"1": 9, "3": 8}
    assert second.memory["plans"].keys() == {"1", "3"}  # type: ignore[union-attr]
    cohort = Cohort(models)
    run(fusion().round(following(following(model, first), second)), cohort)
    assert [sizes(name, cohort.sent[k])["1"] for k in (1, 2, 3)] == [6, 9, 7]


def test_a_lost_round_leaves_the_choice_of_a_reference_to_the_next() -> None:
    name, model = "perceptron", model_of("perceptron")
    with pytest.raises(LostRound, match="1 good replies, the method needs at least 2"):
        ended(fusion(Seen(fewest=2)), model, {1: drawn(name, 1)})
    merged = ended(fusion(), model, {1: drawn(name, 1), 2: drawn(name, 2, 9, 8)})
    assert sizes(name, merged.params) == {"1": 9, "3": 8}


def test_what_the_inner_measures_after_training_goes_to_all_in_the_merged_widths() -> None:
    name, model = "perceptron", model_of("perceptron")
    models = {1: drawn(name, 1), 2: drawn(name, 2, 9, 8)}
    method = fusion(toys.TwoExchanges(inner=parse("fedavg")))
    zeros = {key: torch.zeros_like(models[2][key]) for key in model.names}
    cohort = Cohort(models, grad_sum=zeros, num_grads=1)

    def ask(exchange: Exchange[Any]) -> Iterator[ClientUpdate]:
        return (replace(u, grad_sum={}) if exchange.task == "train" else u for u in cohort(exchange))

    merged = run(method.round(model), lambda exchange: (replace(u, metrics={"loss": 1.0}) for u in ask(exchange)))
    assert sizes(name, cast(Tensors, cohort.asked[1].params)) == sizes(name, merged.params) == {"1": 9, "3": 8}


# --- statistics that follow, and what does not ----------------------------------------------------------------------


def test_squares_follow_other_widths_approximately_and_the_record_says_so() -> None:
    name, model = "perceptron", model_of("perceptron")
    models = {1: drawn(name, 1), 2: drawn(name, 2, 9, 8)}
    squares = {k: {key: value.square() for key, value in params.items()} for k, params in models.items()}
    cohort = [client(k, params, sq_grad_sum=squares[k], num_grads=3) for k, params in models.items()]
    method = fusion(Seen(asked=Request(gradients=Gradients(squares=True))))
    merged = run(method.round(model), lambda exchange: iter(cohort))
    plans = Planner(net(name)[1], model.names).plans(models[1], models[2]).plans
    expected = transport_update(net(name)[1], cohort[0], plans)
    assert same(Seen.updates[1].sq_grad_sum, expected.sq_grad_sum)
    assert same(Seen.updates[2].sq_grad_sum, squares[2])
    assert merged.metrics["approximate_statistics"] == 0.5
    assert merged.metrics["left_out"] == 0
    assert ended(fusion(), model, models).metrics["approximate_statistics"] == 0


@pytest.mark.parametrize("asked", ["gram", "grad_gram", "moments", "sketches"])
def test_clients_whose_statistics_cannot_follow_are_left_out_and_keep_their_place(asked: str) -> None:
    name, model = "perceptron", model_of("perceptron")
    models = {1: drawn(name, 1), 2: drawn(name, 2, 9, 8), 3: drawn(name, 3, 9, 8)}
    request = Request(gradients=Gradients(sketches=1)) if asked == "sketches" else Request(**{asked: True})
    method = fusion(Seen(asked=request))
    merged = ended(method, model, models)
    assert Seen.updates.keys() == {2, 3}
    assert merged.metrics["left_out"] == 1
    cohort = Cohort(models)
    run(method.round(following(model, merged)), cohort)
    assert sizes(name, cohort.sent[1]) == sizes(name, models[1])


REFUSED = [
    ("regmean", "Gram matrices, which"),
    ("kfac", "Gram matrices and Gram matrices of gradients, which"),
    ({"kind": "ssf", "precision": "sketch"}, "sketches, which"),
    ({"kind": "repair", "inner": "fedavg"}, "Gram matrices, which"),
]


@pytest.mark.parametrize(("inner", "asks"), REFUSED)
@pytest.mark.parametrize("settings", [{"solver": "sinkhorn"}, {"marginals": "importance"}])
def test_soft_plans_refuse_by_name_what_only_permutations_carry(
    inner: Any, asks: str, settings: Mapping[str, Any]
) -> None:
    ((field, value),) = settings.items()
    kind = parse(inner).kind
    for config in (inner, {"kind": "fedavgm", "inner": inner}):
        with pytest.raises(ValueError, match=f"{field} = '{value}': {kind} asks for {asks}") as raised:
            parse({"kind": "ot_fusion", "inner": config, **settings})
        assert "\n" not in str(raised.value)
    for fine in ("fedavg", "fisher", {"kind": "batch_norm", "inner": "fisher"}):
        assert parse({"kind": "ot_fusion", "inner": fine, **settings})


class TrainsTwice(Aggregator):
    """Asks clients to train twice."""

    kind: Literal["test_ot_fusion:TrainsTwice"] = "test_ot_fusion:TrainsTwice"

    def questions(self) -> Iterator[Question]:
        """Twice the same."""
        yield from [Question("train")] * 2

    def round(self, model: GlobalModel) -> Round:
        raise NotImplementedError


def test_what_trains_clients_twice_cannot_follow() -> None:
    with pytest.raises(
        ValueError, match="TrainsTwice asks to train, train: what trains clients once, first, can follow"
    ):
        parse({"kind": "ot_fusion", "inner": TrainsTwice()})


def test_what_compares_clients_with_what_they_were_sent_cannot_follow() -> None:
    aligned = {"kind": "activation_matching", "reference": "global", "inner": "fedavg"}
    with pytest.raises(ValueError, match="activation_matching compares clients with what they were sent"):
        parse({"kind": "ot_fusion", "inner": aligned})


def test_a_model_without_symmetry_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the symmetry of the task's network"):
        next(fusion().round(replace(model_of("perceptron"), symmetry=None)))


# --- Sinkhorn -------------------------------------------------------------------------------------------------------


def test_sinkhorns_fusion_tends_to_the_exact_one() -> None:
    name, model = "perceptron", model_of("perceptron")
    symmetry, first = net(name)[1], drawn(name, 1)
    near = {key: value + 0.2 * drawn(name, 2)[key] for key, value in first.items()}
    models = {1: first, 2: symmetry.permute(near, shuffled(name, near))}
    exact = ended(fusion(), model, models).params
    gaps = []
    for regularisation in (1.0, 0.1, 0.01):
        soft = ended(fusion(solver="sinkhorn", regularisation=regularisation), model, models)
        gaps.append(float(norm(steps(model.names, soft.params, exact).values())))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[2] < gaps[0] / 10


# --- activations ----------------------------------------------------------------------------------------------------


def activations(params: Tensors) -> dict[str, Tensor]:
    """What the perceptron's hidden layers put out for fifty inputs, each unit's centred and of length 1."""
    x, found = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)), {}
    for layer in ("1", "3"):
        x = x @ params[f"{layer}.weight"].T + params[f"{layer}.bias"]
        found[layer] = nn.functional.normalize(x - x.mean(0), dim=0)
        x = x.relu()
    return found


class Measuring(Cohort):
    """Clients that measure correlations with the anchor; those `absent` do not."""

    absent: tuple[int, ...] = ()

    def __call__(self, exchange: Exchange[Any]) -> Iterator[ClientUpdate]:
        for update in super().__call__(exchange):
            if exchange.task == "train":
                yield update
            elif update.client_id not in self.absent:
                own, anchor = activations(exchange.sent(update.client_id) or {}), activations(exchange.anchor or {})
                found = {layer: own[layer].T @ anchor[layer] for layer in own}
                yield replace(update, params={}, cross_moments=found)


BY_ACTIVATIONS = {"cost": "activations"}


def test_units_are_carried_to_those_that_do_the_same_whatever_their_widths() -> None:
    name, model = "perceptron", model_of("perceptron")
    base = drawn(name, 1, 4, 3)
    models = {1: duplicated(name, base, 2), 2: base, 3: duplicated(name, base, 3)}
    cohort = Measuring(models)
    merged = run(fusion(**BY_ACTIVATIONS).round(model), cohort)
    torch.testing.assert_close(computed(name, merged.params), computed(name, base), rtol=1e-4, atol=1e-5)
    train, measure = cohort.asked
    assert (train.task, measure.task) == ("train", "measure")
    assert measure.request == Request(cross_moments=True)
    assert same(measure.anchor or {}, models[3])
    assert all(same(measure.sent(k) or {}, params) for k, params in models.items())


def test_correlations_are_measured_anew_for_each_reference_of_a_barycentre() -> None:
    name, model = "perceptron", model_of("perceptron")
    cohort = Measuring({k: drawn(name, k, 4 + k, 5) for k in (1, 2, 3)})
    method = fusion(**BY_ACTIVATIONS, iterations=2)
    run(method.round(model), cohort)
    assert [exchange.task for exchange in cohort.asked] == ["train", "measure", "measure"]
    assert [question.task for question in method.questions()] == ["train", "measure", "measure"]
    first, second = (cast(Tensors, exchange.anchor) for exchange in cohort.asked[1:])
    assert sizes(name, first) == sizes(name, second)
    assert not same(first, second)


def test_who_falls_silent_is_left_out_and_too_few_lose_the_round() -> None:
    name, model = "perceptron", model_of("perceptron")
    cohort = Measuring({k: drawn(name, k, 4 + k, 5) for k in (1, 2, 3)})
    cohort.absent = (2,)
    run(fusion(Seen(), **BY_ACTIVATIONS).round(model), cohort)
    assert Seen.updates.keys() == {1, 3}
    with pytest.raises(LostRound, match="2 good replies, the method needs at least 3"):
        run(fusion(Seen(fewest=3), **BY_ACTIVATIONS).round(model), cohort)


# --- a federation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, BY_ACTIVATIONS])
def test_clients_of_four_initialisations_are_fused_in_a_federation(settings: Mapping[str, Any]) -> None:
    training = {"epochs": 20, "learning_rate": 0.1}
    task = {"kind": "digits", "partition": "iid"}
    method = {"kind": "ot_fusion", "inner": "fedavg", **settings}
    options: dict[str, Any] = {"clients": 4, "rounds": 2, "seed": 1, "start": "own", "training": training}
    first, second = loopback.run(task, method, **options).records
    plain = loopback.run(task, "fedavg", **{**options, "rounds": 1}).records[0]
    assert plain["test"]["accuracy"] < 0.7
    assert first["test"]["accuracy"] > 0.85
    assert second["test"]["accuracy"] > 0.9
    assert first["metrics"]["units_moved"] > 0.7
    assert second["metrics"]["units_moved"] < 0.1
