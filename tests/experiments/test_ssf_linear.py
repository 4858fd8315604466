"""The experiment on linear regression: its posteriors are the textbook's, and the closed form is their product."""

import subprocess
import sys
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch

from experiments.ssf_linear import (
    ALPHA,
    BETA,
    FEATURES,
    TOLERANCE,
    Client,
    Course,
    descent,
    gate,
    merged,
    pooled,
    subsets,
)

ROOT = Path(__file__).resolve().parents[2]


def test_the_subsets_overlap_and_none_covers_another() -> None:
    spans = [(client.design[:, 1].min(), client.design[:, 1].max()) for client in subsets(0)]
    assert len(spans) == 3
    for (low, high), (next_low, next_high) in pairwise(spans):
        assert low < next_low < high < next_high


def test_a_clients_posterior_is_that_of_ridge_regression() -> None:
    client = subsets(0)[0]
    block = client.posterior()
    torch.testing.assert_close(block.factor @ block.factor.T, BETA * client.design.T @ client.design)
    ridge = torch.cat([client.design, (ALPHA / BETA) ** 0.5 * torch.eye(FEATURES).double()])
    targets = torch.cat([client.targets, torch.zeros(FEATURES).double()])
    torch.testing.assert_close(block.mean, torch.linalg.lstsq(ridge, targets).solution)


def test_the_closed_form_is_the_pooled_posteriors_mean_and_the_others_are_not() -> None:
    paths = dict(merged(subsets(1), steps=1, seed=1))
    torch.testing.assert_close(paths["closed form"].theta, pooled(subsets(1)), rtol=TOLERANCE, atol=0)
    assert all(path.distances[-1] > 0.01 for name, path in paths.items() if name != "closed form")


def test_with_all_masked_the_papers_steps_end_at_diagonal_fisher_merging() -> None:
    clients = subsets(2)
    blocks = [client.posterior() for client in clients]
    (end,) = islice(descent(blocks, FEATURES, "paper", seed=2), 500, 501)
    diagonals = torch.stack([block.precision() + ALPHA for block in blocks])
    means = torch.stack([block.mean for block in blocks])
    prior = (len(blocks) - 1) * ALPHA  # counted once in the product
    torch.testing.assert_close(end, (diagonals * means).sum(0) / (diagonals.sum(0) - prior), rtol=1e-3, atol=1e-4)


def test_the_gate_fails_where_one_seed_is_off() -> None:
    exact, off = (Course(torch.zeros(1), 1, [distance]) for distance in (1e-14, 1e-9))
    assert gate([exact, exact]).holds
    assert not gate([exact, off]).holds


def test_all_points_together_are_one_client() -> None:
    client = subsets(3)[0]
    half = len(client.targets) // 2
    halves = [Client(client.design[part], client.targets[part]) for part in (slice(half), slice(half, None))]
    torch.testing.assert_close(pooled(halves), client.posterior().mean)


@pytest.mark.paper
def test_the_quick_run_passes_its_gates(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.ssf_linear", "--quick", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.suffix for path in (tmp_path / "quick").iterdir()} == {".md", ".csv", ".png"}
