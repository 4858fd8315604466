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


@pytest.mark.parametrize(
    ("layer", "wider"),
    [
        (nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(6, 12, 3, groups=6)),
        (nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(6, 12, 3, groups=2)),
        (nn.ConvTranspose2d(4, 6, 2, groups=2), nn.ConvTranspose2d(8, 10, 2, groups=2)),
        (nn.Conv1d(4, 6, 3), nn.Conv1d(5, 2, 3)),
        (nn.GroupNorm(2, 8), nn.GroupNorm(2, 12)),
        (nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(12, affine=False)),
        (nn.GRU(4, 6, num_layers=2, bidirectional=True), nn.GRU(3, 5, num_layers=2, bidirectional=True)),
    ],
    ids=str,
)
def test_a_layer_takes_other_sizes(layer: nn.Module, wider: nn.Module) -> None:
    load(fit(layer, tensors(wider)), tensors(wider))
    assert repr(layer) == repr(wider)
    axes = {"Conv2d": (2, -1, 9, 9), "ConvTranspose2d": (2, -1, 9, 9), "BatchNorm2d": (2, -1, 3, 3)}
    size = getattr(wider, "in_channels", getattr(wider, "num_features", getattr(wider, "num_channels", 3)))
    shape = [size if length < 0 else length for length in axes.get(type(wider).__name__, (2, -1, 9))]
    inputs = torch.rand(2, 7, 3) if isinstance(wider, nn.GRU) else torch.rand(shape)
    outputs, expected = layer.eval()(inputs), wider.eval()(inputs)
    assert same(outputs[0], expected[0])


def test_what_cannot_take_other_sizes_is_named() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.PReLU(4))
    with pytest.raises(ValueError, match=r"^1 is a PReLU, which cannot take tensors of other sizes: Linear, .* can$"):
        fit(module, {"1.weight": torch.zeros(5)})


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
