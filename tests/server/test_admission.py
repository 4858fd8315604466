"""Admission: a sound update enters the fold; any other is refused in one line that says what is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aggregators.core.exchange import Exchange, collect
from aggregators.core.update import TENSOR_FIELDS, ClientUpdate, GlobalModel, Gradients, Moments, Request
from server.admission import Rejected, admit, all_finite, resized
from server.telemetry import LONGEST

MOST = 10_000
MODEL = toys.global_model()
WEIGHT, COUNTER = "first.weight", "norm.num_batches_tracked"
ASKED = Exchange(task="train", params=MODEL.params, request=toys.EVERYTHING, fold=collect)
SOUND = replace(toys.updates(MODEL, toys.EVERYTHING)[0], metrics={"num": 3.0, "loss": float("nan")})


def reason(update: ClientUpdate, exchange: Exchange[Any] = ASKED, model: GlobalModel = MODEL) -> str:
    """Why the update is refused, in one printable line; empty when it is admitted."""
    try:
        admit(update, exchange, model, MOST)
    except Rejected as rejected:
        refused = str(rejected)
    else:
        return ""
    assert refused.isprintable()
    assert 0 < len(refused) <= LONGEST
    return refused


def asking(request: Request) -> Exchange[Any]:
    return replace(ASKED, request=request)


def changed(field: str, name: str, value: Tensor | None) -> ClientUpdate:
    """The sound update with one tensor of one field replaced, or left out."""
    tensors = {**getattr(SOUND, field), name: value}
    changes: dict[str, Any] = {field: {key: tensor for key, tensor in tensors.items() if tensor is not None}}
    return replace(SOUND, **changes)


def spoilt(field: str, value: float) -> ClientUpdate:
    """The sound update with the last entry of one tensor replaced."""
    bad = getattr(SOUND, field)[WEIGHT].clone()
    bad.view(-1)[-1] = value
    return changed(field, WEIGHT, bad)


SIX = torch.ones(6)


def moments(layer: str = "first", num: int = 3, mean: Tensor = SIX, m2: Tensor = SIX) -> ClientUpdate:
    """The sound update with other moments of one layer."""
    return replace(SOUND, moments={**SOUND.moments, layer: Moments(num, mean, m2)})


# --- what is admitted -----------------------------------------------------------------------------------------------


def test_a_sound_update_is_admitted() -> None:
    assert reason(SOUND) == ""


@pytest.mark.parametrize("precision", toys.PRECISIONS)
def test_a_sound_update_of_any_precision_is_admitted(precision: toys.Precision) -> None:
    """Bfloat16, 0-d and empty tensors, integer and boolean buffers: the toy network has them all."""
    model = toys.global_model(precision)
    assert [reason(update, model=model) for update in toys.updates(model, toys.EVERYTHING)] == [""] * 4


def test_params_alone_are_admitted_where_nothing_else_was_asked_for() -> None:
    assert reason(ClientUpdate(client_id=1, num_examples=1, params=SOUND.params), asking(Request())) == ""


def test_a_measurement_is_admitted_without_params() -> None:
    assert reason(replace(SOUND, params={}), replace(ASKED, task="measure")) == ""


def test_an_evaluation_is_admitted_with_nothing_but_metrics() -> None:
    exchange = Exchange(task="evaluate", params=MODEL.params, fold=collect)
    assert reason(ClientUpdate(client_id=1, num_examples=1, metrics={"num": 2.0}), exchange) == ""


@pytest.mark.parametrize("num", [1, MOST])
def test_the_limits_of_num_examples_are_allowed(num: int) -> None:
    assert reason(ClientUpdate(client_id=1, num_examples=num, params=SOUND.params), asking(Request())) == ""


def test_as_many_gradients_as_the_limit_allows_are_admitted() -> None:
    limited = asking(toys.EVERYTHING.model_copy(update={"gradients": Gradients(squares=True, sums=True, limit=3)}))
    assert "num_grads is 5: allowed is 1 to 3" in reason(replace(SOUND, grad_sketch={}), limited)
    assert reason(replace(SOUND, grad_sketch={}, num_grads=3, grad_sum=zeros()), limited) == ""


def zeros() -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in SOUND.grad_sum.items()}


def test_moments_of_batch_norms_are_admitted() -> None:
    plain = replace(MODEL, params={name: value for name, value in MODEL.params.items() if name != "norm.weight"})
    bare = replace(moments("norm", num=5 * 2**24), params=plain.params, grad_sum={}, sq_grad_sum={}, grad_sketch={})
    only = Request(**{**toys.EVERYTHING.model_dump(), "gradients": None})
    assert reason(moments("norm")) == ""
    assert reason(replace(bare), asking(only), plain) == ""


# --- what is refused ------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
WRONG: dict[str, tuple[ClientUpdate, str]] = {
    "no examples": (replace(SOUND, num_examples=0), "num_examples is 0: allowed is 1 to 10000"),
    "fewer than no examples": (replace(SOUND, num_examples=-4), "num_examples is -4: allowed is 1 to 10000"),
    "too many examples": (replace(SOUND, num_examples=10_001), "num_examples is 10001: allowed is 1 to 10000"),
    "a missing tensor": (changed("params", WEIGHT, None), f"params lacks {WEIGHT}"),
    "no params": (replace(SOUND, params={}), "params lacks again.bias, first.bias, first.weight and 13 more"),
    "an extra tensor": (changed("params", "backdoor", torch.ones(1)), "params has backdoor, which was not asked for"),
    "an extra name of two lines": (changed("params", "a\nb\x1b[2J", torch.ones(1)), "params has a b [2J, which"),
    "an extra name without end": (changed("params", "x" * 5000, torch.ones(1)), "params has xxx"),
    "a transposed tensor": (
        changed("params", WEIGHT, torch.ones(4, 6)),
        f"params {WEIGHT} has shape (4, 6), asked for (6, 4)",
    ),
    "a tensor to broadcast": (changed("params", WEIGHT, torch.ones(4)), f"params {WEIGHT} has shape (4,)"),
    "a vector for a 0-d tensor": (changed("params", "temperature", torch.ones(1)), "params temperature has shape (1,)"),
    "a 0-d tensor for a vector": (changed("params", "seen", torch.tensor(1).int()), "params seen has shape ()"),
    "an empty tensor of other shape": (changed("params", "unused", torch.ones(3, 0)), "params unused has shape (3, 0)"),
    "a wider dtype": (
        changed("params", WEIGHT, torch.ones(6, 4).double()),
        "has dtype torch.float64, asked for torch.float32",
    ),
    "integers for floats": (changed("params", WEIGHT, torch.ones(6, 4).int()), "has dtype torch.int32, asked for"),
    "floats for integers": (
        changed("params", COUNTER, torch.tensor(1.5)),
        "has dtype torch.float32, asked for torch.int64",
    ),
    "params that are NaN": (spoilt("params", NAN), "params first.weight holds NaN or infinity"),
    "params that are infinite": (spoilt("params", -INF), "params first.weight holds NaN or infinity"),
    "no sums": (replace(SOUND, grad_sum={}), "grad_sum lacks"),
    "no squares": (replace(SOUND, sq_grad_sum={}), "sq_grad_sum lacks"),
    "no sketches": (replace(SOUND, grad_sketch={}), "grad_sketch lacks"),
    "sums of a buffer": (changed("grad_sum", COUNTER, torch.ones(())), f"grad_sum has {COUNTER}, which was not asked"),
    "misshapen sums": (changed("grad_sum", WEIGHT, torch.ones(24)), f"grad_sum {WEIGHT} has shape (24,)"),
    "misshapen squares": (changed("sq_grad_sum", WEIGHT, torch.ones(1)), f"sq_grad_sum {WEIGHT} has shape (1,)"),
    "too few sketches": (
        changed("grad_sketch", WEIGHT, torch.ones(1, 6, 4)),
        "has shape (1, 6, 4), asked for (2, 6, 4)",
    ),
    "wide squares": (changed("sq_grad_sum", WEIGHT, torch.ones(6, 4).double()), "sq_grad_sum first.weight has dtype"),
    "sums that are NaN": (spoilt("grad_sum", NAN), "grad_sum first.weight holds NaN or infinity"),
    "squares that are NaN": (spoilt("sq_grad_sum", NAN), "sq_grad_sum first.weight holds NaN or infinity"),
    "squares that are infinite": (spoilt("sq_grad_sum", INF), "sq_grad_sum first.weight holds NaN or infinity"),
    "sketches that are NaN": (spoilt("grad_sketch", NAN), "grad_sketch first.weight holds NaN or infinity"),
    "negative squares": (spoilt("sq_grad_sum", -1e-6), "sq_grad_sum first.weight is negative"),
    "squares too small": (
        spoilt("grad_sum", 1e4),
        "first.weight is smaller than grad_sum² / num_grads: Cauchy–Schwarz",
    ),
    "no gradients counted": (replace(SOUND, num_grads=0), "num_grads is 0: allowed is 1 to 5"),
    "more gradients than examples": (replace(SOUND, num_grads=6), "num_grads is 6: allowed is 1 to 5"),
    "no estimator": (replace(SOUND, estimator=None), "estimator is None, asked for exact"),
    "the wrong estimator": (replace(SOUND, estimator="empirical"), "estimator is empirical, asked for exact"),
    "no Gram matrices": (replace(SOUND, gram={}), "gram is missing"),
    "no gradients' Gram matrices": (replace(SOUND, grad_gram={}), "grad_gram is missing"),
    "no moments": (replace(SOUND, moments={}), "moments is missing"),
    "no cross moments": (replace(SOUND, cross_moments={}), "cross_moments is missing"),
    "an oblong Gram matrix": (
        changed("gram", "first", torch.ones(2, 3)),
        "gram first has shape (2, 3), asked for (5, 5)",
    ),
    "a Gram vector": (
        changed("grad_gram", "first", torch.ones(3)),
        "grad_gram first has shape (3,), asked for (6, 6)",
    ),
    "a Gram matrix of other inputs": (
        changed("gram", "first", torch.eye(7)),
        "gram first has shape (7, 7), asked for (5, 5)",
    ),
    "a Gram matrix in float64": (
        changed("gram", "first", torch.eye(5).double()),
        "gram first has dtype torch.float64, asked for torch.float32",
    ),
    "a Gram matrix of no layer": (changed("gram", "nowhere", torch.eye(5)), "gram has nowhere, which is no layer"),
    "a Gram matrix of a layer without a matrix": (
        changed("grad_gram", "norm", torch.eye(6)),
        "grad_gram has norm, which is no layer of the model that trains",
    ),
    "a Gram matrix of one kind alone": (
        changed("grad_gram", "first", None),
        "only one of gram and grad_gram has first: asked for both of every layer",
    ),
    "a Gram matrix of no inputs": (changed("gram", "first", torch.zeros(5, 5)), "gram first counts 0 inputs"),
    "a lopsided Gram matrix": (
        changed("gram", "first", torch.eye(5) + torch.ones(5, 5).triu(1) / 100),
        "gram first is not symmetric",
    ),
    "a Gram matrix beyond its diagonal": (
        changed("grad_gram", "first", torch.eye(6) * 0.9 + 1.1 * (1 - torch.eye(6))),
        "grad_gram first has an entry beyond those of its diagonal: Cauchy–Schwarz",
    ),
    "a Gram matrix with an entry beside a zero": (
        changed("gram", "first", torch.eye(5) * torch.tensor([0.0, 1, 1, 1, 1]) + 0.01 * (1 - torch.eye(5))),
        "gram first has an entry beyond those of its diagonal: Cauchy–Schwarz",
    ),
    "an indefinite Gram matrix": (
        changed("gram", "first", 2.6 * torch.eye(5) - 0.6),
        "gram first has a negative eigenvalue",
    ),
    "a negative Gram diagonal": (changed("gram", "first", -torch.eye(5)), "the diagonal of gram first is negative"),
    "a Gram matrix of NaN": (changed("gram", "first", NAN * torch.eye(5)), "gram first holds NaN or infinity"),
    "moments of nothing": (moments(num=0), f"moments first counts 0: allowed is 1 to {5 * 2**24}"),
    "moments of too much": (moments(num=5 * 2**24 + 1), "moments first counts 83886081: allowed is 1 to 83886080"),
    "moments of no layer": (moments("nowhere"), "moments has nowhere, which is no layer of the model"),
    "moments of other channels": (
        moments(mean=torch.ones(5)),
        "moments first|mean has shape (5,), asked for (6,)",
    ),
    "moments of two shapes": (moments(m2=torch.ones(1)), "moments first|m2 has shape (1,), asked for (6,)"),
    "moments in float64": (
        moments(mean=torch.ones(6).double()),
        "moments first|mean has dtype torch.float64, asked for torch.float32",
    ),
    "negative m2": (moments(m2=-torch.ones(6)), "moments first is negative"),
    "moments that are NaN": (moments("norm", mean=NAN * torch.ones(6)), "moments norm|mean holds NaN or infinity"),
    "correlations of no layer": (
        changed("cross_moments", "temperature", torch.eye(1)),
        "cross_moments has temperature, which is no layer of the model",
    ),
    "correlations of other units": (
        changed("cross_moments", "first", torch.ones(6, 4)),
        "cross_moments first has shape (6, 4), asked for (6, 6)",
    ),
    "correlations in float64": (
        changed("cross_moments", "first", torch.eye(6).double()),
        "cross_moments first has dtype torch.float64, asked for torch.float32",
    ),
    "correlations beyond 1": (
        changed("cross_moments", "first", -1.01 * torch.eye(6)),
        "cross_moments first has a correlation beyond 1: Cauchy–Schwarz",
    ),
    "correlations that are NaN": (
        changed("cross_moments", "first", NAN * torch.eye(6)),
        "cross_moments first holds NaN or infinity",
    ),
    "no class counts": (replace(SOUND, class_counts=None), "class_counts is missing"),
    "class counts of too few": (
        replace(SOUND, class_counts=torch.tensor([2, 2])),
        "class_counts is no vector of whole",
    ),
    "negative class counts": (replace(SOUND, class_counts=torch.tensor([6, -1])), "class_counts is no vector"),
    "fractional class counts": (replace(SOUND, class_counts=torch.tensor([2.5, 2.5])), "class_counts is no vector"),
    "a 0-d class count": (replace(SOUND, class_counts=torch.tensor(5)), "class_counts is no vector"),
    "class counts that wrap": (
        replace(SOUND, class_counts=torch.tensor([2**62] * 4 + [5])),
        "class_counts is no vector",
    ),
    "empty class counts": (
        replace(SOUND, class_counts=torch.tensor([], dtype=torch.int64)),
        "class_counts is no vector",
    ),
    "a claim of too much validation data": (replace(SOUND, metrics={"num": 1e300}), "the metric num is 1e+300"),
    "a claim of negative validation data": (replace(SOUND, metrics={"num": -1.0}), "the metric num is -1"),
    "a claim of NaN validation data": (replace(SOUND, metrics={"num": NAN}), "the metric num is nan"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_unsound_update_is_refused_in_one_line_that_names_what_is_wrong(case: str) -> None:
    update, expected = WRONG[case]
    assert expected in reason(update)


def announced(units: int, **others: Tensor) -> dict[str, Tensor]:
    """Tensors like the model's, without values, with so many units in the first layer; others are as they are given."""
    assert MODEL.symmetry is not None
    shapes = {name: [*value.shape] for name, value in MODEL.params.items()}
    for name, axis in MODEL.symmetry.members["first"]:
        shapes[name][axis] = units
    return {name: MODEL.params[name].new_empty(shape, device="meta") for name, shape in shapes.items()} | others


VAST = {name: torch.empty(2**62, 0) for name in announced(1) if name.startswith(("first", "norm"))}
VAST |= {"second.weight": torch.empty(1, 2**62, 0), "last.weight": SIX[:3, None]}
VAST |= dict.fromkeys(("second.bias", "again.bias"), SIX[:1])
MISFITS: dict[str, tuple[dict[str, Tensor], str]] = {
    "no units": (announced(0), "first has 0 units: allowed is 1 to 24, by the run's max-width"),
    "too many units": (announced(25), "first has 25 units: allowed is 1 to 24, by the run's max-width"),
    "more than storage can have": (announced(1, **VAST), f"first has {2**62} units: allowed is 1 to 24"),
    "widths that contradict": (
        announced(7, **{"norm.weight": SIX}),
        "norm.weight has an axis of 6, its groups make 7: let all that a layer's units are in have one width",
    ),
    "an axis too few": (announced(7, **{"first.weight": SIX}), "first.weight has 1 axes, 2 are described"),
    "no tensors": ({}, "params lacks again.bias, first.bias, first.weight and 13 more"),
    "another tensor": (announced(7, more=SIX), "params has more, which was not asked for"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_widths_of_no_network_are_refused_in_one_line_that_names_what_is_wrong(case: str) -> None:
    params, said = MISFITS[case]
    with pytest.raises(Rejected, match=r"^[^\n]+$") as refused:
        resized(MODEL, params, {"first": 24, "second": 8})
    assert said in str(refused.value)


@pytest.mark.parametrize("units", [1, 6, 24])
def test_any_width_up_to_the_bound_is_allowed(units: int) -> None:
    found = resized(MODEL, announced(units), {"first": 24, "second": 8})
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in announced(units).items()
    }


@pytest.mark.parametrize("field", [*TENSOR_FIELDS[1:], "moments", "class_counts"])
def test_a_field_that_was_not_asked_for_is_refused(field: str) -> None:
    update = ClientUpdate(client_id=1, num_examples=5, params=SOUND.params, **{field: getattr(SOUND, field)})
    refused = reason(update, asking(Request()))
    assert refused.startswith(field)
    assert refused.endswith("not asked for")


@pytest.mark.parametrize("task", ["measure", "evaluate"])
def test_params_are_refused_where_the_exchange_did_not_train(task: Any) -> None:
    update = ClientUpdate(client_id=1, num_examples=5, params=SOUND.params)
    assert reason(update, replace(ASKED, task=task)).startswith("params has again.bias")


def test_statistics_are_refused_in_an_evaluation_whatever_its_request_says() -> None:
    assert reason(replace(SOUND, params={}), replace(ASKED, task="evaluate")).startswith("grad_sum has")


# --- Cauchy–Schwarz -------------------------------------------------------------------------------------------------


def sums_of(gradients: Tensor, dtype: torch.dtype) -> tuple[GlobalModel, ClientUpdate]:
    """A model of one parameter, and an update with the sums of `gradients`, shape (n, d), rounded to `dtype`."""
    n, width = gradients.shape
    model = GlobalModel(params={"w": torch.zeros(width, dtype=dtype)}, trainable=frozenset({"w"}))
    update = ClientUpdate(
        client_id=1,
        num_examples=n,
        num_grads=n,
        estimator="exact",
        params=model.params,
        grad_sum={"w": gradients.sum(0).to(dtype)},
        sq_grad_sum={"w": gradients.square().sum(0).to(dtype)},
    )
    return model, update


BOTH = asking(Request(gradients=Gradients(sums=True, squares=True)))


@settings(max_examples=300)
@given(
    num=st.integers(1, 200),
    spread=st.sampled_from([0.0, 1e-9, 1e-3, 0.1, 1.0, 10.0]),
    scale=st.sampled_from([-24, -23, -22, -9, -5, -4, -3, -2, 0, 1]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_true_sums_of_gradients_pass_in_any_precision(
    num: int, spread: float, scale: int, dtype: torch.dtype, seed: int
) -> None:
    """From all gradients alike, where the bound is tight, to all at random; down to where squares underflow."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(1, 16, generator=generator, dtype=torch.float64)
    noise = torch.randn(num, 16, generator=generator, dtype=torch.float64)
    model, update = sums_of((centre + spread * noise) * 10.0**scale / (1 + spread), dtype)
    assert reason(update, BOTH, model) == ""


@given(num=st.integers(1, 200), seed=st.integers(0, 2**31), scale=st.integers(-6, 6))
def test_squares_that_are_one_percent_too_small_are_refused_in_float32(num: int, seed: int, scale: int) -> None:
    one = torch.randn(1, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10.0**scale
    model, update = sums_of(one.expand(num, 8), torch.float32)
    shrunk = {"w": update.sq_grad_sum["w"].clone()}
    shrunk["w"][3] *= 0.99
    assert "Cauchy–Schwarz" in reason(replace(update, sq_grad_sum=shrunk), BOTH, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_squares_that_are_ten_percent_too_small_are_refused_in_half_precision(dtype: torch.dtype) -> None:
    model, update = sums_of(torch.full((7, 3), 0.3, dtype=torch.float64), dtype)
    shrunk = {"w": update.sq_grad_sum["w"] * 0.9}
    assert "Cauchy–Schwarz" in reason(replace(update, sq_grad_sum=shrunk), BOTH, model)


def test_the_cauchy_schwarz_bound_is_checked_per_coordinate() -> None:
    model, update = sums_of(torch.ones(4, 3, dtype=torch.float64), torch.float32)
    moved = {"w": torch.tensor([4.0, 1.0, 7.0])}  # Σ over coordinates as it was
    assert "Cauchy–Schwarz" in reason(replace(update, sq_grad_sum=moved), BOTH, model)


def test_the_square_of_a_batchs_mean_gradient_is_refused() -> None:
    """What a client sends that squares after averaging: too small by about the batch's size."""
    gradients = torch.full((32, 2), 0.5, dtype=torch.float64)
    model, update = sums_of(gradients, torch.float32)
    assert "Cauchy–Schwarz" in reason(
        replace(update, sq_grad_sum={"w": gradients.mean(0).square().float()}), BOTH, model
    )


def test_sums_added_up_in_float32_pass() -> None:
    """Ten thousand equal gradients, one at a time: the bound is tight, and every addition rounds the same way."""
    gradient, sums, squares = torch.linspace(0.1, 0.9, 64), torch.zeros(64), torch.zeros(64)
    for _ in range(10_000):
        sums += gradient
        squares += gradient.square()
    assert (sums.double().square() > 10_000 * squares.double() * (1 + 1e-5)).any()
    model, update = sums_of(gradient.double().expand(10_000, 64), torch.float32)
    assert reason(replace(update, grad_sum={"w": sums}, sq_grad_sum={"w": squares}), BOTH, model) == ""


# --- Gram matrices --------------------------------------------------------------------------------------------------


GRAMS = asking(Request(gram=True))


def gram_of(x: Tensor) -> tuple[GlobalModel, ClientUpdate]:
    """A model of one layer, and an update with the Gram matrix of its inputs x, shape (n, in)."""
    model = GlobalModel(params={"a.weight": torch.zeros(1, x.shape[1])}, trainable=frozenset({"a.weight"}))
    rows = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    update = ClientUpdate(
        client_id=1, num_examples=len(x), num_grads=len(x), params=model.params, gram={"a": (rows.T @ rows).float()}
    )
    return model, update


@settings(max_examples=200)
@given(
    num=st.integers(1, 50),
    spread=st.sampled_from([0.0, 1e-9, 1e-4, 1.0]),
    scale=st.sampled_from([-24, -23, -20, -10, 0, 10, 15]),
    mixed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_true_gram_matrices_pass_at_any_scale_and_rank(
    num: int, spread: float, scale: int, mixed: bool, seed: int
) -> None:
    """From one example, or all alike, to full rank; inputs whose squares underflow beside others whose do not."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 16, generator=generator).double() + spread * torch.randn(num, 16, generator=generator).double()
    x[:, 3] = 0
    x[:, 8 if mixed else 0 :] *= 10.0**scale
    model, update = gram_of(x)
    assert reason(update, GRAMS, model) == ""


def test_a_gram_matrix_added_up_in_float32_passes() -> None:
    x = torch.rand(10_000, 8, generator=torch.Generator().manual_seed(0))
    model, update = gram_of(x)
    total = torch.zeros(9, 9)
    for row in torch.cat([x, torch.ones(len(x), 1)], 1):
        total += torch.outer(row, row)
    assert reason(replace(update, gram={"a": total}), GRAMS, model) == ""


@given(direction=st.integers(0, 7), share=st.floats(0.02, 1.0))
def test_an_eigenvalue_below_zero_is_refused_however_few_the_negative_directions(direction: int, share: float) -> None:
    model, update = gram_of(torch.randn(40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    values, vectors = torch.linalg.eigh(update.gram["a"].double())
    values[direction] = -share * values[-1]
    turned = ((vectors * values) @ vectors.T).float()
    assert reason(replace(update, gram={"a": turned}), GRAMS, model).startswith(("gram a", "the diagonal of gram a"))


def test_a_client_may_leave_a_layer_out() -> None:
    rest = {name: gram for name, gram in SOUND.gram.items() if name != "first"}
    others = {name: gram for name, gram in SOUND.grad_gram.items() if name != "first"}
    assert reason(replace(SOUND, gram=rest, grad_gram=others)) == ""


def test_a_convolutions_gram_matrix_is_that_of_its_patches() -> None:
    params = {"weight": torch.zeros(2, 3, 2, 2), "a.weight": torch.zeros(4, 2, 3)}
    model = GlobalModel(params=params, trainable=frozenset(params))
    grams = {"": torch.eye(13), "a": torch.eye(7)}
    update = ClientUpdate(client_id=1, num_examples=1, num_grads=1, params=params, gram=grams)
    assert reason(update, GRAMS, model) == ""
    assert "gram a has shape (13, 13), asked for (7, 7)" in reason(
        replace(update, gram={**grams, "a": torch.eye(13)}), GRAMS, model
    )


def test_a_layer_that_does_not_train_has_no_gram_matrix() -> None:
    model, update = gram_of(torch.ones(3, 2))
    frozen = replace(model, trainable=frozenset())
    assert "gram has a, which is no layer of the model that trains" in reason(update, GRAMS, frozen)


@pytest.mark.parametrize("num", [0, 4])
def test_gram_matrices_count_their_examples(num: int) -> None:
    model, update = gram_of(torch.ones(3, 2))
    assert reason(replace(update, num_grads=num), GRAMS, model) == f"num_grads is {num}: allowed is 1 to 3"


def test_gradients_gram_matrices_name_their_estimator() -> None:
    asked = asking(Request(grad_gram=True, gradients=Gradients(estimator="empirical")))
    only = replace(SOUND, grad_sum={}, sq_grad_sum={}, grad_sketch={}, gram={}, moments={}, cross_moments={})
    only = replace(only, class_counts=None)
    assert reason(only, asked) == "estimator is exact, asked for empirical"
    assert reason(replace(only, estimator="empirical"), asked) == ""


# --- finiteness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [0, 500, 999])
def test_one_entry_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, value: float, place: int) -> None:
    tensor = torch.linspace(-1, 1, 1000).to(dtype)
    assert all_finite(tensor)
    tensor[place] = value
    assert not all_finite(tensor)
