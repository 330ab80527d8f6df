"""A file is complete under its name or not there at all."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pyro_bbits.files import save_tensors_atomically, write_atomically, write_text_atomically


class WriterError(Exception):
    pass


def fail_half_way(temporary: Path) -> None:
    temporary.write_text("half of")
    raise WriterError


@pytest.fixture
def umask() -> Iterator[int]:
    mask = 0o027
    old = os.umask(mask)
    yield mask
    os.umask(old)


def test_text_arrives_and_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "notes.txt"
    for text in ("first", "zweite Fassung: β²\n"):
        write_text_atomically(path, text)
        assert path.read_bytes() == text.encode("utf-8")
        assert list(path.parent.iterdir()) == [path]


def test_a_path_may_be_a_string(tmp_path: Path) -> None:
    write_text_atomically(f"{tmp_path}/notes.txt", "text")
    assert (tmp_path / "notes.txt").read_text() == "text"


def test_a_failing_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("old")
    with pytest.raises(WriterError):
        write_atomically(path, fail_half_way)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_writer_leaves_no_new_file(tmp_path: Path) -> None:
    with pytest.raises(WriterError):
        write_atomically(tmp_path / "notes.txt", fail_half_way)
    assert not list(tmp_path.iterdir())


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent and temporary.suffix == ".txt"

    write_atomically(path, write)
    assert path.read_text() == "new"


def test_a_move_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("old")

    def refuse(source: Path, target: Path) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="the disk is gone"):
        write_text_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_way_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "notes.txt"
    folder.mkdir()
    with pytest.raises(OSError, match=r"notes\.txt"):
        write_text_atomically(folder, "text")
    assert list(tmp_path.iterdir()) == [folder] and not list(folder.iterdir())


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "runs"
    file.write_text("old")
    with pytest.raises(OSError, match="runs"):
        write_text_atomically(file / "notes.txt", "text")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="nothing is forbidden to this user")
def test_a_folder_that_forbids_writing_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    folder.chmod(0o500)
    with pytest.raises(PermissionError, match="runs"):
        write_text_atomically(folder / "notes.txt", "text")
    folder.chmod(0o700)
    assert not list(folder.iterdir())


def test_permissions_are_those_of_an_ordinary_new_file(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "notes.txt"
    write_text_atomically(path, "text")
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert os.umask(umask) == umask  # still what it was


def test_tensors_that_share_memory_are_all_written(tmp_path: Path) -> None:
    path, weight = tmp_path / "weights.safetensors", torch.randn(3, 4, requires_grad=True)
    tensors = {
        "a": weight,
        "tied": weight,
        "part": weight[1:],
        "turned": weight.T,
        "signs": torch.tensor([True, False]),
    }
    save_tensors_atomically(path, tensors, {"step": "7"})
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"step": "7"}
    assert list(tmp_path.iterdir()) == [path]
