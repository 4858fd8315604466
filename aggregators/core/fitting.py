"""Modules that take the sizes of the tensors they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from .functional import computed, evaluating
from .symmetry import Symmetry
from .update import Tensors

Sizes: TypeAlias = Mapping[str, Any]  # a module's attributes that follow from its tensors


def fit(module: nn.Module, params: Tensors) -> nn.Module:
    """The same module, its tensors of the shapes that `params` gives them, and its layers' own sizes with them.

    Tensors whose shape changes are left without values. The kinds in `SIZES` follow; ValueError names any other module
    whose tensors would change.
    """
    changed: dict[str, nn.Module] = {}
    for name, places in _places(module).items():
        if name in params and params[name].shape != places[0].tensor.shape:
            _resize(places, params[name])
            changed |= {place.path: place.owner for place in places}
    for path, owner in changed.items():
        for attribute, value in _sizes(path, owner).items():
            setattr(owner, attribute, value)
    return module


@torch.no_grad()
def refuse_unless_resizable(symmetry: Symmetry, module: nn.Module, *inputs: Tensor) -> None:
    """Raises ValueError, in one line, unless the module works with another unit in every group; it keeps that."""
    if untold := _untold(module, nn.GroupNorm):
        raise ValueError(f"{untold}: a GroupNorm without weights keeps its number of groups: give it some, affine=True")
    params = {name: places[0].tensor for name, places in _places(module).items()}
    every = {group: torch.arange(units) for group, units in symmetry.sizes(params).items()}
    larger = symmetry.put(params, every, {group: len(units) + 1 for group, units in every.items()})
    with evaluating(fit(module, larger)):
        try:
            computed(module, larger, *inputs)
        except Exception as error:  # whatever a stranger's module raises
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"the model does not work with other widths ({said}): {_remedy(module)}") from None


class Place(NamedTuple):
    """Where a tensor is kept: a module by its path, and the name there."""

    path: str
    owner: nn.Module
    name: str

    @property
    def tensor(self) -> Tensor:
        """What is kept there."""
        found: Tensor = getattr(self.owner, self.name)
        return found


def _places(module: nn.Module) -> dict[str, list[Place]]:
    """Of each tensor, by its first name, the places that share it."""
    first: dict[int, str] = {}
    found: dict[str, list[Place]] = {}
    for path, owner in module.named_modules():
        for place in _kept(path, owner):
            name = first.setdefault(id(place.tensor), f"{path}.{place.name}".removeprefix("."))
            found.setdefault(name, []).append(place)
    return found


def _kept(path: str, owner: nn.Module) -> Iterator[Place]:
    for name, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
        if tensor is not None:
            yield Place(path, owner, name)


def _resize(places: list[Place], value: Tensor) -> None:
    """Puts one new tensor of this shape in all places; dtype, device and whether it trains stay."""
    old = places[0].tensor
    empty = old.new_empty(value.shape)
    new = nn.Parameter(empty, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else empty
    for place in places:
        setattr(place.owner, place.name, new)


def _remedy(module: nn.Module) -> str:
    if untold := _untold(module, nn.LayerNorm, nn.RMSNorm):
        return f"give {untold} weights, whose sizes it follows: elementwise_affine=True"
    return "where a view or reshape has sizes as numbers, let it follow the tensors, as flatten(1) does"


def _untold(module: nn.Module, *kinds: type[nn.Module]) -> str:
    """The norms of these kinds, by name, that have sizes and no tensor that tells them."""
    norms = [(path, one) for path, one in module.named_modules() if isinstance(one, kinds) and one.weight is None]
    return ", ".join(path or "the model" for path, norm in norms if getattr(norm, "num_groups", 2) > 1)


def _sizes(path: str, owner: nn.Module) -> Sizes:
    """What the module's attributes are by its tensors; ValueError where it is of a kind that does not follow."""
    for kinds, sizes in SIZES.items():
        if isinstance(owner, kinds):
            return sizes(owner)
    names = ", ".join(kind.__name__ for kinds in SIZES for kind in kinds)
    raise ValueError(
        f"{path or 'the model'} is a {type(owner).__name__}, which cannot take tensors of other sizes: {names} can"
    )


def _conv(layer: Any) -> Sizes:
    out, read = layer.weight.shape[:2]
    block = _block(layer, layer.groups, layer.in_channels)
    groups = out * layer.groups // layer.out_channels if block == 1 else layer.groups  # 1: depthwise
    return {"_channels_per_group": block, "groups": groups, "in_channels": read * groups, "out_channels": out}


def _group_norm(norm: Any) -> Sizes:
    channels, block = len(norm.weight), _block(norm, norm.num_groups, norm.num_channels)
    return {"_channels_per_group": block, "num_channels": channels, "num_groups": channels // block if block else 1}


def _block(layer: Any, groups: int, channels: int) -> int:
    """How many channels a group has, 0 if all are one: kept in the layer, for when only one group is left."""
    block: int = getattr(layer, "_channels_per_group", channels // groups if groups > 1 else 0)
    return block


def _recurrent(layer: Any) -> Sizes:
    width = layer.weight_hh_l0.shape[1]
    sizes = {"hidden_size": layer.weight_hr_l0.shape[1], "proj_size": width} if layer.proj_size else {}
    return {"input_size": layer.weight_ih_l0.shape[1], "hidden_size": width, **sizes}


def _named(*axes: str) -> Callable[[Any], Sizes]:
    """The axes of `weight` by the attributes that hold their lengths."""
    return lambda layer: dict(zip(axes, layer.weight.shape, strict=True))


def _normed(layer: Any) -> Sizes:
    return {"num_features": len(layer.weight if layer.weight is not None else layer.running_mean)}


SIZES: dict[tuple[type[nn.Module], ...], Callable[[Any], Sizes]] = {
    (nn.Linear,): _named("out_features", "in_features"),
    (nn.Conv1d, nn.Conv2d, nn.Conv3d): _conv,
    (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d): lambda layer: {
        "in_channels": layer.weight.shape[0],
        "out_channels": layer.weight.shape[1] * layer.groups,
    },
    (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm): _normed,
    (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d): _normed,
    (nn.LayerNorm, nn.RMSNorm): lambda norm: {"normalized_shape": tuple(norm.weight.shape)},
    (nn.GroupNorm,): _group_norm,
    (nn.PReLU,): _named("num_parameters"),
    (nn.Embedding, nn.EmbeddingBag): _named("num_embeddings", "embedding_dim"),
    (nn.RNN, nn.LSTM, nn.GRU): _recurrent,
    (nn.RNNCell, nn.LSTMCell, nn.GRUCell): lambda cell: {
        "input_size": cell.weight_ih.shape[1],
        "hidden_size": cell.weight_hh.shape[1],
    },
}
