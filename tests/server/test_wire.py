"""The wire: what is encoded on one side arrives, bit for bit, on the other; what is malformed is named."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import toys
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from toys import fingerprint

import client.wire
import server.wire
from aggregators.core import flat
from aggregators.core.exchange import Exchange, collect
from aggregators.core.flat import DTYPES, pack, unpack
from aggregators.core.update import ESTIMATORS, TENSOR_FIELDS, ClientUpdate, Gradients, Moments, Request
from server.admission import Rejected, admit
from server.telemetry import LONGEST
from server.wire import Malformed

MODEL = toys.global_model()
UPDATE = toys.updates(MODEL, toys.EVERYTHING)[0]
ASKED = Exchange(task="train", params=MODEL.params, request=toys.EVERYTHING, fold=collect)
ODD_NAMES = ["", " ", "a|b", "|num", "line\nbreak", "nul\x00", 'quote"', "back\\slash", "ünï", "😀", "layers.0.weight"]


def there(update: ClientUpdate) -> ClientUpdate:
    return server.wire.decode(client.wire.encode(update), update.client_id)


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """A tensor of any bits whatever: NaNs with payloads, denormals, infinities; booleans that are 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel() * dtype.itemsize
    drawn = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), generator=generator, dtype=torch.uint8)
    return drawn.view(dtype).view(shape)


# --- what arrives ---------------------------------------------------------------------------------------------------


def test_an_update_with_every_field_arrives_bit_for_bit() -> None:
    update = replace(UPDATE, metrics={"loss": 0.1, "num": 7.0, "diverged": float("inf")})
    assert fingerprint(there(update)) == fingerprint(update)


@pytest.mark.parametrize("precision", toys.PRECISIONS)
def test_an_update_of_any_precision_arrives_bit_for_bit(precision: toys.Precision) -> None:
    update = toys.updates(toys.global_model(precision), toys.EVERYTHING)[1]
    assert fingerprint(there(update)) == fingerprint(update)


@pytest.mark.parametrize("field", TENSOR_FIELDS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_crosses_in_every_field(field: str, dtype: torch.dtype) -> None:
    tensors = {
        str(shape): random_bits(dtype, shape, seed) for seed, shape in enumerate([(), (0,), (3, 0), (5,), (2, 3)])
    }
    fields: dict[str, Any] = {field: tensors}
    update = ClientUpdate(client_id=1, num_examples=1, **fields)
    assert fingerprint(there(update)) == fingerprint(update)


def test_the_payload_bits_of_a_nan_arrive() -> None:
    payload = torch.tensor([0x7FC01234, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    arrived = there(ClientUpdate(client_id=1, num_examples=1, params={"w": payload})).params["w"]
    assert payload.isnan().all()
    assert arrived.view(torch.int32).tolist() == payload.view(torch.int32).tolist()


def test_a_tensor_that_is_not_contiguous_arrives_as_it_looks() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    views = {"transposed": base.T, "strided": base[::2, 1::3], "expanded": base[:1].expand(3, 6), "last": base[-1]}
    arrived = there(ClientUpdate(client_id=1, num_examples=1, params=views)).params
    assert {name: value.tolist() for name, value in arrived.items()} == {n: v.tolist() for n, v in views.items()}


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_of_any_characters_arrives(name: str) -> None:
    moments = {name: Moments(3, torch.ones(2), torch.zeros(2))}
    update = ClientUpdate(client_id=1, num_examples=1, name=name, params={name: torch.ones(2)}, moments=moments)
    assert fingerprint(there(update)) == fingerprint(update)


def test_the_order_of_names_arrives() -> None:
    names = ["z", "a", "m", "10", "9"]
    arrived = there(ClientUpdate(client_id=1, num_examples=1, params={name: torch.ones(1) for name in names}))
    assert list(arrived.params) == names


def test_moments_and_class_counts_arrive() -> None:
    moments = {"bn": Moments(12, torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0]))}
    sent = ClientUpdate(client_id=1, num_examples=4, moments=moments, class_counts=torch.tensor([1, 3]))
    arrived = there(sent)
    assert arrived.moments["bn"].num == 12
    assert arrived.moments["bn"].m2.tolist() == [0.5, 0.0]
    assert arrived.class_counts is not None
    assert arrived.class_counts.tolist() == [1, 3]


@pytest.mark.parametrize("estimator", [*ESTIMATORS, None])
def test_the_estimator_arrives(estimator: Any) -> None:
    assert there(ClientUpdate(client_id=1, num_examples=1, estimator=estimator)).estimator == estimator


def test_the_client_id_is_flowers_and_never_the_payloads() -> None:
    content = client.wire.encode(replace(UPDATE, client_id=5))
    assert server.wire.decode(content, 2**64 - 1).client_id == 2**64 - 1


state_dicts = st.dictionaries(
    st.text(max_size=8),
    st.builds(
        random_bits,
        st.sampled_from(list(DTYPES.values())),
        st.lists(st.integers(0, 4), max_size=4).map(tuple),
        st.integers(0, 2**31),
    ),
    max_size=5,
)


@given(params=state_dicts, grad_sum=state_dicts)
def test_any_state_dict_arrives_bit_for_bit(params: dict[str, Tensor], grad_sum: dict[str, Tensor]) -> None:
    update = ClientUpdate(client_id=3, num_examples=1, params=params, grad_sum=grad_sum)
    assert fingerprint(there(update)) == fingerprint(update)


@given(params=state_dicts)
def test_any_model_reaches_the_client_bit_for_bit(params: dict[str, Tensor]) -> None:
    message = server.wire.encode(Exchange(task="train", params=params, fold=collect), instructions())(7)
    assert fingerprint(client.wire.decode(message)[1]) == fingerprint(params)


def test_decoded_tensors_are_views_of_the_received_bytes() -> None:
    content = client.wire.encode(UPDATE)
    update = server.wire.decode(content, 1)
    for field in TENSOR_FIELDS:
        data = content.array_records[field]["flat"].data
        start = flat.as_tensor(data).data_ptr()
        places = [t.data_ptr() - start for t in getattr(update, field).values() if t.numel()]
        assert places == sorted(places)
        assert 0 <= places[0] <= places[-1] < len(data)


def test_every_tensor_starts_at_a_multiple_of_its_element_size() -> None:
    odd = {
        "a": torch.ones(3, dtype=torch.uint8),
        "b": torch.ones(1, dtype=torch.float64),
        "c": torch.ones(()).bfloat16(),
    }
    for tensor in unpack(*pack(odd)).values():
        assert tensor.data_ptr() % tensor.element_size() == 0


def test_a_dtype_that_the_wire_does_not_carry_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^w has dtype complex64.*use one of float64") as refused:
        pack({"w": torch.ones(1, dtype=torch.complex64)})
    assert "\n" not in str(refused.value)


def test_bytes_are_counted_over_all_arrays() -> None:
    update = ClientUpdate(client_id=1, num_examples=1, params={"w": torch.ones(4)}, grad_sum={"w": torch.ones(1)})
    assert server.wire.nbytes(client.wire.encode(update)) == 4 * 4 + flat.ALIGNMENT


def test_a_forgotten_reply_holds_no_bytes() -> None:
    content = client.wire.encode(UPDATE)
    server.wire.forget(content)
    assert server.wire.nbytes(content) == 0


# --- what the server asks -------------------------------------------------------------------------------------------


def instructions(**changes: Any) -> dict[str, Any]:
    return {"task": "digits", "training": {"epochs": 2}, "seed": 5, "round": 3, "evaluate": True, **changes}


def test_the_clients_side_reads_all_that_the_server_asks() -> None:
    request = Request(gradients=Gradients(squares=True, limit=9), moments=True)
    exchange = Exchange(task="measure", params={}, request=request, fold=collect, frozen=frozenset({"b", "a"}))
    asked, received = client.wire.decode(server.wire.encode(exchange, instructions())(1))
    assert (str(asked.exchange), asked.request, sorted(asked.frozen)) == ("measure", request, ["a", "b"])
    assert (asked.task, asked.training, asked.seed, asked.round, asked.evaluate) == (
        "digits",
        {"epochs": 2},
        5,
        3,
        True,
    )
    assert received == {}


def test_an_own_start_sends_no_params() -> None:
    message = server.wire.encode(replace(ASKED, params=None), instructions())(1)
    assert client.wire.decode(message)[1] is None
    assert server.wire.nbytes(message) == 0


def test_a_model_that_all_receive_is_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = counting_pack(monkeypatch)
    content = server.wire.encode(ASKED, instructions())
    assert len({id(content(client_id)) for client_id in range(20)}) == 1
    assert len(packed) == 1


def test_models_of_their_own_are_packed_per_client(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = counting_pack(monkeypatch)
    exchange = replace(ASKED, params=lambda client_id: {"w": torch.tensor([client_id])})
    content = server.wire.encode(exchange, instructions())
    received = [client.wire.decode(content(client_id))[1] for client_id in (4, 6)]
    assert [params and params["w"].item() for params in received] == [4, 6]
    assert len(packed) == 2


def counting_pack(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    calls: list[object] = []

    def counted(tensors: Any) -> Any:
        calls.append(tensors)
        return pack(tensors)

    monkeypatch.setattr(server.wire, "pack", counted)
    return calls


def test_an_anchor_crosses_beside_the_params_and_is_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = counting_pack(monkeypatch)
    exchange = replace(ASKED, params=lambda client_id: {"w": torch.tensor([client_id])}, anchor={"w": torch.ones(1)})
    content = server.wire.encode(exchange, instructions())
    for client_id in (4, 6):
        params, anchor = client.wire.decode(content(client_id))[1], client.wire.anchor(content(client_id))
        assert params is not None
        assert anchor is not None
        assert (params["w"].tolist(), anchor["w"].tolist()) == ([client_id], [1.0])
    assert sum(call is exchange.anchor for call in packed) == 1


@pytest.mark.parametrize(
    ("params", "anchor", "expected"), [(1.0, None, 1.0), (None, 2.0, 2.0), (1.0, 2.0, 2.0), (None, None, None)]
)
def test_a_client_compares_with_the_anchor_or_else_with_what_it_received(
    params: float | None, anchor: float | None, expected: float | None
) -> None:
    sent = [None if value is None else {"w": torch.tensor(value)} for value in (params, anchor)]
    message = server.wire.encode(replace(ASKED, params=sent[0], anchor=sent[1]), instructions())(1)
    found = client.wire.anchor(message)
    assert (found and found["w"].item()) == expected


def test_a_client_refuses_a_server_of_another_version() -> None:
    message = server.wire.encode(ASKED, instructions())(1)
    message.config_records["manifest"]["version"] = 99
    with pytest.raises(ValueError, match="server speaks wire version 99, this client 1"):
        client.wire.decode(message)


def test_a_client_refuses_instructions_that_it_does_not_know() -> None:
    message = server.wire.encode(ASKED, instructions(encrypt=True))(1)
    with pytest.raises(ValueError, match="encrypt"):
        client.wire.decode(message)


# --- what is malformed ----------------------------------------------------------------------------------------------


def reply() -> RecordDict:
    update = replace(UPDATE, metrics={"loss": 0.5})
    return client.wire.encode(update)


def manifest(**changes: Any) -> Callable[[RecordDict], None]:
    return lambda content: content.config_records["manifest"].update(changes)


def layout(change: Callable[[Any], Any]) -> Callable[[RecordDict], None]:
    """Changes the params' entries [name, dtype, shape] in the layout."""

    def changed(content: RecordDict) -> None:
        layouts = json.loads(str(content.config_records["manifest"]["layout"]))
        layouts["params"] = change(layouts["params"])
        content.config_records["manifest"]["layout"] = json.dumps(layouts)

    return changed


def first(name: object = ..., dtype: object = ..., shape: object = ...) -> Callable[[RecordDict], None]:
    """Changes the layout's first entry."""
    changes = (name, dtype, shape)

    def changed(entries: list[Any]) -> list[Any]:
        pairs = zip(changes, entries[0], strict=True)
        return [[old if new is ... else new for new, old in pairs], *entries[1:]]

    return layout(changed)


def data(change: Callable[[bytes], bytes], field: str = "params") -> Callable[[RecordDict], None]:
    def changed(content: RecordDict) -> None:
        content[field] = client.wire.flat_record(change(content.array_records[field]["flat"].data))

    return changed


def record(name: str, value: Any) -> Callable[[RecordDict], None]:
    return lambda content: content.update({name: value})


def without(name: str) -> Callable[[RecordDict], None]:
    return lambda content: content.__delitem__(name)


def without_part(part: str) -> Callable[[RecordDict], None]:
    """A reply whose moments lack one part."""

    def changed(content: RecordDict) -> None:
        tensors = {f"bn|{name}": torch.ones(()) for name in ("num", "mean", "m2") if name != part}
        put(content, "moments", tensors)

    return changed


def put(content: RecordDict, field: str, tensors: dict[str, Tensor]) -> None:
    packed, entries = pack(tensors)
    layouts = json.loads(str(content.config_records["manifest"]["layout"]))
    content.config_records["manifest"]["layout"] = json.dumps({**layouts, field: entries})
    content[field] = client.wire.flat_record(packed)


COUNTS = {"num_examples": 5, "num_grads": 5}

MALFORMED: dict[str, tuple[Callable[[RecordDict], Any], str]] = {
    "an older version": (manifest(version=0), "wire version 0, this server speaks 1"),
    "a version in words": (manifest(version="one"), "wire version 'one'"),
    "an unknown estimator": (manifest(estimator="guess"), "estimator 'guess': allowed is one of exact"),
    "an estimator in numbers": (manifest(estimator=1), "estimator 1"),
    "no manifest": (without("manifest"), "KeyError: 'manifest'"),
    "no counts": (without("counts"), "KeyError: 'counts'"),
    "no metrics": (without("metrics"), "KeyError: 'metrics'"),
    "a manifest of numbers": (record("manifest", MetricRecord({"version": 1})), "manifest"),
    "counts of text": (record("counts", ConfigRecord({"num_examples": "5"})), "counts"),
    "no count of examples": (record("counts", MetricRecord({"num_grads": 5})), "num_examples"),
    "no count of gradients": (record("counts", MetricRecord({"num_examples": 5})), "num_grads"),
    "a fractional count": (record("counts", MetricRecord({**COUNTS, "num_examples": 5.0})), "a count is 5.0"),
    "a count that is NaN": (record("counts", MetricRecord({**COUNTS, "num_grads": float("nan")})), "a count is nan"),
    "a list of counts": (record("counts", MetricRecord({**COUNTS, "num_grads": [5, 5]})), "a count is [5, 5]"),
    "a list as a metric": (record("metrics", MetricRecord({"loss": [0.5]})), "TypeError"),
    "a metric too large": (record("metrics", MetricRecord({"loss": 10**400})), "OverflowError"),
    "a missing array": (without("grad_sum"), "where the layout describes"),
    "an array too many": (record("extra", ArrayRecord()), "arrays of ['class_counts', 'cross_moments', 'extra'"),
    "an empty record of arrays": (record("params", ArrayRecord()), "KeyError: 'flat'"),
    "truncated bytes": (data(lambda bytes: bytes[:-1]), "bytes where the layout describes"),
    "extra bytes": (data(lambda bytes: bytes + b"\0"), "bytes where the layout describes"),
    "no bytes": (data(lambda bytes: b""), "0 bytes where the layout describes"),
    "no layout": (lambda content: content["manifest"].pop("layout"), "KeyError: 'layout'"),
    "a layout that is no JSON": (manifest(layout="{"), "JSONDecodeError"),
    "a layout that is a number": (manifest(layout="7"), "AttributeError"),
    "a layout that is a list": (manifest(layout="[]"), "AttributeError"),
    "a layout nested too deep": (manifest(layout="[" * 100_000), "RecursionError"),
    "a layout of too long a number": (manifest(layout="1" * 10_000), "ValueError"),
    "an unknown field": (lambda content: put(content, "weights", {"w": torch.ones(1)}), "unknown fields ['weights']"),
    "entries that are no list": (layout(lambda entries: 7), "TypeError"),
    "entries that are text": (layout(lambda entries: "abc"), "ValueError"),
    "entries of two": (layout(lambda entries: [entry[:2] for entry in entries]), "ValueError"),
    "an unknown dtype": (first(dtype="float8"), "is described as 'float8'"),
    "a dtype that is a number": (first(dtype=32), "is described as 32"),
    "a dtype that is a list": (first(dtype=["float32"]), "is described as ['float32']"),
    "a name that is a number": (first(name=1), "1 is described as"),
    "a name that is a list": (first(name=["w"]), "['w'] is described as"),
    "no name": (first(name=None), "None is described as"),
    "a name twice": (layout(lambda entries: [entries[1], *entries[1:]]), ""),
    "a shape that is a number": (first(shape=24), "of shape 24"),
    "a shape that is text": (first(shape=""), "of shape ''"),
    "no shape": (first(shape=None), "of shape None"),
    "a negative size": (first(shape=[-6, -4]), "of shape [-6, -4]"),
    "a boolean size": (first(shape=[True, 24]), "of shape [True, 24]"),
    "a fractional size": (first(shape=[6.0, 4]), "of shape [6.0, 4]"),
    "a nested size": (first(shape=[[6], 4]), "of shape [[6], 4]"),
    "a huge size": (first(shape=[2**50]), "bytes where the layout describes"),
    "sizes whose product overflows": (first(shape=[2**62, 2**62]), "bytes where the layout describes"),
    "a size beyond 64 bits": (first(shape=[2**63]), "of shape [9223372036854775808]"),
    "an empty tensor of sizes that overflow": (first(shape=[0, 2**62, 2**62]), ""),
    "too many axes": (first(shape=[1] * 65), "of shape [1, 1"),
    "moments without a count": (without_part("num"), "moments are incomplete or malformed: ['bn|num']"),
    "moments without means": (without_part("mean"), "moments are incomplete or malformed: ['bn|mean']"),
    "moments without m2": (without_part("m2"), "moments are incomplete or malformed: ['bn|m2']"),
    "moments with a fractional count": (without_part("nothing"), "moments of 'bn' count torch.float32"),
    "two vectors of class counts": (
        lambda content: put(content, "class_counts", {"": torch.ones(1), "x": torch.ones(1)}),
        "ValueError",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_reply_is_named_in_one_line(case: str) -> None:
    change, reason = MALFORMED[case]
    content = reply()
    change(content)
    with pytest.raises(Malformed) as refused:
        server.wire.decode(content, 1)
    assert reason in str(refused.value)
    assert one_printable_line(str(refused.value))


def one_printable_line(text: str) -> bool:
    return text.isprintable() and 0 < len(text) <= LONGEST


def test_a_reply_without_any_record_is_malformed() -> None:
    with pytest.raises(Malformed):
        server.wire.decode(RecordDict(), 1)


def test_a_tensor_name_that_stands_twice_is_malformed() -> None:
    params = {"a": torch.ones(4), "b": torch.ones(4)}
    content = client.wire.encode(ClientUpdate(client_id=1, num_examples=1, params=params))
    manifest(layout=json.dumps({"params": [["a", "float32", [4]], ["a", "float32", [4]]]}))(content)
    with pytest.raises(Malformed, match="stands twice"):
        server.wire.decode(content, 1)


def test_moments_keyed_by_anything_else_are_malformed() -> None:
    content = reply()
    put(content, "moments", {f"bn|{part}": torch.ones((), dtype=torch.int64) for part in ("num", "mean", "m2", "m3")})
    with pytest.raises(Malformed, match="incomplete or malformed"):
        server.wire.decode(content, 1)


def test_no_described_size_costs_time_or_memory() -> None:
    """Thirty thousand axes of the largest size, whose product has half a million digits."""
    content = reply()
    first(shape=[2**63 - 1] * 30_000)(content)
    started = time.perf_counter()
    with pytest.raises(Malformed):
        server.wire.decode(content, 1)
    assert time.perf_counter() - started < 1


# --- whatever a reply may hold --------------------------------------------------------------------------------------

junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 9)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([*DTYPES, *ESTIMATORS, 2**31, 2**32, 2**62, 2**63, 2**64]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
values = st.one_of(st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=5), st.booleans())
numbers = st.one_of(st.integers(), st.floats(), st.lists(st.floats(), max_size=2))


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON tree."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
    return [(tree, key) for key in keys] + [place for key in keys for place in places(tree[key])]


def mutate_layout(draw: st.DataObject, content: RecordDict) -> None:
    tree = [json.loads(str(content.config_records["manifest"]["layout"]))]
    container, key = draw.draw(st.sampled_from(range(len(places(tree)))).map(lambda index: places(tree)[index]))
    container[key] = draw.draw(junk)
    content.config_records["manifest"]["layout"] = json.dumps(tree[0])


def mutate_bytes(draw: st.DataObject, content: RecordDict) -> None:
    field = draw.draw(st.sampled_from(sorted(content.array_records)))
    held = bytearray(content.array_records[field]["flat"].data)
    start = draw.draw(st.integers(0, len(held)))
    held[start : start + draw.draw(st.integers(0, 40))] = draw.draw(st.binary(max_size=40))
    content[field] = ArrayRecord({"flat": Array("uint8", (len(held),), "fedbasin.flat", bytes(held))})


def mutate_values(draw: st.DataObject, content: Any) -> None:
    name = draw.draw(st.sampled_from(["manifest", "counts", "metrics"]))
    key = draw.draw(st.sampled_from([*content[name], "other"]))
    content[name][key] = draw.draw(values if name == "manifest" else numbers)


def mutate_records(draw: st.DataObject, content: Any) -> None:
    name = draw.draw(st.sampled_from([*content, "other"]))
    del content[name if name in content else "counts"]
    if draw.draw(st.booleans()):
        content[name] = draw.draw(st.sampled_from([ArrayRecord(), ConfigRecord(), MetricRecord({"x": 1})]))


MUTATIONS = (mutate_layout, mutate_bytes, mutate_values)


@given(draw=st.data())
def test_whatever_a_reply_holds_it_is_admitted_or_left_out_in_one_line(draw: st.DataObject) -> None:
    content = reply()
    for mutation in draw.draw(st.lists(st.sampled_from(MUTATIONS), min_size=1, max_size=3)):
        mutation(draw, content)
        if "layout" not in content["manifest"] or not is_json_object(content["manifest"]["layout"]):
            break
    if draw.draw(st.booleans()):
        mutate_records(draw, content)
    try:
        update = server.wire.decode(content, 1)
        admit(update, ASKED, MODEL, max_examples=10**9)
    except (Malformed, Rejected) as error:
        outcome = str(error)
    else:
        outcome = f"admitted {fingerprint(there(update)) == fingerprint(update)}"
    assert one_printable_line(outcome)
    assert outcome != "admitted False"


def is_json_object(text: object) -> bool:
    try:
        return isinstance(json.loads(str(text)), dict)
    except ValueError:
        return False


@given(name=st.text(), dtype=junk, shape=junk, size=st.integers(0, 40))
def test_bytes_are_unpacked_as_described_or_refused(name: str, dtype: Any, shape: Any, size: int) -> None:
    try:
        tensors = unpack(bytes(size), [(name, dtype, shape)])
    except ValueError:
        return
    assert list(tensors[name].shape) == list(shape)
    assert tensors[name].dtype == DTYPES[dtype]
