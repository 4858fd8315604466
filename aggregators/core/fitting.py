"""Modules that take the sizes of the tensors they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .functional import computed, evaluating
from .symmetry import Symmetry
from .update import Tensors

Sizes: TypeAlias = Mapping[str, Any]  # a module's attributes that follow from its tensors


def fit(module: nn.Module, params: Tensors) -> nn.Module:
    """The same module, its tensors of the shapes that `params` gives them, and its layers' own sizes with them.

    Tensors whose shape changes are left without values. Linear, Conv, BatchNorm, LayerNorm, GroupNorm, Embedding, RNN,
    LSTM and GRU follow; ValueError names any other module whose tensors would change.
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
    params = {name: places[0].tensor for name, places in _places(module).items()}
    every = {group: torch.arange(units) for group, units in symmetry.sizes(params).items()}
    larger = symmetry.put(params, every, {group: len(units) + 1 for group, units in every.items()})
    with evaluating(fit(module, larger)):
        try:
            computed(module, larger, *inputs)
        except Exception as error:  # whatever a stranger's module raises
            raise ValueError(
                f"the model does not work with other widths ({type(error).__name__}: {error}): where a view or reshape"
                " has sizes as numbers, let it follow the tensors, as flatten(1) does"
            ) from None


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


def _sizes(path: str, owner: nn.Module) -> Sizes:
    """What the module's attributes are by its tensors; ValueError where it is of a kind that does not follow."""
    for kind, sizes in SIZES.items():
        if isinstance(owner, kind):
            return sizes(owner)
    kinds = ", ".join(kind.__name__.strip("_") for kind in SIZES)
    raise ValueError(
        f"{path or 'the model'} is a {type(owner).__name__}, which cannot take tensors of other sizes: {kinds} can"
    )


def _conv(layer: Any) -> Sizes:
    out, read = layer.weight.shape[:2]
    if layer.groups == layer.in_channels > 1:  # depthwise: as many groups as there are channels
        groups = out * layer.groups // layer.out_channels
        return {"groups": groups, "in_channels": groups, "out_channels": out}
    return {"in_channels": read * layer.groups, "out_channels": out}


def _recurrent(layer: Any) -> Sizes:
    gates = {"LSTM": 4, "GRU": 3}.get(layer.mode, 1)
    return {"input_size": layer.weight_ih_l0.shape[1], "hidden_size": len(layer.weight_hh_l0) // gates}


def _named(*axes: str) -> Callable[[Any], Sizes]:
    """The axes of `weight` by the attributes that hold their lengths."""
    return lambda layer: dict(zip(axes, layer.weight.shape, strict=True))


def _normed(layer: Any) -> Sizes:
    return {"num_features": len(layer.weight if layer.weight is not None else layer.running_mean)}


SIZES: dict[type[nn.Module], Callable[[Any], Sizes]] = {
    nn.Linear: _named("out_features", "in_features"),
    _ConvTransposeNd: lambda layer: {
        "in_channels": layer.weight.shape[0],
        "out_channels": layer.weight.shape[1] * layer.groups,
    },
    _ConvNd: _conv,
    _NormBase: _normed,
    nn.LayerNorm: lambda layer: {"normalized_shape": tuple(layer.weight.shape)},
    nn.GroupNorm: _named("num_channels"),
    nn.Embedding: _named("num_embeddings", "embedding_dim"),
    nn.RNNBase: _recurrent,
}
