"""The symmetry of a network, read off the operations that it performs."""

from __future__ import annotations

import operator
import warnings
from copy import deepcopy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.func import functional_call
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from .operations import RULES, Axes, Call, Uniform, Value
from .parts import Part, fix, fixed
from .symmetry import Concat, Layout, Product, Symmetry

REMEDY = "give the task a `symmetry` of its own, or choose a method that needs none"


class Untraceable(ValueError):
    """A network whose symmetry cannot be read off; the message names the module, the operation and the remedy."""


def trace(module: nn.Module, *inputs: Tensor) -> Symmetry:
    """The groups of units of `module` that can be permuted, or scaled, without changing its outputs.

    `inputs` are an example batch of at least two. Reads the operations that torch.export records of a forward pass in
    eval mode, whatever modules they come from: axes that meet in an operation are permuted alike; inputs, outputs and
    what an operation treats by position stay. Untraceable, in one line, for an operation that no rule covers.
    """
    return _Tracer(module, _exported(module, inputs)).symmetry()


@torch.no_grad()
def verify(symmetry: Symmetry, module: nn.Module, *inputs: Tensor, seed: int = 0) -> None:
    """Raises ValueError, naming a group, unless permuting and scaling each group at random keeps the outputs.

    In float64 at parameters and buffers moved at random, since initial ones and zeros hide what permutes them.
    """
    generator = torch.Generator().manual_seed(seed)
    net = deepcopy(module).eval().cpu().double()
    given = [value.cpu().double() if value.is_floating_point() else value.cpu() for value in inputs]
    own = dict(net.state_dict())
    params = {name: _moved(value, generator) for name, value in own.items()}
    expected = _outputs(net, params, given)
    for group, size in symmetry.sizes(params).items():
        permuted = symmetry.permute(params, {group: torch.randperm(size, generator=generator)})
        if group in symmetry.scaled:
            factors = 0.5 + torch.rand(size, generator=generator, dtype=torch.float64)
            permuted = symmetry.scale(permuted, {group: factors})
        for there, here in zip(_outputs(net, permuted, given), expected, strict=True):
            if not torch.allclose(there, here, rtol=1e-7, atol=1e-7 * float(here.abs().max().clamp(min=1))):
                raise ValueError(f"symmetry: permuting the group {group!r} changes the outputs: {REMEDY}")


def _moved(value: Tensor, generator: torch.Generator) -> Tensor:
    """Away from where it is, upwards, so that variances stay positive."""
    if not value.is_floating_point():
        return value
    spread = value.std() if value.numel() > 1 else value.new_ones(())
    return value + (0.1 + spread) * torch.rand(value.shape, generator=generator, dtype=value.dtype)


def _outputs(net: nn.Module, params: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    found = tree_leaves(functional_call(net, dict(params), tuple(inputs), tie_weights=True))
    return [value for value in found if isinstance(value, Tensor)]


def _exported(module: nn.Module, inputs: Sequence[Tensor]) -> ExportedProgram:
    training = module.training
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(module.eval(), tuple(inputs), strict=False)
        except Exception as error:  # whatever a user's forward raises
            said = str(error).strip().partition("\n")[0]
            raise Untraceable(f"{type(module).__name__}: torch.export: {said}; {REMEDY}") from error
        finally:
            module.train(training)


class _Tracer:
    """Axes of parameters, and what the operations of a program say of them."""

    def __init__(self, module: nn.Module, program: ExportedProgram) -> None:
        self.program = program
        self.owner = {}  # name -> the first name of the same tensor
        first: dict[int, str] = {}
        tensors = module.state_dict(keep_vars=True)
        for name, tensor in tensors.items():
            self.owner[name] = first.setdefault(id(tensor), name)
        self.axes = {name: [Part(n) for n in tensors[name].shape] for name in first.values()}
        self.roles: dict[tuple[str, int], int] = {}
        self.source: dict[Node, str] = {}
        self.values: dict[Node, Value] = {}
        kinds = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._placeholder(node, kinds[node.name])
            elif node.op == "call_function":
                self.values[node] = self._called(node)
            else:
                self._output(node)

    def _placeholder(self, node: Node, spec: Any) -> Value:
        name = self.owner.get(spec.target or "")
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and name is not None:
            self.source[node] = name
            return self.axes[name]
        return _still(node.meta.get("val"))

    def _output(self, node: Node) -> None:
        for arg in node.all_input_nodes:
            for axis in _flat(self.values[arg]):
                fix(axis)

    def _called(self, node: Node) -> Value:
        if node.target is operator.getitem:
            value, item = node.args
            return self.values[value][item] if isinstance(value, Node) else None
        name = getattr(node.target, "__name__", str(node.target))
        rule = RULES.get(name.partition(".")[0].rstrip("_"))
        arguments = self._arguments(node)
        if not any(axis.free() for value in arguments.values() for axis in _flat(value)) and rule is not RULES["zeros"]:
            return _still(node.meta.get("val"))
        if rule is None:
            raise Untraceable(f"{_where(node)}: no rule for the operation {name}; {REMEDY}")
        source = {key: self.source.get(arg) for key, arg in self._bound(node).items() if isinstance(arg, Node)}
        used = frozenset(int(user.args[1]) for user in node.users if user.target is operator.getitem and user.users)
        shape = _shape(node.meta.get("val"))
        try:
            found = rule(Call({**arguments, "(name)": name}, shape, source, self.roles, used))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise Untraceable(f"{_where(node)}: the operation {name}: {error}; {REMEDY}") from error
        if isinstance(found, list) and not isinstance(found, Uniform):
            return [one.root() if isinstance(one, Part) else one for one in found]
        return found

    def _bound(self, node: Node) -> dict[str, Any]:
        """The arguments by name, as the operation's schema has them."""
        schema = getattr(node.target, "_schema", None)
        names = [argument.name for argument in schema.arguments] if schema else [str(i) for i in range(len(node.args))]
        return {**dict(zip(names, node.args, strict=False)), **node.kwargs}

    def _arguments(self, node: Node) -> dict[str, Value]:
        return {name: self._argument(value) for name, value in self._bound(node).items()}

    def _argument(self, value: Any) -> Value:
        if isinstance(value, Node):
            return self.values[value]
        return [self._argument(one) for one in value] if isinstance(value, list | tuple) else value

    def symmetry(self) -> Symmetry:
        """The free parts of the parameters' axes as named groups."""
        reached = {name: self.axes[name] for name in self.axes if name in {*self.source.values()}}
        for axis in (axis for axes in reached.values() for axis in axes):
            _keep_one(axis)
        names = dict(_named(reached))
        axes = {name: tuple(_layout(axis, names) for axis in parts) for name, parts in reached.items()}
        moving = {name: parts for name, parts in axes.items() if any(part is not None for part in parts)}
        hints = {
            names[id(leaf)]: leaf.size for parts in reached.values() for leaf in _leaves(parts) if id(leaf) in names
        }
        return Symmetry(moving, self._scaled(reached, names), hints)

    def _scaled(self, reached: Mapping[str, Axes], names: Mapping[int, str]) -> dict[str, dict[tuple[str, int], int]]:
        found: dict[str, dict[tuple[str, int], int]] = {}
        for name, parts in reached.items():
            for axis, part in enumerate(parts):
                for leaf in part.leaves():
                    if leaf.scalable and id(leaf) in names:
                        found.setdefault(names[id(leaf)], {})[name, axis] = self.roles.get((name, axis), 0)
        return {group: roles for group, roles in found.items() if all(roles.values())}


def _still(value: Any) -> Value:
    """What stays in place, of the shapes of these results."""
    if isinstance(value, Tensor):
        return [fixed(int(length)) for length in value.shape]
    return [_still(one) for one in value] if isinstance(value, list | tuple) else None


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.Size(int(length) for length in value.shape)
    return [_shape(one) for one in value] if isinstance(value, list | tuple) else None


def _flat(value: Value) -> Iterator[Part]:
    if isinstance(value, Part):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _flat(one)


def _where(node: Node) -> str:
    """The module that performs the operation."""
    stack = [*(node.meta.get("nn_module_stack") or {}).values()]
    path, kind = stack[-1] if stack else ("", "")
    kind = kind if isinstance(kind, str) else kind.__name__
    return f"{path or 'the model'} ({kind.rpartition('.')[2]})" if kind else path or "the model"


def _leaves(parts: Axes) -> Iterator[Part]:
    for part in parts:
        yield from part.leaves()


def _keep_one(part: Part) -> None:
    """Of a product one factor can be permuted, the outermost that is free: a block of the others moves with it."""
    root = part.root()
    for inner in root.parts:
        _keep_one(inner)
    if root.kind == "product":
        free = [leaf for leaf in root.leaves() if leaf.kind == "free"]
        for leaf in free[1:]:
            fix(leaf)


def _named(reached: Mapping[str, Axes]) -> Iterator[tuple[int, str]]:
    """Each free part's id and its name, that of the first module whose tensor has it."""
    seen: set[int] = set()
    taken: dict[str, int] = {}
    for name, parts in reached.items():
        base = name.rpartition(".")[0] or name
        for leaf in _leaves(parts):
            if leaf.kind == "free" and leaf.size > 1 and id(leaf) not in seen:
                seen.add(id(leaf))
                number = taken[base] = taken.get(base, 0) + 1
                yield id(leaf), base if number == 1 else f"{base}.{number}"


def _layout(part: Part, names: Mapping[int, str]) -> Layout | None:
    """The axis as a layout; None where nothing of it moves."""
    return _described(part.root(), names) if any(id(leaf) in names for leaf in part.leaves()) else None


def _described(part: Part, names: Mapping[int, str]) -> Layout:
    if part.kind in ("free", "fixed"):
        return names.get(id(part), part.size)
    parts = tuple(_described(one.root(), names) for one in part.parts)
    return Product(_merged(parts)) if part.kind == "product" else Concat(parts)


def _merged(parts: Sequence[Layout]) -> tuple[Layout, ...]:
    """Factors with neighbouring numbers multiplied."""
    merged: list[Layout] = []
    for part in parts:
        if merged and isinstance(part, int) and isinstance(merged[-1], int):
            merged[-1] *= part
        else:
            merged.append(part)
    return tuple(merged)
