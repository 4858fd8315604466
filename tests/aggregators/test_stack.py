"""Alignment around restoring around any method: what another order of units changes is nothing."""

from typing import Any

import pytest
import torch

from aggregators.core.update import GlobalModel, Tensors
from client.tasks.digits import Digits
from experiments.finetuning import Cohort, Finetuned, initial
from server.app import symmetry

MLP, CONVNET = Digits(), Digits(architecture="convnet_bn")
ALIGNED: list[dict[str, Any]] = [{"kind": "git_rebasin", "rescale": False}, {"kind": "activation_matching"}]
INNER = ("fedavg", "fisher", "ssf", "regmean")
STACKS: list[tuple[Digits, dict[str, Any] | None]] = [
    (MLP, None),
    (MLP, {"kind": "repair"}),
    (MLP, {"kind": "repair", "mode": "exact"}),
    (CONVNET, {"kind": "batch_norm"}),
    (CONVNET, {"kind": "batch_norm", "source": "measure"}),
]


def client(task: Digits, number: int) -> Finetuned:
    """Clients near one another, with data of their own."""
    generator = torch.Generator().manual_seed(number)
    noise = {name: torch.rand(value.shape, generator=generator) for name, value in initial(task, 0).items()}
    params = {
        name: value + 0.01 * noise[name] if value.is_floating_point() else value
        for name, value in initial(task, 0).items()
    }
    examples: Any = task.data({"partition-id": number, "num-partitions": 8})[0]
    return Finetuned(task, params, examples)


def shuffled(client: Finetuned) -> Finetuned:
    """The same function in another order of units."""
    task, generator = client.task, torch.Generator().manual_seed(5)
    trainable = frozenset(name for name, _ in task.model().named_parameters())
    found = symmetry(task, GlobalModel(params=client.params, trainable=trainable))
    places = {group: torch.randperm(size, generator=generator) for group, size in found.sizes(client.params).items()}
    return client.at(found.permute(client.params, places))


def merged(clients: list[Finetuned], config: Any) -> Tensors:
    return Cohort(clients).round(config).merged.params


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: str(stack[1]))
@pytest.mark.parametrize("aligned", ALIGNED, ids=lambda aligned: aligned["kind"])
def test_a_client_in_another_order_of_units_is_merged_as_in_the_first_ones(
    aligned: dict[str, Any], stack: tuple[Digits, dict[str, Any] | None], inner: str
) -> None:
    task, restored = stack
    method: Any = inner if restored is None else {**restored, "inner": inner}
    one, other = client(task, 0), client(task, 1)
    assert any(not torch.equal(value, other.params[name]) for name, value in shuffled(other).params.items())
    expected = merged([one, other], method)
    found = merged([one, shuffled(other)], {**aligned, "inner": method})
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
