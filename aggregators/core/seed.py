"""Randomness that two machines agree on."""

from __future__ import annotations

from hashlib import blake2b


def derive_seed(*parts: object) -> int:
    """A seed in [0, 2⁶³) that depends on all `parts` (run seed, round, client, purpose), and on nothing else."""
    digest = blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
