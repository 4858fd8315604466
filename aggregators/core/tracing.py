"""The symmetry of a network, read off the operations that it performs."""

from __future__ import annotations

import logging
import operator
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from .functional import evaluating, once
from .operations import RULES, Axes, Call, Rule, Uniform, Value, constant, is_axes, sliced
from .parts import Part, concat, fix, fixed, product
from .symmetry import Concat, Layout, Product, Symmetry
from .verification import REMEDY, verify

__all__ = ["Untraceable", "trace", "verify"]


class Untraceable(ValueError):
    """A network whose symmetry cannot be read off; the message names the module, the operation and the remedy."""


def trace(module: nn.Module, *inputs: Tensor) -> Symmetry:
    """The groups of units of `module` that can be permuted, or scaled, without changing its outputs.

    `inputs` are an example batch of at least two. Reads the operations that torch.export records of a forward pass in
    eval mode, whatever modules they come from: axes that meet in an operation are permuted alike; inputs, outputs,
    what an operation treats by position and what nothing reads stay; what only training uses is not seen. Tensors are
    in the order in which they are read. Untraceable, in one line, for an operation that no rule covers.
    """
    return _Tracer(module, _exported(module, inputs)).symmetry()


def _exported(module: nn.Module, inputs: Sequence[Tensor]) -> ExportedProgram:
    with evaluating(module), _quiet():
        try:
            program = torch.export.export(module, tuple(inputs), strict=False)
        except Exception as error:  # whatever a user's forward raises
            said = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
            raise Untraceable(f"{_raised_in(module, error)}: torch.export: {said}; {REMEDY}") from error
    program.graph.eliminate_dead_code()
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it, what torch has to say besides its exceptions is not said."""
    disabled = logging.root.manager.disable
    logging.disable()
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(disabled)


def _raised_in(module: nn.Module, error: Exception) -> str:
    """The innermost module that was running."""
    names = {id(one): name for name, one in module.named_modules()}
    first = (next(iter(frame.f_locals.values()), None) for frame, _ in traceback.walk_tb(error.__traceback__))
    *_, inner = (module, *(one for one in first if id(one) in names))
    return _titled(names[id(inner)], type(inner).__name__)


def _titled(path: str, kind: str) -> str:
    return f"{path or 'the model'} ({kind})"


class _Tracer:
    """Axes of parameters, and what the operations of a program say of them."""

    def __init__(self, module: nn.Module, program: ExportedProgram) -> None:
        shapes = {name: value.shape for name, value in module.state_dict().items()}
        self.owner = once(module)
        self.axes = {name: [Part(length) for length in shapes[name]] for name in self.owner.values()}
        self.roles: dict[tuple[str, int], int] = {}
        self.source: dict[Node, str] = {}
        self.used: dict[str, None] = {}  # tensors in the order in which operations first read them
        self.values: dict[Node, Value] = {}
        self.passed: list[tuple[list[Part], list[Part]]] = []  # through an operation: what entered, what came out
        self._read(program)

    def _read(self, program: ExportedProgram) -> None:
        specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._placeholder(node, specs[node.name])
            elif node.op == "call_function":
                self.used |= {self.source[arg]: None for arg in node.all_input_nodes if arg in self.source}
                self.values[node] = self._called(node)
            elif node.op == "output":
                fix(*_flat([self.values[arg] for arg in node.all_input_nodes]))
            else:
                self.values[node] = _still(node.meta.get("val"))

    def _placeholder(self, node: Node, spec: Any) -> Value:
        name = self.owner.get(spec.target or "")
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and name is not None:
            self.source[node] = name
            return self.axes[name]
        return _still(node.meta.get("val"))

    def _called(self, node: Node) -> Value:
        if node.target is operator.getitem:
            value, item = self._argument([*node.args])
            return value[item]
        name = getattr(node.target, "__name__", str(node.target))
        rule = RULES.get(name.partition(".")[0].rstrip("_")) if isinstance(node.target, OpOverload) else None
        given = {key: self._argument(value) for key, value in _bound(node).items()}
        moving = [axes for axes in _tensors([*given.values()]) if any(axis.free() for axis in axes)]
        if node.meta.get("val") is None or not (moving or rule is constant):
            return _still(node.meta.get("val"))
        if rule is not None:
            return self._ruled(node, rule, given)
        if not all(isinstance(axes, Uniform) for axes in moving):
            raise Untraceable(f"{_where(node)}: no rule for the operation {name}; {REMEDY}")
        fix(*_flat(moving))
        return _still(node.meta["val"])

    def _ruled(self, node: Node, rule: Rule, given: Mapping[str, Value]) -> Value:
        call = self._call(node, given)
        if call.target._schema.is_mutable:  # what held one number may hold others now
            self.values = {n: [*v] if isinstance(v, Uniform) else v for n, v in self.values.items()}
        try:
            found = rule(call)
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:
            raise Untraceable(f"{_where(node)}: the operation {call.name}: {error}; {REMEDY}") from error
        if rule is not sliced:
            self.passed.append(([*_flat([*given.values()])], [*_flat(found)]))
        return found

    def _call(self, node: Node, given: Mapping[str, Value]) -> Call:
        value = node.meta["val"]
        nodes = dict(_nodes(_bound(node)))
        results = [user for user in node.users if user.target is operator.getitem and user.users]
        return Call(
            target=cast(OpOverload, node.target),
            args=given,
            shape=_shape(value),
            dtype=getattr(value, "dtype", None),
            source={key: self.source[arg] for key, arg in nodes.items() if arg in self.source},
            roles=self.roles,
            used=frozenset(cast(int, result.args[1]) for result in results),
        )

    def _argument(self, value: Any) -> Value:
        if isinstance(value, Node):
            return self.values[value]
        return [self._argument(one) for one in value] if isinstance(value, list | tuple) else value

    def symmetry(self) -> Symmetry:
        """The free parts of the parameters' axes as named groups."""
        self._fix_what_is_unread()
        for axis in _flat([*self.axes.values()]):
            _keep_one(axis)
        names = dict(_named(self.axes))
        order = {**self.used, **dict.fromkeys(self.axes)}
        axes = {name: tuple(_layout(axis, names) for axis in self.axes[name]) for name in order}
        moving = {name: layouts for name, layouts in axes.items() if any(layout is not None for layout in layouts)}
        hints = {names[id(leaf)]: leaf.size for leaf in _leaves(_flat([*self.axes.values()])) if id(leaf) in names}
        return Symmetry(moving, self._roles(), self._scaled(names), hints)

    def _fix_what_is_unread(self) -> None:
        """Keeps units that go through operations, perhaps cut off, and into none: longer inputs may read them."""
        read = {id(leaf) for given, found in self.passed for leaf in {*_leaves(given)} - {*_leaves(found)}}
        fix(*(leaf for leaf in _leaves(_flat([*self.axes.values()])) if id(leaf) not in read))

    def _roles(self) -> dict[tuple[str, int], int]:
        """What operations tell; the one long axis of a vector in more axes, such as a factor, belongs to its units."""
        long = {name: [axis for axis, part in enumerate(parts) if part.size > 1] for name, parts in self.axes.items()}
        vectors = {(name, axes[0]): 1 for name, axes in long.items() if len(axes) == 1}
        return {place: sign for place, sign in {**vectors, **self.roles}.items() if sign}

    def _scaled(self, names: Mapping[int, str]) -> list[str]:
        """The groups that nothing keeps from being scaled, of whose every axis there is one role."""
        found: dict[str, bool] = {}
        for name, parts in self.axes.items():
            for axis, part in enumerate(parts):
                for leaf in (leaf for leaf in part.leaves() if id(leaf) in names):
                    known = leaf.scalable and bool(self.roles.get((name, axis)))
                    found[names[id(leaf)]] = known and found.get(names[id(leaf)], True)
        return [group for group, every in found.items() if every]


def _bound(node: Node) -> dict[str, Any]:
    """The arguments by the names of the operation's schema, its defaults where they are not given."""
    if not isinstance(node.target, OpOverload):
        return {**{str(place): arg for place, arg in enumerate(node.args)}, **node.kwargs}
    arguments = node.target._schema.arguments
    given = zip((argument.name for argument in arguments), node.args, strict=False)
    return {**{argument.name: argument.default_value for argument in arguments}, **dict(given), **node.kwargs}


def _nodes(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Node]]:
    """The tensors among the arguments by name, those in a list by their number too, as `tensors.0`."""
    for key, value in arguments.items():
        listed = {f"{key}.{number}": one for number, one in enumerate(value)} if isinstance(value, list | tuple) else {}
        yield from ((name, one) for name, one in {key: value, **listed}.items() if isinstance(one, Node))


def _still(value: Any) -> Value:
    """What stays in place, of the shapes of these results."""
    if isinstance(value, Tensor):
        return [fixed(int(length)) for length in value.shape]
    return [_still(one) for one in value] if isinstance(value, list | tuple) else None


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else [_shape(one) for one in value]


def _tensors(value: Value) -> Iterator[Axes]:
    """The axes of every tensor in a nest of lists."""
    if is_axes(value):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _tensors(one)


def _flat(value: Value) -> Iterator[Part]:
    for axes in _tensors(value):
        yield from axes


def _leaves(parts: Iterable[Part]) -> Iterator[Part]:
    for part in parts:
        yield from part.leaves()


def _where(node: Node) -> str:
    """The module that performs the operation."""
    path, kind = [("", "?"), *(node.meta.get("nn_module_stack") or {}).values()][-1]
    return _titled(path, kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__)


def _keep_one(part: Part) -> None:
    """Of a product one factor can be permuted, the outermost that is free: a block of the others moves with it."""
    root = part.root()
    for inner in root.parts:
        _keep_one(inner)
    if root.kind == "product":
        fix(*[factor for factor in root.parts if factor.free()][1:])


def _named(tensors: Mapping[str, Axes]) -> Iterator[tuple[int, str]]:
    """Each free part's id and its name, that of the first module whose tensor has it."""
    seen: set[int] = set()
    taken: dict[str, int] = {}
    for name, parts in tensors.items():
        base = name.rpartition(".")[0] or name
        for leaf in _leaves(parts):
            if leaf.kind == "free" and leaf.size > 1 and id(leaf) not in seen:
                seen.add(id(leaf))
                number = taken[base] = taken.get(base, 0) + 1
                yield id(leaf), base if number == 1 else f"{base}#{number}"


def _layout(part: Part, names: Mapping[int, str]) -> Layout | None:
    """The axis as a layout; None where nothing of it moves."""
    return _described(part, names) if any(id(leaf) in names for leaf in part.leaves()) else None


def _described(part: Part, names: Mapping[int, str]) -> Layout:
    root = part.root()
    if root.kind in ("free", "fixed"):
        return names.get(id(root), root.size)
    if root.kind == "product":
        factors = _merged([_described(factor, names) for factor in product([root]).parts], operator.mul)
        return factors[0] if len(factors) == 1 else Product(factors)
    pieces = _merged([_described(piece, names) for piece in concat([root]).parts], operator.add)
    return pieces[0] if len(pieces) == 1 else Concat(pieces)


def _merged(parts: Sequence[Layout], both: Callable[[int, int], int]) -> tuple[Layout, ...]:
    """Neighbouring numbers taken together."""
    merged: list[Layout] = []
    for part in parts:
        if merged and isinstance(part, int) and isinstance(merged[-1], int):
            merged[-1] = both(merged[-1], part)
        else:
            merged.append(part)
    return tuple(merged)
