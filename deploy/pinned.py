#!/opt/fedbasin/bin/python3 -I
"""Flower's flwr-clientapp, but of the app in the folder `app` beside this file, whatever app the operator has sent.

A site puts it, under that name, alone into the PATH of its executor: docs/security.md, "How to pin the code".
"""

import sys
from importlib.metadata import version
from pathlib import Path

FLOWER = "1.39.0"  # whose run_clientapp unpacks and loads an app by the three names that are replaced here


def pin(reviewed: Path) -> None:
    """Has Flower unpack nothing, and load the app in the folder `reviewed`; exits with words if it is another Flower.

    A run of another app or version than the reviewed one ends in Flower's own `FAB ID or version mismatch`.
    """
    if (found := version("flwr")) != FLOWER:
        sys.exit(f"flwr-clientapp: pinning was checked with Flower {FLOWER}, and this is {found}: install {FLOWER}")
    from flwr.clientapp.utils import get_load_client_app_fn
    from flwr.supernode.runtime import run_clientapp

    vars(run_clientapp).update(
        install_from_fab=lambda *_, **__: reviewed,
        get_project_dir=lambda *_, **__: reviewed,
        get_load_client_app_fn=lambda *_, **__: get_load_client_app_fn("", str(reviewed), multi_app=True),
    )


if __name__ == "__main__":
    pin(Path(__file__).with_name("app"))
    from flwr.supernode.cli import flwr_clientapp

    flwr_clientapp()
