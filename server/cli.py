"""The `fedbasin` command."""

from __future__ import annotations

import typer
from rich.table import Table

from aggregators.core.registry import methods, parse
from server import loopback
from server.telemetry import console_for_output

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@app.command(name="methods")
def list_methods() -> None:
    """Every aggregation method: its name, its hyper-parameters with defaults, and what it is."""
    rows = Table("method", "hyper-parameters", "what it is", show_lines=True)
    for kind, cls in methods().items():
        fields = {name: field for name, field in cls.model_fields.items() if name != "kind"}
        shown = [
            name if f.is_required() else f"{name} = {f.get_default(call_default_factory=True)!r}"
            for name, f in fields.items()
        ]
        rows.add_row(kind, "\n".join(shown), (cls.__doc__ or "").split("\n\n", 1)[0])
    console_for_output().print(rows)


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
