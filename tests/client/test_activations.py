"""Gram matrices of layers' inputs and of gradients by their outputs, against loops over examples and positions."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from aggregators.core.update import ESTIMATORS, ClientUpdate, Estimator, Gradients, Request, Tensors
from client.statistics import activations, measure, unsupported
from client.statistics.activations import Grams, grams
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


def pairs(inputs: Tensor, targets: Tensor) -> Examples:
    return cast(Examples, TensorDataset(inputs, targets))


def rows(num: int, *shape: int, seed: int = 0) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    return pairs(torch.randn(num, *(shape or (4,)), generator=generator), torch.arange(num) % 3)


def part(examples: Examples, indices: range) -> Examples:
    return cast(Examples, Subset(examples, indices))


def asked(estimator: Estimator = "empirical", limit: int | None = None, **also: Any) -> Request:
    return Request(gram=True, grad_gram=True, gradients=Gradients(estimator=estimator, limit=limit, **also))


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


# --- the oracle: one example, one label, one position at a time -------------------------------------------------


def calls(model: nn.Module, x: Tensor) -> tuple[list[tuple[nn.Module, Tensor, Tensor]], Tensor]:
    """Every layer with what entered and what left it, in order of the calls, and the scores of one example."""
    met: list[tuple[nn.Module, Tensor, Tensor]] = []

    def hook(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
        met.append((layer, next(iter((*args, *kwargs.values()))).detach().clone(), output))
        return output.clone()

    handles = [
        module.register_forward_hook(hook, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
    ]
    scores = model.eval()(x[None])[0].double()
    for handle in handles:
        handle.remove()
    return met, scores


def channels(layer: Any) -> int:
    """The axis of a layer's outputs that its weights' first axis makes."""
    return -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)


def seen(layer: Any, x: Tensor) -> Iterator[Tensor]:
    """[x, 1] at every position: the derivatives of the first output by the weights that make it."""
    out = layer(x)
    for value in out.select(channels(layer), 0).reshape(-1):
        (grad,) = torch.autograd.grad(value, layer.weight, retain_graph=True)
        yield torch.cat([grad[0].reshape(-1).double(), torch.ones(1, dtype=torch.float64)])


def by_position(layer: nn.Module, delta: Tensor) -> Tensor:
    return torch.stack([one.reshape(-1) for one in delta.unbind(channels(layer))], 1).double()


def labelled(scores: Tensor, target: int, estimator: Estimator) -> list[tuple[float, Tensor]]:
    """The weight of each label and what is differentiated for it."""
    log_p = scores.log_softmax(0)
    if estimator == "exact":
        return [(log_p[y].exp().item(), log_p[y]) for y in range(3)]
    return [(1.0, log_p[target])]


def brute_force(
    model: nn.Module, examples: Examples, estimator: Estimator, names: dict[nn.Module, str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both sums of the named layers in float64."""
    gram: dict[str, Tensor] = {}
    grad_gram: dict[str, Tensor] = {}
    for i in range(len(examples)):  # type: ignore[arg-type]
        met, scores = calls(model, examples[i][0])
        met = [call for call in met if call[0] in names]
        for layer, x, _ in met:
            for row in seen(layer, x):
                gram[names[layer]] = gram.get(names[layer], 0) + torch.outer(row, row)
        for p, value in labelled(scores, int(examples[i][1]), estimator):
            outputs = [output for _, _, output in met]
            deltas = torch.autograd.grad(value, outputs, retain_graph=True, materialize_grads=True)
            for (layer, _, _), delta in zip(met, deltas, strict=True):
                for row in by_position(layer, delta):
                    grad_gram[names[layer]] = grad_gram.get(names[layer], 0) + p * torch.outer(row, row)
    return gram, grad_gram


def close(got: Tensors, expected: Tensors, rtol: float = 1e-4) -> None:
    """Equal names; values equal to a relative error of each matrix's largest."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name].double(), value.double(), rtol=rtol, atol=1e-7 + 1e-5 * float(value.abs().max())
        )


def both_close(got: Grams, expected: tuple[Tensors, Tensors]) -> None:
    close(got.gram, expected[0])
    close(got.grad_gram, expected[1])


class Reused(nn.Module):
    """A layer called two times, another that shares its weight and bias, and one by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.again = nn.Linear(4, 4)
        self.again.weight, self.again.bias = self.layer.weight, self.layer.bias
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(input=self.again(self.layer(self.layer(x).tanh()).tanh()).tanh())
        return scores


class Words(nn.Module):
    """Tokens in, scores out, by way of `body`."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.body = body
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(self.embedding(x)).mean(1))
        return scores


class Tokens(nn.Module):
    """A convolution without a batch axis: the examples' own axis is its positions'."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 5, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.conv(x.T).T)
        return scores


def tokens(num: int, length: int) -> Examples:
    return pairs(torch.arange(num * length).view(num, length) * 7 % 10, torch.arange(num) % 3)


def images(*layers: nn.Module, pool: nn.Module | None = None) -> Callable[[], nn.Module]:
    """Convolutions, a rectifier in place, the mean over positions of four channels, and a linear layer."""
    pool = pool or nn.AdaptiveAvgPool2d(1)
    return lambda: net(*layers, nn.ReLU(inplace=True), pool, nn.Flatten(), nn.Linear(4, 3))


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)


PIXELS = rows(5, 2, 6, 7)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Examples, list[str]]] = {
    "one layer": (lambda: net(nn.Linear(4, 3)), rows(5), [""]),
    "no bias, in place": (
        lambda: net(nn.Linear(4, 5, bias=False), nn.ReLU(inplace=True), nn.Linear(5, 3)),
        rows(5),
        ["0", "2"],
    ),
    "sequences": (lambda: net(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)), rows(5, 3, 4), ["0", "3"]),
    "conv": (images(nn.Conv2d(2, 4, 3)), PIXELS, ["0", "4"]),
    "conv, stride, padding, dilation": (
        images(nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1))),
        PIXELS,
        ["0", "4"],
    ),
    "conv, same": (images(nn.Conv2d(2, 4, (2, 3), padding="same", bias=False)), PIXELS, ["0", "4"]),
    "conv, reflected": (images(nn.Conv2d(2, 4, 3, padding=(1, 2), padding_mode="reflect")), PIXELS, ["0", "4"]),
    "conv, 1-d, circular": (
        images(nn.Conv1d(2, 4, 3, stride=2, padding=1, padding_mode="circular"), pool=nn.AdaptiveAvgPool1d(1)),
        rows(5, 2, 9),
        ["0", "4"],
    ),
    "conv, no batch axis": (lambda: net(Tokens()), rows(5), ["conv", "head"]),
    "two convs, batch norm, dropout": (
        images(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout(), nn.Conv2d(3, 4, 2)),
        PIXELS,
        ["0", "3", "7"],
    ),
    "reused": (lambda: net(Reused()), rows(5), ["layer", "head"]),
    "transformer": (lambda: net(Words(encoder())), tokens(5, 4), ["body.linear1", "body.linear2", "head"]),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # of an even kernel copies the input, says torch
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("estimator", ["empirical", "exact"])
def test_the_sums_are_those_of_single_examples_positions_and_labels(name: str, estimator: Estimator) -> None:
    make, examples, layers = NETWORKS[name]
    model = make()
    names = {model.get_submodule(layer): layer for layer in layers}
    names |= {model.get_submodule("again"): "layer"} if name == "reused" else {}
    got = grams(Labels(), model.train(), examples, asked(estimator), seed=0)
    assert (got.num_grads, got.estimator, sorted(got.gram)) == (5, estimator, sorted(layers))
    both_close(got, brute_force(model, examples, estimator, names))


def test_the_last_entry_counts_rows() -> None:
    make, examples, _ = NETWORKS["conv"]
    counts = {
        name: gram[-1, -1].item() for name, gram in grams(Labels(), make(), examples, asked(), seed=0).gram.items()
    }
    assert counts == {"0": 5 * 4 * 5, "4": 5}


def test_a_gram_matrix_is_positive_and_as_large_as_the_weights() -> None:
    make, examples, _ = NETWORKS["two convs, batch norm, dropout"]
    model = make()
    got = grams(Labels(), model, examples, asked("exact"), seed=0)
    for name, gram in got.gram.items():
        weight = model.get_parameter(f"{name}.weight")
        assert gram.shape == (weight[0].numel() + 1,) * 2
        assert got.grad_gram[name].shape == (len(weight),) * 2
        for matrix in (gram, got.grad_gram[name]):
            assert matrix.dtype == torch.float32
            assert torch.equal(matrix, matrix.T)
            assert torch.linalg.eigvalsh(matrix.double()).min() > -1e-6 * float(matrix.abs().max())


# --- labels and examples ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["sampled", "logit"])
def test_a_drawn_label_gives_that_labels_gradient(estimator: Estimator) -> None:
    model, example = mlp(), rows(1)
    met, scores = calls(model, example[0][0])
    values = scores if estimator == "logit" else scores.log_softmax(0)
    outputs = [output for _, _, output in met]
    options = [torch.autograd.grad(values[y], outputs, retain_graph=True) for y in range(3)]
    drawn = set()
    for seed in range(20):
        got = grams(Labels(), model, example, asked(estimator), seed=seed).grad_gram
        equal = [torch.allclose(got["0"], d.T @ d) and torch.allclose(got["2"], e.T @ e) for d, e in options]
        assert sum(equal) == 1
        drawn.add(equal.index(True))
    assert len(drawn) > 1


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("limit", [None, 6])
def test_the_diagonal_is_the_biases_squares_of_the_same_examples_and_labels(
    estimator: Estimator, limit: int | None
) -> None:
    fields = measure(Labels(), mlp(), rows(11), asked(estimator, limit, squares=True, sketches=2), seed=3)
    assert fields["num_grads"] == (limit or 11)
    for name, gram in fields["grad_gram"].items():
        torch.testing.assert_close(gram.diagonal(), fields["sq_grad_sum"][f"{name}.bias"])


def test_inputs_are_of_the_same_examples_as_gradients() -> None:
    fields = measure(Labels(), net(nn.Linear(4, 3)), rows(11), asked(limit=1, sums=True), seed=5)
    x, delta = fields["gram"][""][-1, :-1], fields["grad_sum"]["bias"]
    torch.testing.assert_close(fields["grad_sum"]["weight"], torch.outer(delta, x))


@given(split=st.integers(1, 6), estimator=st.sampled_from(["empirical", "exact"]))
def test_sums_add_up_over_a_split_of_the_examples(split: int, estimator: Estimator) -> None:
    model, examples = mlp(), rows(7)
    whole, left, right = (
        grams(Labels(), model, part(examples, indices), asked(estimator), seed=0)
        for indices in (range(7), range(split), range(split, 7))
    )
    assert left.num_grads + right.num_grads == whole.num_grads
    for one, other, both in zip(left[:2], right[:2], whole[:2], strict=True):
        close({name: one[name] + other[name] for name in one}, both)


def test_many_chunks_of_examples_are_one_sum() -> None:
    model, examples = net(nn.Linear(4, 3)), rows(300)
    got = grams(Labels(), model, examples, asked("exact"), seed=0)
    x = torch.cat([torch.stack([examples[i][0] for i in range(300)]), torch.ones(300, 1)], 1).double()
    p = model(x[:, :-1].float()).detach().softmax(1).double()
    close(got.gram, {"": x.T @ x})
    close(got.grad_gram, {"": p.sum(0).diag() - p.T @ p})  # Σ Cov(onehot y), the score's second moment


class Watched(nn.Module):
    """Notes at each call whether anything of the call before is still held."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.hidden: list[weakref.ref[Tensor]] = []
        self.held: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.held.append(any(ref() is not None for ref in self.hidden))
        hidden = self.body(x)
        scores: Tensor = self.head(hidden.sin())  # whose derivative needs `hidden`
        self.hidden = [weakref.ref(hidden), weakref.ref(scores)]
        return scores


def test_no_more_than_one_chunk_is_held_or_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    differentiated, grad = set(), torch.autograd.grad

    def counting(outputs: Tensor, inputs: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
        differentiated.add(len(inputs))
        return grad(outputs, inputs, **options)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    model = Watched()
    grams(Labels(), model, rows(300), asked("exact"), seed=0)
    assert model.held == [False, False, False]
    assert differentiated == {3}  # the outputs of two layers, and a zero that every score hangs on


@pytest.mark.parametrize("name", ["sequences", "conv, stride, padding, dilation", "conv, 1-d, circular"])
def test_the_size_of_a_block_does_not_change_the_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, examples, _ = NETWORKS[name]
    large = grams(Labels(), make(), examples, asked("exact"), seed=0)
    monkeypatch.setattr(activations, "BLOCK", 1)
    both_close(grams(Labels(), make(), examples, asked("exact"), seed=0), (large.gram, large.grad_gram))


# --- which layers -----------------------------------------------------------------------------------------------


class Scaled(nn.Linear):
    """A linear layer in name, whose outputs are not W x + b."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.weight.sum()


class Tied(nn.Module):
    """Layers that share a weight with one of another bias, and with an embedding; one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.embedding, self.decode = nn.Embedding(4, 4), nn.Linear(4, 4)
        self.decode.weight = self.embedding.weight
        self.idle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.decode(self.second(self.first(x).tanh()).tanh()))
        return scores


LEFT_OUT: dict[str, tuple[Callable[[], nn.Module], Examples, list[str]]] = {
    "grouped": (images(nn.Conv2d(2, 4, 3, groups=2)), PIXELS, ["4"]),
    "by inheritance": (lambda: net(Scaled(4, 5), nn.Linear(5, 3)), rows(3), ["1"]),
    "reparametrised": (
        lambda: net(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Linear(5, 3)),
        rows(3),
        ["1"],
    ),
    "tied to what differs": (lambda: net(Tied()), rows(3), ["head"]),
    "attention": (lambda: net(Words(encoder())), tokens(3, 4), ["body.linear1", "body.linear2", "head"]),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_layers_that_no_single_matrix_describes_are_left_out(name: str) -> None:
    make, examples, layers = LEFT_OUT[name]
    got = grams(Labels(), make(), examples, asked(), seed=0)
    assert sorted(got.gram) == sorted(got.grad_gram) == layers


class PrivateHead(Labels):
    private: ClassVar[tuple[str, ...]] = ("2.*",)


def test_private_layers_are_not_measured() -> None:
    got = grams(PrivateHead(), mlp(), rows(3), asked(), seed=0)
    assert list(got.gram) == list(got.grad_gram) == ["0"]


def test_layers_that_do_not_train_are_not_measured_and_change_no_other() -> None:
    model, expected = mlp(), grams(Labels(), mlp(), rows(3), asked(), seed=0)
    model.get_parameter("0.weight").requires_grad_(False)
    model.get_parameter("2.bias").requires_grad_(False)
    got = grams(Labels(), model, rows(3), asked(), seed=0)
    both_close(got, ({"2": expected.gram["2"]}, {"2": expected.grad_gram["2"]}))


class Detached(nn.Module):
    """A layer whose outputs no gradient reaches, before one that it reaches."""

    def __init__(self, below: bool) -> None:
        super().__init__()
        self.body, self.head, self.below = nn.Linear(4, 4), nn.Linear(4, 3), below

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.body(x)
        with torch.set_grad_enabled(self.below):
            scores: Tensor = self.head(x)
        return scores


@pytest.mark.parametrize("below", [True, False])
def test_outputs_that_no_gradient_reaches_have_none(below: bool) -> None:
    got = grams(Labels(), net(Detached(below)), rows(3), asked(), seed=0)
    assert {name: bool(gram.any()) for name, gram in got.grad_gram.items()} == {"body": False, "head": below}
    assert all(gram.any() for gram in got.gram.values())


# --- precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 3e4])
def test_half_precision_neither_underflows_nor_overflows(dtype: torch.dtype, scale: float) -> None:
    inputs = (scale * torch.rand(5, 4, generator=torch.Generator().manual_seed(0))).to(dtype)
    model = mlp().to(dtype)
    got = grams(Labels(), model, pairs(inputs, torch.arange(5) % 3), asked("exact"), seed=0)
    wide = grams(Labels(), mlp().to(dtype).float(), pairs(inputs.float(), torch.arange(5) % 3), asked("exact"), seed=0)
    assert {matrix.dtype for fields in got[:2] for matrix in fields.values()} == {torch.float32}
    assert 0 < got.gram["0"].diagonal().min() < torch.inf
    both_close(got, (wide.gram, wide.grad_gram))
    assert next(model.parameters()).dtype == dtype


def test_products_below_the_range_of_float32_add_up_to_what_is_within() -> None:
    inputs = torch.full((128, 4), 2e-23)  # each square is below 4e-46, and rounds to 0 in float32
    got = grams(Labels(), net(nn.Linear(4, 3)), pairs(inputs, torch.zeros(128, dtype=torch.int64)), asked(), seed=0)
    torch.testing.assert_close(got.gram[""][0, 0].double(), 128 * inputs[0, 0].double().square(), rtol=0.1, atol=2e-45)


# --- nothing else -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "fields"), [(Request(gram=True), {"gram"}), (Request(grad_gram=True), {"grad_gram"})]
)
def test_only_what_is_asked_for_is_computed(request_: Request, fields: set[str]) -> None:
    got = grams(Labels(), mlp(), rows(3), request_, seed=0)
    whole = grams(Labels(), mlp(), rows(3), asked("exact"), seed=0)
    assert {field for field in ("gram", "grad_gram") if getattr(got, field)} == fields
    for field in fields:
        close(getattr(got, field), getattr(whole, field))
    assert got.estimator == (None if request_.gram else "exact")


def test_inputs_alone_need_no_gradients() -> None:
    seen_grad: list[bool] = []
    model = mlp()
    model.register_forward_hook(lambda module, args, output: seen_grad.append(output.requires_grad))
    grams(Labels(), model, rows(3), Request(gram=True), seed=0)
    assert seen_grad == [False]


def test_gradients_are_there_even_where_the_caller_has_turned_them_off() -> None:
    with torch.no_grad():
        got = grams(Labels(), mlp(), rows(3), asked(), seed=0)
    assert got.grad_gram["0"].any()


def test_modes_buffers_hooks_gradients_and_the_random_generator_are_as_they_were() -> None:
    make, examples, _ = NETWORKS["two convs, batch norm, dropout"]
    model = make()
    model.get_submodule("1").eval()
    modes, before = [module.training for module in model.modules()], torch.random.get_rng_state()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    grams(Labels(), model, examples, asked("sampled", limit=3), seed=0)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(param.grad is None for param in model.parameters())


# --- refusals ---------------------------------------------------------------------------------------------------


def test_a_model_without_such_layers_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"Labels's model calls no linear or convolutional layer .* choose a method"):
        grams(Labels(), net(nn.Embedding(10, 3), nn.Flatten()), tokens(3, 1), asked(), seed=0)


def test_no_examples_give_no_sums_over_no_gradients() -> None:
    assert grams(Labels(), mlp(), part(rows(1), range(0)), asked(), seed=0) == ({}, {}, 0, "empirical")


def test_gradients_that_need_labels_are_refused_where_there_are_none_but_inputs_are_not() -> None:
    model = net(nn.Linear(4, 1))
    for request in (Request(grad_gram=True), asked("sampled")):
        assert "Regression.num_classes is None" in (unsupported(request, Regression()) or "")
        with pytest.raises(ValueError, match=r"needs labels and Regression.num_classes is None"):
            grams(Regression(), model, rows(3), request, seed=0)
    assert unsupported(Request(gram=True), Regression()) is None
    assert unsupported(asked("empirical"), Regression()) is None


def test_a_regressions_own_targets_give_its_residuals() -> None:
    model, examples = net(nn.Linear(4, 1)), pairs(torch.randn(5, 4), torch.randn(5))
    got = grams(Regression(), model, examples, asked("empirical"), seed=0)
    residuals = torch.stack([examples[i][1] - model(examples[i][0])[0] for i in range(5)])
    torch.testing.assert_close(got.grad_gram[""], residuals.detach().square().sum().reshape(1, 1))


def test_measure_returns_the_fields_of_an_update() -> None:
    fields = measure(Labels(), mlp(), rows(5), Request(gram=True), seed=0)
    update = ClientUpdate(client_id=1, num_examples=5, **fields)
    assert (update.num_grads, update.estimator, update.grad_gram) == (5, None, {})
    assert update.gram["0"].shape == (5, 5)
