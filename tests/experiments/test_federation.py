"""Federations that are looked at: the same as without, and what is seen of their last round."""

from pathlib import Path

import pytest
import torch

from experiments import cache, federation
from experiments.federation import Federation, course, worst_mix
from server import loopback

TASK = {"kind": "digits", "partition": "iid", "limit": 60}
QUICK = Federation(TASK, {"kind": "fisher", "max_grads": 4}, clients=3, rounds=2, training={"epochs": 1}, seed=1)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "FOLDER", tmp_path)


def test_looking_at_a_method_changes_nothing_and_shows_its_clients() -> None:
    seen, plain = (
        loopback.run(TASK, method, clients=3, rounds=2, seed=1)
        for method in ({"kind": "experiments.federation:Observed", "inner": "fedavg"}, "fedavg")
    )
    clients = seen.model.memory["clients"]
    assert all(torch.equal(seen.model.params[name], plain.model.params[name]) for name in plain.model.params)
    assert sorted(clients) == ["1", "2", "3"]  # type: ignore[arg-type]
    for name, merged in seen.model.params.items():
        sizes = [client["labels"].sum() for client in clients.values()]  # type: ignore[union-attr]
        total = sum(n * c["params"][name].double() for n, c in zip(sizes, clients.values(), strict=True))  # type: ignore[union-attr]
        torch.testing.assert_close(merged.double(), total / sum(sizes), rtol=1e-6, atol=1e-7)


def test_a_course_has_a_figure_for_every_round_and_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = course(QUICK)
    monkeypatch.setattr(federation.loopback, "run", None)
    assert course(QUICK) == first
    assert len(first.accuracy) == len(first.nbytes) == 2
    assert first.mean_single <= first.best_single
    assert all(0 <= share <= 1 for share in (*first.accuracy, *first[2:]))


def test_a_course_ends_where_the_server_says_it_does() -> None:
    run = loopback.run(TASK, QUICK.method, clients=3, rounds=2, seed=1, training={"epochs": 1})
    assert course(QUICK).accuracy == [record["test"]["accuracy"] for record in run.records]


def test_a_client_that_is_left_out_ends_the_experiment() -> None:
    with pytest.raises(RuntimeError, match="holds NaN or infinity"):
        course(QUICK._replace(training={"epochs": 1, "learning_rate": 1e30}))


def test_the_worst_mix_weighs_labels_by_its_counts() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    hits = torch.tensor([True, True, True, False])
    assert worst_mix(hits, labels, [torch.tensor([3, 1]), torch.tensor([1, 3])]) == pytest.approx(0.25 + 0.75 * 0.5)
