"""A network as a function of its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def once(module: nn.Module) -> dict[str, str]:
    """Of each name in the state dict the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(value), name) for name, value in module.state_dict(keep_vars=True).items()}


def computed(module: nn.Module, tensors: Mapping[str, Tensor], *inputs: Tensor) -> Any:
    """What the module returns with these parameters and buffers, by first names, in place of its own.

    torch.func.functional_call leaves the new tensors behind in a module that has two names: each is given by one.
    """
    first = {id(value): name for name, value in [*module.named_parameters(), *module.named_buffers()]}
    places = {
        f"{path}.{name}".removeprefix("."): tensors[first[id(value)]]
        for path, one in module.named_modules()
        for name, value in [*one._parameters.items(), *one._buffers.items()]
        if first.get(id(value)) in tensors
    }
    return functional_call(module, places, inputs, tie_weights=False)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within it, the module is in eval mode; after it, every module within is in the mode it was in."""
    modes = {one: one.training for one in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for one, mode in modes.items():
            one.training = mode
