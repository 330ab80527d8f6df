"""Cached pictures are the decoded ones, scaled once; what is read does not depend on who wrote it, or when."""

import errno
import json
import os
import pickle
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_bbits.data import picture_cache
from pyro_bbits.data.image_folder import ImageFolderData
from pyro_bbits.data.picture_cache import PictureCache, cut_bytes
from pyro_bbits.data.picture_loader import IMAGENET_SCALING, ImageFolderLoader
from pyro_bbits.data.pictures import PictureFiles, centre_box, centre_crop, decode, pixels, random_box
from pyro_bbits.data.plan import random_state
from pyro_bbits.data.scaling import Scaling
from pyro_bbits.data.sources import open_data
from pyro_bbits.files import write_text_atomically
from pyro_bbits.settings import RunSettings

pillow = pytest.importorskip("PIL.Image")

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

BYTES = Scaling((0.0,) * 3, (1 / 255,) * 3)  # images come back as levels


@pytest.fixture
def files(make_pictures: Any) -> PictureFiles:
    return PictureFiles.of(make_pictures({"a": 7, "b": 8}, size=(24, 20)))


def cache_of(tmp_path: Path, files: PictureFiles, short_side: int = 10) -> PictureCache:
    return PictureCache(tmp_path / "cache", files.paths, short_side, workers=0)


def loader(files: PictureFiles, cache: Path | None, **options: Any) -> ImageFolderLoader:
    usual: dict[str, Any] = {"image_size": 8, "resize": 10, "scaling": BYTES, "workers": 0, "seed": 3}
    return ImageFolderLoader(files, 4, cache=cache, **usual | options)


def same(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> bool:
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(first, second, strict=True))


def test_pictures_are_scaled_to_their_short_side_and_kept(tmp_path: Path, files: PictureFiles) -> None:
    cache = cache_of(tmp_path, files)
    expected = [pixels(decode(path).resize((12, 10), pillow.Resampling.BILINEAR)) for path in files.paths]
    assert all(torch.equal(cache[i], expected[i]) for i in (3, 0, 14, 3))
    for path in (files.paths[0], files.paths[3]):
        facts = os.stat(path)
        path.write_bytes(b"\0" * facts.st_size)  # nobody looks at it again
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    again = cache_of(tmp_path, files)
    assert torch.equal(again[3], expected[3]) and torch.equal(pickle.loads(pickle.dumps(again))[0], expected[0])
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["done.bin", "index.json", "pixels.bin"]


def test_small_pictures_stay_as_they_are(tmp_path: Path, files: PictureFiles) -> None:
    cache = cache_of(tmp_path, files, short_side=50)
    assert torch.equal(cache[2], pixels(decode(files.paths[2])))


@pytest.mark.parametrize("box", [(0, 0, 40, 30), (3, 5, 20, 29), (10.4, 2.6, 30.5, 22.4)])
def test_parts_are_those_that_pillow_cuts(box: tuple[float, ...]) -> None:
    """Of a smooth picture, at whose edges alone the two differ: one looks beyond the part, one does not."""
    waves = torch.linspace(0, 6, 40).sin()[None, :, None] + torch.linspace(0, 4, 30).cos()[:, None, None]
    picture = (127 + 60 * waves).expand(30, 40, 3).byte().contiguous()
    whole = tuple(map(round, box))
    expected = pixels(pillow.fromarray(picture.numpy()).resize((8, 8), pillow.Resampling.BILINEAR, box=whole))
    found = cut_bytes(picture, box, 8)
    assert found.is_contiguous() and found.dtype == torch.uint8
    assert (found.int() - expected.int())[1:-1, 1:-1].abs().max() <= 1
    assert (found.int() - expected.int()).abs().max() <= 12


def test_an_empty_part_is_one_pixel() -> None:
    picture = torch.arange(27, dtype=torch.uint8).view(3, 3, 3)
    assert torch.equal(cut_bytes(picture, (1.2, 0.9, 1.4, 1.1), 1)[0, 0], picture[1, 1])


@pytest.mark.parametrize("augment", [False, True])
def test_batches_are_the_same_whoever_has_written_the_pictures(
    tmp_path: Path, files: PictureFiles, augment: bool
) -> None:
    """Cold, warm, and by two workers."""
    options = {"shuffle": True, "augment": augment}
    cold = loader(files, tmp_path / "one", **options)
    first, second = list(cold), list(cold)
    warm = loader(files, tmp_path / "one", **options)
    assert same(list(warm), first) and same(list(warm), second)
    two = loader(files, tmp_path / "two", workers=2, **options)
    assert same(list(two), first) and same(list(two), second)


def test_held_out_pictures_are_cut_from_the_middle(tmp_path: Path, files: PictureFiles) -> None:
    cache = cache_of(tmp_path, files)
    found = torch.cat([x for x, _ in loader(files, tmp_path / "cache")])
    for i in (0, 9):
        expected = cut_bytes(cache[i], centre_box(12, 10, 0.8), 8)
        assert torch.equal(found[i].round().byte().movedim(0, -1), expected)
    direct = pixels(centre_crop(decode(files.paths[0]), 8, 10)).float()
    assert (found[0].movedim(0, -1) - direct).abs().max() <= 1, "these sizes scale in one step as in two"


def test_random_parts_are_those_of_the_seed(tmp_path: Path, files: PictureFiles) -> None:
    cache = cache_of(tmp_path, files)
    x, _ = next(iter(loader(files, tmp_path / "cache", augment=True)))
    numbers = random.Random(random_state(3, 0, "picture", 0))
    expected = cut_bytes(cache[0], random_box(12, 10, numbers), 8)
    expected = expected.flip(1) if numbers.random() < 0.5 else expected
    assert torch.equal(x[0].round().byte().movedim(0, -1), expected)


# --- what does not belong together ------------------------------------------------------------------------------------


def test_other_pictures_and_another_size_are_refused(tmp_path: Path, files: PictureFiles) -> None:
    cache_of(tmp_path, files)
    with pytest.raises(ValueError, match="holds pictures with a short side of 10 pixels; 11 are wanted"):
        cache_of(tmp_path, files, short_side=11)
    shutil.copy(files.paths[0], files.paths[0].with_name("new.png"))
    more = PictureFiles.of(files.paths[0].parents[1])
    with pytest.raises(
        ValueError, match=rf"other pictures: {re.escape(os.path.join('a', 'new.png'))} has been added or"
    ):
        cache_of(tmp_path, more)
    os.utime(files.paths[4], (1, 1))
    with pytest.raises(ValueError, match=r"other pictures: .*004\.png has been added or changed"):
        cache_of(tmp_path, files)


def test_fewer_pictures_need_no_other_cache(tmp_path: Path, files: PictureFiles) -> None:
    """Such as those without one that turned out to be broken."""
    whole = cache_of(tmp_path, files)
    expected = whole[8].clone()
    files.paths[3].unlink()
    part = files.take(row for row in range(15) if row != 3)
    again = cache_of(tmp_path, part)
    assert again.rows(part.paths).tolist() == [row for row in range(15) if row != 3]
    assert torch.equal(again[8], expected)


@pytest.mark.parametrize("name", ["pixels.bin", "done.bin"])
@pytest.mark.parametrize("left", [None, 7])
def test_files_that_were_cut_off_are_no_black_pictures(
    tmp_path: Path, files: PictureFiles, name: str, left: int | None
) -> None:
    cache_of(tmp_path, files)
    path = tmp_path / "cache" / name
    path.unlink() if left is None else os.truncate(path, left)
    with pytest.raises(ValueError, match=rf"{name} is missing or has another size than it was made with; remove"):
        cache_of(tmp_path, files)


def test_a_cache_that_cannot_be_written_serves_what_it_has(
    tmp_path: Path, files: PictureFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = cache_of(tmp_path, files)[2].clone()
    monkeypatch.setattr(os, "access", lambda *_: False)
    fixed = cache_of(tmp_path, files)
    assert torch.equal(fixed[2], expected)
    with pytest.raises(ValueError, match=r"lacks .*003\.png, and cannot be written"):
        fixed[3]


@pytest.mark.parametrize("text", ["", "{}", "[1]", json.dumps({"version": 1})])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, files: PictureFiles, text: str) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "index.json").write_text(text)
    with pytest.raises(ValueError, match="is no picture cache that can be read"):
        cache_of(tmp_path, files)


def test_a_disk_that_is_too_small_is_found_before(
    tmp_path: Path, files: PictureFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"decoded, the pictures take 0\.00 GB, and the disk of .* has no room"):
        cache_of(tmp_path, files)
    assert list(tmp_path.iterdir()) == [tmp_path / "own"], "nothing is left behind"


def test_files_that_are_no_pictures_are_named(tmp_path: Path, files: PictureFiles) -> None:
    files.paths[5].write_text("none")
    with pytest.raises(
        ValueError, match=rf"{files.paths[5].name} is not a picture that can be decoded: .* Repair or remove it"
    ):
        cache_of(tmp_path, files)
    assert not (tmp_path / "cache").exists()


def test_the_process_that_is_later_takes_what_is_there(
    tmp_path: Path, files: PictureFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes find no folder; one renames its own while the other is still writing."""
    first = PictureCache(tmp_path / "first", files.paths, 10, workers=0)
    real = write_text_atomically

    def overtaken(path: Path, text: str) -> None:
        real(path, text)
        shutil.copytree(first.folder, tmp_path / "cache")

    monkeypatch.setattr(picture_cache, "write_text_atomically", overtaken)
    assert torch.equal(cache_of(tmp_path, files)[1], first[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "first", "own"], "nothing is left behind"


# --- settings ---------------------------------------------------------------------------------------------------------


def test_all_parts_of_a_data_set_share_a_cache_however_they_are_split(tmp_path: Path, make_pictures: Any) -> None:
    root = make_pictures({"a": 10, "b": 10}, size=(24, 20))
    settings = {"data": str(root), "image_size": 8, "workers": 0, "picture_cache": tmp_path / "cache"}
    for seed in (0, 1):
        data = open_data(RunSettings(**settings, seed=seed))
        assert isinstance(data, ImageFolderData) and data.scaling == IMAGENET_SCALING
        cache = PictureCache(tmp_path / "cache", [*root.rglob("*.png")], 9, workers=0)
        for part, files in zip(data.loaders(4)[1:], (data.validation, data.test), strict=True):
            found = torch.cat([x for x, _ in part])
            rows = cache.rows(files.paths).tolist()
            expected = [cut_bytes(cache[row], centre_box(11, 9, 8 / 9), 8).movedim(-1, 0) for row in rows]
            torch.testing.assert_close(found, IMAGENET_SCALING(torch.stack(expected) / 255))
    with pytest.raises(ValueError, match=r"was not made for elsewhere\.png"):
        cache.rows([Path("elsewhere.png")])
    with pytest.raises(ValueError, match="a picture cache is for pictures that are read while training"):
        open_data(RunSettings(data=str(root), picture_cache=tmp_path / "cache"))
