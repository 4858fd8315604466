"""The `fedbasin` command."""

from __future__ import annotations

import time

import typer

from aggregators.core.registry import methods, parse
from client import task as tasks
from server import catalogue, groups, loopback
from server.app import movable
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
) -> None:
    """A federation of simulated clients in this process."""
    try:
        loopback.run(task, parse(aggregator), clients=clients, rounds=rounds, seed=seed)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
