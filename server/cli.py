"""The `fedbasin` command."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import typer

from aggregators.core.registry import methods, parse
from client import task as tasks
from server import catalogue, groups, loopback
from server.app import movable
from server.ledger import Ledger, Unwritable
from server.parking import Parked, Parking
from server.settings import overrides, to_run_config
from server.telemetry import console_for_output

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@app.command(name="methods")
def show_methods(
    method: str = typer.Argument("", help="all about this one: a name, or JSON with its settings"),
) -> None:
    """Every aggregation method: what it is, what its clients send, in how many bytes, and its paper."""
    console = console_for_output()
    if not method:
        console.print(catalogue.table())
        return
    try:
        console.print(catalogue.page(catalogue.example(method) if method in methods() else parse(method)))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@app.command(name="symmetry")
def show_symmetry(
    task: str = typer.Argument(help="a task's name, module:Class, or JSON with its options"),
) -> None:
    """The groups of units of a task's model that methods of alignment permute: found, verified, and what stays."""
    from aggregators.core.tracing import verify  # torch.export, which nothing else needs

    try:
        chosen = tasks.parse(task)
        model = chosen.model()
        params = tasks.tensors(model, chosen.private)
        start = time.perf_counter()
        symmetry = movable(chosen, model, params)
        found = time.perf_counter()
        verify(symmetry, model, chosen.example())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    console_for_output().print(groups.page(symmetry, params, found - start, time.perf_counter() - found))


@app.command()
def simulate(
    aggregator: str = typer.Option("fedavg", help="a method's name, or JSON with its hyper-parameters"),
    task: str = typer.Option("digits", help="a task's name, module:Class, or JSON with its options"),
    clients: int = typer.Option(4, min=1, help="how many clients"),
    rounds: int = typer.Option(3, min=1, help="how many rounds"),
    seed: int = typer.Option(0, min=0, help="seed of everything random"),
    *,
    folder: str = typer.Option("", help="where checkpoints and records stay, so that the run can be resumed"),
) -> None:
    """A federation of simulated clients in this process; a signal parks one that has a folder."""
    with _stopping(resumable=bool(folder)) as parking:
        method, place = parse(aggregator), folder or None
        loopback.run(task, method, clients=clients, folder=place, parking=parking, rounds=rounds, seed=seed)


@app.command()
def resume(
    folder: str = typer.Argument(help="the folder of a run that stopped before its end"),
    federation: str = typer.Argument("", help="for a run under Flower: the SuperLink's name in Flower's configuration"),
    bundle: str = typer.Option(".", "--app", help="for a run under Flower: the folder of the app, with pyproject.toml"),
) -> None:
    """Goes on with a run: here where its clients were simulated here, else as a new run of a Flower federation."""
    ledger = Ledger(Path(folder).resolve())
    if ledger.noted("nodes") or not (noted := ledger.noted("settings")):
        with _stopping(resumable=True) as parking:
            loopback.resume(folder, parking)
        return
    config = to_run_config({**noted, "resume": str(ledger.folder)})
    command = ["run", bundle, federation or "FEDERATION", "-c", overrides(config)]
    if not federation:
        typer.echo(f"its clients are a federation's; name it, or:\nflwr {shlex.join(command)}")
        return
    raise typer.Exit(subprocess.run([Path(sys.executable).parent / "flwr", *command], check=False).returncode)


@contextmanager
def _stopping(resumable: bool) -> Iterator[Parking]:
    """What a signal parks a run by that is resumable; why it ends before its time is said in a line."""
    parking = Parking()
    try:
        with parking.signals() if resumable else nullcontext():
            yield parking
    except Parked:
        raise typer.Exit from None
    except Unwritable as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
