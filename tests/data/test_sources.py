"""Named data sets: the digits at hand, and parquet folders written and read back exactly."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_bbits.data.sources import load_data
from pyro_bbits.data.splits import DataSplits

datasets = pytest.importorskip("datasets")
pillow = pytest.importorskip("PIL.Image")
arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
sklearn = pytest.importorskip("sklearn.datasets")

MEAN = torch.tensor([0.4914, 0.4822, 0.4465], dtype=torch.float32).view(3, 1, 1)
STD = torch.tensor([0.2023, 0.1994, 0.2010], dtype=torch.float32).view(3, 1, 1)


def random_levels(count: int, channels: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, channels, size, size)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def encode(levels: Tensor, encoding: str) -> bytes:
    pixels = levels.squeeze(0) if len(levels) == 1 else levels.movedim(0, -1)
    buffer = io.BytesIO()
    options = {"lossless": True, "exact": True} if encoding == "WEBP" else {}
    pillow.fromarray(pixels.contiguous().numpy()).save(buffer, encoding, **options)
    return buffer.getvalue()


def write_rows(file: Path, levels: Tensor, labels: list[Any], column: str = "image", encoding: str = "PNG") -> None:
    cells = [{"bytes": encode(image, encoding), "path": None} for image in levels]
    write_table(file, {column: cells, "label": labels})


def write_table(file: Path, columns: dict[str, list[Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table(columns), file)


@pytest.fixture(autouse=True)
def quiet_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point the library's shared cache at a folder that must stay empty."""
    cache = tmp_path / "shared-cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    return cache


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A folder in the layout of MNIST with ten training rows in two files and four test rows."""
    folder = tmp_path / "mnist"
    levels = random_levels(14, 1, 28)
    write_rows(folder / "train-00000-of-00002.parquet", levels[:6], list(range(6)))
    write_rows(folder / "train-00001-of-00002.parquet", levels[6:10], list(range(6, 10)))
    write_rows(folder / "test-00000-of-00001.parquet", levels[10:], [3, 1, 4, 1])
    return folder


def in_label_order(data: DataSplits) -> Tensor:
    """Put the training images, whose labels are 0, 1, 2, ..., back into the order they were written in."""
    labels = torch.cat([data.train.targets, data.validation.targets])
    assert labels.sort().values.tolist() == list(range(len(labels)))
    return torch.cat([data.train.inputs, data.validation.inputs])[labels.argsort()]


def test_digits_have_the_known_shape_and_range() -> None:
    data = load_data("digits")
    assert (data.name, data.num_classes, data.augment, data.input_shape) == ("digits", 10, False, (1, 8, 8))
    assert (len(data.train), len(data.validation), len(data.test)) == (1298, 144, 355)
    images = torch.cat([data.train.inputs, data.validation.inputs, data.test.inputs])
    assert torch.equal((images * 16).round(), images * 16)
    assert [images.min().item(), images.max().item()] == [0, 1]


def test_digits_are_split_once_whatever_the_seed() -> None:
    zero, again, one = load_data("digits"), load_data("digits"), load_data("digits", seed=1)
    assert torch.equal(zero.test.inputs, one.test.inputs)
    assert torch.equal(zero.validation.inputs, again.validation.inputs)
    assert not torch.equal(zero.validation.inputs, one.validation.inputs)
    sums = [torch.cat([data.train.inputs, data.validation.inputs]).sum(0) for data in (zero, one)]
    torch.testing.assert_close(sums[0], sums[1])


def test_digits_splits_cover_every_scan_and_hold_each_class_in_proportion() -> None:
    data = load_data("digits")
    scans, targets = (torch.as_tensor(array) for array in sklearn.load_digits(return_X_y=True))
    rows = [
        (*(image.flatten() * 16).tolist(), label)
        for part in (data.train, data.validation, data.test)
        for image, label in zip(part.inputs, part.targets.tolist(), strict=True)
    ]
    assert sorted(rows) == sorted((*scan, label) for scan, label in zip(scans.tolist(), targets.tolist(), strict=True))
    assert torch.equal(data.test.targets.bincount(), targets.bincount() // 5)


def test_mnist_folder_comes_back_exactly(mnist: Path) -> None:
    data = load_data("mnist", path=mnist, validation_fraction=0.3)
    assert (data.input_shape, data.num_classes, data.augment) == ((1, 28, 28), 10, False)
    assert (len(data.train), len(data.validation)) == (7, 3)
    expected = random_levels(14, 1, 28).float() / 255
    assert torch.equal(in_label_order(data), expected[:10])
    assert torch.equal(data.test.inputs, expected[10:])
    assert data.test.targets.tolist() == [3, 1, 4, 1]


@pytest.mark.parametrize("column", ["image", "img"])
@pytest.mark.parametrize("encoding", ["PNG", "WEBP"])
def test_cifar10_folder_comes_back_normalized(tmp_path: Path, column: str, encoding: str) -> None:
    levels = random_levels(7, 3, 32)
    write_rows(tmp_path / "train-0.parquet", levels[:5], list(range(5)), column, encoding)
    write_rows(tmp_path / "test-0.parquet", levels[5:], [9, 8], column, encoding)
    data = load_data("cifar10", path=str(tmp_path))
    assert (data.input_shape, data.num_classes, data.augment) == ((3, 32, 32), 10, True)
    expected = (levels.float() / 255 - MEAN) / STD
    assert torch.equal(in_label_order(data), expected[:5])
    assert torch.equal(data.test.inputs, expected[5:])


def test_folder_above_gives_the_same_as_the_folder(mnist: Path) -> None:
    direct, above = load_data("mnist", path=mnist), load_data("mnist", path=mnist.parent)
    assert torch.equal(direct.train.inputs, above.train.inputs)


def test_reading_a_folder_leaves_nothing_behind(mnist: Path, quiet_cache: Path) -> None:
    before = sorted(mnist.parent.rglob("*"))
    load_data("mnist", path=mnist)
    assert sorted(mnist.parent.rglob("*")) == before
    assert not quiet_cache.exists()


@pytest.mark.parametrize(("name", "hub_id"), [("mnist", "ylecun/mnist"), ("cifar10", "uoft-cs/cifar10")])
def test_without_a_folder_the_hub_is_asked(name: str, hub_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    channels, size = (1, 28) if name == "mnist" else (3, 32)
    levels = random_levels(2, channels, size)
    cells = [{"bytes": encode(image, "PNG"), "path": None} for image in levels]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    rows = datasets.Dataset.from_dict({"img": cells, "label": [0, 1]}, features=features)
    asked: list[str] = []

    def load_dataset(path: str) -> dict[str, object]:
        asked.append(path)
        return {"train": rows, "test": rows}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_data(name)
    assert asked == [hub_id]
    assert data.test.inputs.shape == (2, channels, size, size)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_fraction_outside_0_and_1_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        load_data("digits", validation_fraction=fraction)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'svhn', and there is no such file .*; choose one of digits, mnist, cifar10"):
        load_data("svhn")


def test_digits_take_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not read from a folder"):
        load_data("digits", path=tmp_path)


def test_missing_folder_and_missing_files_are_refused(mnist: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        load_data("mnist", path=mnist / "nowhere")
    (mnist / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"mnist needs train-\*.parquet and test-\*.parquet in one folder"):
        load_data("mnist", path=mnist)


@pytest.mark.parametrize("columns", [{"picture": [1], "label": [1]}, {"image": [1], "target": [1]}])
def test_other_columns_are_refused(tmp_path: Path, columns: dict[str, list[int]]) -> None:
    write_table(tmp_path / "train-0.parquet", columns)
    write_table(tmp_path / "test-0.parquet", columns)
    with pytest.raises(ValueError, match=f"needs the columns image .* and label; got {', '.join(columns)}"):
        load_data("mnist", path=tmp_path)


@pytest.mark.parametrize("cell", [b"not an image", None, encode(random_levels(1, 1, 28)[0], "PNG")[:-40]])
def test_undecodable_image_is_named_by_its_row(mnist: Path, cell: bytes | None) -> None:
    good = encode(random_levels(1, 1, 28)[0], "PNG")
    cells = [{"bytes": value, "path": None} for value in (good, good, cell)]
    write_table(mnist / "test-00000-of-00001.parquet", {"image": cells, "label": [1, 2, 3]})
    with pytest.raises(ValueError, match="row 2 of the test split of mnist is not an image"):
        load_data("mnist", path=mnist)


def test_images_of_another_size_are_refused(mnist: Path) -> None:
    write_rows(mnist / "test-00000-of-00001.parquet", random_levels(2, 3, 32), [0, 1])
    with pytest.raises(ValueError, match="must hold 28x28 images; row 0 is 32x32"):
        load_data("mnist", path=mnist)


@pytest.mark.parametrize("label", [None, 1.5, "seven"])
def test_labels_that_are_not_numbers_are_refused(mnist: Path, label: object) -> None:
    rows = [1.5, 2.5] if isinstance(label, float) else [label, label]
    write_rows(mnist / "test-00000-of-00001.parquet", random_levels(2, 1, 28), rows)
    for file in mnist.glob("train-*.parquet"):
        write_rows(file, random_levels(2, 1, 28), rows)
    with pytest.raises(ValueError, match=f"whole numbers; row 0 of the train split of mnist has {label!r}"):
        load_data("mnist", path=mnist)


def test_labels_out_of_range_are_refused(mnist: Path) -> None:
    write_rows(mnist / "test-00000-of-00001.parquet", random_levels(2, 1, 28), [9, 10])
    with pytest.raises(ValueError, match=r"\[0, 10\); label 1 of the test split is 10"):
        load_data("mnist", path=mnist)


def test_a_split_without_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = datasets.Dataset.from_dict({"image": [], "label": []})
    monkeypatch.setattr(datasets, "load_dataset", lambda _: {"train": empty, "test": empty})
    with pytest.raises(ValueError, match="the train split of mnist holds no rows"):
        load_data("mnist")


def test_empty_and_broken_files_are_refused(mnist: Path) -> None:
    file = mnist / "train-00001-of-00002.parquet"
    table = parquet.read_table(file)
    parquet.write_table(table.slice(0, 0), file)
    with pytest.raises(ValueError, match="must be complete, hold rows and have the same columns"):
        load_data("mnist", path=mnist)
    parquet.write_table(table, file)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="must be complete, hold rows and have the same columns"):
        load_data("mnist", path=mnist)


def test_missing_library_is_named_with_the_extra(mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'needs datasets; run pip install "pyro-bbits\[hub\]"'):
        load_data("mnist", path=mnist)
