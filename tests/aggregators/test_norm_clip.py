"""Norm clipping: how long the clients' steps are when the inner method sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from toys import PRECISIONS, Precision, ask, away, clients, fingerprint, global_model, updates

from aggregators.core.base import Aggregator
from aggregators.core.exchange import Exchange, Round, collect, run
from aggregators.core.registry import parse
from aggregators.core.tensors import norm, steps
from aggregators.core.update import ClientUpdate, GlobalModel, Merged, Tensors
from aggregators.robust.norm_clip import NormClip


class Seen(Aggregator):
    """An inner method that keeps θ_t, and in its memory what it was given of each client."""

    kind: Literal["test_norm_clip:Seen"] = "test_norm_clip:Seen"
    start: Literal["shared", "personal", "own"] = "shared"

    def round(self, model: GlobalModel) -> Round:
        """Collects the cohort into memory."""
        starts: dict[str, Any] = {"shared": model.params, "personal": lambda i: personal(model, i), "own": None}
        cohort = yield from Exchange(task="train", params=starts[self.start], fold=collect)
        return Merged(model.params, memory={str(update.client_id): dict(update.params) for update in cohort})


def personal(model: GlobalModel, client_id: int) -> Tensors:
    """Another start for every client."""
    shift = client_id % 10
    return {name: value + shift if name in model.trainable else value for name, value in model.params.items()}


def clipped(model: GlobalModel, replies: list[ClientUpdate], max_norm: float) -> Mapping[int, Mapping[str, Tensor]]:
    """What an inner method gets of each client."""
    memory = NormClip(inner=Seen(), max_norm=max_norm).aggregate(model, replies).memory
    return {update.client_id: memory[str(update.client_id)] for update in replies}  # type: ignore[misc]


def length(model: GlobalModel, params: Tensors, start: Tensors | None = None) -> float:
    return float(norm(steps(model.names, params, start or model.params).values()))


@pytest.mark.parametrize("max_norm", [1e-3, 0.1, 0.9, 5.0])
def test_no_step_is_longer_than_the_maximum(max_norm: float) -> None:
    model = global_model()
    replies = updates(model)
    found = clipped(model, replies, max_norm)
    rounding = 2**-24 * float(norm(model.params[name] for name in model.names))
    for update in replies:
        before, after = length(model, update.params), length(model, found[update.client_id])
        assert after == pytest.approx(min(before, max_norm), abs=rounding)


def test_a_clipped_step_keeps_its_direction() -> None:
    model = global_model("float64")
    update = updates(model)[0]
    before = steps(model.names, update.params, model.params)
    after = steps(model.names, clipped(model, [update], 0.1)[update.client_id], model.params)
    scale = 0.1 / length(model, update.params)
    for name, step in before.items():
        torch.testing.assert_close(after[name], scale * step, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_that_is_short_enough_is_left_untouched(precision: Precision) -> None:
    model = global_model(precision)
    replies = updates(model)
    longest = max(length(model, update.params) for update in replies)
    found = clipped(model, replies, longest)
    assert all(fingerprint(found[update.client_id]) == fingerprint(dict(update.params)) for update in replies)


floats = st.floats(-(2.0**99), 2.0**99, width=32)


@given(floats, floats)
def test_however_far_apart_in_magnitude_no_bit_of_a_short_step_is_lost(start: float, end: float) -> None:
    model = GlobalModel(params={"a": torch.tensor([start])}, trainable=frozenset("a"))
    update = ClientUpdate(client_id=1, num_examples=1, params={"a": torch.tensor([end])})
    assert fingerprint(clipped(model, [update], 1e300)[1]) == fingerprint(dict(update.params))


def test_buffers_are_not_clipped() -> None:
    model = global_model()
    replies = updates(model)
    for update in replies:
        found = clipped(model, replies, 1e-6)[update.client_id]
        buffers = [name for name in model.params if name not in model.trainable]
        assert all(found[name] is update.params[name] for name in buffers)


def test_steps_are_measured_from_what_each_client_was_sent() -> None:
    model, generator = global_model("float64"), torch.Generator().manual_seed(5)
    cohort = [
        replace(client, params=away(personal(model, client.client_id), generator, 0.1)) for client in clients(model)
    ]
    merged = run(NormClip(inner=Seen(start="personal"), max_norm=1e-3).round(model), ask(cohort))
    for client in cohort:
        start, found = personal(model, client.client_id), merged.memory[str(client.client_id)]
        scale = 1e-3 / length(model, client.params, start)
        assert isinstance(found, dict)
        for name, step in steps(model.names, client.params, start).items():
            torch.testing.assert_close(found[name], start[name] + scale * step, rtol=1e-12, atol=1e-12)


def test_a_client_that_starts_from_its_own_model_cannot_be_measured() -> None:
    model = global_model()
    with pytest.raises(ValueError, match="norm_clip measures steps from the server's model: use start = 'shared'"):
        NormClip(inner=Seen(start="own")).aggregate(model, updates(model))
    assert "shared_start" in NormClip(inner=Seen()).needs


def test_statistics_are_not_clipped() -> None:
    model, inner = global_model(), parse("fisher")
    plain = run(inner.round(model), ask(clients(model))).metrics
    stopped = run(NormClip(inner=inner, max_norm=1e-6).round(model), ask(clients(model))).metrics
    assert stopped == plain
    assert 0 < float(plain["damped_share"]) < 1
