"""Histories survive a round trip through a file, and become tables."""

import json
from pathlib import Path

import pytest

from pyro_bbits.inference import EpochRecord, History

RECORDS = [
    EpochRecord(1, 0.7, 0.5, 0.6, 81.25, 3.5, 3.25, (8, 4), (5,), 0.5),
    EpochRecord(2, 0.1 + 0.2, 0.4, 0.5, 90.0, 2.5, 1e-17, (2, 0), (0,), 1.25),
]


@pytest.fixture
def history() -> History:
    return History(("conv.weight", "größe.input"), ("conv",), list(RECORDS))


def test_saving_and_loading_keeps_everything(tmp_path: Path, history: History) -> None:
    history.save(tmp_path / "new" / "history.jsonl")
    loaded = History.load(str(tmp_path / "new" / "history.jsonl"))
    assert loaded == history
    assert len((tmp_path / "new" / "history.jsonl").read_text(encoding="utf-8").splitlines()) == 3


@pytest.mark.parametrize("history", [History(), History(epochs=[EpochRecord(1, 0.5), EpochRecord(2, 0.25)])])
def test_runs_without_gates_are_kept_too(tmp_path: Path, history: History) -> None:
    history.save(tmp_path / "history.jsonl")
    assert History.load(tmp_path / "history.jsonl") == history


def test_a_history_is_a_sequence_of_records(history: History) -> None:
    assert len(history) == 2
    assert list(history) == RECORDS
    assert history[-1] is RECORDS[1]


def test_the_table_has_a_row_per_epoch_and_a_column_per_tensor_and_layer(history: History) -> None:
    frame = history.frame()
    scalars = ["epoch", "loss", "kl", "validation_nll", "validation_accuracy", "expected_bops", "bops", "seconds"]
    assert list(frame.columns) == [*scalars, "bits.conv.weight", "bits.größe.input", "kept.conv"]
    assert frame["epoch"].tolist() == [1, 2]
    assert frame["loss"].tolist() == [0.7, 0.1 + 0.2]
    assert frame["bits.conv.weight"].tolist() == [8, 2]
    assert frame["bits.größe.input"].tolist() == [4, 0]
    assert frame["kept.conv"].tolist() == [5, 0]


def test_the_table_of_a_run_without_gates_has_scalars_only() -> None:
    frame = History(epochs=[EpochRecord(1, 0.5)]).frame()
    assert frame["loss"].tolist() == [0.5]
    assert frame["bops"].isna().all()
    assert not [column for column in frame.columns if column.startswith(("bits.", "kept."))]


HEAD = json.dumps({"tensors": [], "layers": []})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        json.dumps([1, 2]),
        json.dumps({"tensors": []}),
        f"{HEAD}\n[1]",
        f"{HEAD}\n3",
        f'{HEAD}\n{{"epoch": 1}}',
        f'{HEAD}\n{{"epoch": 1, "loss": 0.5, "colour": "red"}}',
        f'{HEAD}\n{{"epoch": 1, "loss"',
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"history\.jsonl is not a training history"):
        History.load(path)


def test_missing_and_binary_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jsonl is not a training history: .*No such file"):
        History.load(tmp_path / "none.jsonl")
    (tmp_path / "image.jsonl").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match=r"image\.jsonl is not a training history"):
        History.load(tmp_path / "image.jsonl")
