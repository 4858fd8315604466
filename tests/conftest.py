"""What every test stands on."""

import os

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # toys are small: threads only wait for one another

settings.register_profile("fedbasin", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("fedbasin")


def pytest_configure(config: pytest.Config) -> None:
    """Partitions are cached beside pytest's own cache, not in the user's."""
    os.environ["XDG_CACHE_HOME"] = str(config.cache.mkdir("fedbasin"))
