"""helpers.files: the old file or the new one."""

from pathlib import Path

import pytest

from helpers.errors import UserError
from helpers.files import atomic_folder, atomic_write, check_writable_folder


def test_replaces_in_one_step_and_makes_folders(tmp_path):
    target = tmp_path / "a" / "b" / "file.txt"
    for content in ("first", "second"):
        with atomic_write(target) as temporary:
            temporary.write_text(content)
            assert not target.exists() or target.read_text() == "first"
        assert target.read_text() == content
    assert list(target.parent.iterdir()) == [target]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(OSError, match="disk full"), atomic_write(target) as temporary:
        temporary.write_text("half")
        raise OSError("disk full")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_cannot_be_made_is_refused_and_nothing_is_left(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("")
    link.symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    refused = [
        file,
        file / "x",
        link,
        link / "x",
        tmp_path / ("long" * 100),
        tmp_path / "a" / "zero\0",
        Path("/proc/x"),
    ]
    for path in refused:
        with pytest.raises(UserError, match="; name another") as caught:
            check_writable_folder(path, "name another")
        assert "\n" not in str(caught.value)
    check_writable_folder(tmp_path / "new" / "folder", "name another")
    check_writable_folder(tmp_path, "name another")
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "a" / "out"
    with atomic_folder(target) as folder:
        (folder / "file.txt").write_text("new")
        assert not target.exists()
    assert (target / "file.txt").read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_a_folder_that_fails_is_not_there(tmp_path):
    with (
        pytest.raises(UserError, match="out cannot be written: disk full"),
        atomic_folder(tmp_path / "out") as folder,
    ):
        (folder / "file.txt").write_text("half")
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_taken_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="name a new folder"), atomic_folder(taken):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
