"""The experiment on skewed federations: what is compared with what, and that its gates see what they are there for."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from aggregators.core.registry import parse
from client.training import Training
from experiments import federated_skew
from experiments.federated_skew import FULL, QUICK, Courses, Mnist14, Plan
from experiments.federation import Course

ROOT = Path(__file__).resolve().parents[2]
PLANS = pytest.mark.parametrize("plan", [FULL, QUICK], ids=["full", "quick"])


@PLANS
def test_every_method_and_its_training_can_be_configured(plan: Plan) -> None:
    for case in federated_skew.cases(plan):
        found = federated_skew.federation(plan, case, seed=0)
        assert parse(found.method).kind == found.method["kind"]
        assert Training(**found.training).epochs == found.training["epochs"]


@PLANS
def test_a_seed_deals_the_same_data_to_every_method(plan: Plan) -> None:
    for skew in plan.skews:
        found = [federated_skew.federation(plan, c, seed=7) for c in federated_skew.cases(plan) if c.skew == skew]
        assert all((f.task, f.seed, f.clients) == (found[0].task, 7, 10) for f in found)
        assert found[0].task["partition_seed"] == 7


def test_only_fedprox_is_pulled_back_and_only_rounds_have_an_anchor() -> None:
    cases = federated_skew.cases(QUICK)
    pulled = {case.method for case in cases if federated_skew.federation(QUICK, case, 0).training["proximal"]}
    assert pulled == {"FedProx"}
    assert {case.rounds for case in cases if case.method == "WiSE-FT, α = ½"} == {QUICK.rounds}


def test_mnist_is_halved_by_the_mean_of_four_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2100, 28, 28), dtype=np.uint8)
    official = federated_skew.Labelled(images, np.arange(2100))
    monkeypatch.setattr(federated_skew.Mnist, "test_set", lambda self: official)
    monkeypatch.setattr(federated_skew, "halved", federated_skew.halved.__wrapped__)
    halved, labels = Mnist14().test_set()
    assert labels.tolist() == list(range(2000))
    for row, column in ((0, 0), (13, 13), (5, 9)):
        mean = images[:2000, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((1, 2))
        np.testing.assert_array_equal(halved[:, row, column], np.floor(mean))


def test_bytes_buy_as_many_rounds_as_they_pay_for_in_full() -> None:
    course = Course([0.1, 0.2, 0.3], [10.0, 10.0, 10.0], 0, 0, 0, 0)
    assert [federated_skew.affordable(course, budget) for budget in (9, 10, 29, 30, 99)] == [0, 1, 2, 3, 3]


def courses(**one_shot: float) -> Courses:
    """Two seeds of every case at 0.6, K-FAC sending so much that FedAvg's bytes pay for no round of it."""
    found = {}
    for case in federated_skew.cases(QUICK):
        name = case.method.split(",")[0].replace("-", "").replace(" ", "_").lower()
        accuracy = one_shot.get(name, 0.6) if case[:2] == (1, "Dirichlet 0.1") else 0.6
        size = 100.0 if name == "kfac" else 10.0
        rounds = case.rounds
        found[case] = [Course([accuracy] * rounds, [size] * rounds, 0.1, 0.5, 0.4, 0.7) for _ in range(2)]
    return found


@pytest.mark.parametrize(
    ("one_shot", "number"),
    [
        ({}, []),
        ({"fedavg": 0.61}, [0, 2]),
        ({"fisher": 0.61}, [1]),
        ({"kfac": 0.59}, [2]),
        ({"ssf": float("nan")}, [3]),
    ],
)
def test_each_gate_fails_on_what_it_forbids(one_shot: dict[str, float], number: list[int]) -> None:
    holds = [gate.holds for gate in federated_skew.gates(courses(**one_shot))]
    assert [place for place, held in enumerate(holds) if not held] == number


def test_tables_show_the_end_the_rounds_and_the_bytes_of_every_federation() -> None:
    one_shot, many, by_round, by_byte = federated_skew.tables(courses()).values()
    assert (len(one_shot), len(many), len(by_round), len(by_byte)) == (7, 8, 8, 8)
    assert by_round[0].keys() == {"skew", "method", "round 1", "round 2", "round 3"}
    costly = next(row for row in by_byte if row["method"].startswith("K-FAC"))  # type: ignore[union-attr]
    assert (costly["rounds"], costly["accuracy"]) == (0.0, "none ends")


def test_the_plot_has_a_line_for_every_method_over_rounds_and_over_bytes() -> None:
    figure = Figure()
    federated_skew.plot(courses(), figure)
    assert [len(axes.lines) for axes in figure.axes] == [8] * 2


@pytest.mark.paper
def test_the_quick_run_passes_its_gates(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.federated_skew", "--quick", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.suffix for path in (tmp_path / "quick").iterdir()} == {".md", ".csv", ".png"}
