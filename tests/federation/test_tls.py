"""Certificates and keys by deploy/certs.sh, and federations over TLS of SuperNodes that are known by their keys."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from shutil import copy, which
from stat import S_IMODE

import pytest

from deploy.local import BIN, QUIET, LocalFederation, free_ports, make_certs

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "deploy" / "certs.sh"


def made(folder: Path, *names: str, sites: int = 1, path: str = os.environ["PATH"]) -> str:
    """What certs.sh says, errors included."""
    arguments = ["-d", str(folder), "-n", str(sites), *names]
    done = subprocess.run([SCRIPT, *arguments], env={"PATH": path}, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def openssl(*arguments: str | Path) -> str:
    return subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=True).stdout


# --- what certs.sh makes --------------------------------------------------------------------------------------------


def test_a_second_run_adds_the_keys_that_are_missing_and_writes_nothing_over(tmp_path: Path) -> None:
    made(tmp_path, sites=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert "site-1" in made(tmp_path, sites=2)
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(path.name for path in (tmp_path / "keys").iterdir()) == [
        *("site-0", "site-0.pub", "site-1", "site-1.pub")
    ]


def test_what_is_private_is_for_its_owner_only_and_for_no_repository(tmp_path: Path) -> None:
    made(tmp_path)
    private = ("ca.key", "server.key", "superexec.secret", "keys/site-0")
    assert {S_IMODE((tmp_path / name).stat().st_mode) for name in private} == {0o600}
    assert (tmp_path / ".gitignore").read_text() == "*\n"


def test_the_certificate_is_for_this_machine_and_for_the_names_given(tmp_path: Path) -> None:
    made(tmp_path, "fl.example.org", "192.0.2.7")
    assert "OK" in openssl("verify", "-x509_strict", "-CAfile", tmp_path / "ca.crt", tmp_path / "server.crt")
    said = openssl("x509", "-in", tmp_path / "server.crt", "-noout", "-ext", "subjectAltName")
    for name in ("DNS:localhost", "DNS:superlink", "Address:127.0.0.1", "DNS:fl.example.org", "Address:192.0.2.7"):
        assert name in said


def test_a_certificate_that_lacks_a_name_is_kept_and_the_remedy_told(tmp_path: Path) -> None:
    made(tmp_path)
    before = (tmp_path / "server.crt").read_bytes()
    said = made(tmp_path, "fl.example.org")
    assert f"is not for fl.example.org: remove {tmp_path}/server.crt, then run this again" in said
    assert (tmp_path / "server.crt").read_bytes() == before


def test_the_public_key_that_a_site_has_sent_is_kept(tmp_path: Path) -> None:
    (sent := tmp_path / "keys" / "site-0.pub").parent.mkdir()
    sent.write_text("of another host")
    made(tmp_path)
    assert sent.read_text() == "of another host"
    assert not (tmp_path / "keys" / "site-0").exists()


def test_an_authoritys_key_may_be_kept_elsewhere_until_it_is_to_sign(tmp_path: Path) -> None:
    made(tmp_path)
    (tmp_path / "ca.key").rename(tmp_path / "safe")
    assert "site-1" in made(tmp_path, sites=2)
    (tmp_path / "server.crt").unlink()
    assert "ca.key is missing, which is to sign server.crt: put it back" in made(tmp_path)
    assert not (tmp_path / "ca.key").exists()


def test_a_certificate_without_its_key_is_told_and_no_other_key_made(tmp_path: Path) -> None:
    made(tmp_path)
    (tmp_path / "server.key").unlink()
    assert f"server.key is not that of {tmp_path}/server.crt: put it back" in made(tmp_path)
    assert not (tmp_path / "server.key").exists()


def test_a_certificate_of_ones_own_authority_needs_the_names_given_only(tmp_path: Path) -> None:
    name = ["-subj", "/CN=fl.example.org", "-addext", "subjectAltName=DNS:fl.example.org"]
    key = ["-newkey", "rsa:2048", "-nodes", "-keyout", tmp_path / "server.key"]
    openssl("req", "-x509", *key, *name, "-out", tmp_path / "server.crt")
    copy(tmp_path / "server.crt", tmp_path / "ca.crt")
    said = made(tmp_path, "fl.example.org")
    assert "superexec.secret" in said
    assert "certs.sh:" not in said
    assert f"{tmp_path}/server.crt is not for superlink" in made(tmp_path, "superlink")


def test_a_tool_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "dirname").symlink_to(str(which("dirname")))
    assert "openssl is missing: install openssl" in made(tmp_path / "certs", path=str(tmp_path / "bin"))
    assert not (tmp_path / "certs").exists()


# --- federations over TLS -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFederation]:
    folder = tmp_path_factory.mktemp("tls")
    nodes = [{"partition-id": number, "num-partitions": 2, "name": f"site-{number}"} for number in (0, 1)]
    with LocalFederation(folder, nodes, tls=make_certs(folder / "certs", sites=3)) as federation:
        yield federation


@pytest.mark.slow
def test_a_federation_over_tls_of_clients_known_by_their_keys_finishes(site: LocalFederation) -> None:
    config = {"rounds": 1, "min-clients": 2, "quorum": 2, "evaluate": False, "runs-dir": str(site.folder / "runs")}
    run = site.run(ROOT, config)
    assert run["status"] == "finished:completed"
    record = json.loads((site.folder / "runs" / str(run["run-id"]) / "round-0001.json").read_text())
    (exchange,) = record["exchanges"]
    assert sorted(client["name"] for client in exchange["clients"].values()) == ["site-0", "site-1"]


def refused(site: LocalFederation, *options: str | Path) -> str:
    """What a SuperNode says that is started with these options and is to end by itself."""
    (port,) = free_ports(1)
    where = [
        "--superlink",
        f"127.0.0.1:{site.fleet}",
        "--port",
        str(port),
        "--max-retries",
        "1",
        "--isolation",
        "process",
    ]
    environment = {**os.environ, **QUIET, "PATH": f"{BIN}:{os.environ['PATH']}", "FLWR_HOME": str(site.folder / "out")}
    command = [BIN / "flower-supernode", *where, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    return done.stdout + done.stderr


def trust(folder: Path) -> tuple[str | Path, ...]:
    return "--root-certificates", folder / "ca.crt"


def key(folder: Path, number: int) -> tuple[str | Path, ...]:
    return "--auth-supernode-private-key", folder / "keys" / f"site-{number}"


@pytest.mark.slow
def test_a_client_does_not_talk_to_a_server_of_another_authority(site: LocalFederation, tmp_path: Path) -> None:
    said = refused(site, *trust(make_certs(tmp_path, sites=0)), *key(site.folder / "certs", 0))
    assert "CERTIFICATE_VERIFY_FAILED" in said


@pytest.mark.slow
def test_a_client_without_tls_is_not_served(site: LocalFederation) -> None:
    said = refused(site, "--insecure")
    assert "Failed to initialize the connection to the SuperLink" in said
    assert "Socket closed" in said


@pytest.mark.slow
def test_an_unknown_key_is_refused_and_so_is_none(site: LocalFederation) -> None:
    certs = site.folder / "certs"
    assert "Failed to activate SuperNode" in refused(site, *trust(certs), *key(certs, 2))
    assert "No SuperNode found with the given public key" in (site.folder / "superlink.log").read_text()
    assert "All SuperNodes must be registered" in refused(site, *trust(certs))
