"""Algebra on state dicts, against naive float64."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import fingerprint

from aggregators.core.tensors import BLOCK, add_scaled_, like, norm, steps
from aggregators.core.update import Tensors

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
numbers = st.floats(-1e4, 1e4, width=32)


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    size = int(np.prod(shape))
    values = draw(st.lists(numbers, min_size=size, max_size=size))
    return torch.tensor(values, dtype=torch.float64).reshape(shape).to(dtype)


@st.composite
def state_dicts(draw: st.DrawFn, count: int = 1) -> list[dict[str, Tensor]]:
    """State dicts of the same names, shapes and float dtypes."""
    names = draw(st.lists(st.text("abc.", min_size=1), max_size=4, unique=True))
    forms = {name: (draw(shapes), draw(st.sampled_from(DTYPES[:4]))) for name in names}
    return [{name: draw(tensors(*form)) for name, form in forms.items()} for _ in range(count)]


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_sum_in_blocks_is_the_naive_one(size: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(size)
    total = torch.randn(size, generator=generator, dtype=torch.float64)
    value = torch.randn(size, generator=generator)
    factor = torch.rand(size, generator=generator) if weighted else None
    naive = total + 2.5 * value.double() * (factor.double() if factor is not None else 1)
    add_scaled_(total, 2.5, value, factor)
    torch.testing.assert_close(total, naive, rtol=1e-14, atol=1e-15)


@given(st.data(), shapes, st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.floats(-1e3, 1e3))
def test_any_shape_and_dtype_is_summed_in_float64(
    data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype, other: torch.dtype, scale: float
) -> None:
    total = data.draw(tensors(shape, torch.float64))
    value, factor = data.draw(tensors(shape, dtype)), data.draw(tensors(shape, other))
    before, added = total.clone(), scale * value.double() * factor.double()
    add_scaled_(total, scale, value, factor)
    assert ((total - (before + added)).abs() <= 1e-15 * (before.abs() + added.abs())).all()


def test_a_view_that_is_not_contiguous_is_summed_in_its_own_order() -> None:
    value, total = torch.arange(6.0).reshape(2, 3).T, torch.zeros(3, 2, dtype=torch.float64)
    add_scaled_(total, 2, value, value)
    assert torch.equal(total, 2 * value.double() ** 2)


@pytest.mark.parametrize("value", [torch.ones(3), torch.ones(()), torch.ones(2, 1), torch.ones(3, 2), torch.ones(6)])
@pytest.mark.parametrize("as_factor", [False, True])
def test_nothing_is_broadcast(value: Tensor, as_factor: bool) -> None:
    total = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"shape \(.*\) on cpu to a sum of shape \(2, 3\) on cpu"):
        add_scaled_(total, 1, torch.ones(2, 3) if as_factor else value, value if as_factor else None)
    assert not total.any()


@pytest.mark.parametrize("as_factor", [False, True])
def test_nothing_is_moved_between_devices(as_factor: bool) -> None:
    total, here, there = torch.zeros(2, dtype=torch.float64), torch.ones(2), torch.ones(2, device="meta")
    with pytest.raises(ValueError, match="on meta to a sum of"):
        add_scaled_(total, 1, here if as_factor else there, there if as_factor else None)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the largest memory, in bytes, that any operation allocates."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given_ = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given_:
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize(("dtype", "blocks"), [(torch.float32, 0), (torch.bfloat16, 1)], ids=str)
def test_a_sum_allocates_no_more_than_a_block(dtype: torch.dtype, blocks: int) -> None:
    total, value = torch.zeros(4 * BLOCK, dtype=torch.float64), torch.ones(4 * BLOCK, dtype=dtype)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        add_scaled_(total, 2, value, value)
    assert largest.bytes == 8 * BLOCK * blocks
    assert total.eq(2).all()


@given(state_dicts())
def test_the_norm_is_that_of_all_entries_together(drawn: list[Tensors]) -> None:
    flat = np.concatenate([[0.0], *(value.double().reshape(-1).numpy() for value in drawn[0].values())])
    assert float(norm([torch.zeros(1), *drawn[0].values()])) == pytest.approx(np.linalg.norm(flat), rel=1e-12)


@given(state_dicts(count=2))
def test_steps_lead_from_the_start_to_the_params(drawn: list[Tensors]) -> None:
    start, params = drawn
    found = steps(params, params, start)
    assert list(found) == list(params)
    for name, step in found.items():
        assert step.dtype == torch.float64
        torch.testing.assert_close(start[name].double() + step, params[name].double(), rtol=1e-12, atol=1e-9)


@given(state_dicts(), st.randoms())
def test_like_brings_back_names_order_and_dtypes(drawn: list[dict[str, Tensor]], random: Any) -> None:
    model = drawn[0]
    shuffled = [(name, value.double()) for name, value in model.items()]
    random.shuffle(shuffled)
    assert fingerprint(like(model, dict(shuffled))) == fingerprint(model)


@given(state_dicts())
def test_like_names_what_is_missing_or_extra(drawn: list[dict[str, Tensor]]) -> None:
    model = {**drawn[0], "zz": torch.ones(1)}
    with pytest.raises(ValueError, match=r"\['zz'\]"):
        like(model, drawn[0])
    with pytest.raises(ValueError, match=r"\['zz'\]"):
        like(drawn[0], model)


def test_the_kernel_leaves_torch_as_many_threads_as_it_had() -> None:
    script = (
        "import torch; from aggregators.core.tensors import SMALLEST, add_scaled_, zeros\n"
        "total = zeros(torch.Size([SMALLEST]), torch.device('cpu'))\n"
        "add_scaled_(total, 2.0, torch.ones(SMALLEST))\n"
        "print(torch.get_num_threads(), float(total.sum()) / SMALLEST)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "2.0"]
