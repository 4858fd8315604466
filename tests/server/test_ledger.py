"""The ledger: what is saved is restored bit for bit; what was torn by a crash is as if it had never been written."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st
from server_toys import population
from toys import fingerprint

import server.ledger
from aggregators.core.update import ClientUpdate, GlobalModel, Moments
from server.ledger import Ledger, Unwritable

MODEL = toys.global_model()
MEMORY: dict[str, Any] = {
    "rounds": 3,
    "rate": 0.1,
    "infinite": float("inf"),
    "momentum": {"second.weight": torch.ones(2, 2, dtype=torch.bfloat16), "first.weight": torch.tensor(2.5)},
    "inner": {"inner": {}, "z": torch.tensor([], dtype=torch.int64), "a": {"deep": {"deeper": torch.tensor(True)}}},
    "": {'quote"': 1, "dot.ted": 2.0},
}


def after(round: int, **changes: Any) -> GlobalModel:
    """A model of that round, unlike any other."""
    return replace(toys.global_model(seed=round), round=round, **changes)


def saved(folder: Path, rounds: int, checkpoints: int = 2) -> Ledger:
    ledger = Ledger(folder, checkpoints)
    for round in range(1, rounds + 1):
        ledger.save(after(round), {"round": round})
    return ledger


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# --- finished rounds ------------------------------------------------------------------------------------------------


def test_a_new_run_restores_the_model_that_it_is_given(tmp_path: Path) -> None:
    assert Ledger(tmp_path).latest() is None
    assert Ledger(tmp_path).restore(MODEL) is MODEL


@pytest.mark.parametrize("precision", toys.PRECISIONS)
def test_a_saved_model_is_restored_bit_for_bit(tmp_path: Path, precision: toys.Precision) -> None:
    """Bfloat16, 0-d and empty tensors, integer and boolean buffers, in their order."""
    model = replace(toys.global_model(precision, seed=5), round=1)
    Ledger(tmp_path).save(model, {})
    restored = Ledger(tmp_path).restore(toys.global_model(precision))
    assert fingerprint(restored.params) == fingerprint(model.params)
    assert restored.round == 1


def test_nested_memory_is_restored_bit_for_bit_in_its_order(tmp_path: Path) -> None:
    Ledger(tmp_path).save(after(1, memory=MEMORY), {})
    memory = Ledger(tmp_path).restore(MODEL).memory
    assert fingerprint(memory) == fingerprint(MEMORY)
    assert type(memory["rounds"]) is int
    assert type(memory["rate"]) is float


names = st.text(max_size=4)
leaves = st.integers() | st.floats() | st.integers(0, 3).map(lambda size: torch.arange(float(size)).to(torch.float16))
memories = st.dictionaries(names, st.recursive(leaves, lambda inner: st.dictionaries(names, inner, max_size=3)))


@given(memory=memories)
def test_any_memory_is_restored(tmp_path_factory: pytest.TempPathFactory, memory: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("run")
    Ledger(folder).save(after(1, memory=memory), {})
    assert fingerprint(Ledger(folder).restore(MODEL).memory) == fingerprint(memory)


def test_params_that_share_their_storage_are_saved(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    model = GlobalModel(params={"a": base[:3], "b": base.view(2, 3).T}, trainable=frozenset({"a"}), round=1)
    Ledger(tmp_path).save(model, {})
    assert fingerprint(Ledger(tmp_path).restore(model).params) == fingerprint(model.params)


def test_what_only_the_task_knows_is_not_restored_but_kept(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    restored = Ledger(tmp_path).restore(MODEL)
    assert restored.probe is MODEL.probe
    assert restored.trainable == MODEL.trainable


def test_only_the_newest_models_are_kept_and_all_records_are(tmp_path: Path) -> None:
    ledger = saved(tmp_path, 5, checkpoints=2)
    models = [name for name in files(tmp_path) if name.endswith(".safetensors")]
    assert models == ["round-0004.safetensors", "round-0005.safetensors"]
    assert [record["round"] for record in ledger.records()] == [1, 2, 3, 4, 5]


def test_rounds_are_in_the_order_of_their_numbers_beyond_four_digits(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, checkpoints=1)
    for round in (9_999, 10_000, 10_001):
        ledger.save(after(round), {"round": round})
    assert ledger.latest() == 10_001
    assert [record["round"] for record in ledger.records()] == [9_999, 10_000, 10_001]


def test_the_latest_finished_round_is_restored(tmp_path: Path) -> None:
    restored = saved(tmp_path, 3).restore(MODEL)
    assert restored.round == 3
    assert fingerprint(restored.params) == fingerprint(after(3).params)


def refusal(ledger: Ledger, model: GlobalModel, widths: bool = False) -> str:
    """Why the run cannot go on from what was saved."""
    with pytest.raises(ValueError, match=r"^[^\n]+, or start a new run$") as refused:
        ledger.restore(model, widths)
    assert "round-0001.safetensors: " in str(refused.value)
    return str(refused.value)


def test_a_model_of_another_task_is_refused_in_one_line_that_names_the_tensor(tmp_path: Path) -> None:
    ledger = saved(tmp_path, 1)
    assert "params lacks w: resume it with the task" in refusal(ledger, replace(MODEL, params={"w": torch.ones(1)}))
    other = replace(MODEL, params={**MODEL.params, "first.weight": torch.ones(6, 5)})
    for widths in (False, True):
        assert "params first.weight has shape (6, 4), asked for (6, 5)" in refusal(ledger, other, widths)


def wider(model: GlobalModel, units: int) -> GlobalModel:
    """The model with so many units in its first layer, the new ones 0."""
    assert model.symmetry is not None
    own = torch.arange(min(units, 6))
    taken = model.symmetry.take(model.params, {"first": own})
    return replace(model, params=model.symmetry.put(taken, {"first": own}, {"first": units}))


def test_a_model_of_other_widths_is_restored_only_where_the_method_changes_widths(tmp_path: Path) -> None:
    ledger, model = Ledger(tmp_path), wider(after(1), 9)
    ledger.save(model, {})
    assert fingerprint(ledger.restore(MODEL, widths=True).params) == fingerprint(model.params)
    assert "params first.weight has shape (9, 4), asked for (6, 4)" in refusal(ledger, MODEL)


def test_a_model_of_no_units_is_refused(tmp_path: Path) -> None:
    Ledger(tmp_path).save(wider(after(1), 0), {})
    assert "first has 0 units" in refusal(Ledger(tmp_path), MODEL, widths=True)


def test_a_model_whose_size_overflows_is_refused(tmp_path: Path) -> None:
    assert MODEL.symmetry is not None
    one = MODEL.symmetry.take(MODEL.params, {"second": torch.arange(1)})
    vast = {name: torch.empty(2**62, 0) for name in one if name.startswith(("first", "norm"))}
    params = {**one, **vast, "second.weight": torch.empty(1, 2**62, 0)}
    Ledger(tmp_path).save(replace(after(1), params=params), {})
    assert "overflow" in refusal(Ledger(tmp_path), MODEL, widths=True)


def test_notes_stand_beside_the_rounds_and_are_none(tmp_path: Path) -> None:
    ledger = saved(tmp_path, 1)
    ledger.note("settings", {"rounds": 3})
    ledger.note("v1.2", {"rounds": 4})
    assert ledger.noted("settings") == {"rounds": 3}
    assert ledger.noted("v1") == {}
    assert json.loads((tmp_path / "settings.json").read_text()) == {"rounds": 3}
    assert json.loads((tmp_path / "v1.2.json").read_text()) == {"rounds": 4}
    assert len(ledger.records()) == 1


# --- crashes while a round is saved ---------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


def killed_at_the(write: int, monkeypatch: pytest.MonkeyPatch, half: bool) -> None:
    """The n-th file is not put in its place; only half of it has been written when `half`."""
    put, calls = os.replace, iter(range(1, 99))

    def replacing(partial: Path, path: Path) -> None:
        if next(calls) < write:
            put(partial, path)
            return
        if half:
            partial.write_bytes(partial.read_bytes()[: partial.stat().st_size // 2])
        raise Killed

    monkeypatch.setattr(os, "replace", replacing)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("write", [1, 2])
@pytest.mark.parametrize("checkpoints", [1, 2])
def test_a_round_torn_while_it_was_saved_falls_back_to_the_last_finished_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoints: int, write: int, half: bool
) -> None:
    """Killed while writing the model, and between the model and its record."""
    ledger = saved(tmp_path, 2, checkpoints)
    with monkeypatch.context() as patched:
        killed_at_the(write, patched, half)
        with pytest.raises(Killed):
            ledger.save(after(3), {"round": 3})
    assert ledger.latest() == 2
    assert fingerprint(ledger.restore(MODEL).params) == fingerprint(after(2).params)
    assert [record["round"] for record in ledger.records()] == [1, 2]
    ledger.save(after(3), {"round": 3})
    assert ledger.restore(MODEL).round == 3


def test_a_crash_before_the_record_keeps_the_rounds_replies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = saved(tmp_path, 1)
    ledger.keep(2, 0, UPDATES[0])
    with monkeypatch.context() as patched:
        killed_at_the(2, patched, half=False)
        with pytest.raises(Killed):
            ledger.save(after(2), {"round": 2})
    assert [update.client_id for update in ledger.kept(2, 0)] == [UPDATES[0].client_id]


def test_files_of_one_round_do_not_share_a_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partials = []

    def noted(partial: Path, path: Path) -> None:
        partials.append(partial.name)
        partial.rename(path)

    monkeypatch.setattr(os, "replace", noted)
    ledger = saved(tmp_path, 1)
    ledger.note("round-0001", {})
    assert len(set(partials)) == 2
    assert all(name.endswith(".partial") for name in partials)


def test_every_rename_is_on_disk_before_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file, its new name, the name in its folder; and the folder's own name where that is new."""
    steps, sync, put = [], os.fsync, os.replace

    def synced(file: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "file")
        sync(file)

    def replaced(partial: Path, path: Path) -> None:
        steps.append("rename")
        put(partial, path)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    Ledger(tmp_path / "runs" / "7").save(after(1), {})
    assert steps == ["folder", "folder", *["file", "rename", "folder"] * 2]


def test_what_a_crash_left_half_written_is_removed_at_the_next_start(tmp_path: Path) -> None:
    ledger = saved(tmp_path, 1)
    ledger.keep(2, 0, UPDATES[0])
    for name in ("round-0002.safetensors", "round-0002.json", "replies/0002-00-000001.safetensors"):
        (tmp_path / f"{name}.partial").write_bytes(b"half")
    assert ledger.latest() == 1
    assert len(list(ledger.kept(2, 0))) == 1
    with ledger.held():
        assert [name for name in files(tmp_path) if name.endswith(".partial")] == []
        assert len(list(ledger.kept(2, 0))) == 1


# --- damage ---------------------------------------------------------------------------------------------------------

Damage = Callable[[bytes], bytes]
DAMAGES: dict[str, tuple[str, Damage]] = {
    "half a model": ("safetensors", lambda data: data[: len(data) // 2]),
    "no model": ("safetensors", lambda data: b""),
    "another format": ("safetensors", lambda data: b"PK" + data[2:]),
    "one bit of a tensor": ("safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "half a record": ("json", lambda data: data[: len(data) // 2]),
    "a record of another kind": ("json", lambda data: b"3"),
}


def damaged(ledger: Ledger, round: int, how: str) -> None:
    kind, damage = DAMAGES[how]
    path = ledger.folder / f"round-{round:04d}.{kind}"
    path.write_bytes(damage(path.read_bytes()))


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_with_a_line(
    tmp_path: Path, warned: list[str], how: str
) -> None:
    ledger = saved(tmp_path, 3)
    damaged(ledger, 3, how)
    restored = ledger.restore(MODEL)
    assert restored.round == 2
    assert fingerprint(restored.params) == fingerprint(after(2).params)
    (line,) = warned
    assert "round-0003.safetensors is damaged, its round is repeated: " in line
    assert ledger.history(3) == ["begun again: its checkpoint was damaged"]
    assert ledger.history(4) == []
    ledger.save(after(3), {"round": 3})
    assert ledger.restore(MODEL).round == 3


def test_before_a_damaged_first_checkpoint_is_the_model_that_the_run_began_with(tmp_path: Path) -> None:
    ledger = saved(tmp_path, 1)
    damaged(ledger, 1, "no model")
    assert ledger.restore(MODEL) is MODEL


@pytest.mark.parametrize("lost", [True, False])
def test_a_run_without_any_checkpoint_that_can_be_read_does_not_start_anew(tmp_path: Path, lost: bool) -> None:
    ledger = saved(tmp_path, 3)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink() if lost else path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"^no checkpoint in [^\n]+ can be read: put one back, or start a new run"):
        ledger.restore(MODEL)


def test_a_damaged_record_is_left_out_of_the_records(tmp_path: Path) -> None:
    ledger = saved(tmp_path, 3)
    damaged(ledger, 2, "half a record")
    assert [record["round"] for record in ledger.records()] == [1, 3]


def test_a_damaged_checkpoint_is_none_of_the_newest_that_are_kept(tmp_path: Path) -> None:
    """The run goes on from round 2, and keeps one checkpoint from now on."""
    ledger = saved(tmp_path, 3)
    damaged(ledger, 3, "no model")
    again = Ledger(tmp_path, checkpoints=1)
    again.save(after(2), {"round": 2})
    assert again.restore(MODEL).round == 2


def test_a_file_that_someone_copied_beside_is_no_round(tmp_path: Path) -> None:
    ledger = saved(tmp_path, 1)
    (tmp_path / "round-0001 (copy).json").write_bytes((tmp_path / "round-0001.json").read_bytes())
    assert ledger.latest() == 1
    assert len(ledger.records()) == 1


# --- one server at a time -------------------------------------------------------------------------------------------


def test_a_second_server_is_refused_in_one_line_that_names_the_folder_and_who_holds_it(tmp_path: Path) -> None:
    with Ledger(tmp_path).held(), pytest.raises(ValueError, match=r"^[^\n]+$") as refused, Ledger(tmp_path).held():
        raise AssertionError("two servers")
    assert f"{tmp_path} is in use by process {os.getpid()} on " in str(refused.value)
    with Ledger(tmp_path).held():
        assert Ledger(tmp_path).latest() is None


def test_a_refused_server_touches_nothing(tmp_path: Path) -> None:
    with Ledger(tmp_path).held():
        (tmp_path / "round-0001.json.partial").write_bytes(b"being written")
        with pytest.raises(ValueError, match="is in use"), Ledger(tmp_path).held():
            pass
        assert (tmp_path / "round-0001.json.partial").read_bytes() == b"being written"


HOLD = "import sys, time; from pathlib import Path; from server.ledger import Ledger\n"
HOLD += "with Ledger(Path(sys.argv[1])).held(): print('held', flush=True); time.sleep(60)"


def test_the_folder_of_a_killed_server_is_free_at_once(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "held\n"
            with pytest.raises(ValueError, match=f"in use by process {server.pid} "), Ledger(tmp_path).held():
                pass
        finally:
            server.kill()
    with Ledger(tmp_path).held():
        assert f"process {os.getpid()} " in (tmp_path / "lock").read_text()


# --- a full disk ----------------------------------------------------------------------------------------------------


def full_at(monkeypatch: pytest.MonkeyPatch, *writes: int) -> None:
    """No room is left for those files, by their number."""
    sync, count = os.fsync, iter(range(1, 999))

    def syncing(file: int) -> None:
        if not stat.S_ISDIR(os.fstat(file).st_mode) and next(count) in writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(os, "fsync", syncing)


@pytest.mark.parametrize("write", [1, 2])
def test_a_full_disk_is_said_in_words_and_leaves_the_finished_rounds_and_the_replies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    ledger = saved(tmp_path, 2)
    ledger.keep(3, 0, UPDATES[0])
    full_at(monkeypatch, write)
    with pytest.raises(Unwritable, match=r"^cannot write \S+round-0003\.\w+: No space left on device$"):
        ledger.save(after(3), {"round": 3})
    assert ledger.restore(MODEL).round == 2
    assert [update.client_id for update in ledger.kept(3, 0)] == [UPDATES[0].client_id]
    assert [name for name in files(tmp_path) if name.endswith(".partial")] == []


def test_a_start_removes_nothing_of_others(tmp_path: Path) -> None:
    """Not in folders within, where another server may be writing, and no download."""
    others = [tmp_path / "7" / "round-0001.json.partial", tmp_path / "film.mkv.partial"]
    (tmp_path / "7").mkdir()
    for other in others:
        other.write_text("half")
    with Ledger(tmp_path).held():
        assert all(other.exists() for other in others)


def test_a_folder_that_cannot_be_made_is_said_in_words(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(Unwritable, match=r"^cannot make \S+runs: File exists$"), Ledger(tmp_path / "runs" / "7").held():
        pass


# --- replies --------------------------------------------------------------------------------------------------------

UPDATES = toys.updates(MODEL, toys.EVERYTHING)


def test_kept_replies_come_back_bit_for_bit_in_the_order_of_their_arrival(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for update in UPDATES:
        ledger.keep(1, 0, update)
    assert [fingerprint(update) for update in ledger.kept(1, 0)] == [fingerprint(update) for update in UPDATES]
    assert [update.client_id for update in UPDATES] == list(toys.IDS)  # which is not their sorted order


def test_more_than_ten_replies_keep_their_order(tmp_path: Path) -> None:
    ledger, cohort = Ledger(tmp_path), population(MODEL, 12)
    for client in reversed(cohort):
        ledger.keep(1, 0, ClientUpdate(client_id=client.client_id, num_examples=1))
    assert [update.client_id for update in ledger.kept(1, 0)] == list(range(12, 0, -1))


def test_a_reply_is_kept_without_looking_at_those_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, looks, glob = Ledger(tmp_path), [], Path.glob

    def looking(folder: Path, pattern: str) -> Iterator[Path]:
        looks.append(pattern)
        return iter(list(glob(folder, pattern)))

    monkeypatch.setattr(Path, "glob", looking)
    for number in range(20):
        ledger.keep(1, 0, ClientUpdate(client_id=number, num_examples=1))
    assert len(looks) == 1


def test_replies_kept_after_a_restart_come_after_those_before(tmp_path: Path) -> None:
    for number in (3, 2, 1):
        Ledger(tmp_path).keep(1, 0, ClientUpdate(client_id=number, num_examples=1))
    assert [update.client_id for update in Ledger(tmp_path).kept(1, 0)] == [3, 2, 1]


def test_replies_are_numbered_anew_in_every_round(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for round in (1, 2):
        ledger.keep(round, 0, UPDATES[0])
        assert (tmp_path / "replies" / f"{round:04d}-00-000000.safetensors").exists()
        ledger.save(after(round), {"round": round})


def test_a_round_that_was_begun_knows_its_cohort_and_its_history(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert (ledger.cohort(1), ledger.history(1)) == (set(), [])
    ledger.begin(1, [2**64 - 1, 7], [], [])
    assert (ledger.cohort(1), ledger.online(1)) == ({2**64 - 1, 7}, set())
    assert (ledger.cohort(2), ledger.online(2), ledger.history(2)) == (set(), set(), [])
    ledger.begin(1, [7], [7, 9], ledger.history(1))
    assert (ledger.cohort(1), ledger.online(1)) == ({7}, {7, 9})
    assert ledger.history(1) == ["begun again: the run had stopped in it"] * 2
    ledger.save(after(1), {"round": 1})
    assert ledger.cohort(1) == set()


def test_an_update_of_empty_and_odd_tensors_is_kept(tmp_path: Path) -> None:
    update = ClientUpdate(
        client_id=2**64 - 1,
        name="münchen\n",
        num_examples=1,
        params={"unused": torch.empty(0, 3)},
        moments={"a|b": Moments(2, torch.ones(1).bfloat16(), torch.zeros(1))},
        metrics={"loss": float("nan")},
    )
    Ledger(tmp_path).keep(1, 0, update)
    (kept,) = Ledger(tmp_path).kept(1, 0)
    assert fingerprint(kept) == fingerprint(update)


def test_replies_are_kept_by_round_and_exchange(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for round, exchange in ((1, 0), (1, 1), (2, 0), (1, 0)):
        ledger.keep(round, exchange, ClientUpdate(client_id=10 * round + exchange, num_examples=1))
    assert [update.client_id for update in ledger.kept(1, 0)] == [10, 10]
    assert [update.client_id for update in ledger.kept(1, 1)] == [11]
    assert [update.client_id for update in ledger.kept(2, 0)] == [20]
    assert list(ledger.kept(2, 1)) == []


def test_an_exchange_is_closed_once_replies_to_a_later_one_are_kept(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.keep(1, 0, UPDATES[0])
    assert not ledger.closed(1, 0)
    ledger.keep(1, 1, UPDATES[0])
    assert ledger.closed(1, 0)
    assert not ledger.closed(1, 1)
    assert not ledger.closed(2, 0)


def test_a_finished_round_forgets_its_replies(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.keep(1, 0, UPDATES[0])
    ledger.save(after(1), {"round": 1})
    assert list(ledger.kept(1, 0)) == []
    assert files(tmp_path) == ["round-0001.json", "round-0001.safetensors"]


@pytest.mark.parametrize("removed", range(5))
def test_replies_whose_forgetting_was_cut_short_leave_none_that_stands_on_a_lost_one(
    tmp_path: Path, removed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, first, second = Ledger(tmp_path), UPDATES[:3], UPDATES[:2]
    for exchange, updates in enumerate((first, second)):
        for update in updates:
            ledger.keep(1, exchange, update)
    unlinks = iter([None] * removed)
    unlink = Path.unlink

    def failing(path: Path) -> None:
        if next(unlinks, OSError) is OSError:
            raise OSError
        unlink(path)

    monkeypatch.setattr(Path, "unlink", failing)
    ledger.forget_replies()
    left = [len([*Ledger(tmp_path).kept(1, exchange)]) for exchange in (0, 1)]
    assert left == [min(3, 5 - removed), max(0, 2 - removed)]


def test_who_has_answered_a_rounds_first_exchange_is_known_by_name(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for exchange, update in enumerate(UPDATES[:2]):
        ledger.keep(1, exchange, update)
    ledger.keep(1, 0, UPDATES[2])
    assert ledger.answered(1) == {UPDATES[0].client_id: UPDATES[0].name, UPDATES[2].client_id: UPDATES[2].name}
    next((tmp_path / "replies").glob("0001-00-*")).write_bytes(b"torn")
    assert ledger.answered(1) == {UPDATES[2].client_id: UPDATES[2].name}
    assert ledger.answered(2) == {}


def test_a_file_that_someone_copied_beside_the_replies_is_none(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.keep(1, 0, UPDATES[0])
    (reply,) = (tmp_path / "replies").iterdir()
    reply.with_name(f"{reply.stem} (copy).safetensors").write_bytes(reply.read_bytes())
    again = Ledger(tmp_path)
    again.keep(1, 0, UPDATES[1])
    assert [update.client_id for update in again.kept(1, 0)] == [update.client_id for update in UPDATES[:2]]


def test_no_reply_is_kept_when_none_is_to_be(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, keep_replies=False)
    ledger.keep(1, 0, UPDATES[0])
    assert files(tmp_path) == []
    assert list(ledger.kept(1, 0)) == []


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """What the ledger's logger said."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    server.ledger.log.addHandler(handler)
    yield lines
    server.ledger.log.removeHandler(handler)


def torn(data: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "half": data[: len(data) // 2],
        "one byte short": data[:-1],
        "of another format": b"PK" + data[2:],
        "without its header": data.replace(b'\\"num_examples\\"', b'\\"num_exmaples\\"'),
        "with another layout": data.replace(b'\\"float32\\"', b'\\"float64\\"'),
        "with a client of no number": data.replace(b'\\"client_id\\": \\"1\\"', b'\\"client_id\\": \\"x\\"'),
    }


@pytest.mark.parametrize("how", torn(b""))
def test_a_kept_reply_that_cannot_be_read_is_skipped_with_a_warning(
    tmp_path: Path, warned: list[str], how: str
) -> None:
    ledger = Ledger(tmp_path)
    for update in UPDATES[:3]:
        ledger.keep(1, 0, update)
    spoilt = sorted((tmp_path / "replies").iterdir())[1]
    data = spoilt.read_bytes()
    assert torn(data)[how] != data
    spoilt.write_bytes(torn(data)[how])
    expected = [fingerprint(UPDATES[0]), fingerprint(UPDATES[2])]
    assert [fingerprint(update) for update in ledger.kept(1, 0)] == expected
    assert len(warned) == 1
    assert spoilt.name in warned[0]


def test_replies_that_stand_on_one_that_cannot_be_read_are_forgotten(tmp_path: Path) -> None:
    """Else its exchange would be closed, and they answers to another cohort's."""
    ledger = Ledger(tmp_path)
    for exchange in (0, 0, 1, 2):
        ledger.keep(1, exchange, UPDATES[exchange])
    (tmp_path / "replies" / "0001-00-000001.safetensors").write_bytes(b"torn")
    assert len(list(ledger.kept(1, 0))) == 1
    assert not ledger.closed(1, 0)
    assert list(ledger.kept(1, 1)) == list(ledger.kept(1, 2)) == []


def test_a_reply_that_was_being_written_when_the_server_died_is_none(tmp_path: Path, warned: list[str]) -> None:
    ledger = Ledger(tmp_path)
    ledger.keep(1, 0, UPDATES[0])
    (tmp_path / "replies" / "0001-00-000001.safetensors.partial").write_bytes(b"half")
    ledger.keep(1, 0, UPDATES[1])
    assert [update.client_id for update in ledger.kept(1, 0)] == [UPDATES[0].client_id, UPDATES[1].client_id]
    assert not ledger.closed(1, 0)
    assert warned == []


# --- formats --------------------------------------------------------------------------------------------------------


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("pickled")

    for module, name in ((pickle, "dump"), (pickle, "dumps"), (pickle, "load"), (pickle, "loads")):
        monkeypatch.setattr(module, name, refuse)
    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, refuse)
    ledger = Ledger(tmp_path)
    ledger.keep(1, 0, UPDATES[0])
    assert len(list(ledger.kept(1, 0))) == 1
    ledger.save(after(1, memory=MEMORY), {"round": 1})
    assert ledger.restore(MODEL).round == 1
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}
