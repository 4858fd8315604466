"""What every method in the registry promises. A new method is covered by being there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from math import isfinite
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import (
    PRECISIONS,
    Ask,
    Client,
    Precision,
    TwoExchanges,
    ask,
    clients,
    fingerprint,
    following,
    global_model,
    updates,
)

from aggregators.core.base import Aggregator, SumAggregator, Sums
from aggregators.core.exchange import Exchange, LostRound, Question, Round, collect, run
from aggregators.core.registry import methods, parse
from aggregators.core.seed import derive_seed
from aggregators.core.tensors import norm, steps
from aggregators.core.update import ClientUpdate, GlobalModel, Merged, Tensors
from aggregators.weight_average.fedavg import FedAvg
from aggregators.weight_average.wise_ft import WiseFT

# --- the methods, each with its default settings, its examples and, for a wrapper, its inners ------------------


def configurations() -> Iterator[dict[str, Any]]:
    """A configuration for every case."""
    for kind, cls in methods().items():
        inners = [{"inner": inner} for inner in cls.inners] if "inner" in cls.model_fields else [{}]
        for inner in inners:
            for settings in ({}, *cls.examples):
                yield {"kind": kind, **inner, **settings}


def described(config: dict[str, Any]) -> str:
    """`fisher temper=0.5`, a case's name."""
    return " ".join([config["kind"], *(f"{key}={value}" for key, value in config.items() if key != "kind")])


CASES = {described(config): parse(config) for config in configurations()}
TWO_EXCHANGES = {
    "two exchanges": TwoExchanges(inner=parse("fisher")),
    "two exchanges, clipped": parse({"kind": "norm_clip", "inner": TwoExchanges(inner=parse("fedavg"))}),
    "two exchanges, then a step": parse({"kind": "fedavgm", "inner": TwoExchanges(inner=parse("median"))}),
}
ROUNDS = {**CASES, **TWO_EXCHANGES}

every_method = pytest.mark.parametrize("method", CASES.values(), ids=CASES)
every_sum = pytest.mark.parametrize(
    "method", [pytest.param(m, id=name) for name, m in CASES.items() if isinstance(m, SumAggregator)]
)
every_precision = pytest.mark.parametrize("precision", PRECISIONS)
every_round = pytest.mark.parametrize("method", ROUNDS.values(), ids=ROUNDS)


LONGEST = 0.5  # no client on which all agree is further from θ_t than this


def moves_on(part: Aggregator) -> bool:
    """The whole list of methods that may leave a model on which all clients agree."""
    return (
        type(part).__module__.startswith("aggregators.server_step.")  # goes on beyond the inner's merge
        or getattr(part, "prior", None) == "bayes"  # pulls towards θ_t
        or getattr(part, "max_norm", LONGEST) < LONGEST  # clips the step
        or (isinstance(part, WiseFT) and part.alpha < 1)  # stays on this side of the merge
    )


AGREEING = {name: method for name, method in CASES.items() if not any(map(moves_on, method.parts()))}


def seasoned(method: Aggregator, precision: Precision = "mixed") -> GlobalModel:
    """The model after one round: the method has whatever memory it keeps."""
    model = global_model(precision)
    return following(model, run(method.round(model), ask(clients(model, seed=2))))


def same_bits(a: Tensors, b: Tensors) -> bool:
    return fingerprint(a) == fingerprint(b)


def within_an_ulp(a: Tensor, b: Tensor) -> bool:
    """For float64 results of float64 sums, up to their rounding."""
    if a.dtype == torch.float64:
        return torch.allclose(a, b, rtol=1e-10, atol=1e-14)
    return torch.equal(torch.nextafter(a, b) if a.is_floating_point() else a, b)


def agree(a: Tensors, b: Tensors) -> bool:
    return all(within_an_ulp(a[name], b[name]) for name in a)


# --- what comes out ---------------------------------------------------------------------------------------------


@every_method
@every_precision
def test_clients_that_did_not_move_leave_the_model(method: Aggregator, precision: Precision) -> None:
    model = global_model(precision)
    merged = run(method.round(model), ask([replace(client, params=model.params) for client in clients(model)]))
    assert agree(merged.params, model.params)
    assert same_bits(float32_and_below(merged.params), float32_and_below(model.params))


@pytest.mark.parametrize("method", AGREEING.values(), ids=AGREEING)
@every_precision
def test_clients_that_agree_give_their_model(method: Aggregator, precision: Precision) -> None:
    model = global_model(precision)
    theirs = clients(model, distance=0.02, seed=3)[0].params
    assert 0 < norm(steps(model.names, theirs, model.params).values()) < LONGEST
    merged = run(method.round(model), ask([replace(client, params=theirs) for client in clients(model)]))
    assert agree(merged.params, theirs)
    assert same_bits(float32_and_below(merged.params), float32_and_below(theirs))


def float32_and_below(params: Tensors) -> dict[str, Tensor]:
    """The tensors for which float64 sums are exact enough to promise bits."""
    return {name: value for name, value in params.items() if value.dtype != torch.float64}


@every_method
@every_precision
def test_names_order_shapes_and_dtypes_are_kept(method: Aggregator, precision: Precision) -> None:
    first = global_model(precision)
    for model in (first, seasoned(method, precision)):
        merged = run(method.round(model), ask(clients(first))).params
        assert [(name, *form(value)) for name, value in merged.items()] == [
            (name, *form(value)) for name, value in first.params.items()
        ]
        assert all(value.isfinite().all() for value in merged.values())


def form(value: Tensor) -> tuple[torch.dtype, torch.Size, torch.device]:
    return value.dtype, value.shape, value.device


@every_method
def test_memory_and_metrics_can_be_saved(method: Aggregator) -> None:
    model = seasoned(method)
    merged = run(method.round(model), ask(clients(model)))
    assert all(isinstance(value, Tensor | int | float) for value in tree_leaves(dict(merged.memory)))
    assert all(isfinite(float(value)) for value in merged.metrics.values())
    assert all(value.ndim == 0 for value in merged.metrics.values() if isinstance(value, Tensor))


@every_method
def test_the_order_of_arrival_is_irrelevant(method: Aggregator) -> None:
    model = seasoned(method)
    cohort = clients(model)
    first = run(method.round(model), ask(cohort)).params
    for order in ([3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]):
        assert agree(first, run(method.round(model), ask([cohort[i] for i in order])).params)


@every_method
def test_partial_cohorts_combine_into_one_fold(method: Aggregator) -> None:
    model = seasoned(method)
    whole = run(method.round(model), ask(clients(model))).params
    for cut in (0, 1, 3):
        assert agree(whole, run_in_two_parts(method.round(model), clients(model), cut).params)


def run_in_two_parts(round: Round, cohort: Sequence[Client], cut: int) -> Merged:
    """The round with each exchange folded on two servers, the first with `cut` of the clients."""
    answer: Any = None
    while True:
        try:
            exchange = round.send(answer)
        except StopIteration as stop:
            merged: Merged = stop.value
            return merged
        fold = exchange.fold
        parts = []
        for part in (cohort[:cut], cohort[cut:]):
            state = fold.init()
            for client in part:
                state = fold.accumulate(state, client.reply(exchange))
            parts.append(state)
        answer = fold.finalize(fold.combine(*parts))


# --- what goes in -----------------------------------------------------------------------------------------------


@every_method
def test_inputs_are_left_untouched(method: Aggregator) -> None:
    model = seasoned(method)
    seen: list[tuple[ClientUpdate, str]] = []

    def kept(exchange: Exchange[Any]) -> Iterator[ClientUpdate]:
        for update in ask(clients(model))(exchange):
            seen.append((update, fingerprint(update)))
            yield update

    before = fingerprint([model.params, model.memory])
    run(method.round(model), kept)
    assert fingerprint([model.params, model.memory]) == before
    assert seen
    assert all(fingerprint(update) == bits for update, bits in seen)


@every_method
def test_a_configuration_survives_json(method: Aggregator) -> None:
    assert parse(method.model_dump_json()) == method
    assert parse(json.loads(method.model_dump_json())) == method


@every_method
def test_too_few_answers_lose_the_round(method: Aggregator) -> None:
    model = global_model()
    needed = next(method.round(model)).min_updates
    assert needed >= 1
    for number in range(needed):
        with pytest.raises(LostRound):
            run(method.round(model), ask(clients(model)[:number]))


@every_round
def test_silence_in_any_exchange_loses_the_round(method: Aggregator) -> None:
    model = global_model()
    asked = Silence(clients(model), silent=-1)
    run(method.round(model), asked)
    for silent in range(len(asked.questions)):
        with pytest.raises(LostRound):
            run(method.round(model), Silence(clients(model), silent))


@every_round
def test_a_round_asks_what_the_method_says(method: Aggregator) -> None:
    for model in (global_model(), seasoned(method)):
        asked = Silence(clients(model), silent=-1)
        run(method.round(model), asked)
        assert [*dict.fromkeys(asked.questions)] == [*dict.fromkeys(method.questions())]


class Silence:
    """Answers every exchange but one, and notes what was asked."""

    def __init__(self, cohort: Sequence[Client], silent: int) -> None:
        self.cohort, self.silent, self.questions = cohort, silent, list[Question]()

    def __call__(self, exchange: Exchange[Any]) -> Iterator[ClientUpdate]:
        self.questions.append(Question(exchange.task, exchange.request))
        return ask([] if len(self.questions) - 1 == self.silent else self.cohort)(exchange)


# --- devices ----------------------------------------------------------------------------------------------------


class OnlyMeta(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses every operation on a tensor that is not on `meta`: a stand-in for a device that we do not have."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                raise RuntimeError(f"{func} met a tensor on {leaf.device}, not on the model's device")
        return out


def merged_on_meta(method: SumAggregator) -> Merged:
    model, meta = seasoned(method), torch.device("meta")
    cohort = [update.to(meta) for update in updates(model, method.request)]
    there = replace(model, params={name: value.to(meta) for name, value in model.params.items()})
    with OnlyMeta():  # type: ignore[no-untyped-call]
        return method.aggregate(there, cohort)


@every_sum
def test_sums_stay_on_the_models_device(method: SumAggregator) -> None:
    merged = merged_on_meta(method)
    assert {value.device.type for value in merged.params.values()} == {"meta"}


class HiddenCpu(FedAvg):
    """Federated averaging that builds a tensor without naming its device."""

    def finish(self, model: GlobalModel, sums: Sums) -> Merged:
        merged = super().finish(model, sums)
        return merged._replace(params={name: value + torch.zeros(()) for name, value in merged.params.items()})


def test_a_tensor_hidden_on_the_cpu_is_found() -> None:
    with pytest.raises(RuntimeError, match="not on the model's device"):
        merged_on_meta(HiddenCpu())


# --- memory -----------------------------------------------------------------------------------------------------


def storages(update: ClientUpdate) -> list[StorageWeakRef]:
    """Weak references to the memory of all its tensors, which views and detached copies share."""
    tensors = [leaf for leaf in tree_leaves(dict(vars(update))) if isinstance(leaf, Tensor)]
    return [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]  # type: ignore[no-untyped-call]


class Watch:
    """Counts the replies of which any tensor is alive, whoever holds it, when a new one comes."""

    def __init__(self, cohort: Iterable[Client]) -> None:
        self.cohort, self.peak = list(cohort), 0
        self.replies: list[list[StorageWeakRef]] = []

    def __call__(self, exchange: Exchange[Any]) -> Iterator[ClientUpdate]:
        for client in self.cohort:
            update = client.reply(exchange)
            self.replies.append(storages(update))
            self.peak = max(self.peak, self.alive())
            yield update
            del update

    def alive(self) -> int:
        return sum(not all(map(StorageWeakRef.expired, reply)) for reply in self.replies)


def streams(method: Aggregator) -> bool:
    """Whether it is a sum over clients, or wraps one without collecting the cohort."""
    first = next(method.round(global_model()))
    return isinstance([*method.parts()][-1], SumAggregator) and first.fold.init is not collect.init


@pytest.mark.parametrize("method", [pytest.param(m, id=name) for name, m in CASES.items() if streams(m)])
def test_a_streamed_fold_holds_two_updates_at_most(method: Aggregator) -> None:
    model = global_model()
    watch = Watch(clients(model))
    run(method.round(model), watch)
    assert len(watch.replies) >= 4
    assert watch.peak <= 2
    assert watch.alive() == 0


def test_a_fold_that_holds_its_updates_is_found() -> None:
    model = global_model()
    watch = Watch(clients(model))
    run(parse("median").round(model), watch)
    assert watch.peak == 4


# --- the same bits, always --------------------------------------------------------------------------------------


class CrashError(Exception):
    """The server dies."""


def ledgered(cohort: Sequence[Client], kept: list[list[ClientUpdate]], crash_at: int | None = None) -> Ask:
    """Answers from the kept replies first, then from the clients that have not answered; dies at a reply."""
    number = count()

    def answers(exchange: Exchange[Any]) -> Iterator[ClientUpdate]:
        here = next(number)
        kept.extend([[]] if here == len(kept) else [])
        yield from kept[here][:]
        for client in cohort[len(kept[here]) :]:
            if sum(map(len, kept)) == crash_at:
                raise CrashError
            kept[here].append(client.reply(exchange))
            yield kept[here][-1]

    return answers


@every_round
def test_a_crash_at_any_reply_changes_no_bit(method: Aggregator) -> None:
    model = seasoned(method)
    cohort, whole = clients(model), list[list[ClientUpdate]]()
    undisturbed = fingerprint(run(method.round(model), ledgered(cohort, whole)))
    for crash_at in range(sum(map(len, whole))):
        kept: list[list[ClientUpdate]] = []
        with pytest.raises(CrashError):
            run(method.round(model), ledgered(cohort, kept, crash_at))
        assert sum(map(len, kept)) == crash_at
        assert fingerprint(run(method.round(model), ledgered(cohort, kept))) == undisturbed


class AnyFirst(FedAvg):
    """Federated averaging that trusts the order of a set, and so depends on the interpreter's hash seed."""

    def finish(self, model: GlobalModel, sums: Sums) -> Merged:
        first = next(iter(model.trainable & sums["weighted"].keys()))
        return Merged({name: sum.mean() * (name == first) for name, sum in sums["weighted"].items()})


def digests() -> dict[str, str]:
    """The bits of every method's second round, and a derived seed."""
    torch.set_num_threads(1)
    found = {"seed": str(derive_seed(7, 3, "client", 2**63 + 11))}
    for name, method in {**ROUNDS, "any first": AnyFirst()}.items():
        model = seasoned(method)
        found[name] = fingerprint(run(method.round(model), ask(clients(model))))
    return found


def digests_under(hash_seed: int) -> dict[str, str]:
    """The digests that a new interpreter finds."""
    printed = subprocess.run(
        [sys.executable, "-c", "import json, test_contract; print(json.dumps(test_contract.digests()))"],
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    found: dict[str, str] = json.loads(printed)
    return found


def test_hash_seeds_change_no_bit() -> None:
    with ThreadPoolExecutor() as pool:
        one, two = pool.map(digests_under, (1, 2))
    assert one.pop("any first") != two.pop("any first")
    assert one == two
    assert one.keys() >= CASES.keys()
