from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import ClassVar, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from aggregators.core.update import ESTIMATORS, ClientUpdate, Estimator, Gradients, Request, Tensors
from client.statistics import measure, unsupported
from client.statistics.gradients import GradientSums, gradients
from client.statistics.per_example import per_example, plain_attention
from client.task import Examples, Node, Task


class Labels(Task):
    """Classification into three labels; the models come from the tests."""

    num_classes: ClassVar[int | None] = 3

    def model(self) -> nn.Module:
        return nn.Linear(4, 3)

    def data(self, node: Node) -> tuple[Examples, Examples]:
        return rows(5), rows(2)


class Regression(Labels):
    num_classes: ClassVar[int | None] = None

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, 0] - targets).square() / 2


ALL = Gradients(sums=True, squares=True)


def pairs(inputs: Tensor, targets: Tensor) -> Examples:
    return cast(Examples, TensorDataset(inputs, targets))


def rows(num: int, *shape: int, seed: int = 0) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    return pairs(torch.randn(num, *(shape or (4,)), generator=generator), torch.arange(num) % 3)


def tokens(num: int, length: int) -> Examples:
    return pairs(torch.arange(num * length).view(num, length) * 7 % 10, torch.arange(num) % 3)


def part(examples: Examples, indices: range) -> Examples:
    return cast(Examples, Subset(examples, indices))


def asked(estimator: Estimator = "empirical", limit: int | None = None, sketches: int = 0) -> Gradients:
    return Gradients(sums=True, squares=True, sketches=sketches, estimator=estimator, limit=limit)


def net(*layers: nn.Module, seed: int = 0) -> nn.Module:
    """The layers in a row, every parameter and running statistic at random."""
    model = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.data = noise.abs() + 0.5 if "var" in name else noise * 0.5
    return model


def mlp(seed: int = 0) -> nn.Module:
    return net(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), seed=seed)


def label_gradients(
    model: nn.Module, example: tuple[Tensor, Tensor], raw: bool = False
) -> Iterator[tuple[float, Tensors]]:
    """p(y|x) and the gradient of log p(y|x), or of the raw score of y, for each label y, by plain autograd."""
    params = dict(model.named_parameters())
    model.eval()
    for y in range(3):
        scores = model(example[0][None])[0].double()
        log_p = scores.log_softmax(0)
        value = scores[y] if raw else log_p[y]
        grads = torch.autograd.grad(value, list(params.values()), materialize_grads=True)
        yield log_p[y].exp().item(), dict(zip(params, grads, strict=True))


def brute_force(model: nn.Module, examples: Examples, exact: bool) -> tuple[Tensors, Tensors]:
    """Σ g and Σ g², example by example and label by label, in float64."""
    sums = {name: torch.zeros_like(param, dtype=torch.float64) for name, param in model.named_parameters()}
    squares = {name: total.clone() for name, total in sums.items()}
    for i in range(len(examples)):  # type: ignore[arg-type]
        for y, (p, grads) in enumerate(label_gradients(model, examples[i])):
            weight = p if exact else float(y == examples[i][1])
            for name, g in grads.items():
                sums[name] += weight * g.double()
                squares[name] += weight * g.double().square()
    return sums, squares


def close(got: Tensors, expected: Tensors, rtol: float = 1e-3) -> None:
    """Equal names; values equal to a relative error of each tensor's largest."""
    assert list(got) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name].double(), value.double(), rtol=rtol, atol=1e-6 + 1e-5 * float(value.abs().max())
        )


class Tied(nn.Module):
    """One weight in two linear layers and a third place; so is `second.weight` no parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.second(self.first(x).tanh()).tanh())
        return scores


class Twice(nn.Module):
    """A layer called two times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.layer(self.layer(x).tanh()))
        return scores


class Elsewhere(nn.Module):
    """A linear layer called once, whose weight also serves outside; parameters of the module's own, one a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.offset = nn.Parameter(torch.zeros(4))
        self.scale = nn.Parameter(torch.ones(()))
        self.unused = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.scale * self.layer(input=x + self.offset) + (x**2) @ self.layer.weight.T
        return scores


class Scaled(nn.Linear):
    """A linear layer in name, whose gradient is not δ xᵀ."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.weight.sum()


def hooked() -> nn.Module:
    """A linear layer whose outputs its user doubles."""
    model = net(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model.get_submodule("0").register_forward_hook(lambda layer, args, output: 2 * output)
    return model


class Branch(nn.Module):
    """Control flow that depends on the example, which vmap refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.layer(self.layer(x)) if x.sum() > 0 else self.layer(x))
        return scores


class Words(nn.Module):
    """Tokens in, scores out, by way of `body`."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.body = body
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(self.embedding(x))
        scores: Tensor = self.head((out[0] if isinstance(out, tuple) else out).mean(1))
        return scores


def images(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: net(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Examples]] = {
    "one linear layer": (lambda: net(nn.Linear(4, 3)), rows(7)),
    "no bias": (lambda: net(nn.Linear(4, 5, bias=False), nn.ReLU(inplace=True), nn.Linear(5, 3)), rows(7)),
    "linear on sequences": (lambda: net(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)), rows(7, 3, 4)),
    "conv": (images(nn.Conv2d(2, 4, 3)), rows(7, 2, 6, 6)),
    "conv, stride, padding, groups": (images(nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2)), rows(7, 2, 6, 6)),
    "batch norm": (images(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)), rows(7, 2, 6, 6)),
    "layer norm, dropout": (lambda: net(nn.Linear(4, 6), nn.LayerNorm(6), nn.Dropout(), nn.Linear(6, 3)), rows(7)),
    "weight norm": (lambda: net(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh()), rows(7)),
    "tied": (lambda: net(Tied()), rows(7)),
    "twice": (lambda: net(Twice()), rows(7)),
    "elsewhere": (lambda: net(Elsewhere()), rows(7)),
    "linear by inheritance": (lambda: net(Scaled(4, 5), nn.Tanh(), nn.Linear(5, 3)), rows(7)),
    "hooked": (hooked, rows(7)),
    "branch": (lambda: net(Branch()), rows(7)),
    "embedding": (lambda: net(Words(nn.Tanh())), tokens(7, 5)),
    "lstm": (lambda: net(Words(nn.LSTM(4, 4, batch_first=True))), tokens(7, 5)),
    "transformer": (lambda: net(Words(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))), tokens(7, 5)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("estimator", ["empirical", "exact"])
def test_sums_and_squares_are_those_of_single_examples(name: str, estimator: Estimator) -> None:
    make, examples = NETWORKS[name]
    model = make()
    sums, squares = brute_force(model, examples, exact=estimator == "exact")
    got = gradients(Labels(), model.train(), examples, asked(estimator), seed=0)
    assert (got.num_grads, got.estimator) == (7, estimator)
    close(got.grad_sum, sums)
    close(got.sq_grad_sum, squares)


@pytest.mark.parametrize(
    ("name", "shared"),
    {
        "one linear layer": ["weight"],
        "no bias": ["0.weight", "2.weight"],
        "linear on sequences": ["3.weight"],
        "conv": ["4.weight"],
        "weight norm": [],
        "tied": ["head.weight"],
        "twice": ["head.weight"],
        "elsewhere": [],
        "linear by inheritance": ["2.weight"],
        "hooked": ["0.weight", "2.weight"],
        "branch": [],
        "lstm": [],
    }.items(),
)
def test_only_weights_of_linear_layers_used_once_on_one_row_go_without_copies(name: str, shared: list[str]) -> None:
    make, examples = NETWORKS[name]
    assert list(per_example(make().eval(), examples[0][0]).single) == shared


@pytest.mark.parametrize(
    ("name", "batched"), {"branch": False, "lstm": False, "transformer": True, "conv": True}.items()
)
def test_only_what_vmap_refuses_goes_one_by_one(name: str, batched: bool) -> None:
    make, examples = NETWORKS[name]
    model = make()
    with plain_attention():
        assert per_example(model.eval(), examples[0][0]).batched is batched


def counts(estimator: Estimator) -> tuple[Tensor, Tensor]:
    """How often each label was drawn in 3000 draws, by solving Σ_y n_y g_y² = Σ g²; and each p(y|x)."""
    model = mlp()
    example = rows(1)[0]
    table = list(label_gradients(model, example, raw=estimator == "logit"))
    copies = pairs(example[0].expand(3000, 4), example[1].expand(3000))
    got = gradients(Labels(), model, copies, asked(estimator), seed=0)
    basis = torch.stack([torch.cat([g.double().square().flatten() for g in grads.values()]) for _, grads in table], 1)
    total = torch.cat([s.double().flatten() for s in got.sq_grad_sum.values()])
    solved = torch.linalg.lstsq(basis, total[:, None]).solution[:, 0]
    torch.testing.assert_close(basis @ solved, total, rtol=1e-4, atol=1e-4)
    return solved, torch.tensor([p for p, _ in table], dtype=torch.float64)


@pytest.mark.parametrize("estimator", ["sampled", "logit"])
def test_labels_are_drawn_as_often_as_the_model_expects_them(estimator: Estimator) -> None:
    drawn, p = counts(estimator)
    assert torch.allclose(drawn, drawn.round(), atol=0.05)
    assert ((drawn - 3000 * p).abs() <= 4 * (3000 * p * (1 - p)).sqrt()).all()


def test_the_sampled_fisher_has_the_exact_one_as_its_mean() -> None:
    model, examples = mlp(), rows(2)
    copies = pairs(*(torch.stack([examples[i % 2][k] for i in range(4000)]) for k in (0, 1)))
    sampled = gradients(Labels(), model, copies, asked("sampled"), seed=0).sq_grad_sum
    exact = gradients(Labels(), model, copies, asked("exact"), seed=0).sq_grad_sum
    for name, value in exact.items():
        torch.testing.assert_close(sampled[name], value, rtol=0.1, atol=0.02 * float(value.max()))


def test_the_square_of_a_batch_mean_is_not_what_is_returned() -> None:
    model = net(nn.Linear(4, 3))
    for param in model.parameters():
        nn.init.zeros_(param)
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    opposite = pairs(torch.cat([x, -x]), torch.tensor([0, 0]))
    got = gradients(Labels(), model, opposite, asked(), seed=0)
    assert got.grad_sum["weight"].abs().max() < 1e-6  # the batch mean of the two gradients, and so its square, is 0
    expected = 2 * torch.outer(torch.tensor([2.0, -1.0, -1.0]) / 3, x[0]).square()
    torch.testing.assert_close(got.sq_grad_sum["weight"], expected)


@given(split=st.integers(0, 7), estimator=st.sampled_from(["empirical", "exact"]))
def test_sums_add_up_over_a_split_of_the_examples(split: int, estimator: Estimator) -> None:
    model, examples = mlp(), rows(7)
    whole, left, right = (
        gradients(Labels(), model, part(examples, indices), asked(estimator), seed=0)
        for indices in (range(7), range(split), range(split, 7))
    )
    assert left.num_grads + right.num_grads == whole.num_grads
    for field in ("grad_sum", "sq_grad_sum"):
        one, other = getattr(left, field), getattr(right, field)
        close({name: one[name] + other[name] for name in one}, getattr(whole, field))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("budget", [1, 300])
def test_the_size_of_a_chunk_does_not_change_the_result(estimator: Estimator, budget: int) -> None:
    model, examples = net(Twice()), rows(11)
    request = asked(estimator, sketches=2)
    small = gradients(Labels(), model, examples, request, seed=4, budget=budget)
    large = gradients(Labels(), model, examples, request, seed=4)
    for field in ("grad_sum", "sq_grad_sum", "grad_sketch"):
        close(getattr(small, field), getattr(large, field), rtol=1e-5)


def test_a_chunk_holds_as_many_gradients_as_the_budget_allows() -> None:
    seen: list[int] = []

    class Spy(Labels):
        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            seen.append(len(outputs))
            return super().loss(outputs, targets)

    model = net(Tied())  # 16 + 4 + 4 + 3 numbers, and the head's weight, which is not formed
    gradients(Spy(), model, rows(7), asked(), seed=0, budget=4 * 27 * 3)
    assert seen == [3, 3, 1]


def test_a_limit_takes_that_many_examples_chosen_by_the_seed() -> None:
    model, examples = mlp(), rows(10)

    def limited(seed: int) -> GradientSums:
        return gradients(Labels(), model, examples, asked(limit=1), seed=seed)

    def indices(sums: GradientSums) -> list[int]:
        alone = (gradients(Labels(), model, part(examples, range(i, i + 1)), asked(), seed=0) for i in range(10))
        return [i for i, one in enumerate(alone) if torch.allclose(one.grad_sum["0.weight"], sums.grad_sum["0.weight"])]

    first, again, other = (indices(limited(seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert len(first) == len(other) == limited(0).num_grads == 1


def test_a_limit_beyond_the_examples_takes_each_once() -> None:
    model, examples = mlp(), rows(6)
    limited = gradients(Labels(), model, examples, asked(limit=99), seed=0)
    assert limited.num_grads == 6
    close(limited.sq_grad_sum, gradients(Labels(), model, examples, asked(), seed=0).sq_grad_sum)


@pytest.mark.parametrize("estimator", ["empirical", "exact"])
def test_sketches_have_the_sum_of_outer_products_as_their_mean(estimator: Estimator) -> None:
    model, examples, r = net(nn.Linear(4, 3)), rows(5), 4000
    sketches = gradients(Labels(), model, examples, Gradients(sketches=r, estimator=estimator), seed=0).grad_sketch
    flat = torch.cat([sketches["weight"].flatten(1), sketches["bias"]], 1).double()
    outer = torch.zeros(15, 15, dtype=torch.float64)
    for i in range(5):
        for y, (p, grads) in enumerate(label_gradients(model, examples[i])):
            g = torch.cat([grads["weight"].flatten(), grads["bias"]]).double()
            outer += (p if estimator == "exact" else float(y == examples[i][1])) * torch.outer(g, g)
    spread = (outer.trace().square() + outer.square().sum()) / r  # E‖error‖² of normal signs is this, of ±1 less
    assert (flat.T @ flat / r - outer).square().sum() <= 4 * spread


def test_a_sketch_of_one_example_is_its_gradient_up_to_sign() -> None:
    model, examples = mlp(), rows(1)
    got = gradients(Labels(), model, examples, asked(sketches=20), seed=0)
    signs = {float((got.grad_sketch["0.bias"][j] / got.grad_sum["0.bias"]).mean().round(decimals=4)) for j in range(20)}
    assert signs == {1.0, -1.0}
    for name, sketch in got.grad_sketch.items():
        assert sketch.shape == (20, *got.grad_sum[name].shape)
        torch.testing.assert_close(sketch.abs(), got.grad_sum[name].abs().expand_as(sketch))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_of_half_precision_models_do_not_underflow(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    inputs, targets = (
        1e-4 * torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).to(dtype),
        torch.arange(5) % 3,
    )
    got = gradients(Labels(), model, pairs(inputs, targets), asked(), seed=0)
    wide = gradients(Labels(), mlp().to(dtype).float(), pairs(inputs.float(), targets), asked(), seed=0)
    assert 0 < got.sq_grad_sum["0.weight"].max() < 6e-8  # below the least number of float16
    assert {name: value.dtype for name, value in got.sq_grad_sum.items()} == dict.fromkeys(wide.grad_sum, torch.float32)
    close(got.sq_grad_sum, wide.sq_grad_sum, rtol=1e-6)
    torch.testing.assert_close(got.sq_grad_sum["0.weight"], wide.sq_grad_sum["0.weight"], rtol=1e-5, atol=0)
    assert next(model.parameters()).dtype == dtype


@pytest.mark.parametrize("layers", [(nn.Linear(4, 3),), (nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 3, 1), nn.Flatten())])
def test_squares_below_the_range_of_float32_add_up_to_what_is_within(layers: tuple[nn.Module, ...]) -> None:
    num, x = 128, 2e-23  # each square is below 4e-46, and rounds to 0 in float32
    tiny = pairs(torch.full((num, 4), x), torch.zeros(num, dtype=torch.int64))
    got = gradients(Labels(), net(*layers), tiny, asked(), seed=0)
    name = next(name for name in got.sq_grad_sum if name.endswith("weight"))
    g = got.grad_sum[name].double() / num
    assert (g.square() < 7e-46).all()
    torch.testing.assert_close(got.sq_grad_sum[name].double(), num * g.square(), rtol=0.1, atol=2e-45)
    assert got.sq_grad_sum[name].any()


@given(
    num=st.integers(1, 40),
    seed=st.integers(0, 5),
    estimator=st.sampled_from(ESTIMATORS),
    equal=st.booleans(),
    budget=st.sampled_from([1, 2**27]),
)
def test_cauchy_schwarz_holds_in_every_coordinate_after_rounding(
    num: int, seed: int, estimator: Estimator, equal: bool, budget: int
) -> None:
    examples = (
        pairs(rows(1)[0][0].expand(num, 4), torch.zeros(num, dtype=torch.int64)) if equal else rows(num, seed=seed)
    )
    got = gradients(Labels(), mlp(seed), examples, asked(estimator), seed=seed, budget=budget)
    for name, squares in got.sq_grad_sum.items():
        assert (squares >= 0).all()
        assert (got.grad_sum[name].double().square() <= num * squares.double() * (1 + 1e-6)).all()


def test_the_exact_score_has_zero_mean() -> None:
    got = gradients(Labels(), mlp(), rows(20), asked("exact"), seed=0)
    assert all(value.abs().max() < 1e-5 for value in got.grad_sum.values())


def test_nothing_but_what_is_asked_for_is_returned() -> None:
    model, examples = mlp(), rows(3)
    names = [name for name, _ in model.named_parameters()]
    fields = ("grad_sum", "sq_grad_sum", "grad_sketch")
    for wanted, request in zip(
        fields, [Gradients(sums=True), Gradients(squares=True), Gradients(sketches=1)], strict=True
    ):
        got = gradients(Labels(), model, examples, request, seed=0)
        assert {field: list(getattr(got, field)) for field in fields} == {
            f: names if f == wanted else [] for f in fields
        }


def test_no_examples_give_zero_sums_over_no_gradients() -> None:
    got = gradients(Labels(), mlp(), part(rows(1), range(0)), asked(sketches=2), seed=0)
    assert got.num_grads == 0
    assert got.grad_sketch["0.weight"].shape == (2, 6, 4)
    assert not any(value.any() for value in got.sq_grad_sum.values())


def test_parameters_that_do_not_train_are_measured_too_and_stay_as_they_are() -> None:
    model, examples = mlp(), rows(4)
    expected = gradients(Labels(), model, examples, asked(), seed=0).sq_grad_sum
    model.get_parameter("0.weight").requires_grad_(False)
    close(gradients(Labels(), model, examples, asked(), seed=0).sq_grad_sum, expected)
    assert not model.get_parameter("0.weight").requires_grad
    assert model.get_parameter("0.bias").grad is None


def test_modes_buffers_hooks_and_the_random_generator_are_as_they_were() -> None:
    model, examples = NETWORKS["batch norm"][0](), NETWORKS["batch norm"][1]
    model.get_submodule("1").eval()
    modes, before = [module.training for module in model.modules()], torch.random.get_rng_state()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients(Labels(), model, examples, asked("sampled", limit=3, sketches=1), seed=0)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert not any(module._forward_hooks for module in model.modules())


def test_gradients_are_there_even_where_the_caller_has_turned_them_off() -> None:
    with torch.no_grad():
        got = gradients(Labels(), mlp(), rows(3), asked(), seed=0)
    assert got.sq_grad_sum["0.weight"].any()


def test_a_models_own_error_is_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        gradients(Labels(), nn.Linear(5, 3), rows(3), asked(), seed=0)


def test_regression_takes_its_own_targets() -> None:
    model, examples = net(nn.Linear(4, 1)), pairs(torch.randn(5, 4), torch.randn(5))
    got = gradients(Regression(), model, examples, asked(), seed=0)
    inputs, targets = torch.stack([examples[i][0] for i in range(5)]), torch.stack([examples[i][1] for i in range(5)])
    residuals = targets - model(inputs).detach()[:, 0]
    torch.testing.assert_close(got.grad_sum["weight"][0], residuals @ inputs)
    torch.testing.assert_close(got.sq_grad_sum["weight"][0], residuals.square() @ inputs.square())


@pytest.mark.parametrize("estimator", ["exact", "sampled", "logit"])
def test_an_estimator_that_needs_labels_is_refused_where_there_are_none(estimator: Estimator) -> None:
    with pytest.raises(
        ValueError, match=f"'{estimator}' needs labels and Regression.num_classes is None: .*'empirical'"
    ):
        gradients(Regression(), nn.Linear(4, 1), rows(3), asked(estimator), seed=0)


def test_measure_returns_the_fields_of_an_update_that_the_request_names() -> None:
    model, examples = mlp(), rows(5)
    request = Request(gradients=Gradients(squares=True, estimator="exact"), class_counts=True)
    update = ClientUpdate(client_id=1, num_examples=5, **measure(Labels(), model, examples, request, seed=0))  # type: ignore[arg-type]
    close(update.sq_grad_sum, brute_force(model, examples, exact=True)[1])
    assert (update.num_grads, update.estimator, update.grad_sum) == (5, "exact", {})
    assert update.class_counts is not None
    assert update.class_counts.dtype == torch.int64
    assert update.class_counts.tolist() == [2, 2, 1]


@pytest.mark.parametrize("request_", [Request(), Request(gradients=Gradients())])
def test_measure_computes_nothing_that_is_not_asked_for(request_: Request) -> None:
    class Untouchable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("the model was run")

    before = torch.random.get_rng_state()
    assert measure(Labels(), Untouchable(), rows(3), request_, seed=0) == {}
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "request_", [Request(class_counts=True), Request(gradients=Gradients(sums=True, estimator="logit"))]
)
def test_what_a_task_without_labels_lacks_is_named_in_one_line(request_: Request) -> None:
    reason = unsupported(request_, Regression())
    assert reason is not None
    assert "Regression.num_classes is None" in reason
    assert "\n" not in reason
    assert unsupported(request_, Labels()) is None


def test_a_task_without_labels_supports_the_empirical_estimator() -> None:
    assert unsupported(Request(gradients=asked("empirical")), Regression()) is None


def test_a_clients_message_does_not_pay_for_importing_compilers() -> None:
    script = """
import sys, torch
from torch.utils.data import TensorDataset
from aggregators.core.update import Gradients
from client.statistics.gradients import gradients
from client.task import Task
from client.training import Training, evaluate, train

class Mine(Task):
    num_classes = 3
    def model(self): return torch.nn.Linear(4, 3)
    def data(self, node): raise NotImplementedError

task, examples = Mine(), TensorDataset(torch.randn(8, 4), torch.arange(8) % 3)
model = task.model()
for optimizer in ("sgd", "adamw"):
    train(task, model, examples, Training(optimizer=optimizer, proximal=0.1), seed=0, round=1)
evaluate(task, model, examples)
gradients(task, model, examples, Gradients(squares=True, sketches=1), seed=0)
import client.app
print([module for module in ("torch._dynamo", "numba", "sklearn", "datasets") if module in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
