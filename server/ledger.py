"""What survives a crash: finished rounds, and the replies already admitted to an unfinished one."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
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

REPLY = re.compile(r"\d+-\d+-\d+")  # round, exchange, number
BEGUN = "replies/begun"  # the note of an unfinished round
PARTIAL = ("*.json.partial", "round-*.safetensors.partial", "replies/*.partial")  # what a crash leaves half-written
UNREADABLE = (SafetensorError, OSError, LookupError, TypeError, ValueError)  # what a damaged file raises


class Unwritable(OSError):
    """A file of the ledger could not be written; all that was there before still is."""


@dataclass(eq=False)
class Ledger:
    """A run's folder: `round-0003.safetensors` (θ and memory), `round-0003.json` (the record), `replies/`.

    A round is finished when its record is there; every file appears whole or not at all, and stays after a power cut.
    """

    folder: Path
    checkpoints: int = 2
    keep_replies: bool = True
    _number: int | None = field(init=False, default=None)  # of the next reply to be kept

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it no other server has the folder; files that a crash left half-written are removed first.

        The lock is the kernel's, which frees it when the process ends, however it does. ValueError, in one line, names
        the server that has it.
        """
        _make(self.folder)
        with _told(f"lock {self.folder}"):
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with _told(f"lock {self.folder}"):
                self._lock(lock)
            with _told(f"clear {self.folder} of what a crash has left"):
                for name in PARTIAL:
                    for partial in self.folder.glob(name):
                        partial.unlink()
            yield
        finally:
            os.close(lock)

    def _lock(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = one_line(os.pread(lock, 200, 0).decode(errors="replace")) or "another server"
            raise ValueError(f"{self.folder} is in use by {holder}: stop it first, or take another folder") from None
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        with suppress(OSError):  # a full disk; the lock holds without a name
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()} since {now}".encode(), 0)

    def save(self, model: GlobalModel, record: Mapping[str, Any]) -> None:
        """Writes θ and memory, then the record with their checksum; then forgets replies and the oldest models."""
        state = {"params": model.params, "memory": model.memory}
        outline = {"outline": json.dumps(_outline(state))}
        data = _safetensors({name: tensor.clone() for name, tensor in _tensors(state)}, outline)
        _write(self._model(model.round), data)
        self.note(self._record(model.round).stem, {**record, "sha256": hashlib.sha256(data).hexdigest()})
        self.forget_replies()
        with _told(f"remove the oldest models of {self.folder}"):
            for old in [round for round in self._rounds("safetensors") if round <= model.round][: -self.checkpoints]:
                self._model(old).unlink()

    def forget_replies(self) -> None:
        """Drops the kept replies, the last one first: whatever stops it, those that are left stand on each other."""
        with suppress(OSError):
            for path in reversed(self._kept("*")):
                path.unlink()
            shutil.rmtree(self._replies)
        self._number = None

    def drop_replies(self, round: int, reason: str) -> None:
        """The same, of a round that was begun, which is told of it in its history."""
        if begun := self._begun(round):
            self.forget_replies()
            self.begin(round, [], [], [*begun["history"], reason])

    def note(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes `name`.json."""
        _write(self.folder / f"{name}.json", json.dumps(content, indent=1).encode())

    def noted(self, name: str) -> dict[str, Any]:
        """What was noted under that name; empty where nothing was, or where it cannot be read."""
        try:
            return dict(json.loads((self.folder / f"{name}.json").read_text()))
        except UNREADABLE:
            return {}

    def latest(self) -> int | None:
        """The last finished round whose model is kept; None in a new run."""
        return max(self._finished(), default=None)

    def begun(self) -> bool:
        """Whether a round was finished or begun here."""
        return bool(self._rounds("json") or self.noted(BEGUN))

    def _finished(self) -> list[int]:
        return sorted(set(self._rounds("safetensors")) & set(self._rounds("json")))

    def restore(self, model: GlobalModel, widths: bool = False) -> GlobalModel:
        """`model` with the latest finished round's parameters, memory and number; itself in a new run.

        A round whose checkpoint is damaged is passed over, to be repeated. ValueError, in one line, where none can be
        read, for parameters of another network, or, unless `widths`, of other widths.
        """
        for round in reversed(self._finished()):
            try:
                state = self._state(round, str(model.device))
            except UNREADABLE as error:
                log.warning("%s is damaged, its round is repeated: %s", self._model(round), one_line(str(error)))
                continue
            for fault in _faults(state["params"], model, widths):
                remedy = "resume it with the task and method that it is of, or start a new run"
                raise ValueError(f"cannot go on from {self._model(round)}: {fault}: {remedy}")
            return replace(model, **state, round=round)
        if max(self._rounds("json"), default=0) > 1:  # else what there is before it is θ_0, which the seed gives
            raise ValueError(f"no checkpoint in {self.folder} can be read: put one back, or start a new run elsewhere")
        return model

    def _state(self, round: int, device: str) -> dict[str, Any]:
        """Params and memory after that round; one of UNREADABLE where they are not what was written."""
        record, path = dict(json.loads(self._record(round).read_text())), self._model(round)
        with path.open("rb") as data:
            if record.get("sha256", found := hashlib.file_digest(data, "sha256").hexdigest()) != found:
                raise ValueError("its checksum is not the one in the round's record")
        with safe_open(path, framework="pt", device=device) as file:
            state: dict[str, Any] = _filled(json.loads(file.metadata()["outline"]), file.get_tensor)
        return state

    def records(self) -> list[dict[str, Any]]:
        """The records of all finished rounds, in order, without any that is damaged."""
        records = (self.noted(self._record(round).stem) for round in self._rounds("json"))
        return [record for record in records if record]

    def begin(self, round: int, cohort: Iterable[int], online: Iterable[int], history: list[str]) -> None:
        """Notes that a round has begun, with whom, of which clients, and what happened to it before."""
        ids = {"cohort": [str(client) for client in cohort], "online": [str(client) for client in online]}
        self.note(BEGUN, {"round": round, **ids, "history": history})

    def cohort(self, round: int) -> set[int]:
        """The clients with which the round was begun before; none where it was not."""
        return {int(client) for client in self._begun(round).get("cohort", [])}

    def online(self, round: int) -> set[int]:
        """The clients that were connected when the round was begun before; none where it was not."""
        return {int(client) for client in self._begun(round).get("online", [])}

    def answered(self, round: int) -> dict[int, str]:
        """The names of the clients whose replies to the round's first exchange are kept, by id."""
        headers = (_header(path) for path in self._kept(f"{round:04d}-00-*"))
        return {int(header["client_id"]): str(header["name"]) for header in headers if header}

    def history(self, round: int) -> list[str]:
        """Why the round is begun again, a line for each time; empty where it was not begun before."""
        if begun := self._begun(round):
            return [*begun["history"], "begun again: the run had stopped in it"]
        return ["begun again: its checkpoint was damaged"] if self._record(round).exists() else []

    def _begun(self, round: int) -> dict[str, Any]:
        note = self.noted(BEGUN)
        return note if note.get("round") == round else {}

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
        if self._number is None:
            self._number = max((int(path.stem.split("-")[2]) + 1 for path in self._kept("*")), default=0)
        name = f"{round:04d}-{exchange:02d}-{self._number:06d}.safetensors"
        _write(self._replies / name, _safetensors(arrays, {"header": json.dumps(header)}))
        self._number += 1

    def kept(self, round: int, exchange: int) -> Iterator[ClientUpdate]:
        """The replies kept for that exchange, in the order they were admitted.

        One that cannot be read is skipped, and those to later exchanges, which stand on it, are forgotten.
        """
        for path in self._kept(f"{round:04d}-{exchange:02d}-*"):
            try:
                update = _read(path)
            except UNREADABLE as error:
                log.warning("the kept reply %s cannot be read, its client is asked again: %s", path.name, error)
                with _told(f"remove the replies that stand on {path}"):
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
        return [path for path in self._kept(f"{round:04d}-*") if int(path.stem.split("-")[1]) > exchange]

    def _kept(self, names: str) -> list[Path]:
        """The replies of such names, in order; a file that someone copied beside them is none."""
        return sorted(path for path in self._replies.glob(f"{names}.safetensors") if REPLY.fullmatch(path.stem))

    @property
    def _replies(self) -> Path:
        return self.folder / "replies"

    def _rounds(self, kind: str) -> list[int]:
        """The rounds, in order, of which there is a file of that kind."""
        numbers = (path.stem.removeprefix("round-") for path in self.folder.glob(f"round-*.{kind}"))
        return sorted(int(number) for number in numbers if number.isdigit())

    def _model(self, round: int) -> Path:
        return self.folder / f"round-{round:04d}.safetensors"

    def _record(self, round: int) -> Path:
        return self.folder / f"round-{round:04d}.json"


def _write(path: Path, data: bytes) -> None:
    """Writes the file whole or not at all, and waits until it and its name are on disk; Unwritable where that fails."""
    _make(path.parent)
    partial = path.with_name(f"{path.name}.partial")
    with _told(f"write {path}"):
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def _make(folder: Path) -> None:
    """Makes the folder, and its name lasting in the one that it is in; Unwritable where that fails."""
    with _told(f"make {folder}"):
        if folder.is_dir():
            return
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


@contextmanager
def _told(deed: str) -> Iterator[None]:
    """Says in words, as Unwritable, what the operating system refused to do."""
    try:
        yield
    except Unwritable:
        raise
    except OSError as error:
        raise Unwritable(f"cannot {deed}: {error.strerror or error}") from error


def _sync(folder: Path) -> None:
    """Waits until the names in the folder are on disk: else a power cut may undo a rename."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _safetensors(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The file's bytes; no two of the tensors may share their storage."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)


def _header(path: Path) -> dict[str, Any]:
    """What a kept reply says beside its tensors; empty where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(json.loads(file.metadata()["header"]))
    except UNREADABLE:
        return {}


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
