"""The command: what it tells of every method, and a federation in this process."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from flwr.common.config import parse_config_args
from rich.cells import cell_len
from torch import Tensor, nn
from toys import EVERYTHING, clients
from typer.testing import CliRunner

from aggregators.core.base import CohortAggregator
from aggregators.core.exchange import Exchange, Question, collect
from aggregators.core.flat import tensor_fields
from aggregators.core.registry import methods
from aggregators.core.symmetry import Symmetry
from aggregators.core.update import GlobalModel
from client.task import Examples, Node, Task
from server import loopback
from server.catalogue import answered, describe, example, upload
from server.cli import app
from server.ledger import Ledger
from server.settings import from_run_config

every_kind = pytest.mark.parametrize("kind", methods())


def printed(*arguments: str, code: int = 0) -> str:
    """What the command prints, its tables' lines and line breaks as spaces."""
    finished = CliRunner().invoke(app, arguments)
    assert finished.exit_code == code, finished.output
    return " ".join(re.sub("[│┃┏┓┡┩└┘━─┳╇┴╭╮╰╯]", " ", finished.output).split())


# --- what a method says of itself -------------------------------------------------------------------------------


@every_kind
def test_every_method_says_what_it_is_by_which_formula_and_from_which_paper(kind: str) -> None:
    about = describe(methods()[kind])
    assert about.summary
    assert re.search("[=←]", about.formula), f"{kind}: write its formula, a sentence with =, into its docstring"
    assert about.papers, f"{kind}: end its docstring with `Source: authors year, title, place.`"


class Plain(CohortAggregator):
    """The first client's model,
    whatever it is.

    It is θ* = θ_1 of the cohort, where θ_1 is the first, e.g. by id. α = 0 is not allowed.
    Source: Doe et al. 2019, "Firsts", eq. 1; Roe and Poe 2021, "Seconds", 3rd edition,
    section 2; ours. Time O(D).
    """


class Silent(CohortAggregator):
    pass


def test_a_description_is_read_from_the_docstring() -> None:
    about = describe(Plain)
    assert about.summary == "The first client's model, whatever it is"
    assert about.formula == "It is θ* = θ_1 of the cohort"
    assert about.source == 'Doe et al. 2019, "Firsts", eq. 1; Roe and Poe 2021, "Seconds", 3rd edition, section 2; ours'
    assert about.papers == ["Doe et al. 2019", "Roe and Poe 2021"]


def test_what_a_docstring_lacks_is_empty() -> None:
    assert describe(Silent) == ("", "", "")
    assert describe(Silent).papers == []


# --- what clients send ------------------------------------------------------------------------------------------

INPUTS, OUTPUTS = 6, 5
MODEL = GlobalModel(
    params={"a.weight": torch.zeros(OUTPUTS, INPUTS), "a.bias": torch.zeros(OUTPUTS)},
    trainable=frozenset({"a.weight", "a.bias"}),
)


def sent(question: Question) -> int:
    """The bytes of all tensors that a client answers."""
    exchange = Exchange(task=question.task, params=MODEL.params, request=question.request, fold=collect)
    (client,) = clients(MODEL, num=1)
    fields = {name: values for name, values in tensor_fields(client.reply(exchange)).items() if name != "class_counts"}
    return sum(tensor.nbytes for tensors in fields.values() for tensor in tensors.values())


def told(text: str) -> int:
    """The bytes that `8 a parameter, 4i² + 4o² a layer` means for the model."""
    numbers = re.fullmatch(r"(\d+) a parameter(?:, (.*) a layer)?", text)
    assert numbers
    size = sum(tensor.numel() for tensor in MODEL.params.values())
    terms = re.findall(r"(\d+)(i²|o²|o|)", numbers[2] or "")
    values = {"i²": (INPUTS + 1) ** 2, "o²": OUTPUTS**2, "o": OUTPUTS, "": 1}
    return int(numbers[1]) * size + sum(int(factor) * values[power] for factor, power in terms)


@every_kind
def test_the_bytes_told_are_those_sent(kind: str) -> None:
    questions = [*example(kind).questions()]
    assert told(upload(questions)) == sum(map(sent, questions)) > 0


@pytest.mark.parametrize("task", ["train", "measure"])
def test_of_every_statistic_the_bytes_told_are_those_sent(task: Any) -> None:
    question = Question(task, EVERYTHING.model_copy(update={"class_counts": False}))
    assert told(upload([question])) == sent(question)
    assert answered(question).removeprefix("weights, ") == "Σg, Σg², 2 sketches, Σxxᵀ, Σδδᵀ, moments, corr(a, b)"


def test_an_evaluation_costs_no_bytes() -> None:
    assert answered(Question("evaluate")) == "metrics"
    assert upload([Question("train"), Question("evaluate")]) == "4 a parameter"


# --- the command ------------------------------------------------------------------------------------------------


def test_the_methods_are_listed_in_120_columns_with_paper_formula_statistics_and_bytes() -> None:
    listed = CliRunner().invoke(app, ["methods"]).output
    assert max(map(cell_len, listed.splitlines())) <= 120
    rows = {row.split()[1]: row for row in re.split("[├┡].*[┤┩]", listed)[1:]}
    assert [*rows] == [*methods()]
    for said in ("weights, Σg²", "8 a parameter", "P_k = λ_k n_k F_k^γ", "Raffel 2022"):
        assert said in rows["fisher"]


def test_one_method_is_shown_with_its_docstring_and_every_setting() -> None:
    said = printed("methods", "fisher")
    assert "A coordinate without information takes c." in said
    assert "damping 0.1 number from 0 λ over the mean summed precision" in said
    assert "prior mean mean, bayes, target what damping pulls towards" in said
    assert "max_grads null whole number from 1 or null" in said
    assert "coefficients {} by client: number from 0" in said
    assert "1 train weights, Σg² 8 a parameter" in said


def test_a_method_of_methods_is_shown_with_its_first_inner_one() -> None:
    assert 'inner {"kind": "fisher"} a method' in printed("methods", "coefficient_search")


def test_a_configured_method_is_shown_with_what_it_asks_as_it_is_set() -> None:
    config = {"kind": "wise_ft", "weighting": "fisher", "alpha": 0.25, "inner": {"kind": "fisher", "temper": 0.5}}
    said = printed("methods", json.dumps(config))
    assert 'inner {"kind": "fisher", "temper": 0.5}' in said
    assert "alpha 0.25 number from 0 to 1" in said
    assert "1 train weights, Σg² 8 a parameter 2 measure Σg² 4 a parameter" in said


@pytest.mark.parametrize("arguments", [("methods", "fishr"), ("simulate", "--aggregator", "fishr")], ids=" ".join)
def test_a_method_that_is_unknown_is_refused_with_the_nearest(arguments: tuple[str, ...]) -> None:
    assert "unknown aggregation method 'fishr' (did you mean 'fisher'?)" in printed(*arguments, code=2)


# --- the groups of a task's network -----------------------------------------------------------------------------


class Flattened(Task):
    """A recurrent network and one of maps, side by side; the first layer stays with the client."""

    private: ClassVar[tuple[str, ...]] = ("alone.*",)

    def model(self) -> nn.Module:
        return Beside()

    def data(self, node: Node) -> tuple[Examples, Examples]:
        raise NotImplementedError

    def example(self) -> Tensor:
        return torch.zeros(2, 3, 4)


class Distant(Flattened):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), Distances())


class Fixed(Flattened):
    def model(self) -> nn.Module:
        return nn.Linear(4, 3)


class Mistaken(Flattened):
    def symmetry(self, model: nn.Module) -> Symmetry:
        return Symmetry({"maps.bias": ("maps",)})


class Beside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alone, self.maps = nn.Linear(4, 5), nn.Conv1d(3, 6, 2)
        self.cell, self.head = nn.RNN(5, 7, bidirectional=True, batch_first=True), nn.Linear(24 + 14, 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.maps(nn.functional.pad(x, (0, 1))).flatten(1)
        return self.head(torch.cat([maps, self.cell(self.alone(x))[0][:, -1]], dim=1))


class Distances(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, x)


def test_the_groups_of_a_network_are_shown_with_what_they_move_and_what_stays() -> None:
    said = printed("symmetry", "digits")
    assert "hidden1 64 yes hidden1.weight[0], hidden1.bias[0], hidden2.weight[1]" in said
    assert re.search(r"2 groups of 128 units, traced in \d+\.\d\d s, verified in \d+\.\d\d s\.", said)
    assert "stay in place: hidden1.weight[1], output.weight[0], output.bias[0]." in said


def test_groups_are_shown_in_120_columns_with_their_blocks_and_without_private_ones() -> None:
    listed = CliRunner().invoke(app, ["symmetry", f"{__name__}:Flattened"]).output
    assert max(map(cell_len, listed.splitlines())) <= 120
    said = printed("symmetry", f"{__name__}:Flattened")
    assert "maps 6 yes maps.weight[0], maps.bias[0], head.weight[1: maps × 4 + cell + cell#2]" in said
    assert "3 groups of 20 units" in said
    assert "alone" not in said


def test_a_network_without_groups_is_shown_as_such() -> None:
    assert "0 groups of 0 units" in printed("symmetry", f"{__name__}:Fixed")


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("digts", "unknown task 'digts' (did you mean 'digits'?)"),
        (f"{__name__}:Distant", "1 (Distances): no rule for the operation cdist.default; give the task a `symmetry`"),
        (
            f"{__name__}:Mistaken",
            "symmetry: permuting the group 'maps' changes the outputs: give the task a",
        ),
    ],
)
def test_what_has_no_groups_to_show_is_refused_with_the_reason(task: str, reason: str) -> None:
    assert reason in printed("symmetry", task, code=2)


def test_a_federation_is_simulated() -> None:
    said = printed("simulate", "--rounds", "1", "--clients", "2")
    assert "round 1: train, asking 2 clients" in said


# --- a run that stopped before its end ------------------------------------------------------------------------------


def interrupted(monkeypatch: pytest.MonkeyPatch, folder: Path, reply: int) -> str:
    """What is printed of a simulation to which a signal comes in the n-th reply."""
    respond, replies = loopback.respond, iter(range(1, 99))

    def answer(*args: Any) -> Any:
        if next(replies) == reply:
            signal.raise_signal(signal.SIGTERM)
        return respond(*args)

    with monkeypatch.context() as patched:
        patched.setattr(loopback, "respond", answer)
        return printed("simulate", "--rounds", "2", "--clients", "2", "--folder", str(folder))


def test_a_simulation_that_was_parked_exits_with_0_and_says_how_to_go_on_and_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed("simulate", "--rounds", "2", "--clients", "2", "--folder", str(tmp_path / "a"))
    said = interrupted(monkeypatch, tmp_path / "b", reply=4)
    assert f"parked, nothing is lost; to go on: fedbasin resume {tmp_path / 'b'}" in said
    assert Ledger(tmp_path / "b").latest() == 1
    assert "fedavg on digits: 8,970 parameters, rounds 2 to 2" in printed("resume", str(tmp_path / "b"))
    model = "round-0002.safetensors"
    assert (tmp_path / "a" / model).read_bytes() == (tmp_path / "b" / model).read_bytes()


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    assert "no run there, or its settings.json is damaged" in printed("resume", str(tmp_path), code=2)


def test_a_folder_that_another_server_has_is_refused(tmp_path: Path) -> None:
    with Ledger(tmp_path).held():
        said = printed("simulate", "--rounds", "1", "--folder", str(tmp_path), code=2)
    assert "is in use by process" in said


def test_a_folder_that_cannot_be_written_is_said_in_a_line_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    said = CliRunner().invoke(app, ["simulate", "--rounds", "1", "--folder", str(tmp_path / "runs" / "7")])
    assert isinstance(said.exception, SystemExit)  # no traceback
    assert said.exit_code == 1
    (line,) = said.stderr.splitlines()
    assert line.startswith(f"cannot make {tmp_path / 'runs'}: File exists: all that was finished is whole: mend")
    assert line.endswith("then start it again")


@pytest.fixture
def under_flower(tmp_path: Path) -> Path:
    """The folder of a run under Flower."""
    settings = from_run_config({"rounds": 9, "aggregator": "fisher", "training.epochs": 2, "device": "cpu"})
    Ledger(tmp_path).note("settings", settings.model_dump(mode="json", by_alias=True))
    return tmp_path


def resumed(command: list[str], folder: Path) -> bool:
    """Whether the command begins a run of the same settings that goes on with the folder."""
    config = parse_config_args([command[command.index("-c") + 1]])
    expected = {"rounds": 9, "aggregator": "fisher", "training.epochs": 2, "device": "cpu", "resume": str(folder)}
    return from_run_config(config) == from_run_config(expected)


def test_a_run_on_a_device_that_this_machine_lacks_is_resumed_where_it_runs(under_flower: Path) -> None:
    noted = {**Ledger(under_flower).noted("settings"), "device": "cuda:9"}
    Ledger(under_flower).note("settings", noted)
    command = shlex.split(CliRunner().invoke(app, ["resume", str(under_flower)]).output.splitlines()[-1])
    assert parse_config_args([command[-1]])["device"] == "cuda:9"


def test_a_run_under_flower_is_resumed_by_a_command_that_is_printed(under_flower: Path) -> None:
    said = CliRunner().invoke(app, ["resume", str(under_flower)]).output
    command = shlex.split(said.splitlines()[-1])
    assert command[:4] == ["flwr", "run", ".", "FEDERATION"]
    assert resumed(command, under_flower)


def test_a_run_under_flower_is_resumed_as_a_new_run_of_the_federation_that_is_named(
    under_flower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def ran(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        commands.append([str(part) for part in command])
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", ran)
    printed("resume", str(under_flower), "site", "--app", "/apps/ours", code=3)
    (command,) = commands
    assert command[0].endswith("/flwr")
    assert command[1:4] == ["run", "/apps/ours", "site"]
    assert resumed(command, under_flower)
