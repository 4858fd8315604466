"""Faults, one each, in federations of real processes: the model is that of the undisturbed run, to the bit.

Or a round is lost, which its record says. docs/operations.md tells an operator the same, with the times that it takes.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from processes import until
from relay import Relay
from safetensors.torch import load_file

from client.task import parse
from deploy.local import LocalFederation, make_certs
from server import loopback
from server.app import global_model
from server.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
APP = ROOT / "tests" / "apps" / "unreliable"
sys.path.insert(0, str(APP))
LARGE = json.dumps({"kind": "unreliable:Clouds", "hidden": 2**16})  # 1.3 MB a model
CONFIG = {"task": "unreliable:Clouds", "rounds": 2, "seed": 3, "min-clients": 2, "quorum": 2, "deadline": 240.0}


class Site(LocalFederation):
    """Two clients under names, who obey orders; client 1 speaks through a relay where there is one."""

    def __init__(self, folder: Path, relay: Relay | None = None, tls: Path | None = None) -> None:
        self.relay, self.struck = relay, time.monotonic()
        self.orders, self.runs_dir = folder / "orders", folder / "runs"
        self.orders.mkdir(parents=True)
        nodes = [{"partition-id": k, "name": f"site-{k}", "orders": str(self.orders)} for k in (0, 1)]
        super().__init__(folder, nodes, isolated=True, tls=tls)

    def _supernode(self, number: int) -> list[str]:
        command = super()._supernode(number)
        if self.relay is None or number == 0:
            return command
        self.relay.to = self.fleet
        return [word.replace(f"127.0.0.1:{self.fleet}", f"127.0.0.1:{self.relay.port}") for word in command]

    def bid(self, number: int, order: str) -> None:
        """What client `number` does before its next reply."""
        (self.orders / f"site-{number}.obeyed").unlink(missing_ok=True)
        (self.orders / f"site-{number}").write_text(order)

    def obeys(self, number: int) -> bool:
        """Whether client `number` does so now, or has done so."""
        return (self.orders / f"site-{number}.obeyed").exists()

    def answers(self, number: int) -> list[int]:
        """The rounds of the answers that client `number` has given."""
        return [int(round) for round in (self.orders / f"site-{number}.answers").read_text().split()]

    def let_go(self, number: int) -> None:
        """Client `number`, bidden to stay, replies."""
        (self.orders / f"site-{number}.obeyed").unlink()

    def begin(self, **config: Any) -> tuple[str, Path]:
        """A run's id, and its folder."""
        where = {"runs-dir": str(self.runs_dir), **{key.replace("_", "-"): value for key, value in config.items()}}
        run_id = self.submit(APP, {**CONFIG, **where})
        return run_id, Path(where.get("resume") or Path(where["runs-dir"]) / run_id)

    def finish(self, run_id: str, folder: Path) -> None:
        """Waits for the run's last file, as to ask Flower starts a process each time."""
        until((folder / "evaluation.json").exists, timeout=400)
        rounds = [record["seconds"] for record in records(folder)]
        print(f"{time.monotonic() - self.struck:.0f} s from the last kill to the end; rounds of {rounds} s")  # with -rP
        run = self.wait(run_id)
        assert run["status"] == "finished:completed", self.log(run)

    def resume(self, folder: Path, **config: Any) -> None:
        """Goes on with the run to its end, as another one."""
        self.finish(*self.begin(resume=str(folder), **config))

    def kill(self, name: str) -> None:
        """Kills it, and notes when."""
        self.struck = time.monotonic()
        super().kill(name)

    def kill_apps(self, name: str) -> None:
        """Kills its apps, and notes when."""
        self.struck = time.monotonic()
        super().kill_apps(name)

    def app(self, name: str) -> psutil.Process:
        """The app's process that the executor of that name has started; it leaves its dead ones unburied."""
        children = psutil.Process(self.processes[name].pid).children()
        (process,) = (child for child in children if child.status() != psutil.STATUS_ZOMBIE)
        return process


def kept(folder: Path) -> list[Path]:
    """The replies that are kept of an unfinished round."""
    return [*folder.glob("replies/*.safetensors")]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("round-*.json"))]


def only(record: Mapping[str, Any]) -> dict[str, Any]:
    (exchange,) = record["exchanges"]
    return dict(exchange)


def params(folder: Path, round: int) -> dict[str, torch.Tensor]:
    saved = load_file(folder / f"round-{round:04d}.safetensors")
    return {json.loads(key)[1]: value for key, value in saved.items()}


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def undisturbed(folder: Path, config: Mapping[str, Any] = CONFIG) -> bool:
    """Whether the last model is that of a federation to which nothing happened, in which no round was lost."""
    nodes = [{"partition-id": number, "name": f"site-{number}"} for number in (0, 1)]
    settings = {"aggregator": "fedavg", "evaluate": False, "device": "cpu", **config}
    here = loopback.run(settings.pop("task"), settings.pop("aggregator"), nodes=nodes, **settings)
    merged = all(record["status"] == "merged" for record in records(folder))
    return merged and same(params(folder, settings["rounds"]), here.model.params)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """For faults after which all SuperNodes are what they were."""
    with Site(tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.fixture
def relay() -> Iterator[Relay]:
    with Relay() as relay:
        yield relay


# --- the server -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_serverapp_killed_in_mid_round_is_resumed_with_the_replies_it_had(site: Site) -> None:
    site.bid(1, "stay")
    _, folder = site.begin()
    until(lambda: kept(folder) and site.obeys(1))
    site.kill_apps("superexec")
    site.let_go(1)
    site.resume(folder)
    first, second = records(folder)
    assert first["history"] == ["begun again: the run had stopped in it"]
    assert [*only(first)["kept"].values()] == ["connected"]
    assert second["history"] == []
    assert undisturbed(folder)


@pytest.mark.slow
def test_sigterm_parks_the_round_and_a_new_run_takes_it_up(site: Site) -> None:
    site.bid(1, "stay")
    run_id, folder = site.begin(rounds=1)
    until(lambda: kept(folder) and site.obeys(1))
    site.app("superexec").send_signal(signal.SIGTERM)
    run = site.wait(run_id, timeout=20)  # that of a killed one is over only when its heartbeat is missed
    assert "parked, nothing is lost" in site.log(run)
    site.let_go(1)
    site.resume(folder, rounds=1)
    assert [*only(*records(folder))["kept"].values()] == ["connected"]
    assert undisturbed(folder, {**CONFIG, "rounds": 1})


@pytest.mark.slow
def test_a_second_server_on_the_same_folder_is_refused_and_the_first_goes_on(site: Site) -> None:
    site.bid(1, "stay")
    first, folder = site.begin(rounds=1)
    until(lambda: kept(folder) and site.obeys(1))
    server = site.app("superexec").pid
    second, _ = site.begin(rounds=1, resume=str(folder))
    run = site.wait(second)
    assert run["status"] == "finished:failed"
    assert f"{folder} is in use by process {server} on " in site.log(run)
    site.let_go(1)
    site.finish(first, folder)
    assert only(*records(folder))["kept"] == {}
    assert undisturbed(folder, {**CONFIG, "rounds": 1})


@pytest.mark.slow
def test_a_superlink_that_is_away_when_a_client_replies_gets_the_reply_when_it_is_back(site: Site) -> None:
    site.bid(1, "stay")
    run_id, folder = site.begin(rounds=1)
    until(lambda: kept(folder) and site.obeys(1))
    site.kill("superlink")
    site.let_go(1)
    time.sleep(5)
    site.start("superlink")
    site.finish(run_id, folder)
    (record,) = records(folder)
    assert record["history"] == []
    assert only(record)["left_out"] == []
    assert undisturbed(folder, {**CONFIG, "rounds": 1})


@pytest.mark.chaos
def test_a_disk_full_at_a_checkpoint_ends_the_run_in_words_and_the_round_goes_on_when_there_is_room(
    site: Site, disk: Path
) -> None:
    config = {"rounds": 1, "task": LARGE, "runs_dir": str(disk)}
    run_id, folder = site.begin(**config)
    run = site.wait(run_id)
    assert run["status"] == "finished:failed"
    said = site.log(run)
    assert (
        f"cannot write {folder}/round-0001.safetensors: No space left on device: all that was finished is whole" in said
    )
    assert "make room" in said
    assert len(kept(folder)) == 2
    subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
    site.resume(folder, **config)
    assert sorted(only(*records(folder))["kept"].values()) == ["connected"] * 2
    assert undisturbed(folder, {**CONFIG, "rounds": 1, "task": LARGE})


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system, on which two replies of 1.3 MB find room, and a checkpoint beside them none."""
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no disk to fill, which only root can mount: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


# --- a client's app -------------------------------------------------------------------------------------------------


@pytest.mark.chaos
def test_a_clientapp_whose_process_dies_is_asked_again(site: Site) -> None:
    site.bid(1, "die")
    run_id, folder = site.begin()
    site.finish(run_id, folder)
    assert site.obeys(1)
    assert [only(record)["left_out"] for record in records(folder)] == [[], []]
    assert undisturbed(folder)


@pytest.mark.chaos
def test_a_slow_client_is_waited_for(site: Site) -> None:
    site.bid(1, "sleep 45")
    run_id, folder = site.begin(rounds=1)
    site.finish(run_id, folder)
    (record,) = records(folder)
    assert record["seconds"] > 45
    assert undisturbed(folder, {**CONFIG, "rounds": 1})


@pytest.mark.chaos
def test_a_client_that_hangs_past_the_deadline_loses_the_round_by_name_and_is_back_in_the_next(site: Site) -> None:
    site.bid(1, "sleep 55")
    run_id, folder = site.begin(deadline=45.0)
    site.finish(run_id, folder)
    first, second = records(folder)
    assert (first["status"], second["status"]) == ("lost", "merged")
    assert first["reason"] == "1 good replies, the quorum is 2"
    assert [out["reason"] for out in only(first)["left_out"]] == ["late: no reply within 45 s"]
    assert len(only(second)["admitted"]) == 2
    task = str(CONFIG["task"])
    assert same(params(folder, 1), global_model(parse(task), Settings(task=task, seed=3, device="cpu")).params)


# --- a SuperNode ----------------------------------------------------------------------------------------------------


@pytest.mark.chaos
def test_a_supernode_killed_before_its_reply_is_replaced_by_the_one_started_again(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        site.bid(1, "stay")
        run_id, folder = site.begin(rounds=1)
        until(lambda: kept(folder) and site.obeys(1))
        site.kill_node(1)
        site.start_node(1)
        site.finish(run_id, folder)
    ((left_out,),) = (only(record)["left_out"] for record in records(folder))
    assert "it is gone" in left_out["reason"]
    assert "is asked in its place" in left_out["reason"]
    assert undisturbed(folder, {**CONFIG, "rounds": 1})


@pytest.mark.chaos
def test_a_supernode_with_a_key_killed_during_its_reply_is_asked_again(tmp_path: Path, relay: Relay) -> None:
    with Site(tmp_path, relay, make_certs(tmp_path / "certs", 2)) as site:
        site.bid(1, "stay")
        run_id, folder = site.begin(rounds=1, task=LARGE)
        until(lambda: kept(folder) and site.obeys(1))
        site.let_go(1)
        uploading(relay)
        site.kill_node(1)
        relay.mend()
        site.start_node(1)
        site.finish(run_id, folder)
    assert only(*records(folder))["left_out"] == []
    assert undisturbed(folder, {**CONFIG, "rounds": 1, "task": LARGE})


@pytest.mark.chaos
def test_a_supernode_killed_after_its_reply_costs_nothing_and_comes_back_into_the_next_round(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        site.bid(0, "stay")
        run_id, folder = site.begin()
        until(lambda: kept(folder) and site.obeys(0))
        site.kill_node(1)
        site.start_node(1)
        site.let_go(0)
        site.finish(run_id, folder)
    assert only(records(folder)[0])["left_out"] == []
    assert undisturbed(folder)


# --- the network ----------------------------------------------------------------------------------------------------


def uploading(relay: Relay, share: int = 400_000) -> None:
    """Returns when so many bytes of a reply have gone up, slowly, so that it is in the midst of it."""
    relay.rate, before = 150_000, relay.up
    until(lambda: relay.up - before > share)


@pytest.mark.chaos
def test_an_upload_cut_in_the_midst_is_sent_again(tmp_path: Path, relay: Relay) -> None:
    with Site(tmp_path, relay) as site:
        run_id, folder = site.begin(rounds=1, task=LARGE)
        uploading(relay)
        relay.cut()
        assert relay.up < 10**6
        time.sleep(5)
        relay.mend()
        site.finish(run_id, folder)
    assert undisturbed(folder, {**CONFIG, "rounds": 1, "task": LARGE})


@pytest.mark.chaos
def test_a_client_that_was_given_up_and_returns_answers_twice_and_counts_once(tmp_path: Path, relay: Relay) -> None:
    with Site(tmp_path, relay) as site:
        site.bid(1, "stay")
        run_id, folder = site.begin()
        until(lambda: kept(folder) and site.obeys(1))
        relay.cut()
        site.let_go(1)
        time.sleep(75)
        relay.mend()
        site.finish(run_id, folder)
    assert site.answers(1).count(1) >= 2
    assert [sorted(client["name"] for client in only(record)["clients"].values()) for record in records(folder)] == [
        ["site-0", "site-1"]
    ] * 2
    assert undisturbed(folder)
