"""What every test stands on."""

import logging
import os

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # toys are small: threads only wait for one another

settings.register_profile("fedbasin", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("fedbasin")


def pytest_configure(config: pytest.Config) -> None:
    """Partitions are cached beside pytest's own cache, not in the user's; kernels by each worker for itself.

    Numba's index of what it has compiled is not for two writers.
    """
    os.environ["XDG_CACHE_HOME"] = str(config.cache.mkdir("fedbasin"))
    os.environ["NUMBA_CACHE_DIR"] = str(config.cache.mkdir(f"numba-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the client logs, which Flower's logger keeps to its own handlers."""
    log = logging.getLogger("flwr.fedbasin")
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    caplog.set_level(logging.INFO, logger=log.name)
    return caplog
