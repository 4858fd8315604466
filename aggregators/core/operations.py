"""What each operation of a network says of the axes that meet in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch._ops import OpOverload

from .parts import Part, concat, cut, fix, fixed, product, regroup, unify, unscale

AT_RANDOM = "it draws at random in eval mode too"

Axes: TypeAlias = list[Part]
Value: TypeAlias = Any  # Axes of a tensor, a list of such, or what is no tensor


@dataclass(frozen=True, eq=False)
class Call:
    """An operation of the graph: its arguments by the schema's names, tensors as their axes, and what it returns.

    `shape` is that of its result, or a list for several results; `source` tells which arguments are parameters, and
    of which name; `used` which of several results anything reads.
    """

    target: OpOverload
    args: Mapping[str, Value]
    shape: Any
    dtype: torch.dtype | None
    source: Mapping[str, str]
    roles: dict[tuple[str, int], int]
    used: frozenset[int]

    def __getitem__(self, name: str) -> Value:
        return self.args.get(name)

    @property
    def name(self) -> str:
        """The operation's, as `lstm.input`."""
        return self.target.__name__

    @property
    def axes(self) -> Axes:
        """Those of the first argument."""
        axes: Axes = next(iter(self.args.values()))
        return axes

    @property
    def tensors(self) -> list[Axes]:
        """The axes of every argument that is a tensor."""
        return [value for value in self.args.values() if is_axes(value)]

    def role(self, argument: str, axis: int, sign: int) -> None:
        """Notes that this axis of a parameter brings units forth (1) or reads them (-1), or both (0)."""
        name = self.source.get(argument)
        if name is None:
            unscale(self.args[argument][axis])
        elif self.roles.setdefault((name, axis), sign) != sign:
            self.roles[name, axis] = 0

    def roles_where(self, argument: str, forth: Sequence[bool]) -> None:
        """Notes of each axis of a parameter whether it brings units forth, or reads them; nothing of other tensors."""
        for axis, brings in enumerate(forth if argument in self.source else ()):
            self.role(argument, axis, 1 if brings else -1)


class Uniform(list[Part]):
    """The axes of a tensor that holds one number."""


Rule: TypeAlias = Callable[[Call], Value]
R = TypeVar("R", bound=Rule)
RULES: dict[str, Rule] = {}


def _rule(names: str) -> Callable[[R], R]:
    def add(rule: R) -> R:
        RULES.update(dict.fromkeys(names.split(), rule))
        return rule

    return add


# Entry by entry


@_rule("relu leaky_relu rrelu abs neg clone contiguous detach alias lift_fresh_copy")
def proportional(call: Call) -> Axes:
    """Each entry for itself, in proportion to it where that is positive."""
    return call.axes


@_rule("dropout feature_dropout alpha_dropout feature_alpha_dropout")
def dropped(call: Call) -> Axes:
    """Nothing, in eval mode."""
    if call["train"]:
        raise ValueError(AT_RANDOM)
    return call.axes


@_rule("to _to_copy type_as")
def converted(call: Call) -> Axes:
    """The same numbers in another dtype, in proportion where it is a floating one."""
    if call.dtype is None or not call.dtype.is_floating_point:
        _unscale(call.axes)
    return call.axes


@_rule(
    """
    gelu silu sigmoid tanh elu selu celu softplus hardtanh hardswish hardsigmoid relu6 mish softsign log_sigmoid
    exp exp2 expm1 log log2 log10 log1p sqrt rsqrt pow square reciprocal erf erfc sin cos tan sinh cosh atan sign
    clamp clamp_min clamp_max threshold tanhshrink hardshrink softshrink floor ceil round trunc frac nan_to_num isnan
    isinf isfinite bitwise_not logical_not bitwise_and bitwise_or logical_and logical_or logical_xor eq ne ge gt le lt
    maximum minimum where masked_fill fmod remainder floor_divide atan2 lerp addcmul addcdiv logaddexp softmax
    log_softmax copy fill zero _weight_norm
    """
)
def entrywise(call: Call) -> Axes:
    """One tensor or several entry by entry, which broadcast; an axis along which entries are normalised too."""
    _unscale(*call.tensors)
    return _broadcast(call.shape, call.tensors)


@_rule("add sub rsub")
def added(call: Call) -> Axes:
    """Sums, which broadcast: what is added must be scaled alike, so numbers allow no scaling."""
    if len(call.tensors) < 2:
        return entrywise(call)
    for name in call.source:
        for axis, _ in enumerate(call[name]):
            call.role(name, axis, 1)
    return _broadcast(call.shape, call.tensors)


@_rule("mul div")
def multiplied(call: Call) -> Axes:
    """Products, which broadcast; a number scales all alike."""
    return entrywise(call) if len(call.tensors) > 1 or call["rounding_mode"] else call.tensors[0]


@_rule("prelu")
def prelu(call: Call) -> Axes:
    """A slope for each channel, axis 1, or one for all."""
    x, weight = call["self"], call["weight"]
    if weight[0].size > 1:
        unify(weight[0], x[1])
    _unscale(x)
    return call.axes


@_rule("zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full")
def constant(call: Call) -> Axes:
    """One number everywhere: it does not mind being permuted."""
    return Uniform(Part(length, scalable=False) for length in call.shape)


# Shapes


@_rule("view reshape flatten unflatten squeeze unsqueeze view_as reshape_as ravel _unsafe_view")
def reshaped(call: Call) -> Axes:
    """The same entries in the same order in other axes."""
    return regroup(call.axes, call.shape)


@_rule("transpose swapaxes swapdims permute movedim moveaxis t numpy_T mT")
def reordered(call: Call) -> Axes:
    """Axes in another order: that in which the operation puts axes of the lengths 0, 1, 2, ..."""
    numbered = torch.empty([*range(len(call.axes))], device="meta")
    return [call.axes[axis] for axis in call.target(numbered, *[*call.args.values()][1:]).shape]


@_rule("expand expand_as broadcast_to")
def expanded(call: Call) -> Axes:
    """Axes of 1 repeated, which brings forth units that are all the same."""
    return _broadcast(call.shape, [call.axes])


@_rule("repeat tile repeat_interleave")
def repeated(call: Call) -> Axes:
    """Axes repeated: in whole, row-major; or entry by entry. An axis of 1 brings forth units that are all the same."""
    if is_axes(call["repeats"]):
        raise ValueError("each entry is repeated as often as another tensor says")
    axes = [fixed(1)] * (len(call.shape) - len(call.axes)) + call.axes
    times = [length // axis.size for axis, length in zip(axes, call.shape, strict=True)]
    copies = [Part(n, scalable=False) if axis.size == 1 else fixed(n) for axis, n in zip(axes, times, strict=True)]
    order = 1 if call.name.startswith("repeat_interleave") else -1
    return [product([axis, number][::order]) for axis, number in zip(axes, copies, strict=True)]


@_rule("cat concat concatenate")
def concatenated(call: Call) -> Axes:
    """Tensors one after the other along an axis."""
    tensors = [axes for axes in call["tensors"] if len(axes) == len(call.shape)]
    dim = call["dim"] % len(call.shape)
    joined = concat([axes[dim] for axes in tensors])
    return _broadcast(call.shape, [_with(axes, dim, joined) for axes in tensors])


@_rule("stack")
def stacked(call: Call) -> Axes:
    """Tensors along an axis of their own, which stays."""
    dim = call["dim"] % len(call.shape)
    axes = _broadcast([*call.shape[:dim], *call.shape[dim + 1 :]], call["tensors"])
    return [*axes[:dim], fixed(call.shape[dim]), *axes[dim:]]


@_rule("chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split")
def pieces(call: Call) -> list[Axes]:
    """Consecutive pieces of an axis."""
    dim = call["dim"] % len(call.axes)
    return [_with(call.axes, dim, part) for part in cut(call.axes[dim], [shape[dim] for shape in call.shape])]


@_rule("glu")
def glu(call: Call) -> Axes:
    """Half of an axis, gated by the other half."""
    dim = call["dim"] % len(call.axes)
    value, gate = cut(call.axes[dim], [call.shape[dim]] * 2)
    unify(value, gate)
    _unscale(call.axes)
    return _with(call.axes, dim, value.root())


@_rule("slice narrow")
def sliced(call: Call) -> Axes:
    """Some consecutive entries of an axis; one of which every second is taken, or so, stays."""
    dim = call["dim"] % len(call.axes)
    axis, kept = call.axes[dim], call.shape[dim]
    if call["step"] not in (None, 1):
        fix(axis)
    start = call["start"] or 0
    start = min(max(start + axis.size if start < 0 else start, 0), axis.size - kept)
    return _with(call.axes, dim, cut(axis, [start, kept, axis.size - kept - start])[1])


@_rule("constant_pad_nd pad")
def padded(call: Call) -> Axes:
    """One number before and after the entries of an axis; where it is cut, or padded with copies, it stays."""
    axes = [*call.axes]
    for axis, (before, after) in enumerate(zip(call["pad"][::2], call["pad"][1::2], strict=True), start=1):
        if (before or after) and (min(before, after) < 0 or call["mode"] not in (None, "constant")):
            fix(axes[-axis])
            axes[-axis] = fixed(call.shape[-axis])
        elif before or after:
            ends = [Part(width, scalable=not call["value"]) for width in (before, after)]
            axes[-axis] = concat([ends[0], axes[-axis], ends[1]])
    return axes


@_rule("pixel_shuffle")
def pixels_shuffled(call: Call) -> Axes:
    """Each block of channels spread over positions; the blocks are permuted."""
    *batch, channels, height, width = call.axes
    blocks, within = regroup([channels], [call.shape[-3], channels.size // call.shape[-3]])
    fix(within, height, width)
    return [*batch, blocks.root(), *map(fixed, call.shape[-2:])]


@_rule("pixel_unshuffle")
def pixels_gathered(call: Call) -> Axes:
    """Each channel's positions gathered into a block of channels."""
    *batch, channels, height, width = call.axes
    fix(height, width)
    return [*batch, product([channels, fixed(call.shape[-3] // channels.size)]), *map(fixed, call.shape[-2:])]


@_rule("channel_shuffle")
def channels_shuffled(call: Call) -> Axes:
    """Groups of channels dealt out, as a transposition does it."""
    groups = call["groups"]
    outer, inner = regroup([call.axes[1]], [groups, call.axes[1].size // groups])
    return _with(call.axes, 1, product([inner, outer]))


# Entries by position, and sums


@_rule("select unbind flip roll index_select cumsum tril triu")
def by_position(call: Call) -> Value:
    """Axes whose entries are taken by their places, and which stay."""
    fix(*(call.axes[dim] for dim in _dims(call)))
    return _without(call)


@_rule("max min median topk sort argmax argmin argsort")
def by_order(call: Call) -> Value:
    """Axes whose entries are ordered, which says at which places they stand: these stay; or two tensors."""
    if len(call.tensors) > 1:
        return entrywise(call)
    _unscale(call.axes)
    return by_position(call)


@_rule("index")
def indexed(call: Call) -> Axes:
    """Entries at given places of some axes, which stay; their axes stand at the first of these, or before all."""
    dims = [dim for dim, index in enumerate(call["indices"]) if index is not None]
    fix(*(call.axes[dim] for dim in dims), *(part for dim in dims for part in call["indices"][dim]))
    kept = [axis for dim, axis in enumerate(call.axes) if dim not in dims]
    place = dims[0] if dims[-1] - dims[0] + 1 == len(dims) else 0
    new = call.shape[place : place + len(call.shape) - len(kept)]
    return [*kept[:place], *map(fixed, new), *kept[place:]]


@_rule("mean sum amax amin")
def reduced(call: Call) -> Value:
    """Axes summed over, which may be permuted."""
    _unscale([call.axes[dim] for dim in _dims(call)])
    return _without(call)


@_rule("logsumexp var std var_mean std_mean linalg_vector_norm norm prod any all")
def reduced_out_of_proportion(call: Call) -> Value:
    """Axes reduced in any way that their order does not change."""
    _unscale(call.axes)
    return _without(call)


@_rule(
    """
    max_pool1d max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d
    upsample_bicubic2d upsample_trilinear3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    """
)
def pooled(call: Call) -> Value:
    """Positions gathered or interpolated, channels apart; positions stay."""
    spatial = int(next(filter(str.isdigit, call.name)))
    fix(*call.axes[-spatial:])
    return _each(call.shape, lambda shape: [*call.axes[:-spatial], *map(fixed, shape[-spatial:])])


# Products with weights, and of tensors


@_rule("linear")
def linear(call: Call) -> Axes:
    """x Wᵀ + b."""
    _reads(call, 1, call["input"][-1])
    return [*call["input"][:-1], _brings(call)]


@_rule("bilinear")
def bilinear(call: Call) -> Axes:
    """xᵀ W y + b for each of several matrices W."""
    x, y, weight = call["input1"], call["input2"], call["weight"]
    unify(weight[1], x[-1])
    unify(weight[2], y[-1])
    _unscale(x, y, weight)
    return [*x[:-1], _brings(call)]


@_rule("conv1d conv2d conv3d")
def convolved(call: Call) -> Axes:
    """A convolution, grouped or not; positions stay."""
    spatial = len(call["weight"]) - 2
    *batch, channels = call["input"][:-spatial]
    fix(*call["weight"][2:], *call["input"][-spatial:])
    if call["groups"] == 1:
        _reads(call, 1, channels)
    else:
        _grouped(call, channels)
    return [*batch, _brings(call), *map(fixed, call.shape[-spatial:])]


def _grouped(call: Call, channels: Part) -> None:
    """Groups are permuted as blocks, each group's channels alike."""
    weight, groups = call["weight"], call["groups"]
    block, inner = regroup([channels], [groups, channels.size // groups])
    unify(block, regroup(weight[:1], [groups, weight[0].size // groups])[0])
    unify(inner, weight[1])
    unscale(channels, weight[0], weight[1])


@_rule("conv_transpose1d conv_transpose2d conv_transpose3d")
def convolved_back(call: Call) -> Axes:
    """A transposed convolution; positions stay, and channels where it is grouped."""
    spatial = len(call["weight"]) - 2
    *batch, channels = call["input"][:-spatial]
    fix(*call["weight"][2:], *call["input"][-spatial:])
    if call["groups"] != 1:
        fix(channels, *call["weight"][:2], *(call["bias"] or []))
        return [*batch, *map(fixed, call.shape[len(batch) :])]
    _reads(call, 0, channels)
    return [*batch, _brings(call, axis=1), *map(fixed, call.shape[-spatial:])]


@_rule("matmul mm bmm mv dot vdot addmm addmv baddbmm")
def multiplied_as_matrices(call: Call) -> Axes:
    """Matrix products of tensors, which broadcast, perhaps added to another."""
    *others, a, b = call.tensors
    summed = [-1, -1 if len(b) == 1 else -2]
    unify(a[summed[0]], b[summed[1]])
    _unscale(*call.tensors)
    for argument, axis in zip([name for name, value in call.args.items() if is_axes(value)][-2:], summed, strict=True):
        call.roles_where(argument, [other != axis % len(call[argument]) for other, _ in enumerate(call[argument])])
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else []
    batch = _broadcast(call.shape[: len(call.shape) - len(rows) - len(columns)], [a[:-2], b[:-2]])
    return _broadcast(call.shape, [[*batch, *rows, *columns], *others])


@_rule("einsum")
def einsum(call: Call) -> Axes:
    """A sum of products written with a letter for each axis."""
    inputs, arrow, output = call["equation"].replace(" ", "").partition("->")
    if not arrow or "." in inputs:
        raise ValueError("write its equation with a letter for each axis, and what comes out after ->")
    _unscale(*call["tensors"])
    axes: dict[str, Part] = {}
    for number, (letters, tensor) in enumerate(zip(inputs.split(","), call["tensors"], strict=True)):
        for letter, part in zip(letters, tensor, strict=True):
            unify(axes.setdefault(letter, part), part)
        call.roles_where(f"tensors.{number}", [letter in output for letter in letters])
    return [axes[letter].root() for letter in output]


@_rule("scaled_dot_product_attention")
def attention(call: Call) -> Axes:
    """softmax(Q Kᵀ) V, with heads among the leading axes; several heads of Q may share one of K and V."""
    q, k, v = call["query"], call["key"], call["value"]
    if call["dropout_p"]:
        raise ValueError(AT_RANDOM)
    unify(q[-1], k[-1])
    unify(k[-2], v[-2])
    if call["is_causal"]:
        fix(q[-2], k[-2])
    _unscale(*call.tensors)
    batch = _broadcast(call.shape[:-2], [q[:-2], _shared(k, q), _shared(v, q)])
    if mask := call["attn_mask"]:
        _broadcast([*call.shape[:-1], k[-2].size], [mask, [*batch, q[-2], k[-2]]])
    return [*batch, q[-2], v[-1]]


def _shared(axes: Axes, query: Axes) -> Axes:
    """The leading axes, each head repeated for the query's that share it."""
    if len(axes) < 3:
        return []
    return [*axes[:-3], product([axes[-3], Part(query[-3].size // axes[-3].size)])]


# Normalisation, look-up, recurrence


@_rule("batch_norm instance_norm")
def batch_norm(call: Call) -> Axes:
    """Each channel, axis 1, for itself."""
    return _per_channel(call, "weight", "bias", "running_mean", "running_var")


@_rule("group_norm")
def group_norm(call: Call) -> Axes:
    """Channels in groups, which are permuted as blocks, each group's channels alike."""
    channels, groups = call["input"][1], call["num_groups"]
    regroup([channels], [groups, channels.size // groups])
    return _per_channel(call, "weight", "bias")


@_rule("layer_norm rms_norm")
def layer_norm(call: Call) -> Axes:
    """The last axes together, entries of which may be permuted."""
    _unscale(*call.tensors)
    return _broadcast(call.shape, [call[name] for name in ("input", "weight", "bias") if call[name] is not None])


@_rule("embedding")
def embedding(call: Call) -> Axes:
    """Rows of a table, whose order stays."""
    fix(call["weight"][0])
    call.role("weight", 1, 1)
    return [*call["indices"], call["weight"][1]]


@_rule("lstm gru rnn_tanh rnn_relu")
def recurrent(call: Call) -> list[Axes]:
    """Recurrent layers: the gates of a unit move together, and with them what is fed back."""
    *batch, below = call["input"]
    directions = 2 if call["bidirectional"] else 1
    each = len(call["params"]) // (call["num_layers"] * directions)
    cells = [call["params"][first : first + each] for first in range(0, len(call["params"]), each)]
    hidden: list[Part] = []
    for layer in range(0, len(cells), directions):
        hidden += [_cell(weights, below, call.name) for weights in cells[layer : layer + directions]]
        below = concat(hidden[layer:])
    states = [axes for axes in _states(call) if not isinstance(axes, Uniform)]
    if not states and not call.used - {0}:
        return [[*batch, below]]
    _feed_back(hidden, states)  # which hold the layers and directions side by side
    return [[*batch, below], *([*map(fixed, shape[:-1]), hidden[0].root()] for shape in call.shape[1:])]


@_rule("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def recurrent_cell(call: Call) -> Value:
    """One step of a recurrent layer."""
    weights = [call[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh") if call[name] is not None]
    hidden = _cell(weights, call["input"][-1], call.name)
    _feed_back([hidden], _states(call))
    return _each(call.shape, lambda _: [*call["input"][:-1], hidden.root()])


def _states(call: Call) -> list[Axes]:
    states = call["hx"]
    return [states] if is_axes(states) else [*states]


def _feed_back(hidden: Sequence[Part], states: Iterable[Axes]) -> None:
    """Hidden units and states are all permuted alike; what else a state's axes hold stays."""
    for *others, units in (*([one] for one in hidden), *states):
        fix(*others)
        unify(hidden[0], units)


def _cell(weights: Sequence[Axes], below: Part, kind: str) -> Part:
    """The hidden units of one layer in one direction; they stay where a projection of them is fed back."""
    unify(weights[0][1], below)
    unscale(below)
    if len(weights) % 2:
        fix(*(axis for axes in weights for axis in axes))
        return fixed(weights[-1][0].size)
    hidden = Part(weights[1][1].size, scalable=False)
    unify(weights[1][1], hidden)
    gates = {"lstm": 4, "gru": 3}.get(kind[:4].rstrip("._"), 1)
    for axes in weights:
        unify(axes[0], concat([hidden] * gates))
    return hidden


# What the rules share


def is_axes(value: Value) -> bool:
    """Whether the value stands for a tensor."""
    return isinstance(value, list) and all(isinstance(part, Part) for part in value)


def _unscale(*tensors: Iterable[Part]) -> None:
    unscale(*(part for axes in tensors for part in axes))


def _with(axes: Axes, dim: int, part: Part) -> Axes:
    return [*axes[:dim], part, *axes[dim + 1 :]]


def _listed(value: Any) -> Sequence[int]:
    return [value] if isinstance(value, int) else value


def _dims(call: Call) -> set[int]:
    """The axes that the call names, all if it names none."""
    named = call["dim"] if call["dim"] is not None else call["dims"]
    dims = [named] if isinstance(named, int) else named or range(len(call.axes))
    return {dim % len(call.axes) for dim in dims}


def _without(call: Call) -> Value:
    """The axes that the call does not name: the others have gone, or are of another length and stay."""
    dims = _dims(call)

    def left(shape: Sequence[int]) -> Axes:
        if len(shape) == len(call.axes):
            return [fixed(shape[dim]) if dim in dims else axis for dim, axis in enumerate(call.axes)]
        return [axis for dim, axis in enumerate(call.axes) if dim not in dims]

    return _each(call.shape, left)


def _each(shape: Any, axes: Callable[[Sequence[int]], Axes]) -> Value:
    """The axes of the result, or of each of several."""
    return [axes(one) for one in shape] if isinstance(shape, list) else axes(shape)


def _broadcast(shape: Sequence[int], tensors: Sequence[Axes]) -> Axes:
    """The axes of tensors of broadcast `shape`, which move alike; what is repeated along an axis allows no scaling."""
    axes = [Part(length) if length != 1 else fixed(1) for length in shape]
    for tensor in tensors:
        missing = len(axes) - len(tensor)
        unscale(*axes[:missing])
        for axis, part in zip(axes[missing:], tensor, strict=True):
            if part.size == 1:
                unscale(axis)
            else:
                unify(axis, part)
    return [axis.root() for axis in axes]


def _reads(call: Call, axis: int, part: Part) -> None:
    """An axis of the weight reads these units."""
    unify(call["weight"][axis], part)
    call.role("weight", axis, -1)


def _brings(call: Call, axis: int = 0) -> Part:
    """An axis of the weight, and the bias, bring forth units."""
    part: Part = call["weight"][axis]
    call.role("weight", axis, 1)
    if call["bias"] is not None:
        unify(part, call["bias"][0])
        call.role("bias", 0, 1)
    return part.root()


def _per_channel(call: Call, *names: str) -> Axes:
    channels = call["input"][1]
    for name in names:
        if call[name] is not None:
            unify(channels, call[name][0])
    _unscale(call["input"])
    return call.axes
