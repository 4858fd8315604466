"""What a client answers, and says: to a model of other widths than its own, to a request for too few examples."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from flwr.app import Context, RecordDict
from torch import nn
from torch.utils.data import TensorDataset

from aggregators.core.exchange import Exchange, collect
from aggregators.core.update import Gradients, Request
from client.app import respond
from client.task import Examples, Node, Task, tensors
from server.wire import decode, encode


class Wide(Task):
    """A hidden layer of as many units as a client likes."""

    num_classes: ClassVar[int | None] = 3
    local: ClassVar[tuple[str, ...]] = ("hidden",)

    hidden: int = 4

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 3))

    def data(self, node: Node) -> tuple[Examples, Examples]:
        return (examples := TensorDataset(torch.rand(6, 4), torch.arange(6) % 3)), examples


class PrivateHead(Wide):
    private: ClassVar[tuple[str, ...]] = ("2.*",)


def sent(task: Task, round: int = 2, request: Request = Request()) -> RecordDict:
    """What asks a client to train the task's model."""
    exchange = Exchange(task="train", params=tensors(task.model(), task.private), request=request, fold=collect)
    kind = f"{__name__}:{type(task).__name__}"
    return encode(exchange, {"task": kind, "training": {}, "seed": 0, "round": round, "evaluate": False})(1)


def client(**node: Any) -> Context:
    return Context(0, 1, node, RecordDict(), {})


def test_a_client_says_that_it_trains_in_other_widths_than_its_own(said: pytest.LogCaptureFixture) -> None:
    respond(sent(Wide()), client(**{"task.hidden": 6}))
    assert "received 0.weight of shape (4, 4); by this client's own configuration it is (6, 4)" in said.text
    said.clear()
    respond(sent(Wide(hidden=6)), client(**{"task.hidden": 6}))
    assert "own configuration" not in said.text


def test_private_parameters_that_do_not_fit_the_model_that_was_sent_are_named_with_the_remedy() -> None:
    wide = client(**{"task.hidden": 6})
    respond(sent(PrivateHead(hidden=6), round=1), wide)
    with pytest.raises(ValueError, match=r"private 2\.weight, 2\.bias \(mat1 and mat2 .* same width at every client"):
        respond(sent(PrivateHead()), wide)


def test_an_option_that_a_client_may_not_set_is_refused_with_the_remedy() -> None:
    with pytest.raises(
        ValueError, match=r"^task\.num: a client .* hidden of Wide: remove it from the node configuration$"
    ):
        Wide().at({"task.num": 3})


@pytest.mark.parametrize(
    "request_", [Request(gram=True), Request(gradients=Gradients(squares=True)), Request(class_counts=True)]
)
def test_a_site_gives_no_statistics_of_fewer_examples_than_its_floor(request_: Request) -> None:
    with pytest.raises(
        ValueError, match=r"statistics of 7 examples or more \(min-examples\), these would be of 6: ask"
    ):
        respond(sent(Wide(), request=request_), client(**{"min-examples": 7}))
    respond(sent(Wide(), request=request_), client(**{"min-examples": 6}))


def test_a_request_for_the_gradients_of_few_examples_is_under_a_sites_floor_too() -> None:
    few = Request(gradients=Gradients(squares=True, limit=2))
    with pytest.raises(ValueError, match=r"these would be of 2"):
        respond(sent(Wide(), request=few), client(**{"min-examples": 6}))


def test_weights_alone_are_sent_however_few_examples_a_site_has() -> None:
    reply = decode(respond(sent(Wide()), client(**{"min-examples": 7})), client_id=1)
    assert reply.params.keys() == tensors(Wide().model()).keys()
