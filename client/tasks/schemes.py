"""How labelled examples are dealt to clients, by Flower Datasets' partitioners; slow to import, so import it late."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    PathologicalPartitioner,
)

from client.tasks.own_data import Labels
from client.tasks.partition import Indices, Split

FEWEST = 10  # examples that a Dirichlet part holds at least, where there are so many to go round


def deal(labels: Labels, num: int, split: Split) -> list[Indices]:
    """The part of each of `num` clients, for every scheme that splits at all."""
    match split.scheme:
        case "dirichlet":
            return dirichlet(labels, num, split.alpha, split.seed)
        case "by_label":
            return by_label(labels, num, split.labels_per_client)
        case _:
            return iid(labels, num)


def iid(labels: Labels, num: int) -> list[Indices]:
    """Neighbouring stretches of equal length, give or take one: random if the order of `labels` is."""
    return _load(IidPartitioner(num), labels, num)


def dirichlet(labels: Labels, num: int, alpha: float, seed: int) -> list[Indices]:
    """Parts with each label in proportions drawn from Dir(alpha) (Yurochkin et al. 2019), topped up to `FEWEST`."""
    partitioner = DirichletPartitioner(num, "label", float(alpha), min_partition_size=0, seed=seed)
    return top_up(_load(partitioner, labels, num), min(FEWEST, len(labels) // num))


def top_up(parts: Sequence[Indices], fewest: int) -> list[Indices]:
    """Parts of at least `fewest` examples: one that is too small takes the last of whichever is largest."""
    held = [part.tolist() for part in parts]
    for part in held:
        while len(part) < fewest:
            part.append(max(held, key=len).pop())
    return [np.array(part, dtype=np.int64) for part in held]


def by_label(labels: Labels, num: int, labels_per_client: int) -> list[Indices]:
    """Each part `labels_per_client` neighbouring shards; shard s holds the s-th label, cyclically, and no other.

    ValueError unless every label has a holder, every holder an example, and no client a label twice.
    """
    shards = num * labels_per_client
    _check_labels(labels, num, labels_per_client)
    shard = _load(PathologicalPartitioner(shards, "label", 1, "deterministic", shuffle=False), labels, shards)
    return [np.concatenate(shard[s : s + labels_per_client]) for s in range(0, shards, labels_per_client)]


def _check_labels(labels: Labels, num: int, labels_per_client: int) -> None:
    names, counts = np.unique(labels, return_counts=True)
    fewest = -(-len(names) // num)
    if not fewest <= labels_per_client <= len(names):
        raise ValueError(
            f"labels_per_client={labels_per_client} does not deal {len(names)} labels to {num} clients: "
            f"set it to {fewest} … {len(names)}"
        )
    holders = np.bincount(np.arange(num * labels_per_client) % len(names))
    if (counts < holders).any():
        scarce = np.argmax(holders - counts)
        raise ValueError(
            f"label {names[scarce]} has {counts[scarce]} examples for the {holders[scarce]} clients that hold it: "
            "lower num-partitions or labels_per_client"
        )


def _load(partitioner: Any, labels: Labels, num: int) -> list[Indices]:
    partitioner.dataset = Dataset.from_dict({"label": labels, "index": np.arange(len(labels))})
    return [partitioner.load_partition(k).with_format("numpy")["index"][:] for k in range(num)]
