"""What took long to compute, kept on disk between processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

Arrays: TypeAlias = dict[str, NDArray[Any]]

logger = logging.getLogger(__name__)


def cached(make: Callable[[], Arrays], name: str, *key: object) -> Arrays:
    """The arrays of `make()`, read from disk when they were made before under the same `name` and `key`.

    `key` lists all that the arrays depend on, by its `repr`. They lie in $XDG_CACHE_HOME/fedbasin, else in
    ~/.cache/fedbasin, where anything may be deleted at any time; a folder that cannot be written costs time only.
    """
    path = cache_folder() / f"{name}-{blake2b(repr(key).encode(), digest_size=16).hexdigest()}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        arrays = make()
    try:
        _keep(arrays, path)
    except OSError as error:
        logger.warning("cannot keep %s (%s): set XDG_CACHE_HOME to a folder that can be written", path, error)
    return arrays


def cache_folder() -> Path:
    """The folder of everything this module keeps; not made until something is."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedbasin"


def _keep(arrays: Arrays, path: Path) -> None:
    """Written beside its place and then moved there, so that no reader ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as scratch:
        save_file(arrays, Path(scratch) / path.name)
        os.replace(Path(scratch) / path.name, path)
