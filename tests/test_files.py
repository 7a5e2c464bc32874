from __future__ import annotations

from pathlib import Path

import pytest

from diffmask_fast.files import replacing


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_ends_well_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_whoever_may_read_the_users_files_may_read_what_a_writer_keeps_to_itself(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    with replacing(tmp_path / "weights") as temporary:
        temporary.touch(mode=0o600)
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "a file").stat().st_mode


def test_the_temporary_name_ends_as_the_real_one(tmp_path: Path) -> None:
    with replacing(tmp_path / "figure.pdf") as temporary:
        temporary.touch()
        assert temporary.parent == tmp_path and temporary.suffix == ".pdf"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match=r"folder .*nowhere does not exist"),
        replacing(tmp_path / "nowhere" / "x"),
    ):
        pass


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="give the name of a file"), replacing(tmp_path):
        pass
