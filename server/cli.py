"""The `fedbasin` command."""

from __future__ import annotations

import typer

from aggregators.core.registry import methods, parse
from server import catalogue, loopback
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
