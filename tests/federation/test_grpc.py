"""Federations of real processes: a SuperLink and SuperNodes on loopback, client traffic over gRPC."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import until
from safetensors.torch import load_file

from deploy.local import LocalFederation
from server import loopback

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ROGUE = ROOT / "tests" / "apps" / "rogue"
sys.path.insert(0, str(ROGUE))


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("round-*.json"))]


def finished(federation: LocalFederation, app: Path, config: Mapping[str, Any]) -> Path:
    runs = federation.folder / "runs"
    run = federation.run(app, {**config, "runs-dir": str(runs)})
    assert run["status"] == "finished:completed", run
    return runs / str(run["run-id"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFederation]:
    """An honest client, one that is rogue, and its twin: another process under the same name."""
    nodes: list[dict[str, Any]] = [{"partition-id": 0, "name": "site-0"}]
    nodes += [{"partition-id": 1, "name": "rogue", "rogue": rogue} for rogue in (True, False)]
    with LocalFederation(tmp_path_factory.mktemp("federation"), nodes) as federation:
        yield federation


def test_rubbish_of_every_kind_is_left_out_and_named_and_ends_nothing(site: LocalFederation) -> None:
    from rogue import KINDS

    done = records(finished(site, ROGUE, {"rounds": len(KINDS)}))
    assert [record["status"] for record in done] == ["merged"] * len(KINDS)
    said = {
        "missing tensor": "lacks bias",
        "extra tensor": "more, which was not asked for",
        "misshapen tensor": "bias has shape (1,)",
        "NaN": "bias holds NaN",
        "infinity": "bias holds NaN or infinity",
        "negative squares": "is negative",
        "impossible squares": "Cauchy–Schwarz",
        "no examples": "num_examples is 0",
        "too many examples": "num_examples is 1000000",
        "wrong estimator": "estimator is empirical",
        "no statistics": "grad_sum lacks",
        "wrong version": "wire version 99",
        "an error": "this client has a bad day",
        "not ours": "not a reply",
        "twice": "answered twice",
        "late": "late",
    }
    assert said.keys() == set(KINDS)
    for kind, record in zip(KINDS, done, strict=True):
        (exchange,) = record["exchanges"]
        (left_out,) = exchange["left_out"]
        assert said[kind] in left_out["reason"], (kind, left_out)
        assert left_out["client"].isdigit()
        assert len(exchange["admitted"]) == 2


def test_a_bad_configuration_is_refused_in_one_line_before_any_client_is_woken(site: LocalFederation) -> None:
    runs = site.folder / "refused"
    run = site.run(ROGUE, {"aggregator": '{"kind": "fisher", "dampng": 1}', "runs-dir": str(runs)})
    assert run["status"] == "finished:failed"
    line = next(line for line in site.log(run).splitlines() if "dampng" in line)
    assert "aggregator = " in line
    assert "unknown key 'dampng' (did you mean 'damping'?)" in line
    assert "allowed: coefficients, damping" in line
    assert not runs.exists()


def test_a_client_that_dies_in_mid_round_is_asked_again_when_it_returns(tmp_path: Path) -> None:
    nodes = [{"partition-id": number, "num-partitions": 2, "name": f"site-{number}"} for number in (0, 1)]
    with LocalFederation(tmp_path, nodes) as federation:
        config = {"task": "digits", "rounds": 1, "min-clients": 2, "quorum": 2, "deadline": 180.0}
        run_id = federation.submit(ROOT, {**config, "runs-dir": str(tmp_path / "runs"), "training.epochs": 400})
        federation.wait_for_log("supernode-1", "Start `flwr-clientapp` process")
        federation.kill_node(1)
        federation.start_node(1)
        run = federation.wait(run_id, timeout=300)
        assert run["status"] == "finished:completed"
        (record,) = records(tmp_path / "runs" / str(run["run-id"]))
    (exchange,) = record["exchanges"]
    assert record["status"] == "merged"
    assert sorted(client["name"] for client in exchange["clients"].values()) == ["site-0", "site-1"]


SAME_MODEL: dict[str, dict[str, Any]] = {
    "fedavgm of fisher": {"kind": "fedavgm", "inner": {"kind": "fisher", "estimator": "sampled", "temper": 0.5}},
    "ssf": {"kind": "ssf"},
    "ssf, sketches": {"kind": "ssf", "precision": "sketch", "sketches": 2},
    "regmean": {"kind": "regmean"},
    "kfac": {"kind": "kfac"},
    "wise_ft": {"kind": "wise_ft", "inner": "fisher", "weighting": "fisher"},
    "git_rebasin, repair": {"kind": "git_rebasin", "inner": {"kind": "repair", "inner": "fisher"}},
    "activation_matching of regmean": {"kind": "activation_matching", "inner": "regmean"},
    "batch_norm": {"kind": "batch_norm", "inner": "fedavg", "source": "measure"},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "fedavgm of fisher": {"rounds": 2},
    "git_rebasin, repair": {"start": "own"},
    "activation_matching of regmean": {"start": "own"},
    "batch_norm": {"task": json.dumps({"kind": "digits", "architecture": "convnet_bn"})},
}


def test_loopback_and_grpc_federations_give_the_same_model(tmp_path: Path) -> None:
    nodes = [{"partition-id": number, "num-partitions": 2, "name": f"site-{number}"} for number in (0, 1)]
    with LocalFederation(tmp_path, nodes) as federation:
        for name, method in SAME_MODEL.items():
            settings = {"task": "digits", "rounds": 1, "seed": 3, "device": "cpu", **SETTINGS.get(name, {})}
            folder = finished(federation, ROOT, {**settings, "aggregator": json.dumps(method), "evaluate": False})
            here = loopback.run(settings.pop("task"), method, nodes=nodes, **settings).model
            there = load_file(folder / f"round-{settings['rounds']:04d}.safetensors")
            for tensor, value in here.params.items():
                torch.testing.assert_close(
                    there[json.dumps(["params", tensor])],
                    value,
                    rtol=2e-6,
                    atol=1e-7,
                    msg=lambda m, n=name: f"{n}: {m}",
                )


WIDE = [
    {"partition-id": number, "num-partitions": 3, "name": f"site-{number}", "task.hidden": hidden}
    for number, hidden in enumerate((24, 32, 40))
]


def test_clients_of_three_widths_keep_them_and_the_model_grows(tmp_path: Path) -> None:
    with LocalFederation(tmp_path, WIDE) as federation:
        for method in ({"kind": "fedma"}, {"kind": "ot_fusion", "inner": "fedavg"}):
            settings = {"task": "digits", "rounds": 2, "seed": 3, "device": "cpu", "start": "own"}
            folder = finished(federation, ROOT, {**settings, "aggregator": json.dumps(method)})
            here = loopback.run(settings.pop("task"), method, nodes=WIDE, **settings).model
            there = load_file(folder / "round-0002.safetensors")
            assert len(here.params["hidden1.bias"]) >= 40
            for tensor, value in here.params.items():
                found = there[json.dumps(["params", tensor])]
                torch.testing.assert_close(
                    found, value, rtol=2e-6, atol=1e-6, msg=lambda m, k=method["kind"]: f"{k}: {m}"
                )


def test_a_client_killed_between_the_layers_of_fedma_leaves_the_pass_and_its_units_stay(tmp_path: Path) -> None:
    config = {"task": "digits", "rounds": 1, "min-clients": 3, "quorum": 2, "deadline": 60.0, "start": "own"}
    with LocalFederation(tmp_path, WIDE) as federation:
        run_id = federation.submit(ROOT, {**config, "aggregator": "fedma", "runs-dir": str(tmp_path / "runs")})
        folder = tmp_path / "runs" / run_id
        until(lambda: len([*folder.rglob("0001-00-*.safetensors")]) == 3, timeout=120)
        federation.kill_node(2)
        assert federation.wait(run_id, timeout=300)["status"] == "finished:completed"
        (record,) = records(folder)
    admitted = [len(exchange["admitted"]) for exchange in record["exchanges"]]
    assert record["status"] == "merged"
    assert (admitted[0], admitted[-1]) == (3, 2)
    assert record["metrics"]["units_before.hidden1"] == 40
    assert record["metrics"]["units.hidden1"] >= 40
