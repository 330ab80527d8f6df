"""Class folders come back as images and labels, and what is wrong in them is named with its file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from pyro_bbits.data import folder
from pyro_bbits.data.pictures import PictureFiles, decode, levels
from pyro_bbits.data.sources import load_data
from pyro_bbits.data.splits import DataSplits, Split

pillow = pytest.importorskip("PIL.Image")


def original(data: DataSplits, split: Split) -> Tensor:
    """Bytes of the images, recovered."""
    assert data.input_scaling is not None
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (data.input_scaling.mean, data.input_scaling.std))
    return ((split.inputs * std + mean) * 255).round().byte()


def as_set(images: Tensor, labels: Tensor) -> set[tuple[int, bytes]]:
    return {(int(label), image.numpy().tobytes()) for image, label in zip(images, labels, strict=True)}


def in_files(root: Path, label: int) -> set[tuple[int, bytes]]:
    return {(label, levels(decode(path)).numpy().tobytes()) for path in root.glob("*.png")}


def test_given_parts_come_back_exactly(make_pictures: Any) -> None:
    counts = {"train/b": 6, "train/a": 5, "validation/a": 1, "validation/b": 2, "test/a": 2, "test/b": 1}
    root = make_pictures(counts)
    data = load_data(str(root))
    assert (data.input_shape, data.num_classes, data.class_names, data.augment) == ((3, 5, 6), 2, ("a", "b"), False)
    for part, split in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        expected = in_files(root / part / "a", 0) | in_files(root / part / "b", 1)
        assert len(split) == len(expected)
        assert as_set(original(data, split), split.targets) == expected


def test_classes_alone_are_split_once_and_for_all(make_pictures: Any) -> None:
    root = make_pictures({"x": 25, "y": 25})
    data, other = load_data(root), load_data(root, seed=1)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [36, 4, 10]
    assert data.test.targets.bincount().tolist() == [5, 5]
    found = [as_set(original(data, part), part.targets) for part in (data.train, data.validation, data.test)]
    assert set.union(*found) == in_files(root / "x", 0) | in_files(root / "y", 1) and sum(map(len, found)) == 50
    assert found[2] == as_set(original(other, other.test), other.test.targets)
    assert found[1] != as_set(original(other, other.validation), other.validation.targets)


def test_a_folder_as_imagenet_is_tested_on_val(make_pictures: Any) -> None:
    root = make_pictures({"train/a": 20, "train/b": 20, "val/a": 3, "val/b": 4})
    data = load_data(root)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [36, 4, 7]


def test_grey_pictures_have_one_channel_unless_others_are_coloured(make_pictures: Any) -> None:
    root = make_pictures({"a": 5, "b": 5}, mode="L")
    assert load_data(root).input_shape == (1, 5, 6)
    decode(root / "a" / "000.png").save(root / "a" / "000.png")
    assert load_data(root).input_shape == (3, 5, 6)


def test_files_that_are_no_pictures_are_passed_over(make_pictures: Any) -> None:
    root = make_pictures({"a": 3, "b": 3})
    (root / "a" / "notes.txt").write_text("x")
    (root / "a" / ".hidden.png").write_text("x")
    (root / ".git").mkdir()
    (root / "readme.md").write_text("x")
    files = PictureFiles.of(root)
    assert len(files) == 6 and files.class_names == ("a", "b") and files.labels == (0, 0, 0, 1, 1, 1)


def test_pictures_of_two_sizes_are_refused_with_a_remedy(make_pictures: Any) -> None:
    root = make_pictures({"a": 5, "b": 5})
    decode(root / "b" / "002.png").resize((7, 5)).save(root / "b" / "002.png")
    with pytest.raises(ValueError, match=r"a/000\.png is 6x5, .*b/002\.png is 7x5\. .*--image-size"):
        load_data(root)


def test_pictures_that_do_not_fit_into_memory_are_refused(make_pictures: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_pictures({"a": 5, "b": 5})
    monkeypatch.setattr(folder, "LIMIT", 10 * 3 * 4 * 30 - 1)
    with pytest.raises(ValueError, match=r"10 pictures like .* GiB of memory; give an image size \(--image-size\)"):
        load_data(root)


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_a_broken_file_is_named(make_pictures: Any, content: bytes | None) -> None:
    root = make_pictures({"a": 5, "b": 5}, size=(40, 40))
    path = root / "b" / "003.png"
    path.write_bytes(path.read_bytes()[:-500] if content is None else content)
    with pytest.raises(ValueError, match=r"b/003\.png is not a picture that can be decoded: .") as caught:
        load_data(root)
    assert "\n" not in str(caught.value)


def test_pictures_of_16_bits_are_refused_not_clipped(make_pictures: Any) -> None:
    root = make_pictures({"a": 5, "b": 5})
    pillow.new("I;16", (6, 5), 40_000).save(root / "a" / "001.png")
    with pytest.raises(ValueError, match=r"a/001\.png has more than 8 bits per channel"):
        load_data(root)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"a": 5}, "two class folders at least; .* has a only"),
        ({"a": 5, "b": 0}, r"the class folder .*b holds no picture \(\.png, "),
        ({"": 5}, r"one folder for each class, such as .*cat; .* holds pictures themselves"),
        ({"train": 5}, r"one folder for each class, such as .*train/cat; .*train holds pictures themselves"),
        ({"train/a": 5, "train/b": 5}, "holds the folder train and no test"),
        ({"test/a": 5, "val/b": 5}, "holds the folder val and none called train"),
        (
            {"train/cat": 5, "train/dog": 5, "test/cat": 5, "test/dogs": 5},
            "train and .*test must hold the same classes; only one of them has dog, dogs",
        ),
        (
            {"train/a": 5, "train/b": 5, "test/a": 5, "test/b": 2, "val/a": 3},
            "must hold the same classes; only one of them has b",
        ),
        (
            {"train/a": 2, "train/b": 2, "test/a": 1, "test/b": 1, "val/a": 1, "val/b": 1, "valid/a": 1},
            "must hold one validation folder; got val and valid",
        ),
    ],
)
def test_folders_that_make_no_data_set_are_refused(make_pictures: Any, counts: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_data(make_pictures(counts))


def test_what_is_not_for_these_data_is_refused(make_pictures: Any, tmp_path: Path) -> None:
    root = make_pictures({"a": 5, "b": 5})
    with pytest.raises(ValueError, match=r"a target column is for \.csv files"):
        load_data(root, target="y")
    with pytest.raises(ValueError, match="its folders being the classes; got task='regression'"):
        load_data(root, task="regression")
    with pytest.raises(ValueError, match="path is for mnist and cifar10"):
        load_data(root, path=tmp_path)
    with pytest.raises(ValueError, match="digits is a classification and has no target column; got target='y'"):
        load_data("digits", target="y")
    with pytest.raises(ValueError, match="task must be 'classification' or 'regression'; got 'ranking'"):
        load_data(root, task="ranking")  # type: ignore[arg-type]
    (tmp_path / "data.txt").write_text("x")
    with pytest.raises(ValueError, match=r"must be a folder of pictures, a \.npz or a \.csv file; got .*data\.txt"):
        load_data(tmp_path / "data.txt")


def test_broken_pictures_are_left_out_if_asked(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for number in range(12):
            Image.new("L", (6, 6), 20 * number).save(tmp_path / label / f"{number}.png")
    (tmp_path / "cat" / "zz.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"zz\.png"):
        load_data(tmp_path)
    with pytest.warns(UserWarning, match=r"1 of 25 pictures cannot be decoded and are left out: .*zz\.png"):
        data = load_data(tmp_path, bad_images="skip")
    assert len(data.train) + len(data.validation) + len(data.test) == 24
