"""The product of Kronecker-factored posteriors against dense solves, and RegMean at exponent 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from aggregators.core.exchange import LostRound
from aggregators.core.update import ClientUpdate, GlobalModel, Gradients, Request
from aggregators.weight_average.kfac import KFAC
from aggregators.weight_average.regmean import RegMean
from client.task import Examples, Node, Task
from server import loopback

SHAPES = {
    "dense.weight": (3, 4),
    "dense.bias": (3,),
    "plain.weight": (2, 3),
    "conv.weight": (2, 3, 2, 2),
    "scale": (3,),
}
INPUTS, POSITIONS = {"dense": 4, "plain": 3, "conv": 12}, {"dense": 1, "plain": 1, "conv": 6}
SOLVED: dict[str, Any] = {"tolerance": 1e-13, "iterations": 5000}


def tensors(generator: torch.Generator) -> dict[str, Tensor]:
    return {name: torch.randn(shape, generator=generator).double() for name, shape in SHAPES.items()}


def model() -> GlobalModel:
    """A dense layer, one without bias, a convolution, a parameter of no layer, and buffers."""
    buffers = {"mean": torch.zeros(2), "steps": torch.tensor(3)}
    return GlobalModel(params={**tensors(torch.Generator().manual_seed(0)), **buffers}, trainable=frozenset(SHAPES))


def mixed(num: int, size: int, generator: torch.Generator) -> Tensor:
    """Correlated rows."""
    mixing = torch.randn(size, size, generator=generator).double()
    return torch.randn(num, size, generator=generator).double() @ mixing + 0.5


def client(client_id: int, num: int) -> ClientUpdate:
    """A client with models, inputs and gradients at random."""
    generator = torch.Generator().manual_seed(client_id)
    params = tensors(generator)
    gram, grad_gram = {}, {}
    for layer, inputs in INPUTS.items():
        count = num * POSITIONS[layer]
        x = torch.cat([mixed(count, inputs, generator), torch.ones(count, 1, dtype=torch.float64)], 1)
        delta = mixed(count, len(params[f"{layer}.weight"]), generator) / 10
        gram[layer], grad_gram[layer] = x.T @ x, delta.T @ delta
    return ClientUpdate(
        client_id=client_id,
        num_examples=num,
        num_grads=num,
        estimator="exact",
        params={**params, "mean": torch.full((2,), float(client_id)), "steps": torch.tensor(client_id)},
        gram=gram,
        grad_gram=grad_gram,
    )


COHORT = [client(1, 40), client(2, 15), client(3, 90)]


def matrix(params: Mapping[str, Tensor], layer: str) -> Tensor:
    weight = params[f"{layer}.weight"].reshape(len(params[f"{layer}.weight"]), -1)
    return torch.cat([weight, params["dense.bias"][:, None]], 1) if layer == "dense" else weight


def mean_of(cohort: Sequence[ClientUpdate], name: str) -> Tensor:
    total = sum(update.num_examples for update in cohort)
    return torch.stack([update.num_examples / total * update.params[name] for update in cohort]).sum(0)


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return torch.einsum("ij,j,kj->ik", vectors, values**exponent, vectors)


def dense(method: KFAC, cohort: Sequence[ClientUpdate], layer: str) -> Tensor:
    """The layer's mode by one solve of (in · out)² numbers: the Hessian of vec W̃, row by row, is Σ Ĝ ⊗ A + λI."""
    size = INPUTS[layer] + (layer == "dense")
    mean = matrix({name: mean_of(cohort, name) for name in SHAPES}, layer)
    hessian, pull, trace = torch.zeros(mean.numel(), mean.numel()).double(), torch.zeros(mean.numel()).double(), 0.0
    for update in cohort:
        inputs = update.gram[layer][:size, :size] / (update.num_grads * POSITIONS[layer])
        inputs = torch.where(torch.eye(size) > 0, inputs, method.off_diagonal * inputs)
        outputs = update.num_examples * power(update.grad_gram[layer] / update.num_grads, method.exponent)
        hessian += torch.kron(outputs, inputs)
        pull += torch.kron(outputs, inputs) @ matrix(update.params, layer).reshape(-1)
        trace += float(inputs.trace() * outputs.trace())
    damping = method.damping * trace / mean.numel()
    eye = torch.eye(mean.numel()).double()
    solved: Tensor = torch.linalg.solve(hessian + damping * eye, pull + damping * mean.reshape(-1))
    return solved.reshape(mean.shape)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("off_diagonal", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("damping", [0.0, 0.1, 3.0])
def test_conjugate_gradients_find_the_dense_kronecker_solution(
    exponent: float, off_diagonal: float, damping: float
) -> None:
    method = KFAC(exponent=exponent, off_diagonal=off_diagonal, damping=damping, **SOLVED)
    found = method.aggregate(model(), COHORT)
    for layer in INPUTS:
        torch.testing.assert_close(matrix(found.params, layer), dense(method, COHORT, layer), rtol=1e-7, atol=1e-7)
    assert found.metrics["cg_residual"] <= 1e-13


@pytest.mark.parametrize("damping", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("off_diagonal", [0.5, 1.0])
def test_exponent_zero_is_regmean_where_every_example_passes_a_layer_equally_often(
    damping: float, off_diagonal: float
) -> None:
    """With the same relative damping; a convolution's positions are a factor that all clients share."""
    kfac = KFAC(exponent=0, damping=damping, off_diagonal=off_diagonal, **SOLVED).aggregate(model(), COHORT).params
    regmean = RegMean(damping=damping, off_diagonal=off_diagonal).aggregate(model(), COHORT).params
    for name in SHAPES:
        torch.testing.assert_close(kfac[name], regmean[name], rtol=1e-7, atol=1e-7)


def test_what_belongs_to_no_layer_is_averaged() -> None:
    merged = KFAC().aggregate(model(), COHORT).params
    torch.testing.assert_close(merged["scale"], mean_of(COHORT, "scale"))
    torch.testing.assert_close(merged["mean"], mean_of(COHORT, "mean"))
    assert int(merged["steps"]) == 3


@given(st.floats(1e9, 1e12))
def test_heavy_damping_gives_the_weighted_mean(damping: float) -> None:
    merged = KFAC(damping=damping).aggregate(model(), COHORT).params
    for name in SHAPES:
        torch.testing.assert_close(merged[name], mean_of(COHORT, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e20])
def test_the_unit_of_gradients_is_irrelevant(scale: float) -> None:
    scaled = [replace(u, grad_gram={name: scale * gram for name, gram in u.grad_gram.items()}) for u in COHORT]
    one, other = (KFAC(**SOLVED).aggregate(model(), cohort).params for cohort in (COHORT, scaled))
    for name in SHAPES:
        torch.testing.assert_close(one[name], other[name], rtol=1e-7, atol=1e-7)


def test_matrices_of_some_examples_count_for_all() -> None:
    parts = [
        replace(
            update,
            num_grads=update.num_grads // part,
            gram={name: gram / part for name, gram in update.gram.items()},
            grad_gram={name: gram / part for name, gram in update.grad_gram.items()},
        )
        for update, part in zip(COHORT, (5, 1, 10), strict=True)
    ]
    one, other = (KFAC(**SOLVED).aggregate(model(), cohort).params for cohort in (COHORT, parts))
    for name in SHAPES:
        torch.testing.assert_close(one[name], other[name], rtol=1e-7, atol=1e-7)


# --- conjugate gradients ----------------------------------------------------------------------------------------


def test_the_residual_and_the_iterations_are_reported_and_bounded() -> None:
    short, long = (KFAC(iterations=n, tolerance=1e-9).aggregate(model(), COHORT).metrics for n in (3, 150))
    assert short["cg_iterations"] == 3
    assert 3 < long["cg_iterations"] < 150
    assert long["cg_residual"] <= 1e-9 < short["cg_residual"]


def test_by_default_it_is_as_exact_as_the_tolerance_says() -> None:
    found = KFAC().aggregate(model(), COHORT)
    assert found.metrics["cg_residual"] <= 1e-5
    for layer in INPUTS:
        torch.testing.assert_close(matrix(found.params, layer), dense(KFAC(), COHORT, layer), rtol=1e-3, atol=1e-3)


def test_no_layer_at_all_is_the_mean_and_takes_no_iteration() -> None:
    found = KFAC().aggregate(model(), [replace(update, gram={}, grad_gram={}) for update in COHORT])
    assert found.metrics == {"cg_residual": 0, "cg_iterations": 0}
    torch.testing.assert_close(found.params["conv.weight"], mean_of(COHORT, "conv.weight"))


# --- clients that know little -----------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("num", [1, 30])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_one_client_alone_keeps_its_model(damping: float, num: int, exponent: float) -> None:
    alone = client(7, num)
    merged = KFAC(damping=damping, exponent=exponent).aggregate(model(), [alone]).params
    for name in SHAPES:
        torch.testing.assert_close(merged[name], alone.params[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("field", ["gram", "grad_gram"])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_a_cohort_without_any_information_gives_the_weighted_mean(field: str, damping: float) -> None:
    zero: list[dict[str, Any]] = [{field: {n: 0 * g for n, g in getattr(u, field).items()}} for u in COHORT]
    zeros = [replace(update, **changes) for update, changes in zip(COHORT, zero, strict=True)]
    merged = KFAC(damping=damping).aggregate(model(), zeros).params
    for name in SHAPES:
        torch.testing.assert_close(merged[name], mean_of(COHORT, name))


@pytest.mark.parametrize("field", ["gram", "grad_gram"])
def test_a_client_without_a_layers_matrices_has_a_share_in_its_mean_only(field: str) -> None:
    def silent(matrices: Mapping[str, Tensor]) -> ClientUpdate:
        return replace(COHORT[0], **{field: matrices})  # type: ignore[arg-type]

    sent = getattr(COHORT[0], field)
    absent = silent({name: gram for name, gram in sent.items() if name != "conv"})
    empty = silent({**sent, "conv": 0 * sent["conv"]})
    one, other = (KFAC(**SOLVED).aggregate(model(), [first, *COHORT[1:]]).params for first in (absent, empty))
    for name in SHAPES:
        torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-9)


def test_directions_that_no_gradient_has_stay_at_the_mean() -> None:
    """One example a client: G_k has rank 1, of three."""
    cohort = [client(1, 1), client(2, 1)]
    step = KFAC(exponent=1).aggregate(model(), cohort).params["dense.weight"] - mean_of(cohort, "dense.weight")
    grads = torch.linalg.eigh(torch.stack([update.grad_gram["dense"] for update in cohort]).sum(0)).eigenvectors
    assert (grads[:, 0] @ step).abs().max() < 1e-6
    assert (grads[:, 2] @ step).abs().max() > 1e-2


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_weights_of_an_input_that_is_always_zero_stay_at_the_mean(damping: float) -> None:
    def dead(gram: Tensor) -> Tensor:
        return gram * torch.outer(alive := (torch.arange(13) != 5).double(), alive)

    cohort = [replace(u, gram={**u.gram, "conv": dead(u.gram["conv"])}) for u in COHORT]
    merged = KFAC(damping=damping).aggregate(model(), cohort).params["conv.weight"].reshape(2, 12)
    still = (merged - mean_of(cohort, "conv.weight").reshape(2, 12)).abs().amax(0) < 1e-9
    assert still.tolist() == [column == 5 for column in range(12)]


def test_an_indefinite_gram_matrix_that_escaped_admission_ends_in_numbers() -> None:
    broken = replace(COHORT[0], gram={**COHORT[0].gram, "plain": torch.ones(4, 4).double() - 2 * torch.eye(4)})
    merged = KFAC(off_diagonal=1).aggregate(model(), [broken, *COHORT[1:]]).params
    assert all(value.isfinite().all() for value in merged.values())


def test_weights_that_sum_to_zero_are_a_lost_round() -> None:
    with pytest.raises(LostRound, match="weights sum to 0"):
        KFAC().aggregate(model(), [replace(update, num_examples=0) for update in COHORT])


# --- in a federation --------------------------------------------------------------------------------------------


def test_it_asks_for_both_matrices_of_the_estimator_and_number_configured() -> None:
    assert KFAC(estimator="sampled", max_grads=9).request == Request(
        gram=True, grad_gram=True, gradients=Gradients(estimator="sampled", limit=9)
    )


@pytest.mark.parametrize("settings", [{}, {"estimator": "sampled", "max_grads": 50}])
def test_a_federation_learns_the_digits_with_it(settings: Any) -> None:
    method = {"kind": "kfac", **settings}
    run = loopback.run({"kind": "digits", "partition": "iid"}, method, rounds=3, training={"epochs": 5})
    assert [record["status"] for record in run.records] == ["merged"] * 3
    assert all(0 < record["metrics"]["cg_residual"] <= 1e-5 for record in run.records)
    assert (run.evaluation["accuracy"] or 0) > 0.6


class Bars(Task):
    """Pictures of one bar, upright or lying, in noise; the last layer stays with the client."""

    num_classes: ClassVar[int | None] = 2
    private: ClassVar[tuple[str, ...]] = ("4.*",)

    def model(self) -> nn.Module:
        layers = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.AdaptiveMaxPool2d(1), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(4, 2)).bfloat16()

    def data(self, node: Node) -> tuple[Examples, Examples]:
        generator = torch.Generator().manual_seed(int(node["partition-id"]))
        labels, places = (torch.randint(2, (60,), generator=generator), torch.randint(6, (60,), generator=generator))
        pictures = 0.1 * torch.randn(60, 1, 6, 6, generator=generator)
        for picture, lying, place in zip(pictures, labels, places, strict=True):
            (picture[0].T if lying else picture[0])[:, place] += 1
        examples = cast(Examples, TensorDataset(pictures.bfloat16(), labels))
        return examples, examples


@pytest.mark.parametrize("method", ["kfac", "regmean"])
def test_a_federation_of_convolutions_in_half_precision_with_a_private_head_learns(method: str) -> None:
    run = loopback.run(Bars(), method, clients=3, rounds=4, training={"epochs": 5})
    assert [record["status"] for record in run.records] == ["merged"] * 4
    assert list(run.model.params) == ["0.weight", "0.bias"]
    assert {value.dtype for value in run.model.params.values()} == {torch.bfloat16}
    params, gram, grad_gram = 80 + 16, 4 * 10 * 10, 4 * 4 * 4  # 72 and 8 bytes, each padded to a multiple of 16
    bytes_in = run.records[0]["exchanges"][0]["bytes_in"]
    assert bytes_in == 3 * (params + gram + (grad_gram if method == "kfac" else 0))
    assert (run.evaluation["accuracy"] or 0) > 0.9
