"""Activation matching: units find their partners by what they do, on clients' own data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any, ClassVar, Literal, cast

import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from aggregators.alignment.activation_matching import ActivationMatching, matched
from aggregators.core.base import CohortAggregator
from aggregators.core.exchange import Exchange, LostRound, run
from aggregators.core.registry import parse
from aggregators.core.symmetry import Product, Symmetry, inverse
from aggregators.core.tracing import trace
from aggregators.core.update import ClientUpdate, GlobalModel, Gradients, Merged, Request, Tensors
from client.statistics import measure
from client.task import Examples, Node, Task, tensors
from server import loopback

EVERYTHING = toys.EVERYTHING


class Labels(Task):
    num_classes: ClassVar[int | None] = 3

    def model(self) -> nn.Module:
        raise NotImplementedError

    def data(self, node: Node) -> tuple[Examples, Examples]:
        raise NotImplementedError


class Seen(CohortAggregator):
    """Keeps what it is given, in `updates`."""

    kind: Literal["test_activation_matching:Seen"] = "test_activation_matching:Seen"
    asked: Request = Request()
    fewest: int = 1
    updates: ClassVar[dict[int, ClientUpdate]] = {}

    @property
    def request(self) -> Request:
        return self.asked

    @property
    def min_updates(self) -> int:
        return self.fewest

    def merge(self, model: GlobalModel, updates: Sequence[ClientUpdate]) -> Merged:
        type(self).updates = {update.client_id: update for update in updates}
        return Merged(model.params)


# --- networks -------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A stream that three convolutions write, with batch norms, read by blocks of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.up, self.down = nn.Conv2d(5, 6, 1), nn.Conv2d(6, 5, 3, padding=1)
        self.grouped = nn.Conv2d(5, 5, 3, padding=1, groups=5)
        self.out = nn.Linear(5 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.down(torch.relu(self.up(x)))
        y: Tensor = self.out(torch.relu(self.grouped(x)).flatten(1))
        return y


def net(module: nn.Module, seed: int = 0) -> nn.Module:
    """With every parameter and running statistic at random."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.data = noise.abs() + 0.5 if "var" in name else noise * 0.5
    return module.eval()


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def convolutional() -> nn.Module:
    layers = (
        nn.Conv2d(1, 4, 2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 6),
        nn.Tanh(),
        nn.Linear(6, 3),
    )
    return nn.Sequential(*layers)


NETS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": perceptron,
    "convolutional": convolutional,
    "residual": Residual,
}
every_net = pytest.mark.parametrize("make", NETS.values(), ids=NETS)


def data(num: int = 40, seed: int = 0) -> Examples:
    x = torch.randn(num, 1, 3, 3, generator=torch.Generator().manual_seed(seed))
    return cast(Examples, TensorDataset(x, torch.arange(num) % 3))


def model_of(module: nn.Module) -> GlobalModel:
    params = {name: value.clone() for name, value in tensors(module).items()}
    trainable = frozenset(name for name, _ in module.named_parameters())
    return GlobalModel(params=params, trainable=trainable, symmetry=trace(module, torch.randn(2, 1, 3, 3)))


def answering(module: nn.Module, clients: Mapping[int, Tensors], seed: int = 0) -> toys.Ask:
    """Clients that have trained to these parameters, on the same data, and measure what is asked."""

    def reply(client_id: int, exchange: Exchange[Any]) -> ClientUpdate:
        sent = exchange.sent(client_id)
        assert sent is not None
        params = clients[client_id] if exchange.task == "train" else sent
        module.load_state_dict(params)
        anchor = sent if exchange.anchor is None else exchange.anchor
        fields = measure(Labels(), module, data(seed=seed), exchange.request, seed=1, anchor=anchor)
        kept = params if exchange.task == "train" else {}
        return ClientUpdate(client_id=client_id, num_examples=40, params=kept, **fields)

    return lambda exchange: (reply(client_id, exchange) for client_id in clients)


def drawn(symmetry: Symmetry, params: Tensors, seed: int = 3) -> dict[str, Tensor]:
    """A permutation at random."""
    generator = torch.Generator().manual_seed(seed)
    return {group: torch.randperm(size, generator=generator) for group, size in symmetry.sizes(params).items()}


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], value) for name, value in b.items())


# --- what comes back ------------------------------------------------------------------------------------------------


@every_net
@pytest.mark.parametrize("reference", ["first", "global"])
def test_a_permuted_twin_comes_back_exactly(make: Callable[[], nn.Module], reference: Any) -> None:
    module = net(make())
    model = model_of(module)
    assert model.symmetry is not None
    twin = model.symmetry.permute(model.params, drawn(model.symmetry, model.params))
    assert not same(twin, model.params)
    method = ActivationMatching(inner=Seen(), reference=reference)
    merged = run(method.round(model), answering(module, {1: model.params, 2: twin}))
    assert same(Seen.updates[2].params, model.params)
    assert merged.metrics["distance"] == 0
    assert merged.metrics["distance_before"] > (reference == "first")


@every_net
def test_a_permuted_twin_brings_every_statistic_along(make: Callable[[], nn.Module]) -> None:
    module = net(make())
    model = model_of(module)
    assert model.symmetry is not None
    twin = model.symmetry.permute(model.params, drawn(model.symmetry, model.params))
    method = ActivationMatching(inner=Seen(asked=EVERYTHING), reference="global")
    run(method.round(model), answering(module, {1: model.params, 2: twin}))
    one, two = ({**vars(Seen.updates[client_id])} for client_id in (1, 2))
    assert all(one[field] for field in ("grad_sum", "grad_sketch", "gram", "grad_gram", "moments", "cross_moments"))
    for field in one.keys() - {"client_id", "name", "estimator"}:
        torch.testing.assert_close(two[field], one[field], rtol=1e-4, atol=1e-4)


def test_units_that_stand_for_blocks_are_matched_by_the_mean_over_their_channels() -> None:
    symmetry = Symmetry({"a.weight": (Product(("heads", 2)), None), "b.weight": (None, Product(("heads", 2)))})
    generator = torch.Generator().manual_seed(0)
    anchor = {"a.weight": torch.randn(6, 3, generator=generator), "b.weight": torch.randn(2, 6, generator=generator)}
    rows = torch.nn.functional.normalize(torch.randn(6, 50, generator=generator))
    index = torch.tensor([2, 0, 1])
    moved = rows.view(3, 2, 50)[index].view(6, 50)
    found = matched(symmetry, {"a": moved @ rows.T}, anchor, symmetry.permute(anchor, {"heads": index}))
    assert found.permutation["heads"].tolist() == inverse({"heads": index})["heads"].tolist()
    assert found.after == pytest.approx(1, abs=1e-5)


# --- the best assignment --------------------------------------------------------------------------------------------

TWO_LAYERS = Symmetry({"a.weight": ("g", None), "b.weight": ("g", "h"), "c.weight": ("h", "g")})


def two_layers(seed: int, g: int, h: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Two networks, and correlations, all at random; group g stands in two layers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (g, 2), "b.weight": (g, h), "c.weight": (h, g)}
    a, b = ({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(2))
    found = {layer: 2 * torch.rand(n, n, generator=generator) - 1 for layer, n in {"a": g, "b": g, "c": h}.items()}
    return a, b, found


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), g=st.integers(1, 6), h=st.integers(1, 5))
def test_no_assignment_correlates_better_for_up_to_six_units(seed: int, g: int, h: int) -> None:
    a, b, found = two_layers(seed, g, h)
    best = matched(TWO_LAYERS, found, a, b)
    means = {"g": (found["a"] + found["b"]).double() / 2, "h": found["c"].double()}
    total = 0.0
    for group, mean in means.items():
        size = len(mean)
        brute = max(sum(float(mean[one[i], i]) for i in range(size)) for one in permutations(range(size)))
        assert sum(float(mean[best.permutation[group][i], i]) for i in range(size)) == pytest.approx(
            brute, abs=2e-5 * size
        )
        total += brute
    assert best.after == pytest.approx(total / (g + h), abs=2e-5)
    assert best.before == pytest.approx(sum(float(mean.trace()) for mean in means.values()) / (g + h))
    assert best.after >= best.before - 2e-5


def test_dead_units_are_settled_by_their_weights() -> None:
    """Units 1, 2 and 4 are silent: only what reads them tells them apart."""
    module = net(perceptron())
    with torch.no_grad():
        for part in (module[1].weight, module[1].bias):  # type: ignore[index]
            part[[1, 2, 4]] = 0
    model = model_of(module)
    assert model.symmetry is not None
    twin = model.symmetry.permute(model.params, drawn(model.symmetry, model.params))
    run(ActivationMatching(inner=Seen()).round(model), answering(module, {1: model.params, 2: twin}))
    assert same(Seen.updates[2].params, model.params)


def test_a_group_without_a_layer_is_matched_by_its_weights() -> None:
    a, _, _ = two_layers(0, 5, 4)
    index = {"g": torch.tensor([3, 0, 4, 1, 2])}
    found = matched(TWO_LAYERS, {}, a, TWO_LAYERS.permute(a, index))
    assert same(found.permutation, {**inverse(index), "h": torch.arange(4)})


def test_units_of_which_nothing_trains_stay() -> None:
    module = net(perceptron())
    model = model_of(module)
    assert model.symmetry is not None
    last = model.symmetry.groups[-1]
    twin = model.symmetry.permute(model.params, drawn(model.symmetry, model.params))
    for trainable, moving in ((["5.weight"], [last]), (["5.bias"], [])):
        frozen = replace(model, trainable=frozenset(trainable))
        run(ActivationMatching(inner=Seen()).round(frozen), answering(module, {1: model.params, 2: twin}))
        back = model.symmetry.permute(twin, {g: inverse(drawn(model.symmetry, twin))[g] for g in moving})
        assert same(Seen.updates[2].params, back)


def test_units_alike_to_rounding_stay_where_their_weights_are() -> None:
    """Two examples: every correlation is 1 or -1, but for rounding."""
    a, _, found = two_layers(1, 6, 5)
    signs = {layer: value.sign()[:1].T * value.sign()[:1] for layer, value in found.items()}
    noise = {
        layer: value - 1e-7 * torch.rand(value.shape, generator=torch.Generator()) for layer, value in signs.items()
    }
    best = matched(TWO_LAYERS, noise, a, a)
    assert same(best.permutation, {"g": torch.arange(6), "h": torch.arange(5)})


# --- the exchanges --------------------------------------------------------------------------------------------------

MODEL = toys.global_model()
CLIENTS = toys.clients(MODEL)


class Noting:
    """Toy clients; `asked` keeps the exchanges, `absent` answer no measurement."""

    def __init__(self, *absent: int) -> None:
        self.absent, self.asked = absent, list[Exchange[Any]]()

    def __call__(self, exchange: Exchange[Any]) -> Iterator[ClientUpdate]:
        self.asked.append(exchange)
        there = [c for c in CLIENTS if exchange.task == "train" or c.client_id not in self.absent]
        yield from toys.ask(there)(exchange)


def test_the_first_clients_model_goes_to_all_beside_their_own() -> None:
    noted = Noting()
    run(ActivationMatching(inner=parse("fedavg")).round(MODEL), noted)
    train, compare = noted.asked
    assert (train.task, train.request) == ("train", Request())
    assert (compare.task, compare.request) == ("measure", Request(cross_moments=True))
    first = min(CLIENTS, key=lambda client: client.client_id)
    assert compare.anchor is not None
    assert same(compare.anchor, first.params)
    for client in CLIENTS:
        assert same(compare.sent(client.client_id) or {}, client.params)


def test_the_first_client_stays_as_it_is_whether_or_not_it_answers_again() -> None:
    first = min(CLIENTS, key=lambda client: client.client_id)
    for absent in ((), (first.client_id,)):
        run(ActivationMatching(inner=Seen()).round(MODEL), Noting(*absent))
        assert len(Seen.updates) == 4
        assert same(Seen.updates[first.client_id].params, first.params)


def test_a_client_that_does_not_answer_again_is_left_out() -> None:
    run(ActivationMatching(inner=Seen()).round(MODEL), Noting(7))
    assert sorted(Seen.updates) == [1, 2, 2**63 + 11]


def test_too_few_matched_clients_lose_the_round() -> None:
    with pytest.raises(LostRound, match="3 good replies, the method needs at least 4"):
        run(ActivationMatching(inner=Seen(fewest=4)).round(MODEL), Noting(7))


def test_matching_to_the_global_model_takes_no_second_exchange() -> None:
    noted = Noting()
    inner = parse({"kind": "fisher", "estimator": "empirical"})
    run(ActivationMatching(inner=inner, reference="global").round(MODEL), noted)
    (train,) = noted.asked
    assert (train.task, train.request.cross_moments) == ("train", True)
    assert train.request.gradients == Gradients(squares=True, estimator="empirical")


def test_other_exchanges_of_the_inner_method_pass() -> None:
    noted = Noting()
    run(ActivationMatching(inner=toys.TwoExchanges(inner=parse("fedavg"))).round(MODEL), noted)
    assert [exchange.task for exchange in noted.asked] == ["train", "measure", "measure"]
    assert noted.asked[2].request == Request(gradients=Gradients(sums=True))


@pytest.mark.parametrize("reference", ["first", "global"])
def test_the_record_tells_what_matching_did(reference: Any) -> None:
    module = net(perceptron())
    model = model_of(module)
    assert model.symmetry is not None
    index = {group: torch.arange(size) for group, size in model.symmetry.sizes(model.params).items()}
    index[model.symmetry.groups[0]] = torch.tensor([1, 2, 0, 3, 4, 5])
    twin = model.symmetry.permute(model.params, index)
    method = ActivationMatching(inner=parse("fedavg"), reference=reference)
    metrics = run(method.round(model), answering(module, {1: model.params, 2: twin})).metrics
    share = 1 if reference == "first" else 0.5  # of the clients matched, how many moved
    assert metrics["units_moved"] == pytest.approx(share * 3 / 11)
    assert metrics["matching_objective"] == pytest.approx(1, abs=1e-5)
    assert metrics["matching_objective_before"] < 1 - 0.1 * share


def test_a_model_without_symmetry_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the symmetry"):
        next(parse({"kind": "activation_matching", "inner": "fedavg"}).round(replace(MODEL, symmetry=None)))


# --- a federation ---------------------------------------------------------------------------------------------------


def accuracy(method: Any, start: str = "own") -> float:
    task = {"kind": "digits", "partition": "iid"}
    training = {"epochs": 30, "learning_rate": 0.1}
    run = loopback.run(task, method, clients=4, rounds=1, seed=1, start=start, training=training)
    found: float = run.records[-1]["test"]["accuracy"]
    return found


def test_four_clients_of_four_initialisations_are_merged_without_data_on_the_server() -> None:
    plain, first, untrained = (
        accuracy(method)
        for method in (
            "fedavg",
            {"kind": "activation_matching", "inner": "fedavg"},
            {"kind": "activation_matching", "inner": "fedavg", "reference": "global"},
        )
    )
    assert plain < 0.7
    assert first > 0.88
    assert plain + 0.1 < untrained < first
