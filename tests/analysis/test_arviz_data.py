"""Draws arrive in ArviZ with their names, and ArviZ can work with them."""

import math
from collections.abc import Callable
from typing import Any

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.text import Text

from pyro_bbits import GateValues
from pyro_bbits.analysis import GatePosterior, to_inference_data

IS_FIRST_SERIES = az.__version__.startswith("0.")

MakePosterior = Callable[..., GatePosterior]


@pytest.fixture
def posterior(make_posterior: MakePosterior) -> GatePosterior:
    """No gate of it is certain."""
    tensors = [[0.4 + 0.05 * row, 0.6 - 0.05 * row] for row in range(7)]
    return make_posterior("depthwise", channels=[0.4, 0.6, 0.5, 0.3], tensors=tensors)


def dims(data: Any) -> dict[str, tuple[str, ...]]:
    return {str(name): tuple(map(str, values.dims)) for name, values in data.posterior.data_vars.items()}


def test_variables_carry_the_names_of_the_network(posterior: GatePosterior) -> None:
    data, layout = to_inference_data(posterior, chains=3, draws=5), posterior.structure.layout
    sample = ("chain", "draw")
    assert dims(data) == {
        "z2": (*sample, "channel"),
        "z4": (*sample, "tensor"),
        "z8": (*sample, "tensor"),
        "bits": (*sample, "tensor"),
        "kept": (*sample, "layer"),
        "relative_bops": sample,
    }
    coords = data.posterior.coords
    assert coords["tensor"].values.tolist() == list(layout.tensors)
    assert coords["channel"].values.tolist() == ["conv[0]", "conv[1]", "point[0]", "point[1]"]
    assert coords["layer"].values.tolist() == ["conv", "point"]
    assert (data.posterior.sizes["chain"], data.posterior.sizes["draw"]) == (3, 5)
    assert data.posterior.attrs["inference_library"] == "pyro-bbits"
    assert data.posterior.attrs["bit_ladder"] == [2, 4, 8]


def test_values_are_the_draws_in_order(posterior: GatePosterior) -> None:
    """Chain 1 has draws 5 to 9 of `sample`; bits and kept channels are read from each draw in a loop."""
    values = to_inference_data(posterior, chains=2, draws=5, seed=4).posterior
    gates, layout = posterior.sample(10, seed=4), posterior.structure.layout
    draws = [GateValues(*draw) for draw in zip(*gates, strict=True)]
    expected = {
        "z2": gates.channels,
        "z4": gates.tensors[..., 0],
        "z8": gates.tensors[..., 1],
        "bits": torch.tensor([layout.bits(draw) for draw in draws]),
        "kept": torch.tensor([layout.kept(draw) for draw in draws]),
        "relative_bops": posterior.sampled_bops(10, seed=4),
    }
    assert (expected["bits"] == 0).any()
    for name, rows in expected.items():
        np.testing.assert_array_equal(values[name].values.reshape(10, *rows.shape[1:]), rows.numpy(), err_msg=name)


def test_means_are_the_probabilities(posterior: GatePosterior) -> None:
    """Each within 4.5 standard errors of 4 x 1000 draws."""
    values, inclusion = to_inference_data(posterior, draws=1000).posterior, posterior.inclusion()
    probabilities = {"z2": posterior.probabilities.channels.numpy(), "z4": inclusion[4], "z8": inclusion[8]}
    for name, expected in probabilities.items():
        p = np.asarray(expected, float)
        assert (np.abs(values[name].mean(("chain", "draw")) - p) <= 4.5 * np.sqrt(p * (1 - p) / 4000)).all()
    error = 4.5 * float(values["relative_bops"].std()) / math.sqrt(4000)
    assert float(values["relative_bops"].mean()) == pytest.approx(posterior.expected_bops(), abs=error)
    mean_bits = posterior.widths() @ np.array([0, 2, 4, 8])
    np.testing.assert_allclose(values["bits"].mean(("chain", "draw")), mean_bits, atol=4.5 * 8 / 2 / math.sqrt(4000))


def test_arviz_summarizes_and_plots(posterior: GatePosterior) -> None:
    data = to_inference_data(posterior)
    summary = az.summary(data)
    layout = posterior.structure.layout
    for row in ["z2[conv[1]]", "z4[depth.input]", "bits[head.weight]", "kept[point]", "relative_bops"]:
        assert row in summary.index
    assert len(summary) == 4 + 3 * len(layout.tensors) + 2 + 1
    assert summary["r_hat"].astype(float).max() < 1.05, "independent draws are mixed"
    figure = forest(data)
    texts = {str(text.get_text()) for text in figure.findobj(Text)}
    assert any("head.weight" in text for text in texts)
    plt.close(figure)


def forest(data: Any) -> Any:
    """The figure of the widths, in either series of ArviZ."""
    drawn = az.plot_forest(data, var_names=["bits"], combined=True, backend="matplotlib")
    return drawn[0].figure if IS_FIRST_SERIES else drawn.viz["figure"].item()


def test_constant_gates_are_summarized_without_a_warning(make_posterior: MakePosterior) -> None:
    """Their convergence diagnostics would be 0 / 0, and say nothing of independent draws anyway."""
    posterior = make_posterior("chain", channels=[1.0, 1.0], tensors=[[1.0, 0.0], [0.5, 0.5], [1.0, 1.0]])
    summary = az.summary(to_inference_data(posterior), kind="stats")
    assert "r_hat" not in summary
    means = summary["mean"].astype(float)
    assert [means[f"z{b}[0.weight]"] for b in (4, 8)] == [1, 0] and means["bits[2.input]"] == 8
    assert (summary["sd"].astype(float)[["z4[0.weight]", "kept[0]"]] == 0).all()


def test_network_without_prunable_layer_has_no_channels(make_posterior: MakePosterior) -> None:
    data = to_inference_data(make_posterior("unprunable"), draws=3)
    assert set(dims(data)) == {"z4", "z8", "bits", "relative_bops"}
    assert (data.posterior["bits"] > 0).all()


def test_sites_follow_the_ladder(make_posterior: MakePosterior) -> None:
    assert set(dims(to_inference_data(make_posterior("chain", (4, 8)), draws=3))) >= {"z4", "z8"}
    single = to_inference_data(make_posterior("chain", (8,)), draws=3)
    assert dims(single)["z8"] == ("chain", "draw", "channel")
    assert set(np.unique(single.posterior["bits"])) <= {0, 8}


def test_draws_are_reproducible(posterior: GatePosterior) -> None:
    first, again, other = (to_inference_data(posterior, draws=20, seed=seed).posterior for seed in (1, 1, 2))
    assert first.equals(again) and not first.equals(other)


@pytest.mark.parametrize(("chains", "draws"), [(1, 1), (8, 2)])
def test_any_number_of_chains_is_fine(posterior: GatePosterior, chains: int, draws: int) -> None:
    """Without a warning either: there are no dimensions to mix up."""
    assert to_inference_data(posterior, chains=chains, draws=draws).posterior["kept"].shape == (chains, draws, 2)


@pytest.mark.parametrize(("chains", "draws"), [(0, 5), (5, 0), (-1, 5)])
def test_no_draws_are_refused(posterior: GatePosterior, chains: int, draws: int) -> None:
    with pytest.raises(ValueError, match=f"chains and draws must be at least 1; got {chains} and {draws}"):
        to_inference_data(posterior, chains=chains, draws=draws)
