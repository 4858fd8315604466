"""Federated matched averaging: what each exchange sends and asks, and what comes of a pass, by clients that train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from test_pfnm import CONVOLUTIONAL, PERCEPTRON, at_random, convolutional, model_of, perceptron, permuted, units
from torch import Tensor, nn
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from toys import fingerprint, following

from aggregators.alignment.fedma import FedMA
from aggregators.core.exchange import Exchange, LostRound, run
from aggregators.core.registry import parse
from aggregators.core.symmetry import Symmetry
from aggregators.core.update import ClientUpdate, GlobalModel, Merged, Request, Tensors

Make = Callable[..., nn.Module]
NETWORKS = {"perceptron": (perceptron, PERCEPTRON, (6,)), "convolutional": (convolutional, CONVOLUTIONAL, (1, 6, 6))}
every_network = pytest.mark.parametrize(("make", "symmetry", "shape"), NETWORKS.values(), ids=NETWORKS)


def initial(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def newly(make: Make, seed: int, *widths: int) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return initial(make(*widths))


@dataclass
class Site:
    """A client that starts round 1 from its own network, and trains it unless it has no examples: plain torch."""

    client_id: int
    own: Tensors
    make: Make = perceptron
    x: Tensor = field(default_factory=lambda: torch.zeros(0))
    y: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.int64))
    answered: int = 0

    def reply(self, exchange: Exchange[Any], first: bool) -> ClientUpdate:
        """The answer; `first` where it starts from its own."""
        sent = self.own if first else exchange.sent(self.client_id)
        assert sent is not None
        params = {name: value.clone() for name, value in sent.items()}
        if len(self.x):
            self.train(params, exchange.frozen)
        self.answered += 1
        counts = self.y.bincount(minlength=3) if exchange.request.class_counts else None
        return ClientUpdate(client_id=self.client_id, num_examples=len(self.y), params=params, class_counts=counts)

    def train(self, params: dict[str, Tensor], frozen: frozenset[str]) -> None:
        """40 steps of gradient descent; running statistics follow."""
        module = self.make().train()
        moving = [name for name, _ in module.named_parameters() if name not in frozen]
        for _ in range(40):
            learnt = {name: params[name].detach().requires_grad_() for name in moving}
            loss = nn.functional.cross_entropy(functional_call(module, {**params, **learnt}, self.x), self.y)
            gradients = torch.autograd.grad(loss, [*learnt.values()])
            params |= {n: (learnt[n] - 0.2 * g).detach() for n, g in zip(moving, gradients, strict=True)}


class Federation:
    """Asks those who answered the exchange before; a client falls silent after so many answers."""

    def __init__(self, sites: Sequence[Site], silent: Mapping[int, int] = {}, round: int = 0) -> None:
        self.sites, self.silent, self.round = [*sites], silent, round
        self.exchanges: list[Exchange[Any]] = []
        self.replies: list[list[ClientUpdate]] = []
        self.keep = True

    def __call__(self, exchange: Exchange[Any]) -> Iterator[ClientUpdate]:
        first = not self.exchanges and self.round == 0
        self.exchanges.append(exchange)
        self.replies.append([])
        self.sites = [s for s in self.sites if self.silent.get(s.client_id, 99) > len(self.exchanges) - 1]
        for site in self.sites:
            update = site.reply(exchange, first)
            self.replies[-1] += [update] if self.keep else []
            yield update
            del update

    def ids(self) -> list[int]:
        return [site.client_id for site in self.sites]


def examples(
    shape: tuple[int, ...], num: int, seed: int, weights: Sequence[float] = (1, 1, 1)
) -> tuple[Tensor, Tensor]:
    """Three classes, each around a point of its own."""
    centres = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    y = torch.multinomial(torch.tensor(weights, dtype=torch.float), num, replacement=True, generator=generator)
    return centres[y] + 0.5 * torch.randn(num, *shape, generator=generator), y


def sites(make: Make, shape: tuple[int, ...], widths: Sequence[tuple[int, ...]] = ((),) * 3) -> list[Site]:
    """Clients of these widths that have much of one class each."""
    skewed = [(6, 1, 1), (1, 6, 1), (1, 1, 6)]
    data = [examples(shape, 60, seed, skew) for seed, skew in enumerate(skewed, 1)]
    return [
        Site(7 - k, newly(make, k, *width), make, *xy) for k, (width, xy) in enumerate(zip(widths, data, strict=True))
    ]


def strangers(numbers: Sequence[int] = (4, 4, 4)) -> list[Site]:
    """Perceptrons that have nothing in common, and do not train."""
    own = [at_random(perceptron(), seed) for seed in range(len(numbers))]
    return [
        Site(k, params, y=torch.zeros(n, dtype=torch.int64))
        for k, (params, n) in enumerate(zip(own, numbers, strict=True))
    ]


def passed(method: FedMA, federation: Federation, symmetry: Symmetry) -> tuple[GlobalModel, Merged]:
    model = model_of(federation.sites[0].own, symmetry)
    return model, run(method.round(model), federation)


def accuracy(make: Make, params: Tensors, shape: tuple[int, ...]) -> float:
    x, y = examples(shape, 300, 99)
    outputs: Tensor = functional_call(make().eval(), dict(params), x)
    return float((outputs.argmax(1) == y).float().mean())


# --- a whole pass ----------------------------------------------------------------------------------------------------


@every_network
def test_a_pass_merges_networks_of_other_initialisations(
    make: Make, symmetry: Symmetry, shape: tuple[int, ...]
) -> None:
    federation = Federation(sites(make, shape))
    model, merge = passed(FedMA(), federation, symmetry)
    sizes = symmetry.sizes(merge.params)
    assert all(own <= sizes[group] <= 3 * own for group, own in symmetry.sizes(model.params).items())
    alone = [accuracy(make, update.params, shape) for update in federation.replies[0]]
    assert accuracy(make, merge.params, shape) > max(0.95, *alone)


@every_network
def test_clients_of_three_widths_merge_and_keep_their_own(
    make: Make, symmetry: Symmetry, shape: tuple[int, ...]
) -> None:
    widths = [(5, 4, 6), (3, 6, 4), (4, 5, 5)]
    cohort = sites(make, shape, [width[: len(symmetry.groups)] for width in widths])
    model, merge = passed(FedMA(), Federation(cohort), symmetry)
    assert accuracy(make, merge.params, shape) > 0.95
    again = Federation(cohort, round=1)
    second = run(FedMA().round(following(model, merge)), again)
    for site in cohort:
        sent = again.exchanges[0].sent(site.client_id)
        assert sent is not None
        assert symmetry.sizes(sent) == symmetry.sizes(site.own)
        assert fingerprint(sent) == fingerprint(symmetry.take(merge.params, units(merge, site.client_id)))
    assert accuracy(make, second.params, shape) > 0.95


@every_network
def test_the_same_network_permuted_passes_to_itself(make: Make, symmetry: Symmetry, shape: tuple[int, ...]) -> None:
    params = at_random(make())
    copies = [params, *(permuted(symmetry, params, seed) for seed in range(3))]
    _, merge = passed(FedMA(), Federation([Site(k, own, make) for k, own in enumerate(copies)]), symmetry)
    assert fingerprint(merge.params) == fingerprint(params)
    assert merge.metrics["growth"] == merge.metrics["shared_share"] == 1


def test_a_round_without_training_leaves_what_the_last_one_grew() -> None:
    federation = Federation(strangers())
    model, merge = passed(FedMA(), federation, PERCEPTRON)
    assert merge.metrics["growth"] > 1
    again = run(FedMA().round(following(model, merge)), Federation(federation.sites, round=1))
    assert PERCEPTRON.sizes(again.params) == PERCEPTRON.sizes(merge.params)


# --- the exchanges ---------------------------------------------------------------------------------------------------


def test_there_is_an_exchange_for_each_level_and_one_for_the_last_layer() -> None:
    federation = Federation(strangers())
    _, merge = passed(FedMA(last_epochs=9, last_learning_rate=0.001, last_weight_decay=0.0), federation, PERCEPTRON)
    first, second, third = federation.exchanges
    hidden = [{"0.weight", "0.bias"}, {"2.weight", "2.bias"}]
    assert [one.frozen for one in (first, second, third)] == [set(), hidden[0], hidden[0] | hidden[1]]
    assert [one.training for one in (first, second)] == [{}, {}]
    assert third.training == {"epochs": 9, "learning_rate": 0.001, "weight_decay": 0.0}
    assert [one.request for one in (first, second, third)] == [Request(), Request(), Request(class_counts=True)]
    assert {one.task for one in federation.exchanges} == {"train"}
    assert merge.metrics["exchanges"] == 3


def test_unless_it_is_set_the_last_layer_is_trained_as_all_are() -> None:
    federation = Federation(strangers())
    passed(FedMA(), federation, PERCEPTRON)
    assert federation.exchanges[-1].training == {}


def test_only_a_runs_first_exchange_is_trained_for_the_first_epochs() -> None:
    method, federation = FedMA(first_epochs=8, last_epochs=3), Federation(strangers())
    model = replace(model_of(federation.sites[0].own, PERCEPTRON), round=1)
    again = Federation(federation.sites, round=1)
    merge = run(method.round(model), federation)
    run(method.round(following(model, merge)), again)
    assert [one.training for one in federation.exchanges] == [{"epochs": 8}, {}, {"epochs": 3}]
    assert [one.training for one in again.exchanges] == [{}, {}, {"epochs": 3}]


@every_network
def test_each_client_is_sent_what_is_matched_with_the_rest_of_its_own(
    make: Make, symmetry: Symmetry, shape: tuple[int, ...]
) -> None:
    federation = Federation(sites(make, shape))
    model, merge = passed(FedMA(), federation, symmetry)
    for before, exchange, group in zip(federation.replies, federation.exchanges[1:], symmetry.groups, strict=False):
        settled = exchange.frozen | {n for n in model.buffers if n.startswith("1.run")}
        for update in before:
            sent = exchange.sent(update.client_id)
            assert sent is not None
            assert [*sent] == [*model.params]
            rest = {name: value for name, value in sent.items() if name not in settled}
            own = {name: update.params[name] for name in rest}
            places = {group: units(merge, update.client_id)[group]}
            assert fingerprint(symmetry.take(rest, places)) == fingerprint(own)
            assert all(value.count_nonzero() <= own[name].count_nonzero() for name, value in rest.items())
            assert all(torch.equal(sent[name], merge.params[name]) for name in exchange.frozen)


def test_the_server_lets_go_of_every_reply_before_the_next_exchange() -> None:
    federation, alive = Federation(sites(perceptron, (6,))), list[bool]()
    federation.keep = False
    storages: list[StorageWeakRef] = []

    def ask(exchange: Exchange[Any]) -> Iterator[ClientUpdate]:
        alive.extend(not ref.expired() for ref in storages)  # type: ignore[no-untyped-call]
        storages.clear()
        for update in federation(exchange):
            storages.extend(StorageWeakRef(value.untyped_storage()) for value in update.params.values())  # type: ignore[no-untyped-call]
            yield update
            del update

    run(FedMA().round(model_of(federation.sites[0].own, PERCEPTRON)), ask)
    assert len(alive) == 2 * 3 * 6
    assert not any(alive)


def test_of_later_replies_what_is_settled_is_dropped() -> None:
    federation = Federation(sites(convolutional, (1, 6, 6)))
    passed(FedMA(), federation, CONVOLUTIONAL)
    kept = [
        {*exchange.answer(replies)[0].params}
        for exchange, replies in zip(federation.exchanges, federation.replies, strict=True)
    ]
    everything = {*federation.sites[0].own}
    settled = [{f"{layer}.{name}" for name in ("weight", "bias")} for layer in (0, 1, 3, 6)]
    running = {"1.running_mean", "1.running_var"}
    assert kept[0] == everything
    assert kept[1] == everything - settled[0] - settled[1] - running
    assert kept[2] == kept[1] - settled[2]
    assert kept[3] == {"8.weight", "8.bias", "1.num_batches_tracked"} | running


def test_running_statistics_are_those_of_the_last_exchange() -> None:
    federation = Federation(sites(convolutional, (1, 6, 6)))
    _, merge = passed(FedMA(), federation, CONVOLUTIONAL)
    for name in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(
            merge.params[name], torch.stack([u.params[name] for u in federation.replies[-1]]).mean(0)
        )
    assert merge.params["1.num_batches_tracked"] == 4 * 40


# --- clients that are lost -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", [1, 2])
@pytest.mark.parametrize("absence", [0, 10])
def test_a_client_that_is_lost_leaves_its_units_behind_and_is_remembered_unless_absence_is_0(
    answers: int, absence: int
) -> None:
    """Without absence, as published, it leaves those that were matched."""
    cohort, method = strangers(), FedMA(sigma=0.01, absence=absence)
    _, whole = passed(method, Federation(cohort), PERCEPTRON)
    _, merge = passed(method, Federation(cohort, silent={2: answers}), PERCEPTRON)
    known = answers == 2 or absence > 0
    assert PERCEPTRON.sizes(whole.params) == {"0": 15, "2": 12}
    assert PERCEPTRON.sizes(merge.params) == {"0": 15, "2": 12 if known else 8}
    assert fingerprint(merge.params["0.weight"]) == fingerprint(whole.params["0.weight"])
    remembered = merge.memory["units"]
    assert isinstance(remembered, Mapping)
    assert {*remembered} == ({"0", "1", "2"} if known else {"0", "1"})


def test_a_client_that_is_lost_weighs_nothing_in_what_others_have_too() -> None:
    """The last answer of all three, and of two: what is matched later is the two's mean."""
    params = at_random(perceptron())
    cohort = [
        Site(k, {name: value + shift for name, value in params.items()}) for k, shift in enumerate((0, 0.02, 0.04))
    ]
    _, merge = passed(FedMA(), Federation(cohort, silent={2: 1}), PERCEPTRON)
    assert PERCEPTRON.sizes(merge.params) == PERCEPTRON.sizes(params)
    for layer, shift in (("0", 0.02), ("2", 0.01)):
        torch.testing.assert_close(merge.params[f"{layer}.weight"], params[f"{layer}.weight"] + shift)


def test_a_client_that_is_lost_is_no_part_of_the_last_layer() -> None:
    params = at_random(perceptron())
    other = {name: value + 1 if name.startswith("4.") else value for name, value in params.items()}
    _, merge = passed(FedMA(), Federation([Site(0, params), Site(1, other)], silent={1: 2}), PERCEPTRON)
    assert torch.equal(merge.params["4.bias"], params["4.bias"])


def test_when_all_are_lost_the_round_is() -> None:
    with pytest.raises(LostRound):
        passed(FedMA(), Federation(strangers(), silent=dict.fromkeys(range(3), 1)), PERCEPTRON)


# --- the same answers, the same bits ---------------------------------------------------------------------------------


def test_the_same_answers_give_the_same_bits_whatever_is_drawn_elsewhere() -> None:
    federation = Federation(sites(convolutional, (1, 6, 6)))
    model, merge = passed(FedMA(), federation, CONVOLUTIONAL)
    torch.manual_seed(12345)
    torch.rand(7)
    kept = iter(federation.replies)
    again = run(FedMA().round(model), lambda exchange: iter(next(kept)))
    assert fingerprint([again.params, again.memory]) == fingerprint([merge.params, merge.memory])


def test_a_pass_goes_by_examples_or_not() -> None:
    params = at_random(perceptron())
    near = {name: value + 0.01 for name, value in params.items()}
    cohort = [Site(0, params, y=torch.zeros(1, dtype=torch.int64)), Site(1, near, y=torch.zeros(3, dtype=torch.int64))]
    by_examples, equally = (
        passed(FedMA(weighted=weighted), Federation(cohort), PERCEPTRON)[1].params["0.weight"]
        for weighted in (True, False)
    )
    torch.testing.assert_close(by_examples, params["0.weight"] + 0.0075)
    torch.testing.assert_close(equally, params["0.weight"] + 0.005)


def test_the_published_values_are_what_they_are_and_can_be_changed() -> None:
    paper = FedMA.paper(epochs=20, learning_rate=0.01, max_units=500)
    assert (paper.gamma, paper.sigma, paper.sigma0, paper.sweeps, paper.max_units) == (7.0, 1.0, 1.0, 5, 500)
    assert paper.shrunk
    assert not paper.weighted
    assert not paper.relative
    assert (paper.last_epochs, paper.last_learning_rate, paper.last_weight_decay) == (60, 0.001, 1e-4)
    assert parse(paper.model_dump_json()) == paper


def test_the_published_values_shrink_what_two_clients_agree_on_to_two_thirds() -> None:
    """An atom of two is Σ w / 3: the shrinkage that the corrected defaults do without."""
    params = {name: 10 * value for name, value in at_random(perceptron()).items()}
    cohort = [Site(k, params) for k in range(2)]
    _, paper = passed(FedMA.paper(1), Federation(cohort), PERCEPTRON)
    torch.testing.assert_close(paper.params["0.weight"], params["0.weight"] * 2 / 3)


def test_a_residual_network_is_refused_by_name() -> None:
    residual = replace(PERCEPTRON, axes={**PERCEPTRON.axes, "3.weight": ("0", "2")})
    with pytest.raises(ValueError, match=r"fedma: units follow from themselves, '0' from '2' from '0', .* git_rebasin"):
        next(FedMA().round(model_of(at_random(perceptron()), residual)))
