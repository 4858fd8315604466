"""Modules in other sizes: what follows the tensors, and what is refused."""

import copy
from collections.abc import Callable

import pytest
import torch
from networks import NETWORKS, Bert, Recurrent, lenet, mlp, resnet20, resnet50, vgg9
from torch import Tensor, nn

from aggregators.core.fitting import fit, refuse_unless_resizable
from aggregators.core.tracing import trace
from client.task import load, tensors

WIDER: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: mlp(13),
    "LeNet": lambda: lenet(3),
    "VGG-9": lambda: vgg9(3),
    "ResNet-20": lambda: resnet20(7),
    "ResNet-50": lambda: resnet50(3),
    "BERT": lambda: Bert(36),
    "LSTM": lambda: Recurrent(width=9),
}


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b)


@pytest.mark.parametrize("name", WIDER)
def test_a_module_that_took_a_wider_ones_tensors_computes_and_shows_what_that_does(name: str) -> None:
    wider, module, example = WIDER[name]().eval(), NETWORKS[name].network.eval(), NETWORKS[name].example
    load(fit(module, tensors(wider)), tensors(wider))
    assert same(module(example), wider(example))
    assert repr(module) == repr(wider)


def test_values_of_tensors_whose_shape_stays_are_kept() -> None:
    module = NETWORKS["MLP"].network
    before = {name: value.clone() for name, value in tensors(module).items()}
    fit(module, {name: value for name, value in tensors(mlp(13)).items() if name.startswith("1.")})
    assert module[1].weight.shape == (13, 12)  # type: ignore[index,union-attr]
    assert all(same(value, before[name]) for name, value in tensors(module).items() if not name.startswith("1."))


def test_a_tied_weight_stays_tied_and_a_frozen_one_frozen() -> None:
    module = Bert(24, tied=True)
    module.pooler.weight.requires_grad_(False)
    fit(module, tensors(Bert(36, tied=True)))
    assert module.head.weight is module.words.weight
    assert module.head.weight.shape == (30, 36)
    assert [name for name, value in module.named_parameters() if not value.requires_grad] == ["pooler.weight"]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(
    ("layer", "wider", "inputs"),
    [
        (nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(6, 12, 3, groups=6), torch.rand(2, 6, 9, 9)),
        (nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(6, 12, 3, groups=2), torch.rand(2, 6, 9, 9)),
        (nn.ConvTranspose2d(4, 6, 2, groups=2), nn.ConvTranspose2d(8, 10, 2, groups=2), torch.rand(2, 8, 9, 9)),
        (nn.Conv1d(4, 6, 3), nn.Conv1d(5, 2, 3), torch.rand(2, 5, 9)),
        (nn.GroupNorm(2, 8), nn.GroupNorm(3, 12), torch.rand(2, 12, 9)),
        (nn.GroupNorm(1, 8), nn.GroupNorm(1, 12), torch.rand(2, 12, 9)),
        (nn.RMSNorm(9), nn.RMSNorm(7), torch.rand(2, 7)),
        (nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(12, affine=False), torch.rand(2, 12, 3, 3)),
        (nn.PReLU(8), nn.PReLU(12), torch.rand(2, 12, 9) - 0.5),
        (nn.EmbeddingBag(9, 4), nn.EmbeddingBag(9, 6), torch.arange(6).reshape(2, 3)),
        (nn.GRU(4, 6, 2, bidirectional=True), nn.GRU(3, 5, 2, bidirectional=True), torch.rand(2, 7, 3)),
        (nn.LSTM(3, 6, proj_size=3), nn.LSTM(3, 8, proj_size=2), torch.rand(2, 7, 3)),
        (nn.LSTMCell(4, 6), nn.LSTMCell(3, 8), torch.rand(2, 3)),
        (nn.GRUCell(4, 6), nn.GRUCell(3, 8), torch.rand(2, 3)),
        (nn.RNNCell(4, 6), nn.RNNCell(3, 8), torch.rand(2, 3)),
    ],
    ids=lambda value: str(tuple(value.shape)) if isinstance(value, Tensor) else str(value),
)
def test_a_layer_takes_other_sizes(layer: nn.Module, wider: nn.Module, inputs: Tensor) -> None:
    load(fit(layer, tensors(wider)), tensors(wider))
    assert repr(layer) == repr(wider)
    outputs, expected = layer.eval()(inputs), wider.eval()(inputs)
    assert same(outputs[0], expected[0])


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda width: nn.Conv2d(width, 2 * width, 3, groups=width), torch.rand(2, 4, 5, 5)),
        (lambda width: nn.GroupNorm(width, 2 * width), torch.rand(2, 8, 5)),
    ],
    ids=["depthwise", "group norm"],
)
def test_a_layer_that_went_through_one_group_comes_back(make: Callable[[int], nn.Module], inputs: Tensor) -> None:
    layer, wide = make(4), make(4)
    fit(layer, tensors(make(1)))
    assert repr(layer) == repr(make(1))
    load(fit(copy.deepcopy(layer), tensors(wide)), tensors(wide))
    load(fit(layer, tensors(wide)), tensors(wide))
    assert same(layer(inputs), wide(inputs))


class Blocks(nn.Module):
    """Convolutions normalised in blocks of 4 channels."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4 * groups, 3), nn.GroupNorm(groups, 4 * groups)
        self.last = nn.Linear(4 * groups, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.norm(self.first(x)).relu().mean((2, 3)))
        return y


def test_networks_of_group_norms_side_by_side_compute_the_sum_of_both() -> None:
    one, other, example = Blocks(2), Blocks(3), torch.rand(2, 1, 5, 5)
    symmetry = trace(Blocks(2), example)
    (group,) = symmetry.groups
    places = torch.arange(2), torch.arange(2, 5)
    apart = [symmetry.put(tensors(net), {group: at}, {group: 5}) for net, at in zip((one, other), places, strict=True)]
    both = {name: value + apart[1][name] for name, value in apart[0].items()}
    module = fit(Blocks(2), both)
    load(module, both)
    torch.testing.assert_close(module(example), one(example) + other(example))


def test_what_cannot_take_other_sizes_is_named_beside_the_layers_that_can() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 2))
    with pytest.raises(ValueError, match=r"^1 is a Bilinear, which cannot take .*: Linear, Conv1d, .* GRUCell can$"):
        fit(module, {"1.bias": torch.zeros(5)})


class Viewed(nn.Module):
    """Sizes as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu().view(-1, 16))


@pytest.mark.parametrize("name", ["MLP", "LeNet", "ResNet-20", "LSTM", "DenseNet", "1-d"])
def test_networks_whose_sizes_follow_their_tensors_are_accepted(name: str) -> None:
    network, example = NETWORKS[name].network, NETWORKS[name].example
    symmetry = trace(network, example)
    before = symmetry.sizes(tensors(network))
    refuse_unless_resizable(symmetry, network, example)
    assert symmetry.sizes(tensors(network)) == {group: units + 1 for group, units in before.items()}


def test_a_view_with_a_size_as_a_number_is_refused_with_the_remedy() -> None:
    module, example = Viewed(), torch.rand(2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"does not work with other widths .*flatten\(1\)"):
        refuse_unless_resizable(trace(copy.deepcopy(module), example), module, example)


@pytest.mark.parametrize(
    ("norm", "remedy"),
    [
        (nn.LayerNorm(16, elementwise_affine=False), "give 1 weights, .* elementwise_affine=True"),
        (nn.RMSNorm(16, elementwise_affine=False), "give 1 weights, .* elementwise_affine=True"),
        (nn.GroupNorm(4, 16, affine=False), "^1: a GroupNorm without weights .* affine=True"),
    ],
    ids=str,
)
def test_a_norm_whose_sizes_no_tensor_tells_is_refused_with_the_remedy(norm: nn.Module, remedy: str) -> None:
    module, example = nn.Sequential(nn.Linear(4, 16), norm, nn.ReLU(), nn.Linear(16, 3)), torch.rand(2, 4)
    with pytest.raises(ValueError, match=remedy):
        refuse_unless_resizable(trace(copy.deepcopy(module), example), module, example)


@pytest.mark.parametrize("norm", [nn.LayerNorm(4, elementwise_affine=False), nn.GroupNorm(1, 6, affine=False)], ids=str)
def test_a_norm_without_weights_whose_sizes_stay_or_do_not_matter_is_accepted(norm: nn.Module) -> None:
    linear = nn.Linear(4, 6)
    layers = (norm, linear) if isinstance(norm, nn.LayerNorm) else (linear, norm)
    module, example = nn.Sequential(*layers, nn.ReLU(), nn.Linear(6, 3)), torch.rand(2, 4)
    refuse_unless_resizable(trace(copy.deepcopy(module), example), module, example)
    assert linear.out_features == 7
