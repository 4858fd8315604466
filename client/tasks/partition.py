"""Who holds which examples: one set of data, split among the clients of a federation."""

from __future__ import annotations

from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from client.task import Node
from client.tasks.cache import Arrays, cached
from client.tasks.own_data import Labels

Scheme: TypeAlias = Literal["iid", "dirichlet", "by_label", "shared"]
Indices: TypeAlias = NDArray[np.int64]

LIBRARIES = ("numpy", "datasets", "flwr-datasets")  # another version of them may draw differently


class Split(NamedTuple):
    """How a set is split. `alpha` is for `dirichlet` only, `labels_per_client` for `by_label` only."""

    scheme: Scheme = "dirichlet"
    alpha: float = 0.5
    labels_per_client: int = 2
    seed: int = 0


def parts(labels: Labels, num: int, split: Split) -> list[Indices]:
    """The indices into `labels` that each of `num` clients holds: disjoint, none empty, together all of them.

    `iid`: equal parts at random. `dirichlet`: each label is dealt in proportions drawn from Dir(alpha) (Yurochkin
    et al. 2019); a part left with fewer than ten examples then takes some from the largest. `by_label`: client k
    holds the labels k · labels_per_client and following, cyclically, each split evenly among its holders. `shared`:
    everyone holds everything. The same for the same `split`; computed once, then read from disk. ValueError where
    examples or labels do not go round.
    """
    if split.scheme == "shared":
        return [np.arange(len(labels))] * num
    if not 0 < num <= len(labels):
        raise ValueError(f"{len(labels)} examples cannot be split among {num} clients: change num-partitions")
    order = np.random.default_rng(split.seed).permutation(len(labels))
    key = (blake2b(labels.tobytes()).hexdigest(), num, split, *_origin())
    dealt = cached(lambda: _deal(labels[order], num, split), "partition", *key)
    return [order[part] for part in np.split(dealt["indices"], dealt["ends"][:-1])]


def place(node: Node) -> tuple[int, int]:
    """A client's part and the number of parts: `partition-id` and `num-partitions` of its node configuration."""
    part, num = node.get("partition-id"), node.get("num-partitions")
    if type(part) is not int or type(num) is not int or not 0 <= part < num:
        raise ValueError(
            f"partition-id={part} num-partitions={num} names no part of the data: start the client with, for "
            """instance, --node-config 'partition-id=0 num-partitions=2', or data="FOLDER" for data of its own"""
        )
    return part, num


def _deal(labels: Labels, num: int, split: Split) -> Arrays:
    from client.tasks import schemes

    parts = schemes.deal(labels, num, split)
    return {"indices": np.concatenate(parts), "ends": np.cumsum([len(part) for part in parts])}


def _origin() -> tuple[object, ...]:
    """What computes a partition, so that one computed otherwise is not taken for it."""
    here = Path(__file__)
    return here.read_bytes(), here.with_name("schemes.py").read_bytes(), *map(version, LIBRARIES)
