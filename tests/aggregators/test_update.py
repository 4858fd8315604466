"""What is asked and what is answered."""

from __future__ import annotations

from dataclasses import fields, replace
from math import inf
from typing import TypeAlias

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.utils._pytree import tree_leaves
from toys import EVERYTHING, fingerprint, global_model, updates

from aggregators.core.update import ESTIMATORS, ClientUpdate, Estimator, GlobalModel, Gradients, Request

gradients = st.builds(
    Gradients,
    sums=st.booleans(),
    squares=st.booleans(),
    sketches=st.integers(0, 9),
    estimator=st.sampled_from(ESTIMATORS),
    limit=st.none() | st.integers(1, 9),
)
flags = st.booleans()
requests = st.builds(
    lambda measured, **asked: Request(moments=measured != "not", batch_stats=measured == "by batch", **asked),
    st.sampled_from(["not", "running", "by batch"]),
    gradients=st.none() | gradients,
    gram=flags,
    grad_gram=flags,
    cross_moments=flags,
    class_counts=flags,
)


def alike(request: Request, estimator: Estimator, batch_stats: bool) -> Request:
    """The request with that estimator, and with moments of that kind, if it asks for any."""
    asked = request.gradients and request.gradients.model_copy(update={"estimator": estimator})
    return request.model_copy(update={"gradients": asked, "batch_stats": request.moments and batch_stats})


compatible = st.builds(
    lambda asked, *kind: tuple(alike(request, *kind) for request in asked),
    st.tuples(requests, requests, requests),
    st.sampled_from(ESTIMATORS),
    flags,
)
Three: TypeAlias = tuple[Request, Request, Request]


@given(compatible)
def test_asking_for_both_is_commutative(asked: Three) -> None:
    a, b, _ = asked
    assert a | b == b | a


@given(compatible)
def test_asking_for_both_is_associative(asked: Three) -> None:
    a, b, c = asked
    assert (a | b) | c == a | (b | c)


@given(requests)
def test_asking_twice_is_asking_once(a: Request) -> None:
    assert a | a == a


@given(requests)
def test_an_empty_request_is_neutral(a: Request) -> None:
    assert a | Request() == a == Request() | a


@given(compatible)
def test_whoever_asked_gets_it(asked: Three) -> None:
    a, b, _ = asked
    joint = a | b
    for one in (a, b):
        assert all(getattr(joint, name) for name in Request.model_fields if getattr(one, name))
        if one.gradients and joint.gradients:
            assert joint.gradients.sums >= one.gradients.sums
            assert joint.gradients.squares >= one.gradients.squares
            assert joint.gradients.sketches >= one.gradients.sketches
            assert (joint.gradients.limit or inf) >= (one.gradients.limit or inf)


@given(compatible)
def test_nobody_computes_what_nobody_asked(asked: Three) -> None:
    a, b, _ = asked
    joint = a | b
    for name in Request.model_fields:
        assert not getattr(joint, name) or getattr(a, name) or getattr(b, name)
    if joint.gradients:
        theirs = [one.gradients for one in (a, b) if one.gradients]
        assert joint.gradients.limit in [one.limit for one in theirs]
        assert joint.gradients.sketches in [one.sketches for one in theirs]
        assert joint.gradients.squares in [one.squares for one in theirs]


@given(gradients, gradients)
def test_two_estimators_are_refused(a: Gradients, b: Gradients) -> None:
    assume(a.estimator != b.estimator)
    with pytest.raises(ValueError, match=f"'{a.estimator}' and '{b.estimator}'"):
        Request(gradients=a) | Request(gradients=b)


def test_moments_of_two_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="with batch_stats and without"):
        Request(moments=True) | Request(moments=True, batch_stats=True)


def test_batch_stats_without_moments_are_refused() -> None:
    with pytest.raises(ValidationError, match="ask for moments too"):
        Request(batch_stats=True)


@given(requests)
def test_a_request_survives_json(a: Request) -> None:
    assert Request.model_validate_json(a.model_dump_json()) == a


@pytest.mark.parametrize("wrong", [{"sketches": -1}, {"limit": 0}, {"estimator": "guess"}, {"square": True}])
def test_a_request_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Gradients.model_validate(wrong)


def test_a_client_answers_to_its_node_id_and_its_name() -> None:
    client = ClientUpdate(client_id=2**63 + 11, name="hospital", num_examples=1)
    assert client.answers_to(2**63 + 11)
    assert client.answers_to(str(2**63 + 11))
    assert client.answers_to("hospital")
    assert not client.answers_to("hospital 2")
    assert not client.answers_to(2**63)


def test_moving_an_update_moves_every_tensor_and_nothing_else() -> None:
    update = updates(global_model(), EVERYTHING)[0]
    moved = update.to(torch.device("meta"))
    kinds = {field.name: type(getattr(moved, field.name)) for field in fields(moved)}
    assert kinds == {field.name: type(getattr(update, field.name)) for field in fields(update)}
    before, after = tree_leaves(dict(vars(update))), tree_leaves(dict(vars(moved)))
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        if isinstance(old, Tensor):
            assert (new.device.type, new.shape, new.dtype) == ("meta", old.shape, old.dtype)
        else:
            assert new == old


def test_tensors_already_there_are_shared() -> None:
    update = updates(global_model(), EVERYTHING)[0]
    here = update.to(torch.device("cpu"))
    assert fingerprint(here) == fingerprint(update)
    assert all(a is b for a, b in zip(tree_leaves(dict(here.params)), tree_leaves(dict(update.params)), strict=True))


def test_trainable_names_come_in_the_order_of_the_params() -> None:
    model = global_model()
    assert model.names == [name for name in model.params if name in model.trainable]
    assert model.trainable - set(model.names) == {"again.weight"}  # the tied alias


def test_an_inner_method_sees_its_own_part_of_the_memory() -> None:
    kept = torch.ones(2)
    model = replace(global_model(), memory={"momentum": {"a": kept}, "inner": {"momentum": {"b": kept}, "step": 3}})
    assert list(model.kept("momentum")) == ["a"]
    assert list(model.within().kept("momentum")) == ["b"]
    assert model.within().memory["step"] == 3
    assert model.within().within().memory == {}
    assert model.within().params is model.params


def test_a_first_round_remembers_nothing() -> None:
    assert global_model().kept("momentum") == {}
    assert global_model().within().memory == {}


def test_memory_of_another_shape_is_named() -> None:
    with pytest.raises(TypeError, match=r"memory\['momentum'\] holds int"):
        replace(global_model(), memory={"momentum": 3}).kept("momentum")


def test_the_core_follows_the_device_of_the_model() -> None:
    meta = torch.device("meta")
    model = GlobalModel(params={"a": torch.ones(1, device=meta)}, trainable=frozenset("a"))
    assert model.device == meta
    assert GlobalModel(params={}, trainable=frozenset()).device == torch.device("cpu")
