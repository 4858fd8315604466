"""Small models, clients and methods: every kind of tensor and statistic that the core may meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from hashlib import sha256
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from aggregators.core.base import Aggregator
from aggregators.core.exchange import Exchange, Question, Round, collect
from aggregators.core.registry import AnyAggregator
from aggregators.core.symmetry import Symmetry
from aggregators.core.update import ClientUpdate, GlobalModel, Gradients, Merged, Moments, Probe, Request, Tensors

Precision: TypeAlias = Literal["float32", "bfloat16", "float64", "mixed"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "float64", "mixed")
Ask: TypeAlias = Callable[[Exchange[Any]], Iterator[ClientUpdate]]

EVERYTHING = Request(
    gradients=Gradients(sums=True, squares=True, sketches=2),
    gram=True,
    grad_gram=True,
    moments=True,
    cross_moments=True,
    class_counts=True,
)


LAYERWISE = ("gram", "grad_gram", "moments", "cross_moments")


class Net(nn.Module):
    """Dense layers, one tied to another, a batch norm, a 0-d and an empty parameter, integer and boolean buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.second = nn.Linear(6, 6)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.second.weight
        self.last = nn.Linear(6, 3)
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.empty(0, 3))
        self.register_buffer("seen", torch.tensor([3, 1, 4], dtype=torch.int32))
        self.register_buffer("mask", torch.tensor([True, False]))


SYMMETRY = Symmetry(
    {
        "first.weight": ("first", None),
        "first.bias": ("first",),
        **{f"norm.{name}": ("first",) for name in ("weight", "bias", "running_mean", "running_var")},
        "second.weight": ("second", "first"),
        "second.bias": ("second",),
        "again.bias": ("second",),
        "last.weight": (None, "second"),
    }
)


def net(precision: Precision = "float32", seed: int = 0) -> nn.Module:
    """The toy network, newly initialised; `mixed` holds layers of three dtypes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = Net()
    if precision != "mixed":
        return module.to(getattr(torch, precision))
    module.first.to(torch.bfloat16)
    module.last.to(torch.float64)
    return module


def global_model(precision: Precision = "float32", seed: int = 0) -> GlobalModel:
    """θ_t of the toy network with random values; its tied alias is trainable but, as everywhere, not in params."""
    module = net(precision, seed)
    once = dict([*module.named_parameters(), *module.named_buffers()])
    state = {name: value.clone() for name, value in module.state_dict().items() if name in once}
    return GlobalModel(
        params=away(state, torch.Generator().manual_seed(seed), 0.5),
        trainable=frozenset(name for name, _ in module.named_parameters(remove_duplicate=False)),
        probe=Probe(loss=_squared, score=lambda params: -_squared(params)),
        symmetry=SYMMETRY,
    )


def _squared(params: Tensors) -> float:
    return sum(float(value.double().square().sum()) for value in params.values())


def away(params: Tensors, generator: torch.Generator, distance: float) -> dict[str, Tensor]:
    """Params at random about `distance` away in every float coordinate; variances stay positive, counters grow."""

    def moved(name: str, value: Tensor) -> Tensor:
        if value.dtype == torch.bool:
            return value.clone()
        if not value.is_floating_point():
            return value + torch.randint(0, 9, value.shape, generator=generator, dtype=value.dtype)
        step = distance * torch.randn(value.shape, generator=generator, dtype=torch.float64)
        return (value + (step.abs() if name.endswith("running_var") else step)).to(value.dtype)

    return {name: moved(name, value) for name, value in params.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Client:
    """A client whose examples x_i lie around its θ_k, each with loss ½‖θ − x_i‖²; its training ends at θ_k.

    The first coordinate of every parameter is without information: no loss depends on it.
    """

    client_id: int
    num_examples: int
    params: Tensors
    trainable: frozenset[str]
    name: str = ""

    def reply(self, exchange: Exchange[Any]) -> ClientUpdate:
        """The answer to `exchange`: a function of what was sent and asked, with tensors of its own."""
        sent = exchange.sent(self.client_id)
        sent = self.params if sent is None else sent
        anchor = sent if exchange.anchor is None else exchange.anchor
        if exchange.task == "train":
            own = {name: value.clone() for name, value in self.params.items()}
            return replace(self.measured(exchange.request, own, anchor), params=own)
        return self.measured(exchange.request if exchange.task == "measure" else Request(), sent, anchor)

    def measured(self, request: Request, params: Tensors, anchor: Tensors) -> ClientUpdate:
        """The statistics that `request` names at `params`, and the loss there."""
        generator = torch.Generator().manual_seed(self.client_id % 2**31)
        learnt = {name: value for name, value in params.items() if name in self.trainable}
        asked = request.gradients or Gradients()
        num = min(self.num_examples, asked.limit or self.num_examples)
        labelled = request.gradients is not None or request.grad_gram
        return ClientUpdate(
            client_id=self.client_id,
            name=self.name,
            num_examples=self.num_examples,
            num_grads=num if labelled or request.gram else 0,
            estimator=asked.estimator if labelled else None,
            metrics={"loss": sum(float(_gap(self.params, learnt, name).square().sum()) / 2 for name in learnt)},
            **(self._gradients(asked, num, learnt, generator) if request.gradients else {}),
            **self._activations(request, num, learnt, anchor),
        )

    def _gradients(self, asked: Gradients, num: int, params: Tensors, generator: torch.Generator) -> dict[str, Any]:
        signs = torch.randint(0, 2, (num, asked.sketches), generator=generator, dtype=torch.float64) * 2 - 1
        per_example = {name: self._per_example(params, name, num, generator) for name in params}
        kept = {name: torch.promote_types(value.dtype, torch.float32) for name, value in params.items()}
        sums = {name: g.sum(0).to(kept[name]) for name, g in per_example.items()}
        squares = {name: g.square().sum(0).to(kept[name]) for name, g in per_example.items()}
        sketch = {name: torch.tensordot(signs.T, g, 1).to(kept[name]) for name, g in per_example.items()}
        return {
            "grad_sum": sums if asked.sums else {},
            "sq_grad_sum": squares if asked.squares else {},
            "grad_sketch": sketch if asked.sketches else {},
        }

    def _per_example(self, params: Tensors, name: str, num: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(num, *params[name].shape, generator=generator, dtype=torch.float64)
        gradients = _gap(self.params, params, name) + noise
        gradients.view(num, -1)[:, :1] = 0
        return gradients

    def _activations(self, asked: Request, num: int, params: Tensors, anchor: Tensors) -> dict[str, Any]:
        """Of the same inputs whatever else is asked, as real examples are."""
        generator = torch.Generator().manual_seed(self.client_id % 2**31 + 1)
        wanted = [field for field in LAYERWISE if getattr(asked, field)]
        found: dict[str, dict[str, Tensor | Moments]] = {field: {} for field in wanted}
        for name in (name for name, value in params.items() if wanted and value.ndim == 2 and value.numel()):
            layer = _layer(params[name].float(), anchor[name].float(), num, generator)
            for field in wanted:
                found[field][name.removesuffix(".weight")] = layer[field]
        labels = torch.randint(0, 3, (self.num_examples,), generator=generator)
        return {**found, **({"class_counts": labels.bincount(minlength=3)} if asked.class_counts else {})}


def _layer(weight: Tensor, anchor: Tensor, num: int, generator: torch.Generator) -> dict[str, Tensor | Moments]:
    """The statistics of a layer; the first input and the first output are without information."""
    x = torch.randn(num, weight.shape[1], generator=generator)
    delta = torch.randn(num, weight.shape[0], generator=generator)
    x[:, 0] = delta[:, 0] = 0
    inputs, a, b = torch.cat([x, torch.ones(num, 1)], 1), x @ weight.T, x @ anchor.T
    return {
        "gram": inputs.T @ inputs,
        "grad_gram": delta.T @ delta,
        "moments": Moments(num, a.mean(0), (a - a.mean(0)).square().sum(0)),
        "cross_moments": _standardised(a).T @ _standardised(b),
    }


def _standardised(a: Tensor) -> Tensor:
    """Each column moved and scaled to a sum of 0 and a sum of squares of 1; of a single row 0."""
    return nn.functional.normalize(a - a.mean(0), dim=0)


def _gap(centre: Tensors, params: Tensors, name: str) -> Tensor:
    return params[name].double() - centre[name].double()


IDS = (2, 1, 2**63 + 11, 7)  # as they arrive
EXAMPLES = (5, 12, 1, 30)


def clients(model: GlobalModel, num: int = 4, distance: float = 0.1, seed: int = 1) -> list[Client]:
    """Clients at random around θ_t, in an order of arrival that is not that of their ids."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Client(
            client_id=client_id,
            name=f"site-{client_id % 10}",
            num_examples=num_examples,
            params=away(model.params, generator, distance),
            trainable=model.trainable,
        )
        for client_id, num_examples in zip(IDS[:num], EXAMPLES[:num], strict=True)
    ]


def ask(cohort: Iterable[Client]) -> Ask:
    """What answers exchanges in this process: each client in turn, its reply forgotten once it is taken."""
    return lambda exchange: (client.reply(exchange) for client in cohort)


def updates(model: GlobalModel, request: Request | None = None, cohort: Sequence[Client] = ()) -> list[ClientUpdate]:
    """What the cohort returns from training at θ_t, with what `request` names."""
    exchange = Exchange(task="train", params=model.params, request=request or Request(), fold=collect)
    return [client.reply(exchange) for client in cohort or clients(model)]


def following(model: GlobalModel, merged: Merged) -> GlobalModel:
    """The model of the next round."""
    return replace(model, params=merged.params, memory=merged.memory, round=model.round + 1)


def fingerprint(value: Any) -> str:
    """A digest of every bit, name and order in tensors, mappings, sequences, dataclasses and numbers."""
    return sha256(b"".join(_bytes(value))).hexdigest()


def _bytes(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        yield from _bytes([item for pair in value.items() for item in pair])
    elif isinstance(value, list | tuple):
        yield f"{len(value)}[".encode()
        for item in value:
            yield from _bytes(item)
    elif is_dataclass(value):
        yield from _bytes([getattr(value, field.name) for field in fields(value)])
    else:
        yield f"{value!r};".encode()


class TwoExchanges(Aggregator):
    """The inner's merge, then a step from there along the mean gradient, η · Σ n_k ḡ_k / Σ n_k, with momentum."""

    kind: Literal["toys:TwoExchanges"] = "toys:TwoExchanges"
    inner: AnyAggregator
    learning_rate: float = 0.5

    def questions(self) -> Iterator[Question]:
        """The inner's; then the gradients."""
        yield from self.inner.questions()
        yield Question("measure", Request(gradients=Gradients(sums=True)))

    def round(self, model: GlobalModel) -> Round:
        """Trains, measures the gradients where the inner's merge lands, and answers with both."""
        merged = yield from self.inner.round(model.within())
        request = Request(gradients=Gradients(sums=True))
        asked = Exchange(task="measure", params=merged.params, request=request, fold=collect)
        measured = yield from asked
        num = sum(update.num_grads for update in measured)
        slope = {name: sum(u.grad_sum[name].double() for u in measured) / num for name in model.names}
        params = {n: (merged.params[n] - self.learning_rate * slope[n]).to(merged.params[n].dtype) for n in slope}
        return Merged(
            {**merged.params, **params},
            memory={"rounds": model.round + 1, "slope": slope, "inner": merged.memory},
            metrics={**merged.metrics, "loss": sum(update.metrics["loss"] for update in measured) / len(measured)},
        )
