"""What is drawn are the numbers of the posterior and of the history, read back from the figures."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pyro_bbits.analysis import (
    GatePosterior,
    plot_bit_widths,
    plot_bops,
    plot_channels,
    plot_gates,
    plot_history,
)
from pyro_bbits.inference import EpochRecord, History

MakePosterior = Callable[..., GatePosterior]
POSTERIOR_PLOTS = [plot_gates, plot_bit_widths, plot_channels, plot_bops]


def number(cell: str) -> float:
    """What a cell says, `>.99` standing for the middle of its range."""
    return {"<.01": 0.005, ">.99": 0.995}.get(cell) or float(cell)


def texts(labels: Sequence[Any]) -> list[str]:
    return [label.get_text() for label in labels]


def image(axis: Axes, index: int = 0) -> np.ndarray[Any, Any]:
    return np.ma.filled(cast(np.ma.MaskedArray[Any, Any], axis.images[index].get_array()).astype(float), np.nan)


def rows(posterior: GatePosterior, frame: Any, side: str) -> np.ndarray[Any, Any]:
    """Rows of a table for each layer's weight or input, looked up by name; NaN for the network's input."""
    found = []
    for layer in posterior.map_configuration().layers:
        name = getattr(layer, side)
        found.append(np.full(frame.shape[1], np.nan) if name is None else frame.loc[name].to_numpy())
    return np.array(found)


def layer_names(posterior: GatePosterior) -> list[str]:
    return [layer.name for layer in posterior.structure.layers]


def visible_ticks(axis: Axes) -> list[float]:
    low, high = axis.get_xlim()
    return [float(tick) for tick in axis.get_xticks() if low <= tick <= high]


# --- gates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "bits"), [("chain", (2, 4, 8)), ("depthwise", (2, 4, 8, 16, 32)), ("unprunable", (2, 4)), ("chain", (8,))]
)
def test_gates_show_inclusion_probabilities(make_posterior: MakePosterior, kind: str, bits: tuple[int, ...]) -> None:
    posterior = make_posterior(kind, bits)
    figure = plot_gates(posterior)
    left, right, bar = figure.axes
    assert (left.get_title(), right.get_title(), bar.get_ylabel()) == ("weight", "input", "inclusion probability")
    for axis, side in ((left, "weight"), (right, "input")):
        expected = rows(posterior, posterior.inclusion(), side)
        np.testing.assert_allclose(image(axis), expected)
        assert axis.images[0].get_clim() == (0, 1)
        assert texts(axis.get_xticklabels()) == [f"≥{b}" for b in bits]
        shown = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in axis.texts}
        for (y, x), value in np.ndenumerate(expected):
            if not np.isnan(value):
                assert number(shown.pop((y, x))) == pytest.approx(value, abs=0.0051)
        assert set(shown.values()) <= {"8 bit, not quantized"}
        assert len(shown) == np.isnan(expected).all(1).sum()
    assert texts(left.get_yticklabels()) == layer_names(posterior)
    assert left.get_ylim() == right.get_ylim() == (len(layer_names(posterior)) - 0.5, -0.5), "first layer on top"


def test_cells_of_certain_gates_are_short_and_all_are_legible(make_posterior: MakePosterior) -> None:
    posterior = make_posterior("chain", channels=[1.0, 1.0], tensors=[[1.0, 0.004], [0.0, 0.5], [0.996, 0.5]])
    left, right, _ = plot_gates(posterior).axes
    assert texts(left.texts) == ["1", "1", "<.01", "1", "0", "0"]
    assert texts(right.texts) == ["1", ">.99", "0.50", "8 bit, not quantized"]
    for text in [*left.texts, *right.texts[:3]]:
        assert text.get_color() == ("white" if number(text.get_text()) > 0.6 else "black")


# --- widths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "bits"), [("chain", (2, 4, 8)), ("depthwise", (2, 4, 8, 16, 32)), ("unprunable", (2, 4)), ("chain", (8,))]
)
def test_bars_have_the_lengths_of_the_widths_probabilities(
    make_posterior: MakePosterior, kind: str, bits: tuple[int, ...]
) -> None:
    posterior = make_posterior(kind, bits)
    figure = plot_bit_widths(posterior)
    left, right = figure.axes
    for axis, side in ((left, "weight"), (right, "input")):
        expected = np.nan_to_num(rows(posterior, posterior.widths(), side))
        bars = [cast(list[Rectangle], list(cast(BarContainer, c))) for c in axis.containers]
        lengths = np.array([[bar.get_width() for bar in width] for width in bars]).T
        starts = np.array([[bar.get_x() for bar in width] for width in bars]).T
        middles = np.array([[bar.get_y() + bar.get_height() / 2 for bar in width] for width in bars]).T
        np.testing.assert_allclose(lengths, expected, atol=1e-12)
        np.testing.assert_allclose(starts, np.cumsum(expected, 1) - expected, atol=1e-12)
        np.testing.assert_allclose(middles, np.arange(len(expected))[:, None].repeat(len(bars), 1), atol=1e-12)
        assert texts(axis.texts) == ["8 bit, not quantized"] * int((expected.sum(1) == 0).sum())
    (legend,) = figure.legends
    assert texts(legend.get_texts()) == ["0", *map(str, bits)]
    assert legend.get_title().get_text() == "bits"
    colors = {to_rgba(cast(Any, c)[0].get_facecolor()) for c in left.containers}
    assert len(colors) == len(bits) + 1, "every width has a colour of its own"
    assert texts(left.get_yticklabels()) == layer_names(posterior)


# --- channels ---------------------------------------------------------------------------------------------------------


def test_channels_are_sorted_and_cut_where_the_configuration_cuts(make_posterior: MakePosterior) -> None:
    posterior = make_posterior("deep")
    figure = plot_channels(posterior)
    axis, bar = figure.axes
    channels, kept = posterior.channels(), posterior.map_configuration().kept()
    names = list(posterior.structure.layout.slices)
    assert texts(axis.get_yticklabels()) == names and len(names) == 49
    assert bar.get_ylabel() == "probability of being kept"
    cuts = [np.asarray(c.get_segments()[0]) for c in axis.collections if isinstance(c, LineCollection)]
    for y, name in enumerate(names):
        expected = sorted(channels.loc[channels["layer"] == name, "probability"], reverse=True)
        np.testing.assert_allclose(image(axis, y), [expected])
        assert axis.images[y].get_clim() == (0, 1)
        left, right, bottom, top = axis.images[y].get_extent()
        assert (left, right) == (0, 1) and (bottom + top) / 2 == pytest.approx(y)
        assert cuts[y][:, 0].tolist() == [kept[name] / 4] * 2
        assert cuts[y][:, 1].mean() == pytest.approx(y)
    assert texts(axis.texts) == [f"{kept[name]}/4" for name in names]
    assert len(set(kept.values())) > 2, "the cuts differ"
    (legend,) = figure.legends
    assert texts(legend.get_texts()) == ["channels left of the mark are kept in the most probable configuration"]


def test_channels_of_a_network_that_keeps_all_say_so(make_posterior: MakePosterior) -> None:
    (axis,) = plot_channels(make_posterior("unprunable")).axes
    assert texts(axis.texts) == ["no channel of this network is pruned"]
    assert not axis.axison


# --- cost -------------------------------------------------------------------------------------------------------------


def test_histogram_holds_all_draws_and_marks_mode_and_mean(make_posterior: MakePosterior) -> None:
    posterior = make_posterior("depthwise")
    figure = plot_bops(posterior, draws=300, seed=5)
    (axis,) = figure.axes
    bars = cast(list[Rectangle], axis.patches)
    drawn = posterior.sampled_bops(300, seed=5).double().numpy()
    limit = np.quantile(drawn, 0.99)
    beyond = int((drawn > limit).sum())
    heights, edges = np.histogram(drawn[drawn <= limit], bins=40)
    np.testing.assert_allclose([bar.get_height() for bar in bars], heights)
    np.testing.assert_allclose([bar.get_x() for bar in bars], edges[:-1], atol=1e-9)
    expected, chosen = (np.asarray(line.get_xdata(), float)[0] for line in axis.lines)
    assert expected == posterior.expected_bops()
    assert chosen == posterior.map_configuration().relative_bops
    (legend,) = figure.legends
    assert sorted(texts(legend.get_texts())) == sorted(
        [
            f"300 drawn configurations ({beyond} above {limit:.3g} %)",
            "expected",
            f"most probable configuration: {chosen:.3f} %",
        ]
    )


def test_histogram_of_costs_that_hardly_differ(make_posterior: MakePosterior, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two neighbouring float32 numbers, as a layer with few MACs in a large network makes them."""
    high = torch.nextafter(torch.tensor(50.0), torch.tensor(60.0))
    monkeypatch.setattr(GatePosterior, "sampled_bops", lambda *_, **__: torch.stack([torch.tensor(50.0), high]))
    (axis,) = plot_bops(make_posterior("chain")).axes
    assert sum(bar.get_height() for bar in cast(list[Rectangle], axis.patches)) >= 1


def test_histogram_of_a_certain_posterior(make_posterior: MakePosterior) -> None:
    posterior = make_posterior("chain", channels=[1.0, 1.0], tensors=[[0.0, 0.0]] * 3)
    (axis,) = plot_bops(posterior, draws=20).axes
    assert max(bar.get_height() for bar in cast(list[Rectangle], axis.patches)) == 20


# --- history ----------------------------------------------------------------------------------------------------------


def record(epoch: int, **changes: Any) -> EpochRecord:
    values: dict[str, Any] = {
        "loss": 30.0 / epoch**2,
        "kl": 0.5 + epoch,
        "validation_nll": 2.0 / epoch,
        "validation_accuracy": 50.0 + epoch,
        "expected_bops": 80.0 / epoch**3,
        "bops": 90.0 / epoch**3,
        "bits": ((2, 4, 8, 16, 32)[epoch % 5], 0 if epoch > 2 else 2, 4),
        "kept": (epoch,),
    }
    return EpochRecord(epoch, **(values | changes))


TENSORS = ("a.weight", "b.weight", "b.input")


def history(epochs: int, **changes: Any) -> History:
    return History(TENSORS, ("a",), [record(epoch, **changes) for epoch in range(1, epochs + 1)])


def curves(axis: Axes) -> dict[str, list[tuple[float, float]]]:
    """Points of each line by its label."""
    return {
        str(line.get_label()): list(zip(*(np.asarray(d, float) for d in line.get_data()), strict=True))
        for line in axis.lines
    }


def column(records: History, name: str) -> list[tuple[float, float]]:
    return [(r.epoch, getattr(r, name)) for r in records]


def test_curves_are_the_records() -> None:
    records = history(6)
    loss, quality, bops, widths, bar = plot_history(records).axes
    assert curves(loss) == {
        "loss (negative ELBO)": column(records, "loss"),
        "KL of the gates": column(records, "kl"),
    }
    assert list(curves(quality).values()) == [column(records, "validation_accuracy")]
    assert quality.get_title() == "Held-out accuracy, %"
    assert curves(bops) == {"expected": column(records, "expected_bops"), "hard gates": column(records, "bops")}
    shown, ticks = image(widths), texts(bar.get_yticklabels())
    assert [[int(ticks[int(i)]) for i in row] for row in shown] == np.array([r.bits for r in records]).T.tolist()
    assert texts(widths.get_yticklabels()) == list(TENSORS)
    assert tuple(widths.images[0].get_extent()) == (0.5, 6.5, 2.5, -0.5), "epochs centred, first tensor on top"
    assert [axis.get_xlabel() for axis in (loss, quality, bops, widths)] == ["epoch"] * 4


@pytest.mark.parametrize("epochs", [1, 2, 7])
def test_epochs_are_whole_numbers(epochs: int) -> None:
    figure = plot_history(history(epochs))
    figure.draw_without_rendering()
    for axis in figure.axes[:4]:
        ticks = visible_ticks(axis)
        assert ticks and set(ticks) <= set(range(1, epochs + 1))


def test_one_epoch_is_visible() -> None:
    """A line of one point is nothing without a mark."""
    for axis in plot_history(history(1)).axes[:3]:
        assert axis.lines and all(line.get_marker() == "o" for line in axis.lines)
    for axis in plot_history(history(2)).axes[:3]:
        assert all(line.get_marker() == "None" for line in axis.lines)


def test_widths_outside_the_usual_ladder_have_a_colour() -> None:
    records = history(2, bits=(3, 6, 0))
    *_, widths, bar = plot_history(records).axes
    ticks = texts(bar.get_yticklabels())
    assert ticks == ["0", "2", "3", "4", "6", "8", "16", "32"]
    assert [[ticks[int(i)] for i in row] for row in image(widths)] == [["3", "3"], ["6", "6"], ["0", "0"]]


def test_log_likelihood_stands_in_for_accuracy() -> None:
    records = history(3, validation_accuracy=None)
    axis = plot_history(records).axes[1]
    assert axis.get_title() == "Held-out negative log-likelihood"
    assert list(curves(axis).values()) == [column(records, "validation_nll")]


def test_missing_validation_is_said() -> None:
    axis = plot_history(history(3, validation_accuracy=None, validation_nll=None)).axes[1]
    assert texts(axis.texts) == ["no validation data"] and not axis.lines and not axis.axison


def test_history_without_gates_has_three_panels() -> None:
    records = History(epochs=[EpochRecord(e, 1.0 / e, validation_accuracy=90.0) for e in (1, 2)])
    loss, quality, bops = plot_history(records).axes
    assert curves(loss) == {"loss (negative ELBO)": column(records, "loss")}
    assert list(curves(quality).values()) == [[(1, 90), (2, 90)]]
    assert texts(bops.texts) == ["no gates"] and not bops.lines


@pytest.mark.parametrize(
    ("changes", "scales"),
    [
        ({}, ["log", "linear", "log"]),
        ({"loss": -1.0}, ["linear", "linear", "log"]),
        ({"bops": 0.0, "expected_bops": 0.0}, ["log", "linear", "linear"]),
        ({"bops": 0.4, "expected_bops": 0.39}, ["log", "linear", "linear"]),
    ],
)
def test_axes_are_logarithmic_where_values_span_a_decade(changes: dict[str, Any], scales: list[str]) -> None:
    figure = plot_history(history(6, **changes))
    figure.draw_without_rendering()
    assert [axis.get_yscale() for axis in figure.axes[:3]] == scales


def test_empty_history_is_refused() -> None:
    with pytest.raises(ValueError, match="the history is empty: there is no epoch to plot"):
        plot_history(History())


# --- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plot", POSTERIOR_PLOTS)
@pytest.mark.parametrize(("kind", "bits"), [("chain", (2, 4, 8)), ("unprunable", (8,))])
def test_posterior_plots_are_figures_that_can_be_saved(
    tmp_path: Path,
    make_posterior: MakePosterior,
    plot: Callable[[GatePosterior], Figure],
    kind: str,
    bits: tuple[int, ...],
) -> None:
    figure = plot(make_posterior(kind, bits))
    assert isinstance(figure, Figure)
    figure.savefig(tmp_path / "plot.png", dpi=50)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_history_can_be_saved(tmp_path: Path) -> None:
    plot_history(history(2)).savefig(tmp_path / "plot.png", dpi=50)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("plot", [plot_gates, plot_bit_widths, plot_channels])
def test_figures_grow_with_the_network(make_posterior: MakePosterior, plot: Callable[[GatePosterior], Figure]) -> None:
    """Fifty rows have the height that a few have each, so that no two names overlap."""
    deep, small = plot(make_posterior("deep")), plot(make_posterior("chain"))
    per_row = (deep.get_figheight() - small.get_figheight()) / 48
    assert per_row > 8 / 72, "a name of 8 points"
    deep.draw_without_rendering()
    boxes = [label.get_window_extent() for label in deep.axes[0].get_yticklabels()]
    assert len(boxes) >= 49
    for above, below in pairwise(boxes):
        assert above.y0 >= below.y1, "names overlap"
    assert all(box.x0 >= 0 for box in boxes), "names are cut"


def test_history_grows_with_the_network() -> None:
    names = tuple(f"blocks.{i}.weight" for i in range(50))
    figure = plot_history(History(names, (), [record(e, bits=(8,) * 50, kept=()) for e in (1, 2)]))
    figure.draw_without_rendering()
    labels = figure.axes[3].get_yticklabels()
    assert texts(labels) == list(names)
    boxes = [label.get_window_extent() for label in labels]
    assert all(above.y0 >= below.y1 for above, below in pairwise(boxes))


@pytest.mark.parametrize("plot", POSTERIOR_PLOTS)
@pytest.mark.parametrize("kind", ["chain", "unprunable"])
def test_nothing_is_cut_from_small_figures(
    make_posterior: MakePosterior, plot: Callable[[GatePosterior], Figure], kind: str
) -> None:
    figure = plot(make_posterior(kind, (2, 4, 8, 16, 32)))
    figure.draw_without_rendering()
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert box.x0 >= -0.01 and box.y0 >= -0.01 and box.x1 <= width + 0.01 and box.y1 <= height + 0.01


def test_legends_cover_no_curve() -> None:
    """They lie below the axes; drawn first, since the layout places them then."""
    figure = plot_history(history(3))
    figure.draw_without_rendering()
    found = [axis for axis in figure.axes if axis.get_legend() is not None]
    assert len(found) == 2
    for axis in found:
        legend = axis.get_legend()
        assert legend is not None and not legend.get_window_extent().overlaps(axis.get_window_extent())
