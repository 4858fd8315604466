"""Self-supervised Fisher merging."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, repeat
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..core.base import CohortAggregator, mean_buffers
from ..core.exchange import LostRound
from ..core.masked import MaskedLoss, MaskSize, Precision, descend, draw, minimise
from ..core.posterior import (
    Block,
    Posterior,
    Prior,
    Shapes,
    Span,
    damped,
    everywhere,
    flat,
    posteriors,
    product,
    unflat,
)
from ..core.seed import derive_seed
from ..core.update import ClientUpdate, Estimator, GlobalModel, Gradients, Merged, Request

SHARE = 0.9  # of a coordinate's Σ g² that its sketches may explain: the rest stays on the diagonal


class SSF(CohortAggregator):
    """The mean of the product of the clients' posteriors N(θ_k, Λ_k^{-1}), Λ_k diagonal plus low rank.

    θ* = c + [Σ Λ_k + λI]^{-1} Σ Λ_k (θ_k − c), Λ_k = (n_k / N_k) [D_k + U_k U_kᵀ] from N_k examples' gradients g_i.
    `precision`: `rank_one` U = Σg/√N and D = Σg² − U²; `sketch` U = [s_1 … s_r]/√r of r random signs, D the rest of
    Σg²; `paper` U = Σg/N and D = Σg² − U², without n_k / N_k. Under every one the diagonal is the clients' Fisher.
    λ is `damping` · mean of Σ diag Λ_k, or `alpha`; c the prior's centre: the weighted mean, θ_t (`bayes`, the prior
    that all posteriors share and the product counts once), one client (`target`) or 0 (`zero`, as `bayes`).
    `temper` γ scales variances as Fisher's does and keeps correlations. With the estimator `exact` Σg is 0, a score's
    mean, and `rank_one` is Fisher merging. The paper's `logit` gradients are no scores: their sum is large, and goes
    with `paper`, which gives it little weight, not with `rank_one`.

    `closed_form` solves this exactly, in O(D (K r)²) time and O(Kr) a coordinate of a block; `sgd` and `cg` minimise
    the paper's masked loss instead, in O(D r) a step and mask, whose limit is the closed form if `mask_size` is
    `uniform` and `conditional` `marginal`. `SSF.paper` is the paper's protocol. Memory K updates.
    Source: Recasens et al. 2023, "Beyond Parameter Averaging in Model Aggregation", eqs. 4-7.
    """

    kind: Literal["ssf"] = "ssf"
    solver: Literal["closed_form", "cg", "sgd"] = Field(
        default="closed_form", description="the exact product, or a minimum of the masked loss"
    )
    precision: Literal["sketch", "rank_one", "paper"] = Field(default="rank_one", description="what Λ_k is built from")
    sketches: int = Field(default=8, ge=0, description="r, for the precision `sketch`; 0 is Fisher merging")
    temper: float = Field(default=1.0, gt=0, le=1, description="γ, the power of each variance")
    damping: float = Field(default=0.1, ge=0, allow_inf_nan=False, description="λ over the mean summed precision")
    alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="λ itself, in place of damping")
    prior: Literal["mean", "bayes", "target", "zero"] = Field(default="mean", description="what λ pulls towards")
    target: int | str | None = Field(default=None, description="the prior's client, a node id or name")
    estimator: Estimator = Field(default="sampled", description="which labels the gradients are of")
    max_grads: int | None = Field(default=None, ge=1, description="examples behind the statistics; none: all")
    conditional: Precision = Field(
        default="marginal", description="a masked coordinate's precision: exact, or [Λ_MM]_jj"
    )
    mask_size: MaskSize = Field(default=0.25, description="masked coordinates: a number, a share, or drawn uniformly")
    masks: int = Field(default=20, ge=1, description="masks a step")
    resample: bool = Field(default=False, description="whether each step of sgd draws its masks anew")
    window: int | None = Field(default=None, ge=2, description="coordinates that a mask sees; none: the whole model")
    steps: int = Field(default=5000, ge=1, description="of sgd")
    learning_rate: float = Field(default=0.01, gt=0, description="of sgd")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of sgd")
    start: Literal["mean", "global"] = Field(
        default="mean", description="where sgd and cg begin: weighted mean, or θ_t"
    )
    seed: int = Field(default=0, description="of the masks")

    paper: ClassVar[Mapping[str, Any]] = {
        "kind": "ssf",
        "solver": "sgd",
        "precision": "paper",
        "conditional": "paper",
        "estimator": "logit",
        "alpha": 0.01,
        "prior": "zero",
        "start": "global",
    }
    examples = (
        {"precision": "sketch", "sketches": 3},
        {"precision": "sketch", "sketches": 0, "damping": 0.0},
        {"prior": "bayes", "estimator": "empirical"},
        {"prior": "target", "target": 1, "temper": 0.5, "estimator": "logit"},
        {"solver": "cg", "masks": 3},
        {"solver": "sgd", "steps": 5, "masks": 2, "resample": True, "mask_size": "uniform", "learning_rate": 1e-3},
    )

    def model_post_init(self, context: object) -> None:
        """Refuses settings that contradict one another."""
        if (self.prior == "target") != (self.target is not None):
            raise ValueError("prior 'target' needs a target, a client's node id or name, and only that prior takes one")
        if self.resample and self.solver == "cg":
            raise ValueError("solver 'cg' minimises one loss: masks cannot be drawn anew, set resample to false")

    @property
    def request(self) -> Request:
        """Σ g² and Σ g, or Σ g² and sketches, over single examples."""
        sketched = self.precision == "sketch"
        return Request(
            gradients=Gradients(
                sums=not sketched,
                squares=True,
                sketches=self.sketches if sketched else 0,
                estimator=self.estimator,
                limit=self.max_grads,
            )
        )

    @property
    def min_updates(self) -> int:
        """One: its own posterior."""
        return 1

    def merge(self, model: GlobalModel, updates: Sequence[ClientUpdate]) -> Merged:
        """The closed form, or what the solver makes of the masked loss."""
        shapes = {name: model.params[name].shape for name in model.names}
        buffers = mean_buffers(model, updates)
        if not shapes:
            return Merged(buffers)
        clients = [partial(self._posterior, update) for update in updates]
        prior = self._prior(model, updates, self.alpha or damped(clients, shapes, self.damping))
        if self.solver == "closed_form":
            found = product(clients, prior, shapes)
            return Merged({**found.mean, **buffers}, metrics={"damped_share": found.damped_share})
        start = model.params if self.start == "global" else unflat(everywhere(partial(_mean, updates), shapes), shapes)
        theta, metrics = self._minimum(model, clients, prior, flat(start, shapes), shapes)
        return Merged({**unflat(theta, shapes), **buffers}, metrics=metrics)

    def _posterior(self, update: ClientUpdate, span: Span) -> Block:
        squares, num = span.of(update.sq_grad_sum), max(1, update.num_grads)
        factor = self._factor(update, span, squares, num)
        diagonal = (squares - factor.square().sum(1)).clamp(min=0)
        scale = torch.full_like(squares, 1.0 if self.precision == "paper" else update.num_examples / num)
        if self.temper != 1:
            scale *= torch.where(squares > 0, squares / num, 1).pow(self.temper - 1)
        return Block(span.of(update.params), diagonal * scale, factor * scale.sqrt()[:, None])

    def _factor(self, update: ClientUpdate, span: Span, squares: Tensor, num: int) -> Tensor:
        if self.precision != "sketch":
            return span.of(update.grad_sum)[:, None] / (num if self.precision == "paper" else num**0.5)
        if not self.sketches:
            return squares.new_empty(len(squares), 0)
        rows = span.rows(update.grad_sketch) / self.sketches**0.5
        explained, most = rows.square().sum(1), SHARE * squares
        shrunk: Tensor = rows * torch.where(explained > most, most / explained, 1).sqrt()[:, None]
        return shrunk

    def _prior(self, model: GlobalModel, updates: Sequence[ClientUpdate], precision: float) -> Prior:
        if self.prior == "bayes":
            return Prior(lambda span: span.of(model.params), precision, shared=True)
        if self.prior == "zero":
            return Prior(lambda span: torch.zeros_like(span.of(model.params)), precision, shared=True)
        chosen = [update for update in updates if self.target is None or update.answers_to(self.target)]
        if not chosen:
            raise LostRound(f"client {self.target!r}, the prior's target, did not answer")
        return Prior(partial(_mean, chosen), precision)

    def _minimum(
        self, model: GlobalModel, clients: Sequence[Posterior], prior: Prior, start: Tensor, shapes: Shapes
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The θ that the solver finds, and the loss before and after."""
        losses = self._losses(model.round, posteriors(clients, prior, shapes), everywhere(prior.centre, shapes), prior)
        first = next(losses)
        if self.solver == "cg":
            theta = minimise(first, start)
        else:
            theta = descend(chain([first], losses), start, self.steps, self.learning_rate, self.momentum)
        return theta, {"masked_loss_start": first.value(start), "masked_loss": first.value(theta)}

    def _losses(self, round: int, cohort: Block, centre: Tensor, prior: Prior) -> Iterator[MaskedLoss]:
        """The loss of every step: of the same masks, or of new ones."""
        generator = torch.Generator(centre.device).manual_seed(derive_seed(self.seed, round, "masks"))
        while True:
            masks = draw(generator, len(centre), self.masks, self.mask_size, self.window)
            loss = MaskedLoss.of(cohort, masks, centre, prior.precision, self.conditional)
            yield from [loss] if self.resample else repeat(loss)


def _mean(updates: Sequence[ClientUpdate], span: Span) -> Tensor:
    weighted = torch.stack([update.num_examples * span.of(update.params) for update in updates]).sum(0)
    return weighted / sum(update.num_examples for update in updates)
