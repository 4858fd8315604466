"""The client's side of the wire: what a message asks, and an update as a reply."""

from __future__ import annotations

import json
from typing import Literal

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from pydantic import BaseModel, ConfigDict, JsonValue

from aggregators.core.flat import WIRE_VERSION, pack, tensor_fields, unpack
from aggregators.core.update import ClientUpdate, Request, Tensors


class Instructions(BaseModel):
    """What one exchange asks of one client."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    exchange: Literal["train", "measure", "evaluate"]
    task: str
    request: Request
    training: dict[str, JsonValue]
    frozen: frozenset[str]
    seed: int
    round: int
    evaluate: bool


def decode(content: RecordDict) -> tuple[Instructions, Tensors | None]:
    """The instructions and θ_t of a message, None where the client starts from its own model.

    Raises ValueError when the server speaks another version of the wire.
    """
    manifest = content.config_records["manifest"]
    if (version := manifest.get("version")) != WIRE_VERSION:
        raise ValueError(f"the server speaks wire version {version!r}, this client {WIRE_VERSION}: install one release")
    instructions = Instructions.model_validate_json(str(manifest["instructions"]))
    return instructions, _model(content, "params")


def anchor(content: RecordDict) -> Tensors | None:
    """The model that cross-moments compare the client's with: one sent for this, else θ_t; None if neither was."""
    sent = _model(content, "anchor")
    return _model(content, "params") if sent is None else sent


def _model(content: RecordDict, name: str) -> Tensors | None:
    if name not in content.array_records:
        return None
    layout = json.loads(str(content.config_records["manifest"]["layout"]))[name]
    return unpack(content.array_records[name]["flat"].data, layout)


def encode(update: ClientUpdate) -> RecordDict:
    """The update as one flat array per field, with a manifest (version, names, dtypes, shapes), counts and metrics."""
    packed = {field: pack(tensors) for field, tensors in tensor_fields(update).items()}
    manifest = ConfigRecord(
        {
            "version": WIRE_VERSION,
            "name": update.name,
            "estimator": update.estimator or "",
            "layout": json.dumps({field: layout for field, (_, layout) in packed.items()}),
        }
    )
    content = RecordDict({field: flat_record(data) for field, (data, _) in packed.items()})
    content["manifest"] = manifest
    content["counts"] = MetricRecord({"num_examples": update.num_examples, "num_grads": update.num_grads})
    content["metrics"] = MetricRecord({name: float(value) for name, value in update.metrics.items()})
    return content


def flat_record(data: bytes) -> ArrayRecord:
    """One array of raw bytes: a record of many arrays costs a message object for each."""
    return ArrayRecord({"flat": Array("uint8", (len(data),), "fedbasin.flat", data)})
