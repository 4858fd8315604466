"""What axes are made of, found by unification: the algebra under the tracing of symmetries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import prod
from operator import mul
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
    factors = _factors(parts)
    if len(factors) < 2:
        return factors[0] if factors else fixed(1)
    return Part(prod(factor.size for factor in factors), "product", factors)


def concat(parts: Iterable[Part]) -> Part:
    """The parts one after the other."""
    pieces = _pieces(parts)
    if len(pieces) < 2:
        return pieces[0] if pieces else fixed(0)
    return Part(sum(piece.size for piece in pieces), "concat", pieces)


def fix(*parts: Part) -> None:
    """Keeps all of the parts in place."""
    for leaf in _leaves(parts):
        leaf.kind = "fixed"


def unscale(*parts: Part) -> None:
    """Allows the parts no scaling."""
    for leaf in _leaves(parts):
        leaf.scalable = False


def unify(a: Part, b: Part) -> None:
    """Makes both permuted alike; where their structures do not fit one another, both stay in place."""
    a, b = a.root(), b.root()
    if a is b:
        return
    if a.size != b.size:
        raise ValueError(f"axes of {a.size} and {b.size} cannot move together")
    if "fixed" in (a.kind, b.kind):
        fix(a, b)
    elif a.kind == "free":
        _become(a, b)
    elif b.kind == "free":
        _become(b, a)
    elif a.kind == b.kind == "concat":
        _unify_concats(a, b)
    else:
        _unify_products(a, b)


def regroup(parts: Sequence[Part], sizes: Sequence[int]) -> list[Part]:
    """Axes of these sizes with the entries of `parts` in the same row-major order, as a reshape makes them."""
    axes: list[Part] = []
    rest = [*parts]
    for size in sizes:
        taken = _take(rest, size) if all(sizes) else None
        if taken is None:
            fix(*parts)
            return [fixed(length) for length in sizes]
        axes.append(product(taken))
    return axes


def cut(part: Part, sizes: Sequence[int]) -> list[Part]:
    """Consecutive parts of these sizes, which must add up to the whole."""
    part = part.root()
    if 0 in sizes:
        some = iter(cut(part, [size for size in sizes if size]))
        return [next(some) if size else fixed(0) for size in sizes]
    if len(sizes) < 2:
        return [part] * len(sizes)
    if part.kind == "free":
        _become(part, Part(part.size, "concat", [Part(size) for size in sizes]))
    elif part.kind == "product":
        _open(part, sizes)
    part = part.root()
    return [fixed(size) for size in sizes] if part.kind != "concat" else _cut_concat(part, sizes)


def _leaves(parts: Iterable[Part]) -> list[Part]:
    return [leaf for part in parts for leaf in part.leaves()]


def _become(free: Part, other: Part) -> None:
    if not free.scalable:
        unscale(other)
    free.same = other


def _factors(parts: Iterable[Part]) -> list[Part]:
    """Of a product of parts, the factors that are no products, without those of one entry."""
    roots = [part.root() for part in parts]
    nested = [_factors(root.parts) if root.kind == "product" else [root] for root in roots if root.size != 1]
    return [factor for factors in nested for factor in factors]


def _pieces(parts: Iterable[Part]) -> list[Part]:
    """Of a concatenation of parts, the pieces that are no concatenations, without empty ones."""
    roots = [part.root() for part in parts]
    nested = [_pieces(root.parts) if root.kind == "concat" else [root] for root in roots if root.size]
    return [piece for pieces in nested for piece in pieces]


def _take(rest: list[Part], size: int) -> list[Part] | None:
    """Moves factors that make up `size` from the front of `rest`; None where its factors do not allow that."""
    taken: list[Part] = []
    while size > 1:
        rest[:] = _factors(rest)  # afresh: a part that is split may occur again
        if size % rest[0].size == 0:
            taken.append(rest.pop(0))
        elif rest[0].size % size == 0 and _split(rest[0], size):
            continue
        else:
            return None
        size //= taken[-1].size
    return taken


def _split(part: Part, outer: int) -> bool:
    """Makes a part the product of `outer` and the rest, if it can be."""
    inner = part.size // outer
    if part.kind == "fixed":
        factors = [fixed(outer), fixed(inner)]
    elif part.kind == "free":
        factors = [Part(outer, scalable=part.scalable), Part(inner, scalable=part.scalable)]
    else:
        factors = [fixed(outer), _alike(cut(part, [inner] * outer))]
    if factors[1].kind == "concat":
        return False
    part.same = Part(part.size, "product", factors)
    return True


def _alike(pieces: Sequence[Part]) -> Part:
    """The one part that all of these become."""
    for piece in pieces[1:]:
        unify(pieces[0], piece)
    return pieces[0].root()


def _unify_products(a: Part, b: Part) -> None:
    """Splits both, of which one is a product, into the same factors; both stay where there are none."""
    inner = {size for part in (a, b) for size in accumulate((f.size for f in reversed(_factors([part]))), mul)}
    ends = [1, *sorted(inner)]
    sizes = [end // before for before, end in pairwise(ends)][::-1]
    if any(end % before for before, end in pairwise(ends)):
        fix(a, b)
    else:
        _unify_all(regroup([a], sizes), regroup([b], sizes))


def _unify_concats(a: Part, b: Part) -> None:
    """Cuts both where either is cut."""
    sizes = _between({*_ends(a), *_ends(b)})
    _unify_all(cut(a, sizes), cut(b, sizes))


def _unify_all(some: Sequence[Part], others: Sequence[Part]) -> None:
    for one, other in zip(some, others, strict=True):
        unify(one, other)


def _open(part: Part, sizes: Sequence[int]) -> None:
    """Makes a product a concatenation, cut through its first factor; it stays in place if the borders lie within."""
    outer, *rest = _factors([part])
    inner = prod(factor.size for factor in rest)
    if any(size % inner for size in sizes):
        fix(part)
    else:
        pieces = cut(outer, [size // inner for size in sizes])
        part.same = concat([product([piece, *rest]) for piece in pieces])


def _cut_concat(part: Part, sizes: Sequence[int]) -> list[Part]:
    """Cuts through the pieces where the borders fall."""
    borders = {*accumulate(sizes), *_ends(part)}
    pieces: list[Part] = []
    start = 0
    for piece in _pieces([part]):
        inside = {end - start for end in borders if start < end <= start + piece.size}
        pieces += cut(piece, _between(inside))
        start += piece.size
    return [concat(_first(pieces, size)) for size in sizes]


def _first(pieces: list[Part], size: int) -> Iterator[Part]:
    """Takes pieces of this size from the front."""
    while size:
        piece = pieces.pop(0)
        size -= piece.size
        yield piece


def _ends(part: Part) -> Iterator[int]:
    return accumulate(piece.size for piece in _pieces([part]))


def _between(ends: Iterable[int]) -> list[int]:
    """Sizes of the pieces that end there, the first from 0 on."""
    return [end - start for start, end in pairwise([0, *sorted(ends)])]
