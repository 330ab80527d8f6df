"""Archives come back exactly whatever the layout of their images, and what is wrong names array and row."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyro_bbits.data.arrays import read_arrays
from pyro_bbits.data.sources import load_data

GENERATOR = np.random.default_rng(0)
BYTES = GENERATOR.integers(0, 256, (12, 5, 6, 3), dtype=np.uint8)
LABELS = np.arange(12) % 3


def archive(tmp_path: Path, **arrays: Any) -> Path:
    np.savez(tmp_path / "a.npz", **arrays)
    return tmp_path / "a.npz"


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (BYTES, BYTES.transpose(0, 3, 1, 2)),
        (BYTES.transpose(0, 3, 1, 2), BYTES.transpose(0, 3, 1, 2)),
        (BYTES[..., 0], BYTES[:, None, :, :, 0]),
        (BYTES[..., :1], BYTES[:, None, :, :, 0]),
        (BYTES[..., 0, 0].astype(np.int16), BYTES[..., 0, 0].astype(np.float64)),
        (BYTES / 7, (BYTES / 7).transpose(0, 3, 1, 2).astype(np.float32)),
        (BYTES[..., 0, 0], BYTES[..., 0, 0].astype(np.float64)),
    ],
)
def test_inputs_come_back_in_one_layout(tmp_path: Path, array: Any, expected: Any) -> None:
    inputs = read_arrays(archive(tmp_path, x=array, y=LABELS), "classification")["all"].inputs.numpy()
    assert inputs.dtype == expected.dtype
    np.testing.assert_array_equal(inputs, expected)


@pytest.mark.parametrize(
    "targets", [LABELS, LABELS.astype(np.uint8), LABELS.astype(np.float32), LABELS[:, None], LABELS == 1]
)
def test_labels_come_back_as_whole_numbers(tmp_path: Path, targets: Any) -> None:
    read = read_arrays(archive(tmp_path, x=BYTES, y=targets), "classification")["all"].targets
    assert isinstance(read, torch.Tensor) and read.dtype == torch.int64
    assert read.tolist() == targets.reshape(-1).astype(int).tolist()


def test_names_and_real_numbers_come_back(tmp_path: Path) -> None:
    named = archive(tmp_path, x=BYTES, y=np.array(["a", "b", "c"])[LABELS])
    assert read_arrays(named, "classification")["all"].targets == list("abc" * 4)
    path = archive(tmp_path, x=BYTES, y=np.stack([LABELS, LABELS / 3], 1))
    real = read_arrays(path, "regression")["all"].targets
    assert isinstance(real, torch.Tensor) and real.tolist() == [[i, i / 3] for i in LABELS.tolist()]


@pytest.mark.parametrize("name", ["val", "valid", "validation", None])
def test_parts_are_found_by_their_names(tmp_path: Path, name: str | None) -> None:
    parts = {"x_train": BYTES[:9], "y_train": LABELS[:9], "x_test": BYTES[9:11], "y_test": LABELS[9:11]}
    if name:
        parts |= {f"x_{name}": BYTES[11:], f"y_{name}": LABELS[11:]}
    data = load_data(archive(tmp_path, **parts))
    assert [len(part) for part in (data.train, data.validation, data.test)] == ([9, 1, 2] if name else [8, 1, 2])
    assert data.test.targets.tolist() == LABELS[9:11].tolist()
    assert data.input_scaling is not None
    back = data.test.inputs * torch.tensor(data.input_scaling.std).view(-1, 1, 1)
    back = (back + torch.tensor(data.input_scaling.mean).view(-1, 1, 1)) * 255
    np.testing.assert_allclose(back.numpy(), BYTES[9:11].transpose(0, 3, 1, 2), atol=1e-3)


def broken(array: Any, value: float) -> Any:
    changed = array.astype(float)
    changed[7] = value
    return changed


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": BYTES}, "the arrays x_train, y_train.*; .* holds x"),
        ({"data": BYTES, "target": LABELS}, "holds data, target"),
        ({}, "holds none"),
        ({"x_train": BYTES, "x_test": BYTES, "y_test": LABELS}, "holds x_train without y_train"),
        ({"x_train": BYTES, "y_train": LABELS}, "the arrays x_train, y_train, x_test and y_test"),
        ({"x": BYTES, "y": LABELS[:5]}, "x has 12 rows and y 5"),
        ({"x": BYTES[:0], "y": LABELS[:0]}, r"x must hold features .* got shape \(0, 5, 6, 3\)"),
        ({"x": LABELS, "y": LABELS}, r"x must hold features .* got shape \(12,\)"),
        ({"x": broken(BYTES, np.nan), "y": LABELS}, "x must hold finite numbers; row 7 has NaN"),
        ({"x": broken(BYTES[..., 0, 0], np.inf), "y": LABELS}, "x must hold finite numbers; row 7"),
        ({"x": BYTES, "y": broken(LABELS, 0.5)}, r"y must hold whole numbers .* row 7 has 0\.5\. .*--task regression"),
        ({"x": BYTES, "y": broken(LABELS, np.nan)}, "y must hold finite numbers; row 7"),
        ({"x": BYTES, "y": np.eye(3)[LABELS]}, r"y must have shape .*got \(12, 3\)\. One-hot"),
        ({"x": BYTES, "y": LABELS + 1}, r"0 to K-1 .* have 1, 2, 3; .*a\.npz, row \d+ of y has 3"),
        ({"x": BYTES, "y": np.array([{}] * 12)}, "cannot be read as an .npz archive of plain arrays"),
        ({"x": BYTES.astype(complex), "y": LABELS}, "x must hold numbers; got dtype complex128"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_data(archive(tmp_path, **arrays))
    assert "a.npz" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"])
def test_files_that_are_no_archives_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz cannot be read as an \.npz archive"):
        load_data(tmp_path / "a.npz")


def test_a_single_array_is_no_archive(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", BYTES)
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"a\.npz cannot be read"):
        load_data(tmp_path / "a.npz")
