"""The compose file, the image and the scripts in it, as far as they can be told without an engine."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.healthcheck import ADDRESS, serving

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
COMPOSE = (ROOT / "docker-compose.yml").read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE)["services"]
LASTING = {name: service for name, service in SERVICES.items() if service.get("restart")}
NETWORKS: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE)["networks"]
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def options(name: str) -> str:
    command = SERVICES[name]["command"]
    return command if isinstance(command, str) else " ".join(command)


def filled_in(text: str, **settings: str) -> str:
    """The text as compose reads it with these settings, for the two forms of a variable that concern a pinned app."""
    text = re.sub(r"\$\{(\w+):\+([^}]*)\}", lambda found: found[2] if settings.get(found[1]) else "", text)
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: settings.get(found[1]) or found[2], text)


def of_profile(profile: str) -> list[str]:
    return [name for name, service in SERVICES.items() if profile in service["profiles"]]


# --- what is reachable ------------------------------------------------------------------------


def test_nothing_but_the_fleet_api_is_published() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"superlink", "superlink-plaintext"}
    assert all(port.endswith(":9092") for ports in published.values() for port in ports)


def test_without_encryption_nothing_is_reachable_from_other_hosts() -> None:
    assert [port.split(":")[0] for port in SERVICES["superlink-plaintext"]["ports"]] == ["127.0.0.1"]


@pytest.mark.parametrize("superlink", ["superlink", "superlink-plaintext"])
def test_the_control_api_listens_where_no_client_is(superlink: str) -> None:
    assert "--host control " in options(superlink)
    networks = SERVICES[superlink]["networks"]
    assert "control" in networks["control"]["aliases"]
    assert "control" not in (networks["fleet"] or {}).get("aliases", [])
    assert NETWORKS["control"] == {"internal": True}
    on_control = {name for name, service in SERVICES.items() if "control" in service["networks"]}
    assert not {name for name in on_control if name.startswith(("supernode", "client"))}


def test_only_plaintext_services_are_insecure_beyond_their_own_host() -> None:
    insecure = {name for name in SERVICES if "--insecure" in options(name)}
    inside = {name for name in insecure if list(SERVICES[name]["networks"]) == ["runtime"]}
    assert inside == {"clientapp", "clientapp-gpu"}
    assert insecure - inside == set(of_profile("plaintext"))


def test_the_superlink_knows_its_supernodes_by_key_and_its_executor_by_secret() -> None:
    assert "--enable-supernode-auth" in options("superlink")
    for name in ("superlink", "serverapp", "serverapp-gpu"):
        assert "--superexec-auth-secret-file /run/secrets/superexec" in options(name)


@pytest.mark.parametrize("executor", ["clientapp", "clientapp-gpu"])
def test_what_runs_an_app_on_a_clients_host_has_its_data_but_neither_key_nor_way_out(executor: str) -> None:
    assert SERVICES[executor]["networks"] == ["runtime"]
    assert NETWORKS["runtime"] == {"internal": True}
    assert "secrets" not in SERVICES[executor]
    assert all(volume.endswith(":ro") for volume in SERVICES[executor]["volumes"])
    assert "volumes" not in SERVICES["client"]


@pytest.mark.parametrize("executor", ["clientapp", "clientapp-gpu"])
def test_where_an_app_is_pinned_the_executor_finds_the_pinning_program_and_no_other(executor: str) -> None:
    copied = re.search(r"^COPY deploy/pinned.py (\S+)/flwr-clientapp$", DOCKERFILE, re.MULTILINE)
    assert copied
    assert filled_in(options(executor), REVIEWED="./app").startswith(f"env PATH={copied[1]} /opt/fedbasin/bin/")
    volumes = [filled_in(volume, REVIEWED="./app") for volume in SERVICES[executor]["volumes"]]
    assert f"./app:{copied[1]}/app:ro" in volumes


def test_unless_an_app_is_pinned_the_executor_has_the_images_path() -> None:
    assert filled_in(options("clientapp")).split()[:2] == ["env", "/opt/fedbasin/bin/flower-superexec"]


def test_secrets_are_files() -> None:
    assert all(set(secret) == {"file"} for secret in yaml.safe_load(COMPOSE)["secrets"].values())


# --- how it runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_read_only_limited_and_without_privileges(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert set(service["deploy"]["resources"]["limits"]) == {"memory", "pids"}


def test_all_but_commands_are_restarted_and_asked_for_their_health() -> None:
    assert set(SERVICES) - set(LASTING) == {"register", "cli", "cli-plaintext"}
    for name, service in LASTING.items():
        assert service["restart"] == "always"
        assert service["healthcheck"]["test"] == ["CMD-SHELL", "python3 /opt/fedbasin/deploy/healthcheck.py"]
        assert f"--health-server-address {ADDRESS}" in options(name).replace("=", " ")


def test_the_superlinks_state_is_on_a_volume_and_its_apps_run_elsewhere() -> None:
    for name in ("superlink", "superlink-plaintext"):
        assert "--isolation process" in options(name)
        assert "--database state/superlink.db" in options(name)
        assert any(volume.endswith(":/var/lib/fedbasin/state") for volume in SERVICES[name]["volumes"])


def test_what_is_to_compute_on_gpus_has_them() -> None:
    for name in ("serverapp-gpu", "supernode-gpu", "clientapp-gpu"):
        (device,) = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        assert SERVICES[name]["image"].endswith("-cuda")
        assert SERVICES[name]["build"]["args"]["TORCH"].startswith("${TORCH_CUDA")


def test_the_example_of_settings_names_every_one_with_its_default() -> None:
    example = (ROOT / ".env.example").read_text()
    for name, default in re.findall(r"\$\{(\w+):?-([^}]*)\}", COMPOSE):
        said = "" if default == "/dev/null" else default  # nothing is mounted
        assert re.search(rf"^#?{name}={re.escape(said)}(\s|$)", example, re.MULTILINE), name


# --- the image --------------------------------------------------------------------------------


def test_the_image_stands_on_a_base_pinned_by_digest_and_on_the_lock() -> None:
    assert re.search(r"^ARG BASE=python:3\.11\.\d+-slim-\w+@sha256:[0-9a-f]{64}$", DOCKERFILE, re.MULTILINE)
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) == ["${BASE}"] * 2
    installs = re.findall(r"pip install(?:.|\\\n)*?(?=&&|\n[A-Z])", DOCKERFILE)
    assert installs
    assert all("constraint requirements.lock" in install for install in installs)


def test_no_certificate_key_or_record_goes_into_an_image() -> None:
    first, *kept = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert first == "*"
    assert not any(re.match(r"!(runs|\.env)", line) for line in kept)
    assert all(re.fullmatch(r"!deploy/[\w*]+\.(sh|toml|py)", line) for line in kept if line.startswith("!deploy"))


# --- the health check -------------------------------------------------------------------------


class Health(health_pb2_grpc.HealthServicer):
    def __init__(self, status: int) -> None:
        self.status = status

    def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        return health_pb2.HealthCheckResponse(status=self.status)


@contextmanager
def health_service(status: int) -> Iterator[str]:
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        health_pb2_grpc.add_HealthServicer_to_server(Health(status), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(0).wait()


@pytest.mark.parametrize(("status", "healthy"), [(SERVING, True), (NOT_SERVING, False)])
def test_healthy_is_who_says_that_it_serves(status: int, healthy: bool) -> None:
    with health_service(status) as address:
        assert serving(address) is healthy


def test_who_does_not_answer_is_not_healthy() -> None:
    with health_service(SERVING) as address:
        pass
    assert not serving(address, seconds=0.5)


# --- the scripts ------------------------------------------------------------------------------


@dataclass
class Scripts:
    """Runs the image's scripts with stand-ins of Flower's programs first in PATH."""

    programs: Path
    started: ExitStack

    def stand_in(self, name: str, body: str) -> None:
        (self.programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (self.programs / name).chmod(0o755)

    def start(self, script: str, *arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [DEPLOY / script, *map(str, arguments)],
            env={**os.environ, "PATH": f"{self.programs}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.enter_context(process)
        self.started.callback(process.terminate)
        return process


@pytest.fixture
def scripts(tmp_path: Path) -> Iterator[Scripts]:
    (programs := tmp_path / "bin").mkdir()
    with ExitStack() as started:
        scripts = Scripts(programs, started)
        scripts.stand_in("flower-supernode", 'echo "$@"; exec sleep 60')
        scripts.stand_in("flower-superexec", "exec sleep 60")
        yield scripts


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def site_of(process: subprocess.Popen[str]) -> int:
    found = re.search(r"partition-id=(\d+)", first_line(process))
    assert found
    return int(found[1])


def test_supernodes_on_one_host_become_different_sites(tmp_path: Path, scripts: Scripts) -> None:
    assert {site_of(scripts.start("supernode.sh", tmp_path, 3)) for _ in range(3)} == {0, 1, 2}


def test_more_supernodes_than_sites_end_in_words(tmp_path: Path, scripts: Scripts) -> None:
    site_of(scripts.start("supernode.sh", tmp_path, 1))
    late = scripts.start("supernode.sh", tmp_path, 1)
    assert "all 1 sites" in first_line(late)
    assert late.wait(10) == 1


def test_the_site_of_a_supernode_that_ended_is_free(tmp_path: Path, scripts: Scripts) -> None:
    first = scripts.start("supernode.sh", tmp_path, 1)
    assert site_of(first) == 0
    first.terminate()
    first.wait(10)
    assert site_of(scripts.start("supernode.sh", tmp_path, 1)) == 0


def test_a_site_with_a_key_shows_it(tmp_path: Path, scripts: Scripts) -> None:
    (tmp_path / "site-0").write_text("a key")
    said = first_line(scripts.start("supernode.sh", tmp_path, 1, "--grpc-rere"))
    assert said.startswith("--grpc-rere ")
    assert f"--auth-supernode-private-key {tmp_path}/site-0 " in said


@pytest.mark.parametrize("mortal", ["flower-supernode", "flower-superexec"])
def test_a_site_ends_with_either_of_its_processes(tmp_path: Path, scripts: Scripts, mortal: str) -> None:
    scripts.stand_in(mortal, "sleep 0.5; exit 3")  # bash may miss one that ends as it starts to wait
    assert scripts.start("supernode.sh", tmp_path, 1).wait(10) == 3


def test_told_to_stop_an_executor_waits_until_its_serverapps_have_parked(tmp_path: Path, scripts: Scripts) -> None:
    scripts.stand_in("flower-superexec", "flwr-serverapp & exec sleep 60")
    park = f"sleep 0.5; kill -0 $PPID && echo parked >{tmp_path}/said; exit"
    scripts.stand_in("flwr-serverapp", f"trap '{park}' TERM; echo ready; while :; do sleep 0.1; done")
    process = scripts.start("serverapp.sh")
    assert first_line(process) == "ready\n"
    process.terminate()
    assert process.wait(10) == 0
    assert (tmp_path / "said").read_text() == "parked\n"


def test_without_a_serverapp_an_executor_stops_at_once(scripts: Scripts) -> None:
    scripts.stand_in("flower-superexec", "echo $@; exec sleep 60")
    process = scripts.start("serverapp.sh", "--insecure")
    assert first_line(process) == "--insecure\n"
    process.terminate()
    assert process.wait(10) == 0


def test_told_to_stop_while_its_executor_starts_a_container_ends_well(scripts: Scripts) -> None:
    scripts.stand_in("flower-superexec", "kill $PPID; exec sleep 60")
    started = [scripts.start("serverapp.sh") for _ in range(50)]  # the signal hits any point of the start
    assert [process.wait(10) for process in started] == [0] * 50


def test_an_executor_that_fails_ends_its_container(scripts: Scripts) -> None:
    scripts.stand_in("flower-superexec", "exit 3")
    assert scripts.start("serverapp.sh").wait(10) == 3


def test_a_key_that_was_registered_before_stays_as_it_is(tmp_path: Path, scripts: Scripts) -> None:
    scripts.stand_in("flwr", 'echo "Public key already in use"; exit 1')
    (tmp_path / "site-0.pub").touch()
    process = scripts.start("register.sh", tmp_path)
    assert (process.communicate(timeout=10)[0], process.returncode) == ("site-0 was registered before\n", 0)


def test_a_key_that_cannot_be_registered_fails_after_the_others(tmp_path: Path, scripts: Scripts) -> None:
    scripts.stand_in("flwr", 'case $3 in */site-0.pub) echo "no SuperLink"; exit 1;; esac; echo "$5 is new"')
    for name in ("site-0.pub", "site-1.pub"):
        (tmp_path / name).touch()
    process = scripts.start("register.sh", tmp_path)
    assert (process.communicate(timeout=10)[0], process.returncode) == ("no SuperLink\nsite-1 is new\n", 1)
