"""Comma-separated files come back as numbers, and what is wrong in them is named with its line."""

from pathlib import Path

import pytest
import torch

from pyro_bbits.data.sources import load_data
from pyro_bbits.data.table import read_table


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_comes_back_exactly(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", '\ufeffwidth,kind,"depth, cm"\r\n1.5,yes,-2e3\r\n\r\n 7 , no ,0.1\r\n')
    table = read_table(path, "kind")
    assert (table.features, table.targets) == (("width", "depth, cm"), ["yes", "no"])
    rows = table.rows("classification")
    assert rows.inputs.tolist() == [[1.5, -2000.0], [7.0, 0.1]]
    assert [rows.locate(i) for i in range(2)] == [f"{path}, line 2", f"{path}, line 4"]


def test_targets_follow_the_task(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "a.csv", "x,y\n1,0\n2,1.0\n3,2\n"), "y")
    whole, real = table.rows("classification").targets, table.rows("regression").targets
    assert isinstance(whole, torch.Tensor) and whole.tolist() == [0, 1, 2] and whole.dtype == torch.int64
    assert isinstance(real, torch.Tensor) and real.tolist() == [[0.0], [1.0], [2.0]]
    named = read_table(write(tmp_path / "b.csv", "x,y\n1,0\n2,no\n"), "y")
    assert named.rows("classification").targets == ["0", "no"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,y\n1,2\n3,abc4\nfour,5\n", r"a\.csv, line 4: column 'x' must hold finite numbers; got 'four'\. Encode"),
        ("x,y\n1,2\n,3\n", r"line 3: column 'x' must hold finite numbers; got an empty cell"),
        ("x,y\n1,2\nnan,3\n", r"line 3: column 'x' .*got 'nan'"),
        ("x,y\n-inf,2\n", r"line 2: column 'x' .*got '-inf'"),
        ("x,y\n1,2\n1, \n", r"line 3: the target in column 'y' is empty"),
        ("x,y\n1,2\n1,2,3\n", r"line 3 has 3 cells; the first line names 2 columns"),
        ("x,z\n1,2\n", r"a\.csv has no column 'y' for the targets; the columns are x, z\."),
        ("y\n1\n", "no column beside the targets 'y'"),
        ("x,y\n", "holds no rows below the line of column names"),
        ("", "must name its columns in the first line, which is empty"),
        ("x;y\n1;2\n", "must separate its columns by commas; its first line is 'x;y'"),
        (",x,y\n0,1,2\n", "column 1 has no name; if it only counts the rows, remove it"),
        ("x,x,y\n0,1,2\n", "two columns called 'x'"),
        ('x,y\n1,"2\n', r"cannot be read as comma-separated text in UTF-8: .*"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_table(write(tmp_path / "a.csv", text), "y")
    assert "\n" not in str(caught.value)


def test_targets_that_do_not_suit_the_task_are_named(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "a.csv", "x,y\n1,1\n2,0.5\n"), "y")
    with pytest.raises(ValueError, match=r"line 3: class labels must be whole .* got 0\.5\. .*--task regression"):
        table.rows("classification")
    table = read_table(write(tmp_path / "a.csv", "x,y\n1,1\n2,high\n"), "y")
    with pytest.raises(ValueError, match=r"line 3: the target must hold finite numbers; got 'high'"):
        table.rows("regression")


def test_without_a_target_column_the_columns_are_listed(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"say which column holds the targets \(--target COLUMN\); the columns are x, y"
    ):
        load_data(write(tmp_path / "a.csv", "x,y\n1,2\n"))


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"x,y\n\xff\xfe,1\n")
    with pytest.raises(ValueError, match=r"a\.csv cannot be read as comma-separated text"):
        load_data(tmp_path / "a.csv", target="y")
    with pytest.raises(ValueError, match=r"none\.csv', and there is no such file or folder"):
        load_data(tmp_path / "none.csv", target="y")


def body(*rows: int) -> str:
    return "".join(f"{i},{i * i},{i % 2}\n" for i in rows)


def test_a_file_is_split_and_its_columns_are_described(tmp_path: Path) -> None:
    data = load_data(write(tmp_path / "a.csv", "a,b,y\n" + body(*range(50))), target="y")
    assert (data.input_shape, data.num_classes, data.class_names) == ((2,), 2, ("0", "1"))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [36, 4, 10]
    description = data.description()
    assert (description["target"], description["feature_names"]) == ("y", ["a", "b"])
    assert description["rows"] == {"train": 36, "validation": 4, "test": 10}
    assert len(description["input_scaling"]["mean"]) == 2


@pytest.mark.parametrize("validation", [None, "val", "validation"])
def test_files_of_a_folder_are_its_parts(tmp_path: Path, validation: str | None) -> None:
    write(tmp_path / "train.csv", "a,b,y\n" + body(*range(40)))
    write(tmp_path / "test.csv", "a,b,y\n" + body(40, 41))
    if validation:
        write(tmp_path / f"{validation}.csv", "a,b,y\n" + body(42, 43, 44))
    data = load_data(tmp_path, target="y", task="regression")
    assert [len(part) for part in (data.train, data.validation, data.test)] == (
        [40, 3, 2] if validation else [36, 4, 2]
    )
    assert data.num_classes is None and data.num_outputs == 1


def test_files_of_a_folder_must_have_the_same_columns(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "a,b,y\n" + body(*range(40)))
    with pytest.raises(ValueError, match=r"train\.csv and no test\.csv"):
        load_data(tmp_path, target="y")
    write(tmp_path / "test.csv", "b,a,y\n" + body(40))
    with pytest.raises(
        ValueError, match=r"test\.csv must have the columns of .*train\.csv in the same order; it has b, a"
    ):
        load_data(tmp_path, target="y")
