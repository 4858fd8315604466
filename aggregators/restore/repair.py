"""REPAIR: means and standard deviations of what layers put out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..core.base import Aggregator, SumState, Term
from ..core.exchange import Exchange, Fold, Question, Round, tee
from ..core.layers import Layer, find, layer
from ..core.symmetry import groups
from ..core.tensors import like
from ..core.update import ClientUpdate, GlobalModel, Gradients, Merged, Moments, Request, Tensors
from . import Unaligned

ROUNDING = 2**-24  # relative, of statistics in float32: what differs by less does not differ
FLOOR = 0.25  # of the variance by the clients' covariances: what follows from the merge's goes no lower


class Channels(NamedTuple):
    """Mean and standard deviation of each channel that a layer puts out, float64, (out,)."""

    mean: Tensor
    std: Tensor


class Joint(NamedTuple):
    """Mean and covariance, float64, of what a layer's matrix multiplies, x̃ = [x, 1], (in + 1,), or of what it makes."""

    mean: Tensor
    covariance: Tensor

    @property
    def channels(self) -> Channels:
        """Each by itself."""
        return Channels(self.mean, self.covariance.diagonal().clamp(min=0).sqrt())

    def through(self, matrix: Tensor) -> Joint:
        """W̃ x̄ and W̃ C W̃ᵀ."""
        return Joint(matrix @ self.mean, matrix @ self.covariance @ matrix.mT)

    def scaled(self, factor: Tensor) -> Joint:
        """Each times a number."""
        return Joint(factor * self.mean, torch.outer(factor, factor) * self.covariance)

    def at_least(self, variance: Tensor) -> Joint:
        """With variances no smaller than these."""
        lack = (variance - self.covariance.diagonal()).clamp(min=0)
        return Joint(self.mean, self.covariance + torch.diag(lack))

    def following(self, before: Joint, after: Joint) -> Joint:
        """What x̃ becomes when the z that x = φ(z) comes from covary as `after` and no longer as `before`.

        C_ij + α s_i s_j (after_ij − before_ij) for i ≠ j, s_i = √(C_ii / before_ii), α in [0, 1] the slope of the C_ij
        over the s_i s_j before_ij, by least squares; a linear φ has α = 1.
        """
        units = len(before.mean)
        own = self.covariance[:units, :units]
        ratio = (own.diagonal() / before.covariance.diagonal()).clamp(min=0).sqrt().nan_to_num(0, 0, 0)
        was, now = (_off_diagonal(z.scaled(ratio).covariance) for z in (before, after))
        slope = ((_off_diagonal(own) * was).sum() / was.square().sum()).nan_to_num(0).clamp(0, 1)
        moved = self.covariance.clone()
        moved[:units, :units] += slope * (now - was)
        return Joint(self.mean, moved)


class Gap(NamedTuple):
    """What a layer is to put out, and what it does."""

    goal: Channels
    now: Channels

    def change(self, cap: float) -> tuple[Tensor, Tensor]:
        """g and mean_goal − g · mean; 1 and 0 where nothing is to change."""
        goal, now = self
        same = (goal.std - now.std).abs() <= ROUNDING * now.std
        factor = torch.where(same, 1, (goal.std / now.std).clamp(max=cap))
        shift = goal.mean - factor * now.mean
        return factor, torch.where(shift.abs() > ROUNDING * torch.hypot(now.mean, now.std), shift, 0)


class Unit(NamedTuple):
    """A layer that can be repaired, and the groups of units that it reads and brings forth."""

    name: str
    reads: frozenset[str]
    writes: frozenset[str]


Known: TypeAlias = tuple[Joint, Joint]  # what enters a layer in the clients' models, and what it puts out
Ends: TypeAlias = Mapping[int, Mapping[str, Channels]]  # client -> layer -> what its own model puts out


class Repair(Aggregator):
    """The inner method's merge with the spread restored that averaging took from what its layers put out.

    W ← diag(g) W, b ← mean_goal + g (b − mean), g = min(std_goal / std, cap) by channel. The goals are what client k's
    own model puts out on its own examples, m_k ± s_k: mean_goal = Σ w_k m_k and std_goal = √(Σ w_k s_k²), w_k = n_k /
    Σ n_k, or Σ w_k s_k as in the paper (`mean_std`). mean and std are what the merge puts out on the same examples,
    averaged alike, so that one model held by all stays as it is whatever their data. A channel that is dead in every
    client, std_goal = 0, ends constant; where no bias trains only W is scaled.
    `gram`: from the Gram matrices of layers' inputs, in one shot: with x̄ and C the means over clients of mean and
    covariance, mean = W x̄ + b and var = diag(W C Wᵀ), exact in the first layer. Further on the repaired inputs have the
    clients' means and variances but covary more, since averaging keeps what units have in common: where a layer reads
    the units of one other, C follows how these covary in the merge, which is known, with the slope at which it follows
    it in the clients; var is taken to be a quarter of what the clients' C gives, or more. `exact`: the merge's moments
    are measured, in one exchange for every level of layers, after all before it was repaired.
    Repaired are layers whose outputs are units of the network's symmetry, so not the last, and not those whose units
    have running statistics: resetting these by `batch_norm` with source `measure` is their repair, and stands outside
    this one where a network has both. In `gram`, layers without Gram matrices stay.
    Source: Jordan et al. 2023, "REPAIR: REnormalizing Permuted Activations for Interpolation Repair"; more than two
    clients, and `gram`, are this project's. O(out · in²) a layer and client with float64 matrices of in² and out² a
    layer in memory, or if `exact` two numbers a channel of every client. Metrics: `repaired_layers`, and of their
    channels' g `largest_factor`, `mean_factor`, `capped_share` and `dead_share`.
    """

    kind: Literal["repair"] = "repair"
    inner: Unaligned = Field(description="the method that merges")
    mode: Literal["gram", "exact"] = Field(default="gram", description="in one shot, or an exchange for every level")
    goal: Literal["within", "mean_std"] = Field(default="within", description="how the clients' spreads are averaged")
    cap: float = Field(default=10.0, gt=1, allow_inf_nan=False, description="the largest factor g")

    needs: ClassVar[frozenset[str]] = frozenset({"symmetry"})
    examples = ({"cap": 1.5}, {"mode": "exact"}, {"mode": "exact", "goal": "mean_std"})

    @model_validator(mode="after")
    def _measurable(self) -> Repair:
        if self.mode == "gram" and self.goal == "mean_std":
            raise ValueError("summed Gram matrices hold no mean of the merge's stds: set mode = 'exact'")
        return self

    def questions(self) -> Iterator[Question]:
        """The inner's, with statistics where it trains; then, if exact, moments, in a round once for every level."""
        for question in self.inner.questions():
            yield question._replace(request=question.request | self._asked) if question.task == "train" else question
        if self.mode == "exact":
            yield Question("measure", self._again)

    def round(self, model: GlobalModel) -> Round:
        """The inner's round, then its layers, rescaled."""
        units = [*_units(model)]
        merged = yield from (self._in_one_shot if self.mode == "gram" else self._level_by_level)(model, units)
        return merged

    def _in_one_shot(self, model: GlobalModel, units: Sequence[Unit]) -> Round:
        merged, known = yield from tee(self.inner.round(model), _gathered(model, units), self._asked)
        params, factors, ends = merged.params, list[Tensor](), dict[str, tuple[Joint, Joint]]()
        for unit in (unit for unit in units if unit.name in known):
            inputs, goal = known[unit.name]
            matrix = layer(model, unit.name).matrix(params)
            plain = inputs.through(matrix)
            now = _entering(unit, units, inputs, ends).through(matrix).at_least(FLOOR * plain.covariance.diagonal())
            params, found = self._rescaled(model, params, {unit.name: Gap(goal.channels, now.channels)})
            ends[unit.name] = goal, now.scaled(*found)
            factors += found
        return self._repaired(merged, params, factors)

    def _level_by_level(self, model: GlobalModel, units: Sequence[Unit]) -> Round:
        merged, ends = yield from tee(self.inner.round(model), _ends(units), self._asked)
        params, factors = merged.params, list[Tensor]()
        for level in _levels(units):
            fold = self._compared(ends, level)
            gaps = yield from Exchange(task="measure", params=params, request=self._again, fold=fold)
            params, found = self._rescaled(model, params, gaps)
            factors += found
        return self._repaired(merged, params, factors)

    def _repaired(self, merged: Merged, params: Tensors, factors: Sequence[Tensor]) -> Merged:
        metrics: dict[str, float | Tensor] = {"repaired_layers": len(factors)}
        if factors:
            g = torch.cat([*factors])
            shares = {"capped_share": (g >= self.cap).double().mean(), "dead_share": (g == 0).double().mean()}
            metrics |= {"largest_factor": g.max(), "mean_factor": g.mean(), **shares}
        return merged._replace(params=params, metrics={**merged.metrics, **metrics})

    @property
    def _asked(self) -> Request:
        return Request(gram=self.mode == "gram", moments=self.mode == "exact")

    @property
    def _again(self) -> Request:
        """Moments over the examples of the train exchange, where the inner limits these."""
        trained = [question.request.gradients for question in self.inner.questions() if question.task == "train"]
        asked = trained[-1] if trained else None
        if asked is None or asked.limit is None:
            return self._asked
        return self._asked | Request(gradients=Gradients(estimator=asked.estimator, limit=asked.limit))

    @property
    def _power(self) -> int:
        return 2 if self.goal == "within" else 1

    def _compared(self, ends: Ends, level: Sequence[str]) -> Fold[SumState, dict[str, Gap]]:
        """What these layers are to put out, and do, by the clients that know both."""

        def accumulate(state: SumState, update: ClientUpdate) -> SumState:
            own = ends.get(update.client_id, {})
            for name in (name for name in level if name in own and name in update.moments):
                self._add(state, "goal", name, update, own[name])
                self._add(state, "now", name, update, _channels(update.moments[name]))
            return state

        def finalize(state: SumState) -> dict[str, Gap]:
            names = state.sums.get("goal mean", {})
            return {name: Gap(self._mean(state, "goal", name), self._mean(state, "now", name)) for name in names}

        return Fold(init=SumState, accumulate=accumulate, combine=SumState.combine, finalize=finalize)

    def _add(self, state: SumState, side: str, name: str, update: ClientUpdate, channels: Channels) -> None:
        state.add(Term(f"{side} mean", name, update.num_examples, channels.mean))
        state.add(Term(f"{side} spread", name, update.num_examples, channels.std**self._power))

    def _mean(self, state: SumState, side: str, name: str) -> Channels:
        """Σ w m, and √(Σ w s²) or Σ w s."""
        mean, spread = (state.sums[f"{side} {part}"][name].mean() for part in ("mean", "spread"))
        return Channels(mean, spread ** (1 / self._power))

    def _rescaled(
        self, model: GlobalModel, params: Tensors, gaps: Mapping[str, Gap]
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The parameters with these layers repaired, and the factors g of each."""
        changed, factors = dict(params), []
        for name, gap in gaps.items():
            found = layer(model, name)
            factor, shift = gap.change(self.cap)
            matrix = factor[:, None] * found.matrix(params)
            if found.bias is not None:
                matrix[:, -1] += shift
            changed |= found.tensors(matrix)
            factors.append(factor)
        return like(model.params, changed), factors


def _units(model: GlobalModel) -> Iterator[Unit]:
    """The layers that can be repaired, in the order of the symmetry's tensors, in which a traced network runs."""
    if model.symmetry is None:
        raise ValueError("repair needs the symmetry of the task's network, which tells hidden layers from the last")
    axes = model.symmetry.axes
    normed = {group for name in axes if name.endswith("running_var") for group in groups(axes[name][0])}
    for name in (name for name in axes if name in model.trainable):
        stem, _, kind = name.rpartition(".")
        out, into, *_ = (*axes[name], None, None)
        reads, writes = frozenset(groups(into)), frozenset(groups(out))
        if kind == "weight" and find(model, stem) is not None and writes and not writes & normed:
            yield Unit(stem, reads, writes)


def _levels(units: Sequence[Unit]) -> Iterator[list[str]]:
    """Consecutive layers together while they read the same units, and none that one of them brings forth."""
    level: list[Unit] = []
    for unit in units:
        if level and (unit.reads != level[0].reads or any(unit.reads & one.writes for one in level)):
            yield [one.name for one in level]
            level = []
        level.append(unit)
    if level:
        yield [one.name for one in level]


def _gathered(model: GlobalModel, units: Sequence[Unit]) -> Fold[SumState, dict[str, Known]]:
    """Of each layer what enters it and what it puts out, as means over clients of means and covariances."""

    def accumulate(state: SumState, update: ClientUpdate) -> SumState:
        for name in (unit.name for unit in units if unit.name in update.gram):
            found = layer(model, name)
            inputs = _inputs(found, update.gram[name])
            for side, joint in (("in", inputs), ("out", inputs.through(found.matrix(update.params)))):
                for part, value in joint._asdict().items():
                    state.add(Term(f"{side} {part}", name, update.num_examples, value))
        return state

    def finalize(state: SumState) -> dict[str, Known]:
        def joint(side: str, name: str) -> Joint:
            return Joint(*(state.sums[f"{side} {part}"][name].mean() for part in Joint._fields))

        return {name: (joint("in", name), joint("out", name)) for name in state.sums.get("in mean", {})}

    return Fold(init=SumState, accumulate=accumulate, combine=SumState.combine, finalize=finalize)


def _entering(unit: Unit, units: Sequence[Unit], inputs: Joint, ends: Mapping[str, tuple[Joint, Joint]]) -> Joint:
    """What enters a layer of the merge: as in the clients, but where it reads the units of one layer before it."""
    before = [other.name for other in units if other.writes & unit.reads]
    if len(before) != 1 or before[0] not in ends:
        return inputs
    own, merged = ends[before[0]]
    alike = len(own.mean) in (len(inputs.mean), len(inputs.mean) - 1)
    return inputs.following(own, merged) if alike else inputs


def _off_diagonal(matrix: Tensor) -> Tensor:
    return matrix - torch.diag(matrix.diagonal())


def _ends(units: Sequence[Unit]) -> Fold[dict[int, dict[str, Channels]], Ends]:
    """What each client's own model puts out; kept apart, so that a client silent later on is missing on both sides."""

    def accumulate(ends: dict[int, dict[str, Channels]], update: ClientUpdate) -> dict[int, dict[str, Channels]]:
        names = [unit.name for unit in units if unit.name in update.moments]
        return {**ends, update.client_id: {name: _channels(update.moments[name]) for name in names}}

    return Fold(init=dict, accumulate=accumulate, combine=lambda a, b: {**a, **b}, finalize=lambda ends: ends)


def _channels(moments: Moments) -> Channels:
    variance = moments.m2.double() / max(1, moments.num)
    return Channels(moments.mean.to(torch.float64, copy=True), variance.sqrt())


def _inputs(layer: Layer, gram: Tensor) -> Joint:
    """Of one client's layer, from Σ x̃ x̃ᵀ."""
    num = gram[-1, -1].clamp(min=1)
    square = layer.gram(gram, 1.0) / num
    mean = gram[: len(square), -1].double() / num
    return Joint(mean, square - torch.outer(mean, mean))
