"""What survives a crash: finished rounds, and the replies already admitted to an unfinished one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from aggregators.core.flat import from_tensor_fields, pack, tensor_fields, unpack
from aggregators.core.update import ClientUpdate, GlobalModel, Memory


@dataclass(frozen=True)
class Ledger:
    """A run's folder: `round-0003.safetensors` (θ and memory), `round-0003.json` (the record), `replies/`.

    A round is finished when its record is there; every file appears whole or not at all.
    """

    folder: Path
    checkpoints: int = 2
    keep_replies: bool = True

    def save(self, model: GlobalModel, record: Mapping[str, Any]) -> None:
        """Writes θ and memory, then the record; then forgets the round's replies and the oldest models."""
        tensors, numbers = _flatten(model.memory)
        tensors |= {_key("params", name): tensor for name, tensor in model.params.items()}
        metadata = {"round": str(model.round), "numbers": json.dumps(numbers), "order": json.dumps(list(model.params))}
        _write(self._model(model.round), _safetensors(tensors, metadata))
        _write(self._record(model.round), json.dumps(record, indent=1).encode())
        shutil.rmtree(self._replies, ignore_errors=True)
        for old in sorted(self.folder.glob("round-*.safetensors"))[: -self.checkpoints]:
            old.unlink()

    def note(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes `name`.json."""
        _write(self.folder / f"{name}.json", json.dumps(content, indent=1).encode())

    def latest(self) -> int | None:
        """The last finished round whose model is kept; None in a new run."""
        finished = [int(path.stem.removeprefix("round-")) for path in self.folder.glob("round-*.safetensors")]
        return max((round for round in finished if self._record(round).exists()), default=None)

    def restore(self, model: GlobalModel) -> GlobalModel:
        """`model` with the latest finished round's parameters, memory and number; itself in a new run."""
        if (latest := self.latest()) is None:
            return model
        with safe_open(self._model(latest), framework="pt", device=str(model.device)) as file:
            metadata = file.metadata()
            params = {name: file.get_tensor(_key("params", name)) for name in json.loads(metadata["order"])}
            paths = [path for path in map(json.loads, file.keys()) if path[0] == "memory"]
            memory = _unflatten({_key(*path): file.get_tensor(_key(*path)) for path in paths}, metadata["numbers"])
        if params.keys() != model.params.keys():
            raise ValueError(f"the model in {self._model(latest)} is of another task: start a new run")
        return replace(model, params=params, memory=memory, round=latest)

    def records(self) -> list[dict[str, Any]]:
        """The records of all finished rounds, in order."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("round-*.json"))]

    def keep(self, round: int, exchange: int, update: ClientUpdate) -> None:
        """Keeps an admitted reply until its round is finished."""
        if not self.keep_replies:
            return
        packed = {field: pack(tensors) for field, tensors in tensor_fields(update).items()}
        header = {
            "client_id": str(update.client_id),
            "name": update.name,
            "num_examples": update.num_examples,
            "num_grads": update.num_grads,
            "estimator": update.estimator,
            "metrics": dict(update.metrics),
            "layout": {field: layout for field, (_, layout) in packed.items()},
        }
        arrays = {field: torch.frombuffer(bytearray(data), dtype=torch.uint8) for field, (data, _) in packed.items()}
        number = len(list(self._replies.glob("*")))
        name = f"{round:04d}-{exchange:02d}-{number:06d}.safetensors"
        _write(self._replies / name, _safetensors(arrays, {"header": json.dumps(header)}))

    def kept(self, round: int, exchange: int) -> Iterator[ClientUpdate]:
        """The replies kept for that exchange, in the order in which they were admitted."""
        for path in sorted(self._replies.glob(f"{round:04d}-{exchange:02d}-*.safetensors")):
            with safe_open(path, framework="pt") as file:
                header = json.loads(file.metadata()["header"])
                fields = {
                    field: unpack(file.get_tensor(field).numpy().tobytes(), layout)
                    for field, layout in header.pop("layout").items()
                }
            yield ClientUpdate(client_id=int(header.pop("client_id")), **header, **from_tensor_fields(fields))

    @property
    def _replies(self) -> Path:
        return self.folder / "replies"

    def _model(self, round: int) -> Path:
        return self.folder / f"round-{round:04d}.safetensors"

    def _record(self, round: int) -> Path:
        return self.folder / f"round-{round:04d}.json"


def _write(path: Path, data: bytes) -> None:
    """Writes the file whole or not at all, and waits until it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _safetensors(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    return save({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, metadata)


def _key(*path: str) -> str:
    return json.dumps(path)


def _flatten(memory: Memory, path: tuple[str, ...] = ("memory",)) -> tuple[dict[str, Tensor], dict[str, int | float]]:
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, int | float] = {}
    for name, value in memory.items():
        if isinstance(value, Tensor):
            tensors[_key(*path, name)] = value
        elif isinstance(value, Mapping):
            inner_tensors, inner_numbers = _flatten(value, (*path, name))
            tensors |= inner_tensors
            numbers |= inner_numbers
        else:
            numbers[_key(*path, name)] = value
    return tensors, numbers


def _unflatten(tensors: Mapping[str, Tensor], numbers: str) -> Memory:
    memory: dict[str, Any] = {}
    for key, value in {**tensors, **json.loads(numbers)}.items():
        _, *groups, name = json.loads(key)
        place = memory
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return memory
