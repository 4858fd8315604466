"""Probabilistic federated neural matching."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Self

from ..core.exchange import Exchange, Question, Round
from ..core.matched_averaging import PAPER, Nonparametric, Pass
from ..core.update import GlobalModel


class PFNM(Nonparametric):
    """The clients' units matched to global ones, of which there may be more than any client has, from one exchange.

    Level after level θ* = Σ_k s_k θ_k / Σ_k s_k over the clients that have a unit, zeros standing for inputs that they
    have not; the units of a level are matched by their incoming weights and biases (`core.nonparametric`), its inputs
    being matched before, and batch norms follow. The last layer is a mean by classes, Σ_k (n_kc / n_c) θ_k[c]. Clients
    may have any widths, and keep theirs: the next round sends each the units that its own were matched to. One that is
    away weighs nothing in what others have too, and for `absence` rounds its units stay as they were.

    The defaults are corrected: precisions go by examples, atoms are not shrunk towards 0, their prior is wide, σ and σ0
    are in units of the weights' own scale, and no copy of a unit is a new one. `PFNM.paper()` has the published values.
    Source: Yurochkin et al. 2019, "Bayesian Nonparametric Federated Learning of Neural Networks", section 3 and
    appendix. O(n² d + n³) a client, level and sweep, of n units with d weights.
    """

    kind: Literal["pfnm"] = "pfnm"

    examples = ({"relative": False, "sigma0": 1.0, "weighted": False},)

    @classmethod
    def paper(cls, **settings: Any) -> Self:
        """With the published values: γ = 7, σ = σ0 = 1 whatever the weights' scale, shrunk atoms, equal precisions."""
        return cls(**{**PAPER, **settings})

    def questions(self) -> Iterator[Question]:
        """One: to train, and to count classes."""
        yield Question("train", self.asked)

    def round(self, model: GlobalModel) -> Round:
        """One train exchange, whose answers are matched."""
        merger = Pass(self, model)
        fold = merger.fold(buffers=True)
        rest = yield from Exchange(task="train", params=merger.start, fold=fold, request=self.asked)
        for level in merger.levels:
            rest = merger.match(level, rest)
        return merger.finish(rest, exchanges=1)
