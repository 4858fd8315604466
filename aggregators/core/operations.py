"""What each operation of a network says of the axes that meet in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from math import prod
from typing import Any, TypeAlias, cast

from torch import Size

from .parts import Part, concat, cut, fix, fixed, product, regroup, unify, unscale

Axes: TypeAlias = list[Part]
Value: TypeAlias = Any  # Axes of a tensor, a list of such, or what is no tensor


@dataclass(frozen=True, eq=False)
class Call:
    """An operation of the graph: the axes, or values, of its arguments by name, and the shape of what it returns.

    `source` tells which parameter an argument is, if it is one, and `used` which of several results anything reads.
    """

    args: Mapping[str, Value]
    shape: Any
    source: Mapping[str, str | None]
    roles: dict[tuple[str, int], int]
    used: frozenset[int] = frozenset()

    def __getitem__(self, name: str) -> Value:
        return self.args.get(name)

    def role(self, argument: str, axis: int, sign: int) -> None:
        """Notes that this axis of a parameter brings units forth (1) or reads them (-1); neither if it did the other."""
        name = self.source.get(argument)
        if name is None:
            unscale(self.args[argument][axis])
        elif self.roles.setdefault((name, axis), sign) != sign:
            self.roles[name, axis] = 0


class Uniform(list[Part]):
    """The axes of a tensor that holds one number."""


Rule: TypeAlias = Callable[[Call], Value]
RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return add


# Elementwise


@_rule("relu", "leaky_relu", "dropout", "feature_dropout", "alpha_dropout", "clone", "contiguous", "detach", "alias")
@_rule("to", "_to_copy", "type_as", "neg", "abs", "lift_fresh_copy", "rrelu")
def same(call: Call) -> Axes:
    """Each entry for itself, in proportion to it where it is scaled by a positive number."""
    return cast(Axes, next(iter(call.args.values())))


@_rule("gelu", "silu", "sigmoid", "tanh", "elu", "selu", "celu", "softplus", "hardtanh", "hardswish", "hardsigmoid")
@_rule("relu6", "mish", "softsign", "logsigmoid", "log_sigmoid", "exp", "log", "sqrt", "rsqrt", "pow", "erf", "cos")
@_rule("sin", "reciprocal", "clamp", "clamp_min", "clamp_max", "square", "sign", "bitwise_not", "logical_not", "log1p")
@_rule("expm1", "tanhshrink", "hardshrink", "softshrink", "threshold", "floor", "round", "isnan", "isinf", "nan_to_num")
def pointwise(call: Call) -> Axes:
    """Each entry for itself, but not in proportion to it."""
    axes = cast(Axes, next(iter(call.args.values())))
    _unscale(axes)
    return axes


@_rule("add", "sub", "rsub")
def added(call: Call) -> Axes:
    """Sums, which broadcast: what is added must be scaled alike."""
    first, second = call["self"], call["other"]
    if not (_is_axes(first) and _is_axes(second)):
        _unscale(axes := first if _is_axes(first) else second)
        return cast(Axes, axes)
    for name, axes in (("self", first), ("other", second)):
        for axis in range(len(axes)):
            if call.source.get(name):
                call.role(name, axis, 1)
    return _broadcast(call.shape, [first, second])


@_rule("mul", "div")
def multiplied(call: Call) -> Axes:
    """Products, which broadcast; a number other than a tensor scales all alike."""
    first, second = call["self"], call["other"]
    if not (_is_axes(first) and _is_axes(second)):
        return cast(Axes, first if _is_axes(first) else second)
    return _entangled(call, [first, second])


@_rule("eq", "ne", "ge", "gt", "le", "lt", "maximum", "minimum", "where", "masked_fill", "bitwise_and", "bitwise_or")
@_rule("logical_and", "logical_or", "fmod", "remainder", "floor_divide", "atan2", "lerp", "addcmul", "addcdiv", "prelu")
def entangled(call: Call) -> Axes:
    """Several tensors entry by entry, with broadcasting."""
    return _entangled(call, [value for value in call.args.values() if _is_axes(value)])


@_rule("zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones")
@_rule("new_full", "new_empty", "scalar_tensor")
def constant(call: Call) -> Axes:
    """One number everywhere: it does not mind being permuted."""
    return Uniform(Part(length, scalable=False) for length in call.shape)


@_rule("softmax", "_softmax", "log_softmax", "_log_softmax")
def softmax(call: Call) -> Axes:
    """Normalised along an axis, which may be permuted."""
    return pointwise(call)


# Shapes


@_rule("view", "reshape", "flatten", "unflatten", "_unsafe_view", "squeeze", "unsqueeze", "view_as", "reshape_as")
def reshaped(call: Call) -> Axes:
    """The same entries in the same order in other axes."""
    return regroup(call["self"], call.shape)


@_rule("transpose", "swapaxes")
def transposed(call: Call) -> Axes:
    """Two axes exchanged."""
    axes = [*call["self"]]
    a, b = call["dim0"], call["dim1"]
    axes[a], axes[b] = axes[b], axes[a]
    return axes


@_rule("t", "numpy_T", "mT", "adjoint")
def transposed_last(call: Call) -> Axes:
    """The last two axes exchanged."""
    axes = [*call["self"]]
    return axes[:-2] + axes[-2:][::-1]


@_rule("permute")
def permuted(call: Call) -> Axes:
    """Axes in another order."""
    return [call["self"][axis] for axis in call["dims"]]


@_rule("expand", "expand_as", "broadcast_to")
def expanded(call: Call) -> Axes:
    """Axes of 1 repeated, which brings forth units that are all the same."""
    return _broadcast(call.shape, [call["self"]])


@_rule("cat", "concat", "concatenate")
def concatenated(call: Call) -> Axes:
    """Tensors one after the other along an axis."""
    tensors = [axes for axes in call["tensors"] if len(axes) == len(call.shape)]
    dim = (call["dim"] or 0) % len(call.shape)
    joined = concat([axes[dim] for axes in tensors])
    others = _broadcast(call.shape, [[*axes[:dim], fixed(1), *axes[dim + 1 :]] for axes in tensors], skip=dim)
    return [*others[:dim], joined, *others[dim + 1 :]]


@_rule("stack")
def stacked(call: Call) -> Axes:
    """Tensors along an axis of their own, which stays."""
    dim = (call["dim"] or 0) % len(call.shape)
    inner = Size([*call.shape[:dim], *call.shape[dim + 1 :]])
    axes = _broadcast(inner, call["tensors"])
    return [*axes[:dim], fixed(call.shape[dim]), *axes[dim:]]


@_rule("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split")
def pieces(call: Call) -> list[Axes]:
    """Consecutive pieces of an axis."""
    axes = call["self"]
    dim = (call["dim"] or 0) % len(axes)
    parts = cut(axes[dim], [shape[dim] for shape in call.shape])
    return [[*axes[:dim], part, *axes[dim + 1 :]] for part in parts]


@_rule("unbind")
def unbound(call: Call) -> list[Axes]:
    """The slices of an axis, which stays."""
    axes = call["self"]
    dim = (call["dim"] or 0) % len(axes)
    fix(axes[dim])
    return [[*axes[:dim], *axes[dim + 1 :]] for _ in call.shape]


@_rule("select")
def selected(call: Call) -> Axes:
    """One slice of an axis, which stays."""
    axes = [*call["self"]]
    fix(axes.pop(call["dim"]))
    return axes


@_rule("slice", "narrow")
def sliced(call: Call) -> Axes:
    """Some consecutive entries of an axis."""
    axes = [*call["self"]]
    dim = (call["dim"] or 0) % len(axes)
    size, kept, start = axes[dim].size, call.shape[dim], call["start"] or 0
    if size == kept:
        return axes
    if (call["step"] or 1) != 1:
        fix(axes[dim])
        axes[dim] = fixed(kept)
        return axes
    start = max(0, start + size if start < 0 else start)
    sizes = [start, kept, size - start - kept]
    found = iter(cut(axes[dim], [length for length in sizes if length]))
    axes[dim] = [next(found) if length else None for length in sizes][1]
    return axes


@_rule("constant_pad_nd", "pad")
def padded(call: Call) -> Axes:
    """Numbers before and after the entries of an axis."""
    axes, widths = [*call["self"]], [*call["pad"]]
    for axis, (before, after) in zip(
        reversed(range(len(axes))), zip(widths[::2], widths[1::2], strict=True), strict=False
    ):
        if before or after:
            axes[axis] = concat([Part(before), axes[axis], Part(after)])
    return axes


# Sums over axes


@_rule("mean", "sum", "amax", "amin", "logsumexp", "var", "std", "linalg_vector_norm", "any", "all")
def reduced(call: Call) -> Axes:
    """An axis summed over, which may be permuted."""
    axes = call["self"]
    dims = call["dim"] if call["dim"] is not None else range(len(axes))
    dims = {dim % len(axes) for dim in ([dims] if isinstance(dims, int) else dims)}
    for dim in dims:
        unscale(axes[dim])
    if len(call.shape) == len(axes):
        return [fixed(1) if dim in dims else axis for dim, axis in enumerate(axes)]
    return [axis for dim, axis in enumerate(axes) if dim not in dims]


@_rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d")
@_rule("adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "upsample_nearest2d")
@_rule("upsample_bilinear2d", "max_pool2d_with_indices")
def pooled(call: Call) -> Value:
    """Positions gathered, channels apart; positions stay."""
    axes, shapes = call["self"], call.shape
    several = bool(shapes) and not isinstance(shapes[0], int)
    spatial = int(next(c for c in reversed(call.args["(name)"].split("_with")[0]) if c.isdigit()))
    for axis in axes[-spatial:]:
        fix(axis)
    found = [[*axes[:-spatial], *map(fixed, shape[-spatial:])] for shape in (shapes if several else [shapes])]
    return found if several else found[0]


@_rule("linear")
def linear(call: Call) -> Axes:
    """x Wᵀ + b."""
    x, weight, bias = call["input"], call["weight"], call["bias"]
    _reads(call, "weight", 1, x[-1])
    return [*x[:-1], _brings(call, weight[0], bias)]


@_rule("conv1d", "conv2d", "conv3d", "convolution")
def convolved(call: Call) -> Axes:
    """A convolution, grouped or not; positions stay."""
    x, weight, groups = call["input"], call["weight"], call["groups"] or 1
    spatial = len(weight) - 2
    for axis in (*weight[2:], *x[-spatial:]):
        fix(axis)
    channels = x[-spatial - 1]
    if groups == 1:
        _reads(call, "weight", 1, channels)
        out = _brings(call, weight[0], call["bias"])
    else:
        out = _grouped(call, channels, groups)
    return [*x[: -spatial - 1], out, *map(fixed, call.shape[-spatial:])]


def _grouped(call: Call, channels: Part, groups: int) -> Part:
    """Groups are permuted as blocks, each group's channels alike."""
    weight = call["weight"]
    (block, inner), (out_block, _) = (regroup([part], [groups, part.size // groups]) for part in (channels, weight[0]))
    unify(block, out_block)
    unify(inner, weight[1])
    if weight[1].size > 1:
        unscale(channels)
    return _brings(call, weight[0], call["bias"])


@_rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolved_back(call: Call) -> Axes:
    """A transposed convolution of one group; positions stay."""
    x, weight = call["input"], call["weight"]
    spatial = len(weight) - 2
    for axis in (*weight[2:], *x[-spatial:]):
        fix(axis)
    if (call["groups"] or 1) != 1:
        for axis in (weight[0], weight[1], x[-spatial - 1]):
            fix(axis)
        return [fixed(length) for length in call.shape]
    _reads(call, "weight", 0, x[-spatial - 1])
    out = _brings(call, weight[1], call["bias"], axis=1)
    return [*x[: -spatial - 1], out, *map(fixed, call.shape[-spatial:])]


@_rule("matmul", "mm", "bmm")
def matmul(call: Call) -> Axes:
    """Matrix products of tensors, which broadcast."""
    a, b = call["self"], call["other"] or call["mat2"]
    unify(a[-1], b[-1 if len(b) == 1 else -2])
    unscale(a[-1])
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else []
    _unscale([*rows, *columns])
    batch = _broadcast(call.shape[: len(call.shape) - len(rows) - len(columns)], [a[:-2], b[:-2]])
    return [*batch, *rows, *columns]


@_rule("addmm")
def addmm(call: Call) -> Axes:
    """b + x W."""
    x, weight = call["mat1"], call["mat2"]
    unify(x[-1], weight[0])
    axes = _broadcast(call.shape, [call["self"], [x[0], weight[1]]])
    _unscale([x[-1], *axes])
    return axes


@_rule("scaled_dot_product_attention")
def attention(call: Call) -> Axes:
    """softmax(Q Kᵀ) V, with heads among the leading axes."""
    q, k, v = call["query"], call["key"], call["value"]
    unify(q[-1], k[-1])
    unify(k[-2], v[-2])
    batch = _broadcast(call.shape[:-2], [q[:-2], k[:-2], v[:-2]])
    if mask := call["attn_mask"]:
        _broadcast(Size([*call.shape[:-1], k[-2].size]), [mask, [*batch, q[-2], k[-2]]])
    _unscale([*q, *k, *v])
    return [*batch, q[-2], v[-1]]


# Normalisation, look-up, recurrence


@_rule("batch_norm", "instance_norm", "cudnn_batch_norm")
def batch_norm(call: Call) -> Axes:
    """Each channel, axis 1, for itself."""
    return _per_channel(call, call["input"][1], ("weight", "bias", "running_mean", "running_var"))


@_rule("group_norm")
def group_norm(call: Call) -> Axes:
    """Channels in groups, which are permuted as blocks, each group's channels alike."""
    channels, groups = call["input"][1], call["num_groups"]
    regroup([channels], [groups, channels.size // groups])
    return _per_channel(call, channels, ("weight", "bias"))


@_rule("layer_norm", "rms_norm")
def layer_norm(call: Call) -> Axes:
    """The last axes together, entries of which may be permuted."""
    x = call["input"]
    for name in ("weight", "bias"):
        if _is_axes(axes := call[name]):
            for one, other in zip(x[-len(axes) :], axes, strict=True):
                unify(one, other)
    _unscale(x)
    return cast(Axes, x)


@_rule("embedding")
def embedding(call: Call) -> Axes:
    """Rows of a table, whose order stays."""
    weight = call["weight"]
    fix(weight[0])
    call.role("weight", 1, 1)
    return [*call["indices"], weight[1]]


@_rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(call: Call) -> list[Axes]:
    """Recurrent layers: the gates of a unit move together, and with them what is fed back."""
    x = call["input"]
    directions = 2 if call["bidirectional"] else 1
    each, states = len(call["params"]) // (call["num_layers"] * directions), call["hx"]
    states, below, hidden = states if not _is_axes(states) else [states], x[-1], []
    for first in range(0, len(call["params"]), directions * each):
        sides = [call["params"][first + side * each : first + (side + 1) * each] for side in range(directions)]
        hidden += [_cell(weights, below, call.args["(name)"]) for weights in sides]
        below = concat(hidden[-directions:])
    if call.used - {0} or not all(isinstance(state, Uniform) for state in states):
        for one in hidden:
            unify(hidden[0], one)
    for state in states:
        if not isinstance(state, Uniform):
            unify(hidden[0], state[-1])
    return [[*x[:-1], below], *([*map(fixed, shape[:-1]), hidden[0]] for shape in call.shape[1:])]


def _cell(weights: Sequence[Axes], below: Part, kind: str) -> Part:
    """The hidden units of one layer in one direction."""
    gates = {"lstm": 4, "gru": 3}.get(kind.split(".")[0], 1)
    hidden = Part(weights[1][1].size, scalable=False)
    if len(weights) % 2:  # a projection of what is fed back
        for axis in (below, *(axis for axes in weights for axis in axes)):
            fix(axis)
        return fixed(weights[-1][0].size)
    unify(weights[0][1], below)
    unify(weights[1][1], hidden)
    for axes in weights:
        unify(axes[0], concat([hidden] * gates))
    unscale(below)
    return hidden


# What the rules share


def _is_axes(value: Value) -> bool:
    return isinstance(value, list) and all(isinstance(part, Part) for part in value)


def _unscale(axes: Iterable[Part]) -> None:
    for axis in axes:
        unscale(axis)


def _broadcast(shape: Sequence[int], tensors: Sequence[Axes], skip: int | None = None) -> Axes:
    """The axes of tensors of broadcast `shape`: those that are not repeated move alike."""
    axes = [Part(length) if length != 1 else fixed(1) for length in shape]
    for tensor in tensors:
        for axis, part in zip(reversed(range(len(shape))), reversed(tensor), strict=False):
            if part.size == axes[axis].size and axis != skip:
                unify(axes[axis], part)
    return [axis.root() for axis in axes]


def _entangled(call: Call, tensors: Sequence[Axes]) -> Axes:
    for axes in tensors:
        _unscale(axes)
    return _broadcast(call.shape, tensors)


def _reads(call: Call, argument: str, axis: int, part: Part) -> None:
    """An axis of a weight reads these units."""
    unify(call[argument][axis], part)
    call.role(argument, axis, -1)


def _brings(call: Call, part: Part, bias: Axes | None, axis: int = 0) -> Part:
    """An axis of a weight, and its bias, bring forth units."""
    call.role("weight", axis, 1)
    if bias is not None:
        unify(part, bias[0])
        call.role("bias", 0, 1)
    return part


def _per_channel(call: Call, channels: Part, names: Iterable[str]) -> Axes:
    for name in names:
        if _is_axes(axes := call[name]):
            unify(channels, axes[0])
    _unscale(call["input"])
    return cast(Axes, call["input"])
