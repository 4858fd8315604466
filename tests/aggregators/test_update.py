"""What is asked and what is answered."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.utils._pytree import tree_leaves
from toys import EVERYTHING, fingerprint, global_model, updates

from aggregators.core.update import ESTIMATORS, ClientUpdate, GlobalModel, Gradients, Request

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
    Request,
    gradients=st.none() | gradients,
    gram=flags,
    grad_gram=flags,
    moments=flags,
    cross_moments=flags,
    class_counts=flags,
)


def compatible(*asked: Request) -> bool:
    return len({request.gradients.estimator for request in asked if request.gradients}) <= 1


@given(requests, requests)
def test_asking_for_both_is_commutative(a: Request, b: Request) -> None:
    assume(compatible(a, b))
    assert a | b == b | a


@given(requests, requests, requests)
def test_asking_for_both_is_associative(a: Request, b: Request, c: Request) -> None:
    assume(compatible(a, b, c))
    assert (a | b) | c == a | (b | c)


@given(requests)
def test_asking_twice_is_asking_once(a: Request) -> None:
    assert a | a == a


@given(requests)
def test_an_empty_request_is_neutral(a: Request) -> None:
    assert a | Request() == a == Request() | a


@given(requests, requests)
def test_whoever_asked_gets_it(a: Request, b: Request) -> None:
    assume(compatible(a, b))
    joint = a | b
    for one in (a, b):
        assert all(getattr(joint, name) for name in Request.model_fields if getattr(one, name))
        if one.gradients and joint.gradients:
            assert joint.gradients.sums >= one.gradients.sums
            assert joint.gradients.squares >= one.gradients.squares
            assert joint.gradients.sketches >= one.gradients.sketches
            assert joint.gradients.limit is None or (one.gradients.limit or 10) <= joint.gradients.limit


@given(gradients, gradients)
def test_two_estimators_are_refused(a: Gradients, b: Gradients) -> None:
    assume(a.estimator != b.estimator)
    with pytest.raises(ValueError, match=f"'{a.estimator}' and '{b.estimator}'"):
        Request(gradients=a) | Request(gradients=b)


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
