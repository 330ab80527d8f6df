"""Bars are exact, marks are what estimators say, and nothing is lost at the edge."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pyro_bbits import GatePrior, GateProbabilities, QuantizedNetwork
from pyro_bbits.analysis import EstimatorComparison, ExactPosterior, plot_comparison
from pyro_bbits.models import GatedModel


@pytest.fixture
def comparison(make_network: Callable[..., QuantizedNetwork]) -> EstimatorComparison:
    network = make_network("chain", (2, 4, 8))
    prior = GatePrior(network, mu=0.03)
    prior.channel_strength[0] = 0.0
    exact = ExactPosterior.from_model(GatedModel(network, prior, 12), [(torch.rand(12, 3), torch.arange(12) % 2)])
    sure = GateProbabilities(torch.ones(2), torch.zeros(3, 2))  # all in one configuration
    found = {"sure": sure, "half": GateProbabilities(torch.ones(2), torch.full((3, 2), 0.5)), "best mean field": sure}
    return EstimatorComparison(exact, found, dict.fromkeys(found, 1.0), 0)


def _widths(axis: Any) -> list[float]:
    return [bar.get_width() for bar in axis.patches]


def test_marks_stand_at_the_inclusion_probabilities(comparison: EstimatorComparison) -> None:
    left, _ = plot_comparison(comparison).axes
    inclusion = comparison.inclusion()
    np.testing.assert_allclose(_widths(left), inclusion["exact"])
    assert len(left.get_lines()) == 2, "the best mean field is a reference, not an estimator"
    for line, name in zip(left.get_lines(), ("sure", "half"), strict=True):
        np.testing.assert_allclose(np.asarray(line.get_xdata(), float), inclusion[name])
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert labels[:3] == ["0[1] kept", "0.weight ≥4 bits", "0.weight ≥8 bits"]


def test_configurations_are_the_top_ones_and_far_marks_are_labelled(comparison: EstimatorComparison) -> None:
    figure = plot_comparison(comparison, configurations=40)
    _, right = figure.axes
    top = comparison.exact.top(40)
    np.testing.assert_allclose(_widths(right), top["probability"])
    row = top[["0.weight", "2.weight", "2.input"]].eq(2).all(axis=1) & top["kept.0"].eq(2)
    labels = [label.get_text() for label in right.get_yticklabels()]
    assert [label for label, mine in zip(labels, row, strict=True) if mine] == [" 2  2  2 2 ch."]
    assert [text.get_text() for text in right.texts] == ["1.00 →"]
    _, high = right.get_xlim()
    assert all((np.asarray(line.get_xdata(), float) <= high).all() for line in right.get_lines())
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    gaps = comparison.table()["gap"]
    assert texts == ["exact", f"sure (gap {gaps['sure']:.2f} nats)", f"half (gap {gaps['half']:.2f} nats)"]


def test_nothing_to_compare_is_an_error(comparison: EstimatorComparison) -> None:
    with pytest.raises(ValueError, match="configurations must be at least 1; got 0"):
        plot_comparison(comparison, configurations=0)
    exact = comparison.exact
    one = ExactPosterior(exact.layout, type(exact.configurations)(*(g[:1] for g in exact.configurations)),
        exact.log_prior[:1], exact.log_likelihood[:1])  # fmt: skip
    with pytest.raises(ValueError, match="every gate is pinned"):
        plot_comparison(EstimatorComparison(one, comparison.probabilities, comparison.seconds, 0))
