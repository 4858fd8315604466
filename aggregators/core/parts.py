"""What axes are made of, found by unification: the algebra under the tracing of symmetries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from typing import Literal


@dataclass(eq=False)
class Part:
    """A run of entries along an axis: free to be permuted, fixed, or a product or concatenation of parts.

    Parts that must be permuted alike are unified: one refers to the other. `scalable` says of a free part whether its
    entries may be multiplied by positive numbers.
    """

    size: int
    kind: Literal["free", "fixed", "product", "concat"] = "free"
    parts: Sequence[Part] = ()
    scalable: bool = True
    same: Part | None = field(default=None, repr=False)

    def root(self) -> Part:
        """What this part has become by unification."""
        part = self
        while part.same is not None:
            part = part.same
        return part

    def leaves(self) -> Iterator[Part]:
        """The free and fixed parts it consists of, in order."""
        root = self.root()
        if root.kind in ("free", "fixed"):
            yield root
        for part in root.parts:
            yield from part.leaves()

    def free(self) -> bool:
        """Whether any of it can be permuted."""
        return any(leaf.kind == "free" and leaf.size > 1 for leaf in self.leaves())


def fixed(size: int) -> Part:
    """A part that stays in place."""
    return Part(size, "fixed")


def product(parts: Iterable[Part]) -> Part:
    """The row-major product of parts."""
    factors = [factor for part in parts for factor in _factors(part) if factor.size != 1]
    if len(factors) < 2:
        return factors[0] if factors else fixed(1)
    return Part(prod(factor.size for factor in factors), "product", factors)


def concat(parts: Iterable[Part]) -> Part:
    """The parts one after the other."""
    pieces = [piece for part in parts for piece in _pieces(part) if piece.size]
    if len(pieces) < 2:
        return pieces[0] if pieces else fixed(0)
    return Part(sum(piece.size for piece in pieces), "concat", pieces)


def fix(part: Part) -> None:
    """Keeps all of the part in place."""
    for leaf in part.leaves():
        leaf.kind = "fixed"


def unscale(part: Part) -> None:
    """Allows the part no scaling."""
    for leaf in part.leaves():
        leaf.scalable = False


def unify(a: Part, b: Part) -> None:
    """Makes both permuted alike; where their structures do not fit one another, both stay in place."""
    a, b = a.root(), b.root()
    if a is b:
        return
    if a.size != b.size:
        raise ValueError(f"axes of {a.size} and {b.size} cannot move together")
    if "fixed" in (a.kind, b.kind):
        fix(a), fix(b)
    elif a.kind == "free":
        _become(a, b)
    elif b.kind == "free":
        _become(b, a)
    elif not _unify_structures(a, b):
        fix(a), fix(b)


def regroup(parts: Sequence[Part], sizes: Sequence[int]) -> list[Part]:
    """Axes of these sizes with the entries of `parts` in the same row-major order, as a reshape makes them."""
    factors, axes = [factor for part in parts for factor in _factors(part) if factor.size != 1], []
    for size in sizes:
        taken: list[Part] = []
        while (missing := size // prod(part.size for part in taken)) > 1:
            if not factors or not _fits(factors, missing):
                return _all_fixed(parts, sizes)
            taken.append(factors.pop(0))
        axes.append(product(taken))
    return axes


def cut(part: Part, sizes: Sequence[int]) -> list[Part]:
    """Consecutive parts of these sizes, which must add up to the whole."""
    part = part.root()
    if len(sizes) == 1:
        return [part]
    if part.kind == "free":
        _become(part, Part(part.size, "concat", [Part(size, scalable=part.scalable) for size in sizes]))
    elif part.kind == "product" and not _cut_product(part, sizes):
        fix(part)
        return [fixed(size) for size in sizes]
    if (part := part.root()).kind == "fixed":
        return [fixed(size) for size in sizes]
    return _cut_concat(part, sizes)


def _become(free: Part, other: Part) -> None:
    if not free.scalable:
        unscale(other)
    free.same = other


def _factors(part: Part) -> Sequence[Part]:
    root = part.root()
    return [factor for one in root.parts for factor in _factors(one)] if root.kind == "product" else [root]


def _pieces(part: Part) -> Sequence[Part]:
    root = part.root()
    return [piece for one in root.parts for piece in _pieces(one)] if root.kind == "concat" else [root]


def _fits(factors: list[Part], missing: int) -> bool:
    """Whether the first factor can be taken whole, after being split in two if it is too large."""
    first = factors[0]
    if missing % first.size == 0:
        return True
    if first.size % missing:
        return False
    factors[:1] = _split(first, missing)
    return factors[0].size == missing


def _split(part: Part, outer: int) -> Sequence[Part]:
    """A part as (outer, the rest); itself if it cannot be split so."""
    inner = part.size // outer
    if part.kind == "concat":
        pieces = cut(part, [inner] * outer)
        if any(piece.root().kind == "concat" for piece in pieces):
            fix(part)
            return fixed(outer), fixed(inner)
        for piece in pieces[1:]:
            unify(pieces[0], piece)
        both = fixed(outer), pieces[0].root()
    else:
        both = Part(outer, part.kind, scalable=part.scalable), Part(inner, part.kind, scalable=part.scalable)
    part.same = Part(part.size, "product", both)
    return both


def _unify_structures(a: Part, b: Part) -> bool:
    """Whether both could be made alike."""
    if a.kind == b.kind == "concat":
        return _unify_concats(a, b)
    sizes = _common(a, b)
    if sizes is None:
        return False
    for one, other in zip(regroup([a], sizes), regroup([b], sizes), strict=True):
        unify(one, other)
    return True


def _common(a: Part, b: Part) -> list[int] | None:
    """Sizes of factors into which both can be split; None where there are none."""
    inner = [{*accumulate((factor.size for factor in reversed(_factors(part))), int.__mul__)} for part in (a, b)]
    ends = sorted(inner[0] | inner[1])
    if any(later % earlier for earlier, later in zip(ends, ends[1:], strict=False)):
        return None
    return [later // earlier for earlier, later in zip([1, *ends], ends, strict=False)][::-1]


def _unify_concats(a: Part, b: Part) -> bool:
    ends = sorted({end for part in (a, b) for end in accumulate(piece.size for piece in _pieces(part))})
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    for one, other in zip(cut(a, sizes), cut(b, sizes), strict=True):
        unify(one, other)
    return True


def _cut_concat(part: Part, sizes: Sequence[int]) -> list[Part]:
    """Cuts through the pieces where the borders fall."""
    ends = sorted({*accumulate(sizes), *accumulate(piece.size for piece in _pieces(part))})
    pieces: list[Part] = []
    start = 0
    for piece in _pieces(part):
        inside = [end for end in ends if start < end <= start + piece.size]
        pieces += cut(piece, [end - begin for begin, end in zip([start, *inside], inside, strict=False)])
        start += piece.size
    return _gathered(pieces, sizes)


def _gathered(pieces: Sequence[Part], sizes: Sequence[int]) -> list[Part]:
    rest, whole = [*pieces], []
    for size in sizes:
        taken: list[Part] = []
        while sum(piece.size for piece in taken) < size:
            taken.append(rest.pop(0))
        whole.append(concat(taken))
    return whole


def _cut_product(part: Part, sizes: Sequence[int]) -> bool:
    """Makes a product a concatenation along its first factor, which then stays in place, if the borders allow it."""
    outer, *rest = _factors(part)
    inner = prod(factor.size for factor in rest)
    if any(size % inner for size in sizes):
        return False
    fix(outer)
    part.same = Part(part.size, "concat", [product(rest) for _ in range(outer.size)])
    return True


def _all_fixed(parts: Sequence[Part], sizes: Sequence[int]) -> list[Part]:
    for part in parts:
        fix(part)
    return [fixed(size) for size in sizes]
