"""Files written whole or not at all."""

import os
from pathlib import Path

import pytest

from hf_blr.atomic import check_writable, write_text_atomically


def test_a_file_is_written_and_its_folder_made(tmp_path):
    path = tmp_path / "new" / "x.json"
    write_text_atomically(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode()
    write_text_atomically(path, "b")
    assert path.read_text() == "b" and list(path.parent.iterdir()) == [path]


def test_others_may_read_it_as_any_other_file(tmp_path):
    write_text_atomically(tmp_path / "a", "")
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("broken", [(Path, "write_text"), (os, "replace")])
def test_what_fails_leaves_the_version_before_and_nothing_beside_it(broken, tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text("before")

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(*broken, fail)
    with pytest.raises(KeyboardInterrupt):
        write_text_atomically(path, "after")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_tried_and_left_as_it_was(tmp_path):
    (tmp_path / "kept").mkdir()
    for folder in (tmp_path / "kept", tmp_path / "kept" / "new" / "newer"):
        check_writable(folder)
        assert [path.name for path in tmp_path.rglob("*")] == ["kept"]


@pytest.mark.parametrize("broken", [(Path, "write_bytes"), (Path, "mkdir")])
def test_a_folder_that_cannot_be_written_raises_and_leaves_nothing(broken, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "there")

    monkeypatch.setattr(*broken, fail)
    with pytest.raises(PermissionError):
        check_writable(tmp_path / "new" / "newer")
    assert not list(tmp_path.iterdir())
