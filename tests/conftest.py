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
    """Partitions are cached beside pytest's own cache, not in the user's."""
    os.environ["XDG_CACHE_HOME"] = str(config.cache.mkdir("fedbasin"))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the client logs, which Flower's logger keeps to its own handlers."""
    log = logging.getLogger("flwr.fedbasin")
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    monkeypatch.setattr(log, "level", logging.INFO)
    return caplog
