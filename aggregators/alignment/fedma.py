"""Federated matched averaging."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import Field, JsonValue

from ..core.exchange import Exchange, Question, Round
from ..core.matched_averaging import PAPER, Nonparametric, Pass
from ..core.update import GlobalModel, Request


class FedMA(Nonparametric):
    """The clients' units matched level by level to global ones, which clients then keep and train the rest on.

    An exchange trains everything. The units of the first level are matched by their incoming weights and biases
    (`core.nonparametric`), θ* = Σ_k s_k θ_k / Σ_k s_k over the clients that have a unit, and batch norms follow. The
    next exchange sends each client the matched level with the rest of its own, whose inputs are where the matched units
    are, zeros where it has none; it trains the rest, and so on: an exchange more than there are levels. The last layer
    is a mean by classes, Σ_k (n_kc / n_c) θ_k[c], running statistics are those of the last exchange. Clients may have
    any widths, and keep theirs: the next round sends each the units that its own were matched to. One that is away, or
    is lost on the way, weighs nothing in what others have too, and for `absence` rounds its units stay as they were.
    Of the clients the server holds what is not matched.

    The defaults are corrected: precisions go by examples, atoms are not shrunk towards 0, σ and σ0 are in units of the
    weights' own scale, no copy of a unit is a new one, and units of clients that are away stay. `FedMA.paper(epochs)`
    has the published values.
    Source: Wang et al. 2020, "Federated Learning with Matched Averaging", section 2 and algorithm 1; matching of
    Yurochkin et al. 2019. O(n² d + n³) a client, level and sweep, of n units with d weights.
    """

    kind: Literal["fedma"] = "fedma"
    first_epochs: int | None = Field(default=None, ge=1, description="of a run's first training; null: as ever")
    last_epochs: int | None = Field(default=None, ge=1, description="of training the last layer alone; null: as ever")
    last_learning_rate: float | None = Field(default=None, gt=0, description="of training the last layer alone")
    last_weight_decay: float | None = Field(default=None, ge=0, description="of training the last layer alone")

    examples = ({"relative": False, "sigma0": 1.0, "weighted": False, "first_epochs": 2, "last_epochs": 3},)

    @classmethod
    def paper(cls, epochs: int, learning_rate: float = 0.01, **settings: Any) -> Self:
        """With the values of the published experiments, for clients that train for so many epochs at this rate.

        γ = 7, σ = σ0 = 1 whatever the weights' scale, shrunk atoms, equal precisions; the last layer is trained for
        three times the epochs, at a tenth of the rate, with a weight decay of 1e-4.
        """
        last = {"last_epochs": 3 * epochs, "last_learning_rate": learning_rate / 10, "last_weight_decay": 1e-4}
        return cls(**{**PAPER, **last, **settings})

    def questions(self) -> Iterator[Question]:
        """To train, once for each level of the network; to train the last layer, and to count classes."""
        yield Question("train")
        yield Question("train", self.asked)

    def round(self, model: GlobalModel) -> Round:
        """A train exchange for each level, and one for the last layer."""
        merger = Pass(self, model)
        longer = {"epochs": self.first_epochs} if self.first_epochs and not merger.known else {}
        exchange = Exchange(task="train", params=merger.start, fold=merger.fold(buffers=False), training=longer)
        for level in merger.levels:
            rest = merger.match(level, (yield from exchange))
            last = level is merger.levels[-1]
            exchange = Exchange(
                task="train",
                params=merger.sent(rest),
                fold=merger.fold(buffers=last),
                request=self.asked if last else Request(),
                frozen=merger.frozen,
                training=self._last_training() if last else {},
            )
        return merger.finish((yield from exchange), exchanges=1 + len(merger.levels))

    def _last_training(self) -> dict[str, JsonValue]:
        """The overrides of local training that are set."""
        fields = ("epochs", "learning_rate", "weight_decay")
        values = {field: getattr(self, f"last_{field}") for field in fields}
        return {field: value for field, value in values.items() if value is not None}
