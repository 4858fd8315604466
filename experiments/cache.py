"""Trained models on disk, so that an experiment continues where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FOLDER = Path(__file__).resolve().parent / ".cache"


def cached(name: str, settings: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of `make()`, read from disk where they were made before under this name and these settings.

    `settings` is whatever the tensors depend on, as JSON can hold it. The file is named `name` and a digest of the
    settings, and holds them as metadata; it may be deleted at any time.
    """
    text = json.dumps(settings, sort_keys=True)
    path = FOLDER / f"{name}-{blake2b(text.encode(), digest_size=8).hexdigest()}.safetensors"
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError):
        _keep(dict(make()), {"settings": text}, path)
    return load_file(path)


def _keep(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Written beside its place and then moved there, so that no reader ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as scratch:
        save_file(
            {name: value.detach().contiguous() for name, value in tensors.items()}, Path(scratch) / path.name, metadata
        )
        os.replace(Path(scratch) / path.name, path)
