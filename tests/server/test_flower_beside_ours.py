"""Flower's own mean beside ours on the same three replies: what it lets through, or what ends its run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.exception import InconsistentMessageReplies
from flwr.serverapp.strategy import FedAvg
from server_toys import Hall, flower_process, left_out, records, strategy
from torch import Tensor

from aggregators.core.update import ClientUpdate, GlobalModel
from client.wire import encode

State = dict[str, Tensor]
NUM = (10, 20, 30)  # examples of each client


@pytest.fixture(autouse=True)
def _in_a_flower_process() -> Iterator[None]:
    with flower_process():
        yield


def flowers(states: Sequence[State], num: Sequence[int] = NUM) -> dict[str, np.ndarray[Any, Any]]:
    """What Flower's FedAvg makes of the clients' replies."""
    replies = [_flower_reply(client, state, n) for client, (state, n) in enumerate(zip(states, num, strict=True), 1)]
    arrays, _ = FedAvg().aggregate_train(1, replies)
    assert arrays is not None
    return {name: array.numpy() for name, array in arrays.items()}


def _flower_reply(client: int, state: State, num: int) -> Message:
    metrics = MetricRecord({"num-examples": num})
    asked = Message(RecordDict(), client, "train")
    return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=asked)


def ours(
    start: State, states: Sequence[State], folder: Path, num: Sequence[int] = NUM
) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """The model and the record of one round of ours with the same replies."""

    def answering(client: int) -> Any:
        update = ClientUpdate(client_id=client, num_examples=num[client - 1], params=states[client - 1])
        return lambda content: encode(update)

    trainable = frozenset(name for name, tensor in start.items() if tensor.is_floating_point())
    run = strategy("fedavg", Hall({client: answering(client) for client in (1, 2, 3)}), folder, rounds=1)
    model, _ = run.run(GlobalModel(params=start, trainable=trainable))
    (record,) = records(folder)
    return model.params, record


def mean(a: Tensor, b: Tensor) -> Tensor:
    """Of clients 1 and 2, the good ones."""
    return (NUM[0] * a.double() + NUM[1] * b.double()) / (NUM[0] + NUM[1])


A, B = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
START = {"w": torch.zeros(2, 2)}


def test_both_agree_on_good_replies(tmp_path: Path) -> None:
    states = [{"w": A}, {"w": B}, {"w": A + B}]
    merged, record = ours(START, states, tmp_path)
    assert left_out(record) == {}
    assert np.allclose(flowers(states)["w"], merged["w"].numpy())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_flower_lets_nan_into_the_model_ours_leaves_the_client_out(tmp_path: Path, value: float) -> None:
    bad = A.clone()
    bad[1, 0] = value
    states = [{"w": A}, {"w": B}, {"w": bad}]
    assert not np.isfinite(flowers(states)["w"]).all()
    merged, record = ours(START, states, tmp_path)
    assert left_out(record) == {"3": "params w holds NaN or infinity"}
    assert record["status"] == "merged"
    assert merged["w"].equal(mean(A, B).float())


def test_flower_broadcasts_a_misshapen_tensor_silently_ours_leaves_the_client_out(tmp_path: Path) -> None:
    states = [{"w": A}, {"w": B}, {"w": torch.tensor([100.0, 200.0])}]
    row = np.array([100.0, 200.0]) * NUM[2] / sum(NUM)
    broadcast = (mean(A, B) * (NUM[0] + NUM[1]) / sum(NUM)).numpy() + row
    assert np.allclose(flowers(states)["w"], broadcast)
    merged, record = ours(START, states, tmp_path)
    assert left_out(record) == {"3": "params w has shape (2,), asked for (2, 2)"}
    assert merged["w"].equal(mean(A, B).float())


@pytest.mark.parametrize(
    ("third", "reason"),
    [({"v": A}, "params lacks w"), ({"w": A, "v": A}, "params has v, which was not asked for"), ({}, "params lacks w")],
)
def test_one_key_that_differs_ends_flowers_run_ours_leaves_the_client_out(
    tmp_path: Path, third: State, reason: str
) -> None:
    states = [{"w": A}, {"w": B}, third]
    with pytest.raises(InconsistentMessageReplies, match="same keys"):
        flowers(states)
    merged, record = ours(START, states, tmp_path)
    assert left_out(record) == {"3": reason}
    assert record["status"] == "merged"
    assert merged["w"].equal(mean(A, B).float())


def test_a_reply_with_two_records_of_arrays_ends_flowers_run_ours_reads_named_fields(tmp_path: Path) -> None:
    reply = _flower_reply(1, {"w": A}, 10)
    reply.content["gradients"] = ArrayRecord({"w": A})
    with pytest.raises(InconsistentMessageReplies, match="exactly one ArrayRecord"):
        FedAvg().aggregate_train(1, [reply])
    update = ClientUpdate(client_id=1, num_examples=1, params={"w": A}, grad_sum={"w": A})
    assert len(encode(update).array_records) == 2
    _, record = ours(START, [{"w": A}, {"w": B}, {"w": A}], tmp_path)
    assert record["exchanges"][0]["admitted"] == ["1", "2", "3"]


def test_counts_of_zero_end_flowers_run_ours_loses_the_round(tmp_path: Path) -> None:
    states = [{"w": A}, {"w": B}, {"w": A}]
    with pytest.raises(ZeroDivisionError):
        flowers(states, num=(0, 0, 0))
    merged, record = ours(START, states, tmp_path, num=(0, 0, 0))
    assert record["status"] == "lost"
    assert set(left_out(record)) == {"1", "2", "3"}
    assert merged["w"].equal(START["w"])


def test_a_negative_count_pushes_flowers_model_away_ours_leaves_the_client_out(tmp_path: Path) -> None:
    states = [{"w": A}, {"w": B}, {"w": 100 * A}]
    assert flowers(states, num=(10, 20, -29))["w"][0, 0] < -1000
    merged, record = ours(START, states, tmp_path, num=(10, 20, -29))
    assert left_out(record) == {"3": "num_examples is -29: allowed is 1 to 1000000000"}
    assert merged["w"].equal(mean(A, B).float())


def test_flowers_counters_come_back_as_floats_ours_keep_their_dtype(tmp_path: Path) -> None:
    start = {**START, "seen": torch.tensor([0, 0])}
    states = [{"w": A, "seen": torch.tensor([n, 2**53 + n])} for n in (1, 2, 4)]
    assert flowers(states)["seen"].dtype == np.float64
    merged, _ = ours(start, states, tmp_path)
    assert merged["seen"].dtype == torch.int64
    assert merged["seen"].tolist() == [4, 2**53 + 4]


def test_flower_sums_half_precision_in_half_precision_ours_in_double(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(100, generator=generator).half() for _ in NUM]
    exact = sum((num * value.double() for num, value in zip(NUM, values, strict=True)), torch.zeros(100)) / sum(NUM)
    theirs = flowers([{"w": value} for value in values])["w"]
    merged, _ = ours({"w": torch.zeros(100).half()}, [{"w": value} for value in values], tmp_path)
    assert theirs.dtype == np.float16
    assert (theirs != exact.half().numpy()).mean() > 0.2
    assert merged["w"].equal(exact.half())


def test_flower_has_no_bfloat16_ours_carries_it(tmp_path: Path) -> None:
    states = [{"w": tensor.bfloat16()} for tensor in (A, B, A)]
    with pytest.raises(TypeError, match="BFloat16"):
        flowers(states)
    merged, record = ours({"w": torch.zeros(2, 2).bfloat16()}, states, tmp_path)
    assert record["status"] == "merged"
    assert merged["w"].dtype == torch.bfloat16
