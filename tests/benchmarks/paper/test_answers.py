"""Figures, tables and answers are those of a count by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.paper import figures, questions
from benchmarks.paper.metrics import Predictions, Saving, calibration_error, pooled, saving_of
from benchmarks.paper.published import PUBLISHED
from benchmarks.paper.results import RESULTS, Result, append_results, latest, read_results
from benchmarks.paper.run import main as run
from benchmarks.paper.tables import (
    EXPECTED,
    PAGE,
    accuracy_table,
    fill_tables,
    lambda_table,
    savings_table,
    trials_table,
)
from benchmarks.paper.tables import main as write_tables
from benchmarks.paper.zeros import nonzero_products, zero_crediting_bops
from pyro_bbits import BitConfiguration, quantize
from pyro_bbits.gates import GateValues
from pyro_bbits.inference import EpochRecord, History


def result(**values: Any) -> Result:
    given: dict[str, Any] = {
        "dataset": "mnist",
        "network": "lenet5",
        "method": "bayesian-bits",
        "recipe": "parity",
        "seed": 0,
        "test_accuracy": 99.0,
        "relative_bops": 0.4,
        "epochs": 100,
        "seconds": 60.0,
        "hardware": "Some GPU",
        "command": "python -m benchmarks.paper.run",
        "date": "2026-01-31",
        "mu": 0.1,
    }
    return Result(**given | values)


@pytest.fixture
def results() -> list[Result]:
    """Two seeds, another strength, a trial on a tenth of the epochs, and a float network."""
    saved = {"widths_only": 1.6, "pruning_only": 25.0}
    return [
        result(test_accuracy=99.0, relative_bops=0.4, **saved),
        result(test_accuracy=99.2, relative_bops=0.4, seed=1, **saved),
        result(test_accuracy=98.0, relative_bops=0.2, mu=0.3),
        result(test_accuracy=50.0, share=0.1, epochs=10),
        result(method="float32", recipe="float32", mu=None, relative_bops=100.0, test_accuracy=99.5),
    ]


def rows_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


# --- tables -----------------------------------------------------------------------------------------------------------


def test_results_come_back_and_the_last_of_a_seed_counts(tmp_path: Path, results: list[Result]) -> None:
    append_results(tmp_path / "results.jsonl", results)
    assert read_results(tmp_path / "results.jsonl") == results
    again = result(test_accuracy=99.1, date="2026-02-01")
    assert latest([results[0], results[1], again]) == [again, results[1]]


def test_accuracy_is_a_mean_over_seeds_beside_published_and_missing_rows(results: list[Result]) -> None:
    rows = rows_of(accuracy_table("mnist", results))
    published = [row for row in rows if row[-1].startswith("published")]
    assert len(published) == sum(row.dataset == "mnist" for row in PUBLISHED)
    assert ["Bayesian Bits, mu 0.1", "99.30", "0.36", "", "", "published"] in published
    parity = next(row for row in rows if row[0] == "parity (mu 0.1), lenet5")
    deviation = math.sqrt(2 * 0.1**2)
    assert parity[1:5] == [f"99.10 ± {deviation:.2f}", "0.400 ± 0.000", "0, 1", "100"]
    assert sum(row[1] == "not run yet" for row in rows) == len(EXPECTED) - 2
    assert not any("50.00" in cell for row in rows for cell in row)


def test_tables_stand_between_their_markers(tmp_path: Path, results: list[Result]) -> None:
    page, lines = tmp_path / "page.md", tmp_path / "results.jsonl"
    page.write_text(
        "a\n<!-- table: accuracy, mnist --><!-- end -->\n<!-- table: savings, cifar10 -->\nold<!-- end -->b"
    )
    append_results(lines, results)
    options = ["--page", str(page), "--results", str(lines)]
    assert write_tables([*options, "--check"]) == 1
    assert write_tables(options) == 0 and write_tables([*options, "--check"]) == 0
    text = page.read_text()
    assert "| parity (mu 0.1), lenet5" in text and "old" not in text and text.count("*not run yet*") == 1


def test_committed_page_shows_the_committed_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert fill_tables(page, read_results(RESULTS)) == page


def test_strengths_are_compared_where_there_are_several(results: list[Result]) -> None:
    rows = rows_of(lambda_table("mnist", results))
    assert [row[:2] for row in rows[2:]] == [["parity", "0.1"], ["parity", "0.3"]]
    assert lambda_table("mnist", results[:2]) == "*not run yet*"


# --- the saving -------------------------------------------------------------------------------------------------------


def test_trials_show_what_is_chosen_by(results: list[Result]) -> None:
    results.append(result(share=0.2, test_accuracy=97.1, validation_accuracy=98.76, settings={"bops": 0.2}, seed=4))
    _, _, first, second = rows_of(trials_table("mnist", results))
    assert first == ["parity (mu 0.1)", "0.1", "", "0.400", "0"]
    assert second == ["parity (mu 0.1, bops 0.2)", "0.2", "98.76", "0.400", "4"]


def test_the_saving_is_split_by_hand(results: list[Result]) -> None:
    # pruning alone saves a factor 4, widths alone 62.5, both together 250: no interaction
    saving = Saving(0.4, 1.6, 25.0)
    assert saving.pruning_share == pytest.approx(math.log(4) / math.log(250))
    cells = rows_of(savings_table("mnist", results))[2]
    assert cells[1:] == ["0.400", "1.600", "25.000", "25", "75"]
    assert Saving(25.0, 100.0, 25.0).pruning_share == pytest.approx(1.0)
    assert Saving(6.25, 6.25, 100.0).pruning_share == pytest.approx(0.0)
    assert Saving(100.0, 100.0, 100.0).pruning_share == 0.0


@pytest.fixture
def pruned() -> tuple[nn.Module, BitConfiguration]:
    """3 - 4 - 2: weights at 4 and 8 bits, the hidden values at 2, and one of four channels removed."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    network = quantize(net, torch.rand(8, 3), bits=(2, 4, 8))
    gates = GateValues(torch.tensor([1.0, 0, 1, 1]), torch.tensor([[1.0, 0], [1, 1], [0, 0]]))
    configuration = BitConfiguration.from_gates(network, gates)
    return configuration.apply(net), configuration


def test_a_configuration_s_saving_is_counted_by_hand(pruned: tuple[nn.Module, BitConfiguration]) -> None:
    saving, full = saving_of(pruned[1]), 1024 * (12 + 8)
    both, widths = 0.75 * 12 * 4 * 8 + 0.75 * 8 * 8 * 2, 12 * 4 * 8 + 8 * 8 * 2
    assert saving == pytest.approx((100 * both / full, 100 * widths / full, 75.0))
    assert saving.pruning_share == pytest.approx(math.log(4 / 3) / math.log(full / both))


# --- zeros ------------------------------------------------------------------------------------------------------------


def test_nonzero_products_are_counted_by_hand() -> None:
    linear = nn.Linear(3, 2)
    linear.weight = nn.Parameter(torch.tensor([[1.0, 0, 2], [0, 3, 4]]))
    x = torch.tensor([[1.0, 1, 0], [0, 0, 5]])
    assert nonzero_products(linear, x) == (2 + 2) / 2  # 1*1, 1*3; then 2*5, 4*5
    assert nonzero_products(linear, x, torch.tensor([1.0, 0])) == 1
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    conv.weight = nn.Parameter(torch.ones(1, 1, 3, 3))
    assert nonzero_products(conv, torch.ones(1, 1, 2, 2)) == 16  # each of four outputs sees four pixels
    with pytest.raises(TypeError, match="zeros are counted in"):
        nonzero_products(nn.Conv1d(1, 1, 1), torch.ones(1, 1, 1))


def test_crediting_zeros_takes_off_what_is_zero(pruned: tuple[nn.Module, BitConfiguration]) -> None:
    net, configuration = pruned
    x = torch.rand(64, 3) + 0.1
    rows = {row["layer"]: row for row in zero_crediting_bops(net, configuration, [(x, None)])}
    first, whole = rows["0"], rows["whole network"]
    weight = net.get_submodule("0").weight.detach()  # type: ignore[operator]
    kept = weight[[0, 2, 3]]
    assert first["zeros credited %"] == pytest.approx(100 * 4 * 8 * kept.ne(0).sum().item() / (1024 * 20))
    assert whole["relative BOPs %"] == pytest.approx(configuration.relative_bops)
    assert 0 < whole["zeros credited %"] <= whole["relative BOPs %"] and first["nonzero inputs %"] == 100


# --- calibration ------------------------------------------------------------------------------------------------------


def test_calibration_error_is_that_of_a_hand_computation() -> None:
    # two of confidence 0.9, one right: gap 0.4; two of 0.6, both right: gap 0.4
    probabilities = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.4, 0.6]])
    targets = torch.tensor([0, 0, 0, 1])
    assert calibration_error(probabilities, targets) == pytest.approx(100 * (2 * 0.4 + 2 * 0.4) / 4)
    found = Predictions(probabilities.double(), targets)
    assert found.accuracy == 75
    assert found.nll == pytest.approx(-(math.log(0.9) + math.log(0.1) + 2 * math.log(0.6)) / 4)
    certain = torch.tensor([[1.0, 0.0]])
    assert calibration_error(certain, torch.tensor([0])) == 0


def test_an_ensemble_averages_probabilities() -> None:
    y = torch.tensor([0])
    members = [Predictions(torch.tensor([[p, 1 - p]]).double(), y) for p in (0.2, 0.9)]
    torch.testing.assert_close(pooled(members).probabilities, torch.tensor([[0.55, 0.45]]).double())


# --- transitions ------------------------------------------------------------------------------------------------------


@pytest.fixture
def history() -> History:
    widths = [(32, 32), (16, 32), (8, 4), (8, 2), (4, 8)]
    records = [EpochRecord(i + 1, 1.0 / (i + 1), bits=bits, bops=50.0 / (i + 1)) for i, bits in enumerate(widths)]
    return History(("a", "b"), (), records)


def test_transitions_tell_steps_from_jumps(history: History) -> None:
    first, second = questions.transitions(history)
    assert first == {"tensor": "a", "path": "32 16 8 4", "smooth": 3, "jumps": 0, "raised": 0}
    assert second == {"tensor": "b", "path": "32 4 2 8", "smooth": 1, "jumps": 2, "raised": 1}


def test_figures_show_their_data(history: History, results: list[Result]) -> None:
    points = figures.plot_accuracy("mnist", results).axes[0]
    assert {"parity", "float32"} == set(points.get_legend_handles_labels()[1])
    colors = {(line.get_color(), line.get_marker()) for line in points.lines if line.get_marker() in ("D", "*")}
    assert len(colors) == 2, "parity at two strengths is one recipe"
    other = result(recipe="parity", network="resnet20", test_accuracy=50.0)
    assert len(figures.plot_accuracy("mnist", [*results, other]).axes[0].lines) == len(points.lines)
    assert sum(len(line.get_xdata()) == 1 for line in points.lines) >= len(PUBLISHED) // 2  # type: ignore[arg-type]
    bars = figures.plot_savings("mnist", results).axes[0]
    assert bars.patches[0].get_width() == pytest.approx(100 * math.log(4) / math.log(250))  # type: ignore[attr-defined]
    curves = figures.plot_curves({"run": history}).axes
    assert list(curves[0].lines[0].get_ydata()) == [1.0 / k for k in range(1, 6)]  # type: ignore[arg-type]
    image = figures.plot_transitions(history).axes[0].images[0].get_array()
    assert image is not None and image[1].tolist() == [5, 5, 2, 1, 3]


def test_a_point_far_below_the_others_lies_at_the_edge_and_says_so(results: list[Result]) -> None:
    collapsed = result(recipe="straight-through", method="collapsed", test_accuracy=10.0, relative_bops=0.1)
    axis = figures.plot_accuracy("mnist", [*results, collapsed]).axes[0]
    assert axis.get_ylim()[0] > 90
    assert "\u2193 10.0 %" in {text.get_text() for text in axis.texts}
    plain = figures.plot_accuracy("mnist", results).axes[0]
    assert not any("\u2193" in text.get_text() for text in plain.texts)


def test_figures_are_written(tmp_path: Path, history: History, results: list[Result]) -> None:
    append_results(tmp_path / "results.jsonl", results)
    (tmp_path / "run").mkdir()
    history.save(tmp_path / "run" / "history.jsonl")
    options = ["--results", str(tmp_path / "results.jsonl"), "--runs", str(tmp_path / "run"), "--format", "svg"]
    figures.main([*options, "--output", str(tmp_path)])
    expected = {"accuracy_mnist", "savings_mnist", "curves", "transitions_run"}
    assert {file.stem for file in tmp_path.glob("*.svg")} == expected


# --- questions to a finished run --------------------------------------------------------------------------------------


def test_every_question_is_answered_by_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--quick", "--device", "cpu"]
    run([*options, "--recipe", "own", "--data", "digits", "--compile", "never", "--output", str(tmp_path)])
    (folder,) = (tmp_path / "digits").iterdir()
    capsys.readouterr()
    answers = {}
    for question in ("savings", "transitions", "threshold", "ensemble", "zeros"):
        questions.main([question, str(folder), *options, "--draws", "2"])
        answers[question] = rows_of(capsys.readouterr().out.strip().partition("\n\n")[2])
    layers = ["conv1", "conv2", "conv3", "fc1", "fc2"]
    assert [row[0] for row in answers["savings"][2:]] == ["whole network", *layers]
    assert [row[0] for row in answers["zeros"][2:]] == [*layers, "whole network"]
    assert answers["threshold"][2][0] == "map" and len(answers["threshold"]) == 2 + 9
    _, drawn, pool = answers["ensemble"][2:]
    assert float(pool[-1]) == pytest.approx(2 * float(drawn[-1]), abs=0.01)
    assert [row[1] for row in answers["transitions"][2:]] == ["32"] * 9
    with pytest.raises(SystemExit, match="holds no finished run"):
        questions.main(["savings", str(tmp_path)])
