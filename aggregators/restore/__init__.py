"""Methods that restore in the merged model what its layers put out in the clients' own."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import AfterValidator, ValidationInfo

from ..core.base import Aggregator
from ..core.registry import AnyAggregator


def unaligned(inner: Aggregator, info: ValidationInfo) -> Aggregator:
    """`inner`, unless it aligns: units are compared with those they were merged from, so they must match before."""
    for part in inner.parts():
        if type(part).__module__.startswith("aggregators.alignment."):
            if "inner" not in type(part).model_fields:
                raise ValueError(f"{part.kind} merges in units of its own, which nothing outside it can compare")
            order = f'{{"kind": "{part.kind}", "inner": {{"kind": "{info.data["kind"]}", "inner": ...}}}}'
            raise ValueError(f"{part.kind} aligns clients first, so it must stand outside: {order}")
    return inner


Unaligned: TypeAlias = Annotated[AnyAggregator, AfterValidator(unaligned)]
