"""The server's side of the wire: an exchange as messages, and a reply as a ClientUpdate."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from aggregators.core.exchange import Exchange
from aggregators.core.flat import WIRE_VERSION, Layout, from_tensor_fields, pack, unpack
from aggregators.core.update import ESTIMATORS, ClientUpdate, Estimator, Tensors

from .telemetry import one_line


class Malformed(ValueError):
    """A reply that does not follow the wire format."""


def encode(exchange: Exchange[Any], instructions: Mapping[str, Any]) -> Callable[[int], RecordDict]:
    """The message of `exchange` for each client; a model that all receive is packed once."""
    text = json.dumps({**instructions, **_asked(exchange)})
    anchor = {} if exchange.anchor is None else {"anchor": pack(exchange.anchor)}

    def message(params: Tensors | None) -> RecordDict:
        return _message(text, {**({} if params is None else {"params": pack(params)}), **anchor})

    if callable(exchange.params):
        return lambda client_id: message(exchange.sent(client_id))
    shared = message(exchange.params)
    return lambda client_id: shared


def _asked(exchange: Exchange[Any]) -> dict[str, Any]:
    return {
        "exchange": exchange.task,
        "request": exchange.request.model_dump(),
        "frozen": sorted(exchange.frozen),
    }


def _message(instructions: str, models: Mapping[str, tuple[bytes, Layout]]) -> RecordDict:
    layouts = json.dumps({name: layout for name, (_, layout) in models.items()})
    manifest = ConfigRecord({"version": WIRE_VERSION, "instructions": instructions, "layout": layouts})
    flat = {name: Array("uint8", (len(data),), "fedbasin.flat", data) for name, (data, _) in models.items()}
    return RecordDict({"manifest": manifest, **{name: ArrayRecord({"flat": array}) for name, array in flat.items()}})


def decode(content: RecordDict, client_id: int) -> ClientUpdate:
    """The update in a reply, its tensors views of the received bytes; Malformed, in one line, when it is none."""
    try:
        return _update(content, client_id)
    except Malformed as error:
        reason = str(error)
    except Exception as error:  # there is no telling what a stranger's bytes may cause
        reason = f"not a reply: {type(error).__name__}: {error}"
    raise Malformed(one_line(reason))


def _update(content: RecordDict, client_id: int) -> ClientUpdate:
    manifest, counts = content.config_records["manifest"], content.metric_records["counts"]
    if (version := manifest["version"]) != WIRE_VERSION:
        raise Malformed(f"wire version {version!r}, this server speaks {WIRE_VERSION}: install one release on both")
    layouts, arrays = json.loads(str(manifest["layout"])), content.array_records
    if layouts.keys() != arrays.keys():
        raise Malformed(f"arrays of {sorted(arrays)}, where the layout describes {sorted(layouts)}")
    tensors = {name: unpack(arrays[name]["flat"].data, layout) for name, layout in layouts.items()}
    return ClientUpdate(
        client_id=client_id,
        name=str(manifest["name"]),
        num_examples=_count(counts["num_examples"]),
        num_grads=_count(counts["num_grads"]),
        estimator=_estimator(manifest["estimator"]),
        metrics={name: float(value) for name, value in content.metric_records["metrics"].items()},  # type: ignore[arg-type]
        **from_tensor_fields(tensors),
    )


def _count(value: object) -> int:
    if type(value) is not int:  # a bool is no count
        raise Malformed(f"a count is {value!r}, not a whole number")
    return value


def _estimator(value: object) -> Estimator | None:
    for known in ESTIMATORS:
        if value == known:
            return known
    if value != "":
        raise Malformed(f"estimator {value!r}: allowed is one of {', '.join(ESTIMATORS)}, or none")
    return None


def forget(content: RecordDict) -> None:
    """Drops the arrays of a message: Flower's records sit in reference cycles, and would wait for the collector."""
    for record in content.array_records.values():
        record.clear()


def nbytes(content: RecordDict) -> int:
    """Bytes of the arrays in a message or reply: what the wire carries, but for a few hundred bytes of envelope."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())
