"""A result does not outlive the code it came from."""

from pathlib import Path

import pytest

from experiments import sources


def test_a_digest_changes_with_any_file_of_its_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    (tmp_path / "folder").mkdir()
    files = [tmp_path / "one.py", tmp_path / "folder" / "two.py"]
    for file in files:
        file.write_text("x = 1\n")
    digests = {sources.sources.__wrapped__("one.py", "folder")}
    for file in files:
        file.write_text("x = 2\n")
        digests.add(sources.sources.__wrapped__("one.py", "folder"))
    assert len(digests) == 3


def test_a_place_that_is_not_there_is_refused() -> None:
    with pytest.raises(FileNotFoundError):
        sources.sources("nowhere.py")
