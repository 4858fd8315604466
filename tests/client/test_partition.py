from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.tasks import cache, partition
from client.tasks.cache import cache_folder, cached
from client.tasks.own_data import Labels
from client.tasks.partition import Indices, Split, parts, place

ROOT = Path(__file__).parents[2]
ROUND_ROBIN = np.arange(1000) % 10


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def held(dealt: list[Indices]) -> list[int]:
    return sorted(np.concatenate(dealt).tolist())


some_labels = st.lists(st.integers(0, 9), min_size=8, max_size=60).map(lambda values: np.array(values, dtype=np.int64))


@settings(max_examples=25, deadline=None)
@given(
    labels=some_labels,
    num=st.integers(1, 8),
    scheme=st.sampled_from(["iid", "dirichlet"]),
    alpha=st.sampled_from([1e-9, 0.1, 1.0, 1e6]),
    seed=st.integers(0, 2**40),
)
def test_every_example_has_one_holder_and_every_client_an_example(
    labels: Labels, num: int, scheme: Literal["iid", "dirichlet"], alpha: float, seed: int
) -> None:
    dealt = parts(labels, num, Split(scheme, alpha, seed=seed))
    assert held(dealt) == list(range(len(labels)))
    assert len(dealt) == num
    assert min(map(len, dealt)) >= min(10, len(labels) // num)


@settings(max_examples=15, deadline=None)
@given(num=st.integers(1, 12), labels_per_client=st.integers(1, 10), seed=st.integers(0, 2**40))
def test_by_label_deals_all_examples_and_exactly_so_many_labels_each(
    num: int, labels_per_client: int, seed: int
) -> None:
    labels = np.arange(300) % 10
    split = Split("by_label", labels_per_client=labels_per_client, seed=seed)
    if num * labels_per_client < 10:
        with pytest.raises(ValueError, match=f"set it to {-(-10 // num)} … 10"):
            parts(labels, num, split)
    else:
        dealt = parts(labels, num, split)
        assert held(dealt) == list(range(300))
        assert {len(np.unique(labels[part])) for part in dealt} == {labels_per_client}


def test_by_label_gives_a_client_the_labels_that_follow_one_another() -> None:
    dealt = parts(ROUND_ROBIN, 5, Split("by_label", labels_per_client=3))
    assert [set(ROUND_ROBIN[part].tolist()) for part in dealt] == [
        {0, 1, 2}, {3, 4, 5}, {6, 7, 8}, {9, 0, 1}, {2, 3, 4},
    ]  # fmt: skip


def test_by_label_names_a_label_with_fewer_examples_than_holders() -> None:
    labels = np.array([0] * 50 + [1] * 2)
    with pytest.raises(ValueError, match="label 1 has 2 examples for the 3 clients"):
        parts(labels, 3, Split("by_label", labels_per_client=2))


def test_iid_parts_are_equal_give_or_take_one_and_hold_every_label() -> None:
    dealt = parts(ROUND_ROBIN, 7, Split("iid"))
    assert {len(part) for part in dealt} == {142, 143}
    assert all(len(np.unique(ROUND_ROBIN[part])) == 10 for part in dealt)


def test_shared_gives_everyone_everything() -> None:
    assert [held([part]) for part in parts(ROUND_ROBIN, 3, Split("shared"))] == [list(range(1000))] * 3


def test_a_large_alpha_deals_every_label_evenly() -> None:
    dealt = parts(ROUND_ROBIN, 4, Split("dirichlet", alpha=1e6))
    counts = np.array([np.bincount(ROUND_ROBIN[part], minlength=10) for part in dealt])
    assert (abs(counts - 25) <= 1).all()


def test_a_small_alpha_deals_each_label_to_one_client() -> None:
    dealt = parts(ROUND_ROBIN, 2, Split("dirichlet", alpha=1e-9))
    counts = np.array([np.bincount(ROUND_ROBIN[part], minlength=10) for part in dealt])
    assert set(counts.ravel().tolist()) == {0, 100}


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 12), min_size=1, max_size=6), data=st.data())
def test_topping_up_moves_no_more_examples_than_are_missing(sizes: list[int], data: st.DataObject) -> None:
    from client.tasks.schemes import top_up

    fewest = data.draw(st.integers(0, sum(sizes) // len(sizes)))
    before = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    after = top_up(before, fewest)
    stayed = sum(len(np.intersect1d(old, new)) for old, new in zip(before, after, strict=True))
    assert held(after) == held(before)
    assert min(map(len, after)) >= fewest
    assert sum(sizes) - stayed == sum(max(0, fewest - size) for size in sizes)


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "by_label"])
def test_a_partition_depends_on_its_seed_alone(scheme: Literal["iid", "dirichlet", "by_label"]) -> None:
    first, other = (parts(ROUND_ROBIN, 5, Split(scheme, seed=seed)) for seed in (1, 2))
    for file in cache_folder().iterdir():
        file.unlink()
    again = parts(ROUND_ROBIN, 5, Split(scheme, seed=1))
    assert [part.tolist() for part in again] == [part.tolist() for part in first]
    assert [part.tolist() for part in other] != [part.tolist() for part in first]


@pytest.mark.parametrize("num", [0, -1, 1001])
def test_more_clients_than_examples_are_refused(num: int) -> None:
    with pytest.raises(ValueError, match=f"1000 examples cannot be split among {num} clients"):
        parts(ROUND_ROBIN, num, Split("iid"))


@pytest.mark.parametrize(
    "node",
    [
        {},
        {"partition-id": 0},
        {"num-partitions": 3},
        {"partition-id": 3, "num-partitions": 3},
        {"partition-id": -1, "num-partitions": 3},
        {"partition-id": "0", "num-partitions": 3},
        {"partition-id": False, "num-partitions": 3},
        {"partition-id": 0.0, "num-partitions": 3},
    ],
)
def test_a_node_without_a_part_is_told_how_to_name_one(node: dict[str, str | int | float | bool]) -> None:
    with pytest.raises(ValueError, match=re.escape("--node-config 'partition-id=0 num-partitions=2'")) as caught:
        place(node)
    assert "\n" not in str(caught.value)


def test_a_node_names_its_part() -> None:
    assert place({"partition-id": 2, "num-partitions": 3, "site": "north"}) == (2, 3)


# --- the cache --------------------------------------------------------------------------------


class Making:
    """Something slow: it counts how often it was computed."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> cache.Arrays:
        self.times += 1
        return {"a": np.arange(5), "b": np.ones((2, 3), dtype=np.uint8)}


@pytest.fixture
def making(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Making:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Making()


def test_what_is_cached_is_computed_once_and_comes_back_bit_for_bit(making: Making) -> None:
    computed, read = (cached(making, "toy", 1, "x") for _ in range(2))
    assert making.times == 1
    assert computed.keys() == read.keys()
    assert all(
        read[name].dtype == array.dtype and np.array_equal(read[name], array) for name, array in computed.items()
    )


def test_another_key_is_computed_anew(making: Making) -> None:
    for key in ((1, "x"), (1, "y"), (2, "x"), ("1", "x")):
        cached(making, "toy", *key)
    assert making.times == 4


def test_nothing_but_the_finished_file_is_left_in_the_cache(making: Making) -> None:
    cached(making, "toy")
    assert [path.suffix for path in cache_folder().iterdir()] == [".safetensors"]


def test_a_damaged_cache_file_is_computed_anew_and_mended(making: Making) -> None:
    cached(making, "toy")
    (file,) = cache_folder().iterdir()
    file.write_bytes(file.read_bytes()[:20])
    assert cached(making, "toy")["a"].tolist() == [0, 1, 2, 3, 4]
    cached(making, "toy")
    assert making.times == 2


def test_a_cache_that_cannot_be_written_costs_time_only(
    making: Making, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cached(making, "toy")["a"].tolist() == [0, 1, 2, 3, 4]
    assert "set XDG_CACHE_HOME to a folder that can be written" in caplog.text


def test_a_partition_is_kept_per_labels_and_origin(monkeypatch: pytest.MonkeyPatch, making: Making) -> None:
    parts(ROUND_ROBIN, 2, Split("iid"))
    parts(ROUND_ROBIN[::-1], 2, Split("iid"))
    monkeypatch.setattr(partition, "_origin", lambda: ("another version",))
    parts(ROUND_ROBIN, 2, Split("iid"))
    parts(ROUND_ROBIN, 2, Split("iid"))
    assert len(list(cache_folder().iterdir())) == 3


FRESH = """
import sys, torch
connections = []
sys.addaudithook(lambda event, args: connections.append(event) if event in WATCHED else None)
WATCHED = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}
from client.tasks.digits import Digits
print(len(Digits().data({"partition-id": 1, "num-partitions": 4})[0]))
print(sorted({"datasets", "flwr_datasets", "sklearn"} & set(sys.modules)), connections)
"""


def test_the_first_client_computes_the_partition_offline_and_later_ones_import_nothing_slow(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", FRESH]
    first, later = (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
        for _ in range(2)
    )
    assert first[1] == "['datasets', 'flwr_datasets', 'sklearn'] []"
    assert later == [first[0], "[] []"]
