"""Pictures read by workers: what is drawn depends on seed, epoch and picture alone, and no file is lost silently."""

import itertools
import math
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_bbits.data import picture_loader, pictures
from pyro_bbits.data.image_folder import ImageFolderData
from pyro_bbits.data.picture_loader import IMAGENET_SCALING, ImageFolderLoader
from pyro_bbits.data.pictures import PictureFiles, centre_crop, decode, levels, random_crop
from pyro_bbits.data.scaling import Scaling
from pyro_bbits.data.sources import open_data
from pyro_bbits.settings import RunSettings

pillow = pytest.importorskip("PIL.Image")

# Python 3.12 warns of fork in a process with threads; the workers run no code that could wait for one of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

BYTES = Scaling((0.0,) * 3, (1 / 255,) * 3)  # images come back as levels


@pytest.fixture
def files(make_pictures: Any) -> PictureFiles:
    return PictureFiles.of(make_pictures({"a": 7, "b": 8}, size=(12, 10)))


def loader(files: PictureFiles, batch_size: int = 4, **options: Any) -> ImageFolderLoader:
    usual: dict[str, Any] = {"image_size": 8, "scaling": BYTES, "workers": 0}
    return ImageFolderLoader(files, batch_size, **usual | options)


def batches(loader: ImageFolderLoader) -> list[tuple[Tensor, Tensor]]:
    return list(loader)


def same(one: Sequence[tuple[Tensor, Tensor]], other: Sequence[tuple[Tensor, Tensor]]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in pairs)


# --- what a picture becomes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 40), (56, 40), (40, 48)])
def test_evaluation_sees_the_middle_of_a_picture_that_needs_no_scaling(size: tuple[int, int], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (size[1], size[0], 3), dtype=torch.uint8, generator=generator)
    crop = levels(centre_crop(pillow.fromarray(pixels.numpy()), size=32, resize=40))
    top, left = (size[1] - 32) // 2, (size[0] - 32) // 2
    assert torch.equal(crop, pixels[top : top + 32, left : left + 32].movedim(-1, 0))


def test_evaluation_scales_the_short_side() -> None:
    """A ramp from 0 to 200 over 400 columns, at half its size: the middle 224 of 248 columns, 2 columns apart."""
    ramp = (torch.arange(800) / 4).byte().expand(496, 800)
    crop = levels(centre_crop(pillow.fromarray(ramp.numpy()), size=224, resize=248)).float()[0]
    assert crop.shape == (224, 224)
    expected = (800 - 448) / 2 / 4 + torch.arange(224) / 2
    assert (crop - expected).abs().max() <= 1


class Boxes:
    """Records which part of a picture is asked for."""

    def __init__(self, width: int, height: int) -> None:
        self.size, self.found = (width, height), list[tuple[Any, ...]]()

    def resize(self, size: tuple[int, int], _: Any, box: tuple[float, ...]) -> "Boxes":
        self.found.append(box)
        return self

    def transpose(self, _: Any) -> "Boxes":
        self.found[-1] += ("mirrored",)
        return self


def test_parts_have_the_promised_area_and_ratio() -> None:
    image, numbers = Boxes(300, 240), random.Random(0)
    for _ in range(2000):
        random_crop(image, 224, numbers)
    areas, ratios = [], []
    for left, top, right, bottom, *_ in image.found:
        assert 0 <= left < right <= 300 and 0 <= top < bottom <= 240
        areas.append((right - left) * (bottom - top) / 72_000)
        ratios.append((right - left) / (bottom - top))
    assert 0.07 < min(areas) < 0.1 and 0.9 < max(areas) <= 1
    assert 0.72 < min(ratios) < 0.78 and 1.28 < max(ratios) < 1.37
    mirrored = sum(len(box) == 5 for box in image.found)
    assert abs(mirrored - 1000) < 5 * math.sqrt(500), "five deviations"
    assert {box[0] for box in image.found} >= {0} and max(box[2] for box in image.found) == 300


@pytest.mark.parametrize(("width", "height", "expected"), [(1000, 10, (13 + 1 / 3, 10)), (10, 1000, (10, 13 + 1 / 3))])
def test_a_narrow_picture_gives_its_largest_part(width: int, height: int, expected: tuple[float, float]) -> None:
    image = Boxes(width, height)
    numbers = random.Random(0)
    numbers.random = lambda: 0.99  # type: ignore[method-assign]
    random_crop(image, 224, numbers)
    left, top, right, bottom, *_ = image.found[0]
    assert (right - left, bottom - top) == pytest.approx(expected)
    assert (left + right, top + bottom) == pytest.approx((width, height))


def test_batches_hold_the_pictures_of_their_labels(files: PictureFiles) -> None:
    found = {
        (int(y), image.round().byte().numpy().tobytes())
        for x, labels in loader(files)
        for image, y in zip(x, labels, strict=True)
    }
    expected = zip(files.labels, (levels(centre_crop(decode(path), 8, 9)) for path in files.paths), strict=True)
    assert found == {(label, pixels.numpy().tobytes()) for label, pixels in expected}


def test_batches_are_normalized(files: PictureFiles) -> None:
    (raw, _), (normalized, _) = (next(iter(loader(files, scaling=scaling))) for scaling in (BYTES, IMAGENET_SCALING))
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (IMAGENET_SCALING.mean, IMAGENET_SCALING.std))
    torch.testing.assert_close(normalized, (raw / 255 - mean) / std)
    assert normalized.dtype == torch.float32


@pytest.mark.parametrize("augment", [False, True])
def test_images_lie_in_memory_channels_last(files: PictureFiles, augment: bool) -> None:
    x, _ = next(iter(loader(files, augment=augment)))
    assert x.shape == (4, 3, 8, 8) and x.is_contiguous(memory_format=torch.channels_last)


# --- epochs, workers and ranks ----------------------------------------------------------------------------------------


def test_numbers_of_workers_change_nothing(files: PictureFiles) -> None:
    one, two = (loader(files, shuffle=True, augment=True, seed=3, workers=workers) for workers in (0, 2))
    for _ in range(3):
        assert same(batches(one), batches(two))
    two.set_epoch(1)
    one.set_epoch(1)
    next(iter(two))  # left early
    next(iter(one))
    assert same(batches(two), batches(one))


def test_workers_by_default_are_no_more_than_batches(files: PictureFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_loader, "default_workers", lambda: 2)
    counts = [loader(files, size, workers=None)._loader.num_workers for size in (4, 8, 15)]
    assert counts == [2, 2, 1]


def test_pictures_that_are_not_mirrored_are_the_same_parts(files: PictureFiles) -> None:
    both, straight = (loader(files, augment=True, seed=1, mirror=mirror) for mirror in (True, False))
    found = ([image for _ in range(4) for x, _ in one for image in x] for one in (both, straight))
    pairs = list(zip(*found, strict=True))
    mirrored = [not torch.equal(*pair) for pair in pairs]
    assert any(mirrored) and not all(mirrored)
    assert all(torch.equal(x.flip(-1), y) for (x, y), turned in zip(pairs, mirrored, strict=True) if turned)


def test_epochs_and_seeds_differ_and_come_again(files: PictureFiles) -> None:
    first = loader(files, shuffle=True, augment=True, seed=1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    zero, one = batches(first), batches(first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not same(zero, one)
    assert not same(batches(loader(files, shuffle=True, augment=True, seed=2)), zero)
    assert first.epoch == 2
    first.set_epoch(0)
    torch.manual_seed(2)
    assert same(batches(first), zero) and same(batches(first), one)


def test_a_picture_is_cropped_alike_wherever_it_comes(files: PictureFiles) -> None:
    """Order and batch size do not enter."""
    whole, shuffled = (
        {image.numpy().tobytes() for x, _ in loader(files, size, shuffle=shuffle, augment=True) for image in x}
        for size, shuffle in ((15, False), (4, True))
    )
    assert whole == shuffled and len(whole) == 15


def test_ranks_together_see_the_batches_of_one_process(files: PictureFiles) -> None:
    options: dict[str, Any] = {"shuffle": True, "augment": True, "seed": 5}
    whole = batches(loader(files, 10, **options))
    ranks = [loader(files, 10, **options, rank=rank, world_size=2) for rank in range(2)]
    assert [rank.num_data for rank in ranks] == [15, 15]
    for (x, y), *parts in zip(whole, *ranks, strict=True):
        kept = len(y) - len(y) % 2
        assert torch.equal(torch.cat([part[0] for part in parts]), x[:kept])
        assert torch.equal(torch.cat([part[1] for part in parts]), y[:kept])


# --- broken files -----------------------------------------------------------------------------------------------------


def break_file(path: Path, how: str) -> None:
    if how == "truncated":
        decode(path).resize((200, 200)).save(path, "PNG")
        path.write_bytes(path.read_bytes()[:-2000])
    elif how == "missing":
        path.unlink()
    else:
        path.write_bytes(b"no picture")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["truncated", "missing", "text"])
def test_a_broken_file_ends_the_pass_by_its_name(files: PictureFiles, how: str, workers: int) -> None:
    break_file(files.paths[9], how)
    with pytest.raises(
        ValueError, match=r"b/002\.png is not a picture that can be decoded: .*--bad-images skip"
    ) as caught:
        batches(loader(files, workers=workers))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_are_skipped_with_a_warning_that_names_each(files: PictureFiles, workers: int) -> None:
    for row in (2, 9):
        break_file(files.paths[row], "truncated")
    with pytest.warns(UserWarning, match="2 of 15 pictures cannot be decoded") as caught:
        skipping = loader(files, workers=workers, on_error="skip")
    message = str(caught[0].message)
    assert [row for row, path in enumerate(files.paths) for _ in range(message.count(str(path)))] == [2, 9]
    assert skipping.skipped == (files.paths[2], files.paths[9])
    assert skipping.num_data == 13
    assert [len(y) for _, y in skipping] == [4, 4, 4, 1]


def test_skipping_without_broken_files_warns_of_nothing(files: PictureFiles) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        skipping = loader(files, on_error="skip")
    assert skipping.skipped == () and skipping.num_data == 15


def test_a_class_without_a_whole_picture_is_an_error(files: PictureFiles) -> None:
    for path in files.paths[7:]:
        break_file(path, "text")
    with pytest.raises(ValueError, match=r"no picture of b can be decoded; the first fault: .*b/000\.png is not a"):
        loader(files, on_error="skip")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "1 <= image_size <= resize"),
        ({"image_size": 8, "resize": 7}, "got image_size=8, resize=7"),
        ({"workers": -1}, "workers must be at least 0; got -1"),
        ({"on_error": "mend"}, "on_error must be 'raise' or 'skip'; got 'mend'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"rank": 1}, "got rank 1 of world_size 1"),
    ],
)
def test_a_loader_that_cannot_be_is_refused(files: PictureFiles, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader(files, **options)
    with pytest.raises(ValueError, match="epochs count from 0"):
        loader(files).set_epoch(-1)


def test_files_need_labels_that_are_classes() -> None:
    with pytest.raises(ValueError, match="each file needs a label; got 1 files and 0 labels"):
        PictureFiles((Path("a"),), (), ("x",))
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 1\)"):
        PictureFiles((Path("a"),), (1,), ("x",))


# --- a whole data set -------------------------------------------------------------------------------------------------


def test_a_data_set_is_split_and_batched(make_pictures: Any) -> None:
    root = make_pictures({"a": 20, "b": 30}, size=(20, 16))
    data = ImageFolderData.open(root, image_size=12, workers=0)
    parts = (data.train, data.validation, data.test)
    assert [len(part) for part in parts] == [36, 4, 10]
    assert sorted(path for part in parts for path in part.paths) == sorted(root.glob("*/*.png"))
    assert all(path.parent.name == "ab"[label] for p in parts for path, label in zip(p.paths, p.labels, strict=True))
    assert set(data.train.labels[:8]) == {0, 1}, "the first pictures show every class"
    assert ImageFolderData.open(root, image_size=12, seed=1).test.paths == data.test.paths
    assert data.input_shape == (3, 12, 12) and data.num_outputs == 2 and data.num_data == 36
    loaders = data.loaders(8, seed=1)
    assert [sum(len(y) for _, y in loader) for loader in loaders] == [36, 4, 10]
    assert next(iter(loaders.train))[0].shape == (8, 3, 12, 12)
    examples = data.example_inputs(5)
    assert examples.shape == (5, 3, 12, 12) and torch.equal(examples, data.example_inputs(64)[:5])
    assert data.description()["rows"] == {"train": 36, "validation": 4, "test": 10}


def test_ranks_share_evaluation_if_asked_to(make_pictures: Any) -> None:
    data = ImageFolderData.open(make_pictures({"a": 20, "b": 30}), image_size=8, workers=0)
    for share, expected in ((False, [10, 10]), (True, [5, 5])):
        found = [data.loaders(4, rank=rank, world_size=2, share_evaluation=share).test for rank in range(2)]
        assert [sum(len(y) for _, y in test) for test in found] == expected


def test_training_pictures_are_augmented_and_held_out_ones_are_not(make_pictures: Any) -> None:
    data = ImageFolderData.open(make_pictures({"a": 20, "b": 30}, size=(20, 16)), image_size=8, workers=0)
    first, again = data.loaders(36), data.loaders(36)
    again.train.set_epoch(1)
    tests = [next(iter(loaders.test))[0] for loaders in (first, again)]
    assert torch.equal(*tests)
    trains = [{x.numpy().tobytes() for x in next(iter(loaders.train))[0]} for loaders in (first, again)]
    assert len(trains[0]) == 36 and not trains[0] & trains[1]


def test_settings_choose_how_a_folder_is_read(make_pictures: Any) -> None:
    root = make_pictures({"a": 10, "b": 10}, size=(12, 12))
    broken = root / "a" / "004.png"
    in_memory = open_data(RunSettings(data=str(root)))
    assert (in_memory.input_shape, in_memory.augment) == ((3, 12, 12), False)
    assert open_data(RunSettings(data=str(root), augment="crop-flip")).augment
    streamed = open_data(RunSettings(data=str(root), image_size=8, workers=0))
    assert isinstance(streamed, ImageFolderData)
    assert (streamed.input_shape, streamed.augment, streamed.workers) == ((3, 8, 8), True, 0)
    assert not open_data(RunSettings(data=str(root), image_size=8, augment="none")).augment
    for size, name in itertools.product((None, 8), ("none", "crop", "crop-flip")):
        assert open_data(RunSettings(data=str(root), image_size=size, augment=name)).description()["augment"] == name
    painted = open_data(RunSettings(data=str(root), augment="crop-flip-cutout"))
    assert painted.description()["augment"] == "crop-flip-cutout"
    with pytest.raises(ValueError, match="crop-flip-cutout is for images in memory; with an image size take crop-flip"):
        open_data(RunSettings(data=str(root), image_size=8, augment="crop-flip-cutout"))
    break_file(broken, "text")
    with pytest.warns(UserWarning, match="1 of 20 pictures"):
        skipped = open_data(RunSettings(data=str(root), image_size=8, bad_images="skip", workers=0))
    assert skipped.description()["skipped"] == [str(broken)]
    assert sum(skipped.description()["rows"].values()) == 19


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "digits", "image_size": 8}, "an image size is for a folder of pictures"),
        ({"data": "nowhere", "image_size": 8}, "there is no folder nowhere"),
        ({"data": "x.csv", "target": "y", "image_size": 8}, "an image size is for a folder of pictures"),
        ({"data": "nowhere"}, "no data set is called 'nowhere', and there is no such file or folder"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_data(RunSettings(**settings))


def test_features_are_not_cropped(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n" + "".join(f"{i},{i % 2}\n" for i in range(20)))
    with pytest.raises(ValueError, match=r"crop-flip augmentation is for images; .*a\.csv holds 1 features a row"):
        open_data(RunSettings(data=str(tmp_path / "a.csv"), target="y", augment="crop-flip"))


def test_without_pillow_the_extra_is_named(files: PictureFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *_: str) -> Any:
        raise ImportError(f"reading this data set needs {name}")

    monkeypatch.setattr(pictures, "require", missing)
    with pytest.raises(ImportError, match=r"needs PIL\.Image"):
        batches(loader(files))
