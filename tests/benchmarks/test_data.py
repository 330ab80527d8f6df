"""The script for pictures makes the files it says, and its figures hang together."""

from pathlib import Path

import pytest

pytest.importorskip("PIL.Image")

from benchmarks.speed.data import main as run
from benchmarks.speed.data import make_folder, reading_alone, texture
from benchmarks.speed.results import read_rows
from pyro_bbits.data import PictureFiles


def test_pictures_are_as_many_as_asked_for_and_some_differ(tmp_path: Path) -> None:
    make_folder(tmp_path, images=37, distinct=12, width=40, height=30)
    files = PictureFiles.of(tmp_path)
    assert len(files) == 37 and len(files.class_names) == 10
    assert len({path.read_bytes() for path in files.paths}) == 12
    assert texture(3, 40, 30).size == (40, 30)


def test_reading_needs_two_batches(tmp_path: Path) -> None:
    make_folder(tmp_path, images=10, distinct=2, width=20, height=20)
    files = PictureFiles.of(tmp_path)
    options = {"image_size": 8, "workers": 0}
    assert reading_alone(files, 5, options) > 0
    with pytest.raises(ValueError, match="two batches at least; got 1 of 10 pictures"):
        reading_alone(files, 10, options)


def test_pictures_are_decoded_once_where_that_is_asked_for(tmp_path: Path) -> None:
    run(["--quick", "--cache", "--variants", "plain", "--device", "cpu", "--output", str(tmp_path / "results.jsonl")])
    (row,) = read_rows(tmp_path / "results.jsonl")
    assert row.variant == "digits-net, plain, auto, 0 workers, decoded once" and "--cache" in row.command


def test_a_quick_run_adds_rows_whose_figures_agree(tmp_path: Path) -> None:
    run(["--quick", "--device", "cpu", "--output", str(tmp_path / "results.jsonl")])
    rows = read_rows(tmp_path / "results.jsonl")
    assert [(row.table, row.case, row.variant) for row in rows] == [
        ("data", "image-folder", "digits-net, plain, auto, 0 workers"),
        ("data", "image-folder", "digits-net, gated, auto, 0 workers"),
    ]
    for row in rows:
        assert row.batch == 10 and row.dtype == "float32"
        assert row.details["images/s"] == pytest.approx(1e4 / row.ms)
        busy = min(100, 100 * row.details["images/s"] / row.details["step alone, images/s"])
        assert row.details["device busy %"] == pytest.approx(busy)
