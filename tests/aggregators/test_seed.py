"""Seeds: test_contract.py compares one across processes and hash seeds."""

from __future__ import annotations

from hashlib import blake2b

from hypothesis import given
from hypothesis import strategies as st

from aggregators.core.seed import derive_seed

parts = st.lists(st.integers() | st.text("abc"), min_size=1, max_size=4)


@given(parts)
def test_a_seed_is_a_hash_that_fits_every_generator(drawn: list[int | str]) -> None:
    digest = blake2b("\x1f".join(str(part) for part in drawn).encode(), digest_size=8).hexdigest()
    assert derive_seed(*drawn) == int(digest, 16) // 2
    assert 0 <= derive_seed(*drawn) < 2**63


@given(parts, parts)
def test_other_parts_give_another_seed(a: list[int | str], b: list[int | str]) -> None:
    same = [str(part) for part in a] == [str(part) for part in b]
    assert (derive_seed(*a) == derive_seed(*b)) == same


def test_the_order_of_the_parts_matters() -> None:
    assert derive_seed(1, 2) != derive_seed(2, 1)
    assert derive_seed(1, 23) != derive_seed(12, 3)
