"""Dropping one file into the package is all that a new method takes; the contract finds what it breaks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from shutil import copytree, ignore_patterns
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]

HONEST = """
import torch
from typing import Literal
from aggregators.core.base import SumAggregator, Term
from aggregators.core.update import Merged, Request

SEEN = []


class Dropped(SumAggregator):
    kind: Literal["dropped_honest"] = "dropped_honest"

    @property
    def request(self):
        return Request()

    def terms(self, model, update):
        for name in model.names:
            yield Term("weighted", name, update.num_examples, update.params[name])

    def finish(self, model, sums):
        return Merged({name: sum.mean() for name, sum in sums["weighted"].items()})
"""

# what is edited, what it becomes, and a promise of the contract that must be seen to break
BROKEN = {
    "dropped_writes": ("update.params[name]", "update.params[name].add_(1)", "inputs_are_left_untouched"),
    "dropped_ordered": ("update.num_examples", "SEEN.append(0) or len(SEEN)", "order_of_arrival_is_irrelevant"),
    "dropped_random": ("sum.mean()", "sum.mean() + torch.rand(())", "crash_at_any_reply_changes_no_bit"),
    "dropped_hidden": ("sum.mean()", "sum.mean() + torch.zeros(())", "stay_on_the_models_device"),
    "dropped_flat": ("sum.mean()", "sum.mean().reshape(-1)", "shapes_and_dtypes_are_kept"),
    "dropped_greedy": ("model.names:", "SEEN.append(update) or model.names:", "holds_two_updates_at_most"),
}


def source(kind: str) -> str:
    old, new, _ = BROKEN.get(kind, ("", "", ""))
    assert old in HONEST
    return HONEST.replace("dropped_honest", kind).replace(old, new) if old else HONEST


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Mapping[str, bool]]:
    """For each method dropped into a copy of the package: whether it passed each test of the contract."""
    there = tmp_path_factory.mktemp("drop_in")
    copytree(ROOT / "aggregators", there / "aggregators", ignore=ignore_patterns("__pycache__"))
    (there / "tests/aggregators").mkdir(parents=True)
    for file in ("pyproject.toml", "tests/conftest.py", "tests/toys.py", "tests/aggregators/test_contract.py"):
        (there / file).write_bytes((ROOT / file).read_bytes())
    for kind in ("dropped_honest", *BROKEN):
        (there / "aggregators/weight_average" / f"{kind}.py").write_text(source(kind))
    report = there / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-k", "dropped_", f"--junitxml={report}"]
    finished = subprocess.run(command, cwd=there, stdout=subprocess.PIPE, text=True, check=False)
    assert finished.returncode == pytest.ExitCode.TESTS_FAILED, finished.stdout
    found: dict[str, dict[str, bool]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        promise, _, parameters = case.attrib["name"].rstrip("]").partition("[")
        kind = parameters.rpartition("-")[2]
        passed = case.find("failure") is None and case.find("error") is None
        found.setdefault(kind, {})[promise] = passed and found.get(kind, {}).get(promise, True)
    return found


def test_a_dropped_in_method_is_tried_and_keeps_the_contract(outcomes: Mapping[str, Mapping[str, bool]]) -> None:
    assert len(outcomes["dropped_honest"]) >= 12
    assert all(outcomes["dropped_honest"].values())


@pytest.mark.parametrize("kind", BROKEN)
def test_the_contract_finds_a_broken_method(outcomes: Mapping[str, Mapping[str, bool]], kind: str) -> None:
    broken = [promise for promise, passed in outcomes[kind].items() if not passed]
    assert any(promise.endswith(BROKEN[kind][2]) for promise in broken), broken
