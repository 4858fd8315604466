"""Fine-tuned models: trained once, measured once, merged as a round would, scored alone and together."""

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from aggregators.core.registry import parse
from aggregators.core.update import Gradients
from client.statistics.gradients import gradients
from client.task import Examples, Node, Task, load
from client.training import Training, seeded
from experiments import cache, finetuning
from experiments.finetuning import BATCH, Finetuned, accuracy, correct, digest, initial, merged, merged_from, outputs
from experiments.merging import traffic

TRAINING = Training(epochs=2, batch_size=4)


class Toy(Task):
    num_classes: ClassVar[int] = 3

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))

    def data(self, node: Node) -> tuple[Examples, Examples]:
        return points(8), points(8)


def points(num: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(num, 2, generator=generator), torch.arange(num) % 3)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "FOLDER", tmp_path)


@pytest.fixture
def start() -> Finetuned:
    return Finetuned(Toy(), initial(Toy(), 0), points(8))


def equal(a: Finetuned, b: Finetuned) -> bool:
    return all(torch.equal(a.params[name], b.params[name]) for name in a.params)


def test_a_model_is_trained_once_for_the_same_start_examples_and_seed(
    start: Finetuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start.tuned(points(12), TRAINING, seed=1)
    monkeypatch.setattr(finetuning, "train", None)
    assert equal(start.tuned(points(12), TRAINING, seed=1), first)


@pytest.mark.parametrize("change", ["examples", "seed", "training", "start"])
def test_whatever_training_depends_on_makes_another_model(start: Finetuned, change: str) -> None:
    first = start.tuned(points(12), TRAINING, seed=1)
    other = {
        "examples": lambda: start.tuned(points(12, seed=5), TRAINING, seed=1),
        "seed": lambda: start.tuned(points(12), TRAINING, seed=2),
        "training": lambda: start.tuned(points(12), Training(epochs=1, batch_size=4), seed=1),
        "start": lambda: first.tuned(points(12), TRAINING, seed=1),
    }[change]()
    assert not equal(first, other)


def test_an_update_holds_the_squares_of_all_examples_when_there_are_fewer_than_asked_for(start: Finetuned) -> None:
    update = start.update(3, limit=1000)
    model = start.task.model()
    load(model, start.params)
    expected = gradients(start.task, model, start.examples, Gradients(squares=True), seed=0)
    assert (update.client_id, update.num_grads, update.num_examples) == (3, 8, 8)
    for name, squares in expected.sq_grad_sum.items():
        torch.testing.assert_close(update.sq_grad_sum[name], squares)


def test_a_new_head_starts_anew_and_never_leaves(start: Finetuned) -> None:
    tuned = start.tuned(points(12), TRAINING, seed=1)
    fresh = tuned.with_new(("2.*",), seed=4)
    assert torch.equal(fresh.params["2.weight"], initial(Toy(), 4)["2.weight"])
    assert torch.equal(fresh.params["0.weight"], tuned.params["0.weight"])
    assert fresh.update(0).params.keys() == fresh.update(0).sq_grad_sum.keys() == {"0.weight", "0.bias"}


def test_a_merge_of_the_public_part_keeps_the_private_one(start: Finetuned) -> None:
    client = start.with_new(("2.*",), seed=4)
    body = merged(
        {"kind": "fedavg"}, [client.update(0), start.tuned(points(9), TRAINING, 1).with_new(("2.*",), 5).update(1)]
    )
    after = client.at(body.params)
    assert torch.equal(after.params["2.weight"], client.params["2.weight"])
    assert not torch.equal(after.params["0.weight"], client.params["0.weight"])


def test_a_round_from_a_model_measures_its_clients_there_too(start: Finetuned) -> None:
    tuned = start.tuned(points(12), TRAINING, seed=1)
    halfway = {"kind": "wise_ft", "inner": "fedavg", "alpha": 0.5, "weighting": "fisher", "damping": 0.0}
    found = merged_from(halfway, start.params, [tuned], limit=None).params
    here, there = (client.update(0).sq_grad_sum for client in (tuned.at(start.params), tuned))
    for name in found:
        total = here[name].double() + there[name]
        expected = (here[name] * start.params[name].double() + there[name] * tuned.params[name].double()) / total
        torch.testing.assert_close(found[name].double(), expected.nan_to_num(), rtol=1e-5, atol=1e-6)


def test_bytes_are_two_models_and_what_is_asked_for(start: Finetuned) -> None:
    size = 4 * sum(value.numel() for value in start.params.values())
    fisher = {"kind": "wise_ft", "inner": "fedavg", "weighting": "fisher"}  # trains, then measures at the anchor
    copies = [({"kind": "fedavg"}, 2), ({"kind": "fisher"}, 3), (fisher, 5)]
    assert [traffic(parse(config), start.params) for config, _ in copies] == [size * number for _, number in copies]


@pytest.mark.parametrize("width", [2, 4, 7])
def test_a_network_of_any_width_is_scored(width: int) -> None:
    with seeded(0):
        model, inputs = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 3)), torch.randn(BATCH + 1, 2)
    torch.testing.assert_close(outputs(Toy(), model.state_dict(), inputs), model(inputs).detach())


def test_an_ensemble_labels_by_its_mean_probability() -> None:
    def constant(*probabilities: float) -> dict[str, torch.Tensor]:
        zero = {name: torch.zeros_like(value) for name, value in initial(Toy(), 0).items()}
        return {**zero, "2.bias": torch.tensor(probabilities).log()}

    models = [constant(0.5, 0.4, 0.1), constant(0.1, 0.4, 0.5)]
    test = TensorDataset(torch.randn(4, 2), torch.tensor([1, 1, 0, 2]))
    assert correct(Toy(), models, test).tolist() == [True, True, False, False]
    assert accuracy(Toy(), models[:1], test) == 0.25


def test_a_digest_tells_values_shapes_and_dtypes_apart() -> None:
    x = torch.arange(4.0)
    assert digest([x]) == digest([x.clone()])
    assert len({digest(t) for t in ([x], [x + 1], [x.view(2, 2)], [x.view(torch.int32)], [x, x], [])}) == 6
