"""What survives a crash: finished rounds, and the replies already admitted to an unfinished one."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from aggregators.core.flat import as_tensor, from_tensor_fields, pack, tensor_fields, unpack
from aggregators.core.update import ClientUpdate, GlobalModel, Memory, Tensors

from .admission import Rejected, mismatches, resized
from .telemetry import one_line

log = logging.getLogger("flwr.fedbasin")


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
        state = {"params": model.params, "memory": model.memory}
        outline = {"outline": json.dumps(_outline(state))}
        _write(self._model(model.round), _safetensors(dict(_tensors(state)), outline))
        _write(self._record(model.round), json.dumps(record, indent=1).encode())
        self.forget_replies()
        for old in self._rounds("safetensors")[: -self.checkpoints]:
            self._model(old).unlink()

    def forget_replies(self) -> None:
        """Drops the kept replies: what they were for is finished."""
        shutil.rmtree(self._replies, ignore_errors=True)

    def note(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes `name`.json."""
        _write(self.folder / f"{name}.json", json.dumps(content, indent=1).encode())

    def latest(self) -> int | None:
        """The last finished round whose model is kept; None in a new run."""
        return max(set(self._rounds("safetensors")) & set(self._rounds("json")), default=None)

    def restore(self, model: GlobalModel, widths: bool = False) -> GlobalModel:
        """`model` with the latest finished round's parameters, memory and number; itself in a new run.

        ValueError, in one line, for parameters of another network, or, unless `widths`, of other widths.
        """
        if (latest := self.latest()) is None:
            return model
        with safe_open(self._model(latest), framework="pt", device=str(model.device)) as file:
            state = _filled(json.loads(file.metadata()["outline"]), file.get_tensor)
        for fault in _faults(state["params"], model, widths):
            remedy = "resume it with the task and method that it is of, or start a new run"
            raise ValueError(f"cannot go on from {self._model(latest)}: {fault}: {remedy}")
        return replace(model, **state, round=latest)

    def records(self) -> list[dict[str, Any]]:
        """The records of all finished rounds, in order."""
        return [json.loads(self._record(round).read_text()) for round in self._rounds("json")]

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
        arrays = {field: as_tensor(data) for field, (data, _) in packed.items()}
        number = len(list(self._replies.glob("*")))
        name = f"{round:04d}-{exchange:02d}-{number:06d}.safetensors"
        _write(self._replies / name, _safetensors(arrays, {"header": json.dumps(header)}))

    def kept(self, round: int, exchange: int) -> Iterator[ClientUpdate]:
        """The replies kept for that exchange, in the order they were admitted.

        One that cannot be read is skipped, and those to later exchanges, which stand on it, are forgotten.
        """
        for path in sorted(self._replies.glob(f"{round:04d}-{exchange:02d}-*.safetensors")):
            try:
                update = _read(path)
            except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
                log.warning("the kept reply %s cannot be read, its client is asked again: %s", path.name, error)
                for later in self._after(round, exchange):
                    later.unlink()
                continue
            yield update
            del update

    def closed(self, round: int, exchange: int) -> bool:
        """Whether replies to a later exchange of the round are kept: they stand on this one's, which takes no more."""
        return bool(self._after(round, exchange))

    def _after(self, round: int, exchange: int) -> list[Path]:
        """The replies kept for later exchanges of the round."""
        replies = self._replies.glob(f"{round:04d}-*.safetensors")
        return [path for path in replies if int(path.name.split("-")[1]) > exchange]

    @property
    def _replies(self) -> Path:
        return self.folder / "replies"

    def _rounds(self, kind: str) -> list[int]:
        """The rounds, in order, of which there is a file of that kind."""
        return sorted(int(path.stem.removeprefix("round-")) for path in self.folder.glob(f"round-*.{kind}"))

    def _model(self, round: int) -> Path:
        return self.folder / f"round-{round:04d}.safetensors"

    def _record(self, round: int) -> Path:
        return self.folder / f"round-{round:04d}.json"


def _write(path: Path, data: bytes) -> None:
    """Writes the file whole or not at all, and waits until it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _safetensors(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    return save({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, metadata)


def _read(path: Path) -> ClientUpdate:
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["header"])
        packed = {field: file.get_tensor(field).numpy().tobytes() for field in header["layout"]}
    fields = {field: unpack(packed[field], layout) for field, layout in header.pop("layout").items()}
    return ClientUpdate(client_id=int(header.pop("client_id")), **header, **from_tensor_fields(fields))


def _key(path: tuple[str, ...]) -> str:
    return json.dumps(path)


def _tensors(state: Memory, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested mappings, each under its path."""
    for name, value in state.items():
        if isinstance(value, Tensor):
            yield _key((*path, name)), value
        elif isinstance(value, Mapping):
            yield from _tensors(value, (*path, name))


def _outline(state: Any) -> Any:
    """Nested mappings with their order and numbers, None in place of each tensor."""
    if isinstance(state, Mapping):
        return {name: _outline(value) for name, value in state.items()}
    return None if isinstance(state, Tensor) else state


def _filled(outline: Any, tensor: Callable[[str], Tensor], path: tuple[str, ...] = ()) -> Any:
    """The inverse: the outline with its tensors."""
    if isinstance(outline, Mapping):
        return {name: _filled(value, tensor, (*path, name)) for name, value in outline.items()}
    return tensor(_key(path)) if outline is None else outline


def _faults(params: Tensors, model: GlobalModel, widths: bool) -> Iterator[str]:
    """Why these are no tensors of the model's network, of any width if `widths`."""
    try:
        yield from mismatches("params", params, resized(model, params, {}) if widths else model.params)
    except (Rejected, RuntimeError) as error:
        yield one_line(str(error))
