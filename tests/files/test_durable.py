"""Files and folders that are complete or absent."""

from __future__ import annotations

import hashlib
import os

import pytest

from moe_gpt.files import durable
from moe_gpt.files.durable import (
    complete_folder,
    delete_folder,
    delete_leftovers,
    read_digest,
    replace_file,
    write_file,
)


def test_write_file_returns_what_it_wrote(tmp_path):
    """Size and digest are those of the file."""
    facts = write_file(tmp_path / "x", [b"one", memoryview(b"two")])
    assert facts == (6, hashlib.sha256(b"onetwo").hexdigest()) == read_digest(tmp_path / "x")


def test_everything_is_forced_to_the_disk_before_the_name_appears(tmp_path, monkeypatch):
    """The file, then its folder, then the new name's folder."""
    order = []
    real_fsync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.readlink(f"/proc/self/fd/{fd}")), real_fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (order.append(f"rename to {b}"), real_rename(a, b)))
    with complete_folder(tmp_path / "x") as temporary:
        write_file(temporary / "f", [b"1"])
    assert order == [str(temporary / "f"), str(temporary), f"rename to {tmp_path / 'x'}", str(tmp_path)]


def test_folder_that_fails_half_way_is_absent(tmp_path):
    """And leaves nothing."""
    with pytest.raises(TypeError), complete_folder(tmp_path / "x") as temporary:
        write_file(temporary / "f", [b"1", "not bytes"])
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_not_empty_is_replaced_only_on_request(tmp_path):
    """What was there stays otherwise."""
    with complete_folder(tmp_path / "x") as temporary:
        write_file(temporary / "old", [b"1"])
    with pytest.raises(OSError, match="not empty"), complete_folder(tmp_path / "x") as temporary:
        write_file(temporary / "new", [b"1"])
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["old"]
    with complete_folder(tmp_path / "x", replace=True) as temporary:
        write_file(temporary / "new", [b"1"])
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "new"]


def test_permissions_are_the_users(tmp_path):
    """Not those of a temporary file, which only the owner may read."""
    before = os.umask(0o022)
    try:
        with complete_folder(tmp_path / "x") as temporary:
            write_file(temporary / "f", [b"1"])
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "x" / "f").stat().st_mode & 0o777 == 0o644


def test_replaced_file_is_old_or_new(tmp_path, monkeypatch):
    """An error while the new contents are written leaves the old ones."""
    replace_file(tmp_path / "f", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "write_file", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(tmp_path / "f", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_text() == "old"


def test_deleting_takes_the_name_first(tmp_path, monkeypatch):
    """Killed while the contents are deleted, the folder is no longer found; the next one clears up."""
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "f").write_text("1")
    monkeypatch.setattr(durable.shutil, "rmtree", lambda *a, **k: None)  # as if killed here
    delete_folder(folder)
    monkeypatch.undo()
    assert not folder.exists()
    assert len(list(tmp_path.iterdir())) == 1
    delete_leftovers(tmp_path, "x")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_are_told_from_data(tmp_path):
    """Only what has the mark of a temporary name."""
    for name in ("step_1", "step_1.tmp-ab", "other.tmp-cd"):
        (tmp_path / name).mkdir()
    delete_leftovers(tmp_path, "step_")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.tmp-cd", "step_1"]
