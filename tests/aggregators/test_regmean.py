"""RegMean against least squares on pooled inputs, and against a loop over clients, layers and columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from server_toys import hall, left_out, population, records, strategy
from torch import Tensor
from toys import fingerprint, global_model, updates

from aggregators.core.exchange import LostRound
from aggregators.core.update import ClientUpdate, GlobalModel, Request
from aggregators.weight_average.regmean import RegMean
from server import loopback

SHAPES = {
    "dense.weight": (3, 4),
    "dense.bias": (3,),
    "plain.weight": (2, 3),
    "conv.weight": (2, 3, 2, 2),
    "scale": (3,),
}
INPUTS = {"dense": 4, "plain": 3, "conv": 12}


def model() -> GlobalModel:
    """A dense layer, one without bias, a convolution, a parameter of no layer, and a buffer."""
    generator = torch.Generator().manual_seed(0)
    params = {name: torch.randn(shape, generator=generator).double() for name, shape in SHAPES.items()}
    return GlobalModel(params={**params, "buffer": torch.zeros(2)}, trainable=frozenset(SHAPES))


def rows(inputs: int, num: int, generator: torch.Generator) -> Tensor:
    """[x, 1] of correlated inputs."""
    mixing = torch.randn(inputs, inputs, generator=generator).double()
    x = torch.randn(num, inputs, generator=generator).double() @ mixing + 0.5
    return torch.cat([x, torch.ones(num, 1, dtype=torch.float64)], 1)


def client(client_id: int, num: int) -> ClientUpdate:
    """A client with models and inputs at random."""
    generator = torch.Generator().manual_seed(client_id)
    params = {name: torch.randn(shape, generator=generator).double() for name, shape in SHAPES.items()}
    x = {layer: rows(inputs, num, generator) for layer, inputs in INPUTS.items()}
    return ClientUpdate(
        client_id=client_id,
        num_examples=num,
        num_grads=num,
        params={**params, "buffer": torch.full((2,), float(client_id))},
        gram={layer: x.T @ x for layer, x in x.items()},
    )


COHORT = [client(1, 40), client(2, 15), client(3, 90)]


def by_hand(method: RegMean, cohort: Sequence[ClientUpdate]) -> Mapping[str, np.ndarray[Any, Any]]:
    """Every parameter in NumPy: the mean, then each layer's normal equations."""
    total = sum(u.num_examples for u in cohort)
    weights = [u.num_examples / total for u in cohort]
    merged = {
        name: np.sum([w * u.params[name].numpy() for w, u in zip(weights, cohort, strict=True)], axis=0)
        for name in [*SHAPES, "buffer"]
    }
    for layer, inputs in INPUTS.items():
        size = inputs + (layer == "dense")

        def matrix(params: Mapping[str, Any], layer: str = layer) -> np.ndarray[Any, Any]:
            weight = np.asarray(params[f"{layer}.weight"]).reshape(len(params[f"{layer}.weight"]), -1)
            bias = [np.asarray(params["dense.bias"])[:, None]] if layer == "dense" else []
            return np.concatenate([weight, *bias], axis=1)

        left, right = np.zeros((size, size)), np.zeros((size, len(merged[f"{layer}.weight"])))
        for update in cohort:
            gram = update.gram[layer].numpy()[:size, :size] * update.num_examples / update.num_grads
            gram = np.where(np.eye(size) > 0, gram, method.off_diagonal * gram)
            left, right = left + gram, right + gram @ matrix(update.params).T
        damping = method.damping * np.trace(left) / size
        solved = np.linalg.solve(left + damping * np.eye(size), right + damping * matrix(merged).T).T
        merged[f"{layer}.weight"] = solved[:, :inputs].reshape(SHAPES[f"{layer}.weight"])
        if layer == "dense":
            merged["dense.bias"] = solved[:, -1]
    return merged


def same(got: Mapping[str, Tensor], expected: Mapping[str, Any], rtol: float = 1e-9) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name].double(), torch.as_tensor(value).double(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("off_diagonal", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.1, 3.0])
def test_it_is_the_formula(off_diagonal: float, damping: float) -> None:
    method = RegMean(off_diagonal=off_diagonal, damping=damping)
    same(method.aggregate(model(), COHORT).params, by_hand(method, COHORT))


def test_a_linear_model_is_the_least_squares_fit_on_pooled_inputs() -> None:
    generator = torch.Generator().manual_seed(1)
    xs = [rows(4, num, generator) for num in (30, 12, 70)]
    ys = [torch.randn(len(x), 3, generator=generator).double() for x in xs]
    start = GlobalModel(
        params={"weight": torch.ones(3, 4).double(), "bias": torch.ones(3).double()},
        trainable=frozenset({"weight", "bias"}),
    )
    cohort = []
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        own = torch.linalg.lstsq(x, y).solution.T
        params = {"weight": own[:, :-1], "bias": own[:, -1]}
        cohort.append(
            ClientUpdate(client_id=i, num_examples=len(x), num_grads=len(x), params=params, gram={"": x.T @ x})
        )
    merged = RegMean(off_diagonal=1, damping=0).aggregate(start, cohort).params
    pooled = torch.linalg.lstsq(torch.cat(xs), torch.cat(ys)).solution.T
    same(merged, {"weight": pooled[:, :-1], "bias": pooled[:, -1]})


def test_diagonal_grams_weigh_each_input_by_its_second_moment() -> None:
    merged = RegMean(off_diagonal=0, damping=0).aggregate(model(), COHORT).params["plain.weight"]
    moments = [update.gram["plain"].diagonal()[:3] for update in COHORT]
    weighted = sum(m * update.params["plain.weight"] for m, update in zip(moments, COHORT, strict=True))
    torch.testing.assert_close(merged, weighted / sum(moments))


@given(st.floats(1e10, 1e14))
def test_heavy_damping_gives_the_weighted_mean(damping: float) -> None:
    merged = RegMean(damping=damping).aggregate(model(), COHORT).params
    mean = {n: sum(u.num_examples * u.params[n] for u in COHORT) / 145 for n in merged}
    same(merged, mean, rtol=1e-7)


def test_the_result_does_not_depend_on_the_model_that_training_started_from() -> None:
    far = replace(model(), params={name: value + 100 for name, value in model().params.items()})
    one, other = (RegMean().aggregate(start, COHORT).params for start in (model(), far))
    same(one, other, rtol=1e-8)


def test_gram_matrices_of_some_examples_count_for_all() -> None:
    parts = [
        replace(update, num_grads=update.num_grads // part, gram={n: gram / part for n, gram in update.gram.items()})
        for update, part in zip(COHORT, (5, 1, 10), strict=True)
    ]
    same(RegMean().aggregate(model(), parts).params, RegMean().aggregate(model(), COHORT).params)


def test_it_asks_for_gram_matrices_alone() -> None:
    assert RegMean().request == Request(gram=True)


# --- clients that know less -------------------------------------------------------------------------------------


def without(update: ClientUpdate, layer: str) -> ClientUpdate:
    return replace(update, gram={name: gram for name, gram in update.gram.items() if name != layer})


def test_a_client_without_a_layers_gram_matrix_has_a_share_in_its_mean_only() -> None:
    silent = replace(COHORT[0], gram={**COHORT[0].gram, "dense": torch.zeros(5, 5).double()})
    one, other = (
        RegMean().aggregate(model(), [first, *COHORT[1:]]).params for first in (silent, without(COHORT[0], "dense"))
    )
    same(one, other)
    same(one, by_hand(RegMean(), [silent, *COHORT[1:]]))


def test_a_layer_of_which_nobody_sent_a_gram_matrix_is_averaged() -> None:
    merged = RegMean().aggregate(model(), [without(update, "conv") for update in COHORT]).params["conv.weight"]
    torch.testing.assert_close(merged, sum(u.num_examples * u.params["conv.weight"] for u in COHORT) / 145)


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_a_layer_without_any_input_is_averaged_and_counted(damping: float) -> None:
    cohort = [replace(u, gram={n: 0 * g for n, g in u.gram.items()}) for u in COHORT]
    found = RegMean(damping=damping).aggregate(model(), cohort)
    same(found.params, {n: sum(u.num_examples * u.params[n] for u in cohort) / 145 for n in found.params})
    assert float(found.metrics["unsolved_layers"]) == 3
    assert float(RegMean(damping=damping).aggregate(model(), COHORT).metrics["unsolved_layers"]) == 0


@pytest.mark.parametrize("num", [1, 3])
def test_without_damping_directions_that_no_input_has_stay_at_the_mean(num: int) -> None:
    """Fewer inputs than columns, in float32: what they determine is theirs, nothing else moves."""
    cohort = [client(1, num), client(2, num)]
    cohort = [replace(u, gram={n: g.float() for n, g in u.gram.items()}) for u in cohort]
    merged = RegMean(damping=0, off_diagonal=1).aggregate(model(), cohort).params["conv.weight"].reshape(2, 12)
    mean = (cohort[0].params["conv.weight"] + cohort[1].params["conv.weight"]).reshape(2, 12) / 2
    total = sum(u.gram["conv"][:12, :12].double() for u in cohort)
    step = merged - mean
    _, vectors = torch.linalg.eigh(total)
    assert (step @ vectors[:, : 12 - 2 * num]).abs().max() < 1e-5
    pull = sum((u.params["conv.weight"].reshape(2, 12) - mean) @ u.gram["conv"][:12, :12].double() for u in cohort)
    torch.testing.assert_close(step @ total, pull, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("num", [1, 30])
def test_one_client_alone_keeps_its_model(damping: float, num: int) -> None:
    merged = RegMean(damping=damping).aggregate(model(), [client(7, num)]).params
    same(merged, client(7, num).params, rtol=1e-12)


def test_a_layer_whose_gram_matrix_is_not_positive_is_averaged_and_counted() -> None:
    broken = replace(COHORT[0], gram={**COHORT[0].gram, "plain": -1e6 * torch.ones(4, 4).double()})
    found = RegMean(off_diagonal=1).aggregate(model(), [broken, *COHORT[1:]])
    mean = sum(u.num_examples * u.params["plain.weight"] for u in COHORT) / 145
    torch.testing.assert_close(found.params["plain.weight"], mean)
    assert float(found.metrics["unsolved_layers"]) == 1


def test_a_bias_that_does_not_train_is_no_part_of_its_layer() -> None:
    frozen = replace(model(), trainable=frozenset(SHAPES) - {"dense.bias"})
    cohort = [replace(u, params={**u.params, "dense.bias": model().params["dense.bias"]}) for u in COHORT]
    merged = RegMean(off_diagonal=1, damping=0).aggregate(frozen, cohort).params
    grams = [u.gram["dense"][:4, :4] for u in cohort]
    pull = sum(u.params["dense.weight"] @ gram for u, gram in zip(cohort, grams, strict=True))
    torch.testing.assert_close(merged["dense.weight"], pull @ torch.linalg.inv(sum(grams)))
    torch.testing.assert_close(merged["dense.bias"], model().params["dense.bias"])


def test_weights_that_sum_to_zero_are_a_lost_round() -> None:
    with pytest.raises(LostRound, match="weights sum to 0"):
        RegMean().aggregate(model(), [replace(update, num_examples=0) for update in COHORT])


def test_a_gram_matrix_of_no_layer_is_refused_by_name() -> None:
    stray = replace(COHORT[0], gram={**COHORT[0].gram, "nowhere": torch.eye(2)})
    with pytest.raises(ValueError, match="Gram matrices of 'nowhere', which is no layer"):
        RegMean().aggregate(model(), [stray])


# --- beside averaging -------------------------------------------------------------------------------------------


def test_it_moves_the_layers_and_only_them() -> None:
    start = global_model()
    cohort = updates(start, RegMean().request)
    merged = RegMean().aggregate(start, cohort).params
    mean = {n: sum(u.num_examples * u.params[n].double() for u in cohort) / 48 for n in start.names}
    moved = {n for n in start.names if not torch.allclose(merged[n].double(), torch.as_tensor(mean[n]), atol=1e-6)}
    assert moved == {f"{layer}.{part}" for layer in ("first", "second", "last") for part in ("weight", "bias")}


@pytest.mark.parametrize("kind", ["regmean", "kfac"])
def test_a_client_whose_matrices_fit_no_layer_is_left_out_and_named_and_the_others_go_on(
    kind: str, tmp_path: Path
) -> None:
    start = global_model()
    cohort = population(start, 4)
    changes = {
        2: lambda update: replace(update, gram={**update.gram, "first": torch.eye(7)}),
        3: lambda update: replace(update, gram={**update.gram, "norm": torch.eye(2)}),
    }
    merged, _ = strategy(kind, hall(cohort, changes), tmp_path / "all", rounds=1).run(start)
    (record,) = records(tmp_path / "all")
    assert record["status"] == "merged"
    assert left_out(record) == {
        "2": "gram first has shape (7, 7), asked for (5, 5)",
        "3": "gram has norm, which is no layer of the model that trains",
    }
    alone, _ = strategy(kind, hall([cohort[0], cohort[3]]), tmp_path / "rest", rounds=1).run(start)
    assert fingerprint(merged.params) == fingerprint(alone.params)


def test_a_federation_learns_the_digits_with_it() -> None:
    run = loopback.run({"kind": "digits", "partition": "iid"}, "regmean", rounds=3, training={"epochs": 5})
    assert [record["status"] for record in run.records] == ["merged"] * 3
    assert all(record["metrics"]["unsolved_layers"] == 0 for record in run.records)
    assert (run.evaluation["accuracy"] or 0) > 0.6
