"""What clients compute for the server, beside an epoch of training and a plain loop on the same examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from aggregators.core.update import Estimator, Gradients, Request
from client.statistics import measure
from client.task import Examples, Node, Task
from client.tasks.architectures import convnet, mlp
from client.training import Training, train

from .row import Row, interleaved

EXAMPLES = 2000
LOOPED = {"empirical": 200, "exact": 40}  # examples that the loop is timed on, and counted up from
SAMPLED = Gradients(estimator="sampled")
REQUESTS = {
    "Σg and Σg², sampled (ssf)": Request(gradients=Gradients(sums=True, squares=True, estimator="sampled")),
    "Σg² and 8 sketches, sampled": Request(gradients=Gradients(squares=True, sketches=8, estimator="sampled")),
    "Gram matrices of inputs (regmean)": Request(gram=True),
    "both Gram matrices, sampled (kfac)": Request(gram=True, grad_gram=True, gradients=SAMPLED),
    "both Gram matrices, exact (kfac)": Request(gram=True, grad_gram=True, gradients=Gradients()),
}


class Images(Task):
    """Labels 0 to 9, no data of its own."""

    num_classes = 10

    def model(self) -> nn.Module:
        """The ConvNet of 21,840 parameters."""
        return convnet()

    def data(self, node: Node) -> tuple[Examples, Examples]:
        """Noise with random labels."""
        return noise(EXAMPLES), noise(EXAMPLES)


def rows() -> Iterator[Row]:
    """The ConvNet, and a perceptron, whose gradients take more memory than time; on one thread, the steadiest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from _rows("ConvNet (21,840 parameters)", convnet(), "empirical", "<= 3")
        yield from _rows("ConvNet (21,840 parameters)", convnet(), "exact", "")
        yield from _rows("3 × 512 perceptron", mlp(784, 512, 512, 512, 10), "empirical", "<= 3")
        yield from _kinds("ConvNet (21,840 parameters)", convnet())
        yield from _kinds("3 × 512 perceptron", mlp(784, 512, 512, 512, 10))
    finally:
        torch.set_num_threads(threads)


def _rows(network: str, model: nn.Module, estimator: Estimator, asked: str) -> Iterator[Row]:
    examples, few = noise(EXAMPLES), noise(LOOPED[estimator])
    request = Request(gradients=Gradients(squares=True, estimator=estimator))
    training = Training(learning_rate=1e-9)
    ours, epoch, few_looped = interleaved(
        lambda: measure(Images(), model, examples, request, seed=0),
        lambda: train(Images(), model, examples, training, seed=0, round=1),
        lambda: loop(model, few, estimator),
        repeats=3,
    )
    looped = few_looped * EXAMPLES / LOOPED[estimator]
    work = f"{estimator} squares, {network}"
    yield Row(work, "an epoch of training", ours / epoch, asked, f"{ours:.2f} s, epoch {epoch:.2f} s")
    yield Row(work, "a loop over single examples", ours / looped, "<= 0.5", f"{ours:.2f} s, loop {looped:.2f} s")


def _kinds(network: str, model: nn.Module) -> Iterator[Row]:
    """Every other kind of statistic, beside an epoch."""
    examples, training = noise(EXAMPLES), Training(learning_rate=1e-9)
    works = [partial(measure, Images(), model, examples, request, seed=0) for request in REQUESTS.values()]
    epoch, *taken = interleaved(partial(train, Images(), model, examples, training, seed=0, round=1), *works, repeats=2)
    for kind, seconds in zip(REQUESTS, taken, strict=True):
        detail = f"{seconds:.2f} s, epoch {epoch:.2f} s"
        yield Row(f"{kind}, {network}", "an epoch of training", seconds / epoch, "", detail)


def noise(num: int) -> Examples:
    """Images 1 × 28 × 28 and labels, all random."""
    generator = torch.Generator().manual_seed(num)
    images = torch.randn(num, 1, 28, 28, generator=generator)
    return cast(Examples, TensorDataset(images, torch.randint(10, (num,), generator=generator)))


def loop(model: nn.Module, examples: Examples, estimator: Estimator) -> Sequence[Tensor]:
    """The same sums, one example and one backward pass after the other."""
    model.eval()
    params = list(model.parameters())
    totals = [torch.zeros_like(param) for param in params]
    for i in range(len(examples)):  # type: ignore[arg-type]
        image, label = examples[i]
        log_p = model(image[None]).log_softmax(1)[0]
        for y in range(len(log_p)) if estimator == "exact" else [int(label)]:
            weight = log_p[y].exp().item() if estimator == "exact" else 1.0
            for total, g in zip(totals, torch.autograd.grad(log_p[y], params, retain_graph=True), strict=True):
                total.addcmul_(g, g, value=weight)
    return totals


if __name__ == "__main__":
    for row in rows():
        print(f"{row.work} / {row.beside}: {row.ratio:.2f} {row.asked} ({row.detail})")
