"""Every figure of the posterior is what enumerating, or drawing, all of its configurations gives."""

import json
import math
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pyro_bbits import GatePrior, GateProbabilities, GateValues, NetworkCost, QuantizedNetwork, quantize
from pyro_bbits.analysis import GatePosterior
from pyro_bbits.gates import DecisionRule
from pyro_bbits.inference import HardConcreteGuide, StraightThroughGuide

MakePosterior = Callable[..., GatePosterior]
Patterns = Callable[[GatePosterior], Iterator[tuple[float, GateValues]]]

SMALL = [
    ("chain", (2, 4, 8)),
    ("chain", (4, 8)),
    ("chain", (8,)),
    ("unprunable", (2, 4, 8, 16)),
    ("unprunable", (4,)),
    ("depthwise", (4, 8)),
]
"""Networks and ladders with at most 2^12 patterns of gates."""

small = pytest.mark.parametrize(("kind", "bits"), SMALL)


def widths_by_hand(posterior: GatePosterior, gates: GateValues) -> list[int]:
    """Width of each tensor: climb until the first closed gate; 0 for a weight all of whose channels are off."""
    layout = posterior.structure.layout
    widths = []
    for row, name in enumerate(layout.tensors):
        channels = [gates.channels[layout.slices[g.layer]] for g in layout.groups if f"{g.layer}.weight" == name]
        closed = [*gates.tensors[row].tolist(), 0].index(0)
        widths.append(0 if channels and not channels[0].any() else layout.ladder.bits[closed])
    return widths


@pytest.fixture
def by_hand(make_posterior: MakePosterior) -> GatePosterior:
    """Tensors 0.weight, 2.weight, 2.input; one of the two channels of layer 0 is kept."""
    return make_posterior("chain", channels=[0.9, 0.4], tensors=[[0.8, 0.1], [0.3, 0.5], [0.9, 0.75]])


# --- probabilities ----------------------------------------------------------------------------------------------------


def test_inclusion_is_the_product_along_the_chain(by_hand: GatePosterior) -> None:
    some = 1 - 0.1 * 0.6
    expected = pd.DataFrame(
        [[some, some * 0.8, some * 0.8 * 0.1], [1, 0.3, 0.3 * 0.5], [1, 0.9, 0.9 * 0.75]],
        index=pd.Index(["0.weight", "2.weight", "2.input"], name="tensor"),
        columns=pd.Index([2, 4, 8], name="bits"),
    )
    pd.testing.assert_frame_equal(by_hand.inclusion(), expected, rtol=1e-6)


@small
def test_widths_equal_enumeration(
    make_posterior: MakePosterior, enumerate_patterns: Patterns, kind: str, bits: tuple[int, ...]
) -> None:
    posterior = make_posterior(kind, bits)
    columns, tensors = (0, *bits), posterior.structure.layout.tensors
    expected = np.zeros((len(tensors), len(columns)))
    for probability, gates in enumerate_patterns(posterior):
        for row, width in enumerate(widths_by_hand(posterior, gates)):
            expected[row, columns.index(width)] += probability
    widths = posterior.widths()
    np.testing.assert_allclose(widths.to_numpy(), expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(widths.sum(axis=1), 1.0, atol=1e-6)
    pd.testing.assert_index_equal(widths.index, pd.Index(tensors, name="tensor"))
    pd.testing.assert_index_equal(widths.columns, pd.Index(columns, name="bits"))


@small
def test_inclusion_is_the_upper_tail_of_widths(make_posterior: MakePosterior, kind: str, bits: tuple[int, ...]) -> None:
    posterior = make_posterior(kind, bits)
    tail = posterior.widths().iloc[:, ::-1].cumsum(axis=1).iloc[:, ::-1].drop(columns=0)
    pd.testing.assert_frame_equal(posterior.inclusion(), tail, rtol=0, atol=1e-6)


def test_a_weight_is_gone_when_every_channel_is_off(by_hand: GatePosterior) -> None:
    """0.1 x 0.6; tensors without channel gates of their own are never gone."""
    assert by_hand.widths()[0].tolist() == pytest.approx([0.06, 0, 0], abs=1e-7)
    assert by_hand.any_channel.tolist() == pytest.approx([0.94, 1, 1])


@pytest.mark.parametrize(("channels", "expected"), [([1.0, 0.3], 1.0), ([0.0, 0.0], 0.0), ([1e-6, 0.0], 1e-6)])
def test_certain_channels_decide_about_their_weight(
    make_posterior: MakePosterior, channels: list[float], expected: float
) -> None:
    assert make_posterior("chain", channels=channels).any_channel[0].item() == pytest.approx(expected, rel=1e-5)


def test_channels_are_listed_by_layer(make_posterior: MakePosterior) -> None:
    posterior = make_posterior("depthwise", channels=[0.1, 0.2, 0.3, 0.4])
    channels = posterior.channels()
    assert channels["layer"].tolist() == ["conv", "conv", "point", "point"]
    assert channels["channel"].tolist() == [0, 1, 0, 1]
    assert channels["probability"].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])


# --- draws and cost ---------------------------------------------------------------------------------------------------


@small
def test_expected_bops_equal_enumeration(
    make_posterior: MakePosterior, enumerate_patterns: Patterns, kind: str, bits: tuple[int, ...]
) -> None:
    posterior = make_posterior(kind, bits)
    patterns = list(enumerate_patterns(posterior))
    gates = GateValues(*(torch.stack(values) for values in zip(*(g for _, g in patterns), strict=True)))
    bops: Tensor = torch.vmap(NetworkCost(posterior.structure).relative_bops)(
        GateValues(gates.channels, gates.tensors.cumprod(-1))
    )
    expected = math.fsum(p * b for (p, _), b in zip(patterns, bops.tolist(), strict=True))
    assert posterior.expected_bops() == pytest.approx(expected, rel=1e-5)


def test_expected_bops_by_hand(by_hand: GatePosterior) -> None:
    """Layer 0 has 6 MACs at 8-bit input, layer 2 has 4; all widths and channels are independent."""
    weight0, weight2 = 2 * 0.2 + 4 * 0.72 + 8 * 0.08, 2 * 0.7 + 4 * 0.15 + 8 * 0.15
    read, kept = 2 * 0.1 + 4 * 0.225 + 8 * 0.675, (0.9 + 0.4) / 2
    expected = 100 * (weight0 * 8 * 6 * kept + weight2 * read * 4 * kept) / (1024 * 10)
    assert by_hand.expected_bops() == pytest.approx(expected, rel=1e-6)


@small
def test_mean_of_drawn_bops_is_the_expectation(make_posterior: MakePosterior, kind: str, bits: tuple[int, ...]) -> None:
    """Within 4.5 standard errors of 4000 draws: a right posterior fails in one of 100,000 seeds."""
    posterior = make_posterior(kind, bits)
    drawn = posterior.sampled_bops(4000).double()
    error = drawn.std().item() / math.sqrt(len(drawn))
    assert abs(drawn.mean().item() - posterior.expected_bops()) <= 4.5 * error + 1e-5


@small
def test_drawn_bops_equal_a_loop_over_draws(make_posterior: MakePosterior, kind: str, bits: tuple[int, ...]) -> None:
    posterior = make_posterior(kind, bits)
    gates, cost = posterior.sample(20, seed=3), NetworkCost(posterior.structure)
    looped = torch.stack([cost.relative_bops(GateValues(*draw)) for draw in zip(*gates, strict=True)])
    torch.testing.assert_close(posterior.sampled_bops(20, seed=3), looped, rtol=1e-6, atol=0)


@small
def test_frequencies_of_draws_are_the_probabilities(
    make_posterior: MakePosterior, kind: str, bits: tuple[int, ...]
) -> None:
    """Each within 4.5 standard errors of 4000 draws."""
    posterior, draws = make_posterior(kind, bits), 4000
    gates = posterior.sample(draws, seed=1)
    assert gates.channels.shape == (draws, *posterior.probabilities.channels.shape)
    assert gates.tensors.shape == (draws, *posterior.probabilities.tensors.shape)
    inclusion = torch.tensor(posterior.inclusion().drop(columns=bits[0]).to_numpy())
    for drawn, expected in ((gates.channels, posterior.probabilities.channels), (gates.tensors, inclusion)):
        limit = 4.5 * (expected * (1 - expected) / draws).sqrt() + 1e-6
        assert ((drawn.double().mean(0) - expected).abs() <= limit).all()


def test_joint_frequencies_of_widths_are_their_products(by_hand: GatePosterior) -> None:
    """Tensors are independent: 2.weight at 2 bits with 2.input at 8 has 0.7 x 0.675."""
    layout, draws = by_hand.structure.layout, 4000
    gates = by_hand.sample(draws)
    widths = [layout.bits(GateValues(*draw)) for draw in zip(*gates, strict=True)]
    share = sum(w[1:] == (2, 8) for w in widths) / draws
    assert share == pytest.approx(0.7 * 0.675, abs=4.5 * math.sqrt(0.25 / draws))


def test_no_gate_is_open_behind_a_closed_one(make_posterior: MakePosterior) -> None:
    posterior = make_posterior("chain", (2, 4, 8, 16), channels=[0.3, 0.2])
    gates = posterior.sample(500)
    gone = ~gates.channels.bool().any(1)
    assert 0 < gone.sum() < 500
    assert set(gates.channels.unique().tolist()) == set(gates.tensors.unique().tolist()) == {0.0, 1.0}
    assert (gates.tensors.diff(dim=-1) <= 0).all()
    assert not gates.tensors[gone, 0].any(), "a weight without channels has no bits"
    assert gates.tensors[~gone, 0].any() and gates.tensors[gone, 1:].any()


def test_draws_have_a_generator_of_their_own(by_hand: GatePosterior) -> None:
    state = torch.get_rng_state()
    first = by_hand.sample(100, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again, other = by_hand.sample(100, seed=5), by_hand.sample(100, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.channels, other.channels) and not torch.equal(first.tensors, other.tensors)


@pytest.mark.parametrize("draws", [0, -3])
def test_no_draws_are_refused(by_hand: GatePosterior, draws: int) -> None:
    with pytest.raises(ValueError, match=f"draws must be at least 1; got {draws}"):
        by_hand.sample(draws)


def test_interval_holds_the_quantiles_of_drawn_bops(make_posterior: MakePosterior) -> None:
    posterior = make_posterior("depthwise")
    drawn = posterior.sampled_bops(400, seed=2).numpy()
    low, high = posterior.bops_interval(0.8, draws=400, seed=2)
    assert (low, high) == pytest.approx(np.quantile(drawn, [0.1, 0.9]).tolist(), rel=1e-6)
    assert posterior.bops_interval() == pytest.approx(
        np.quantile(posterior.sampled_bops().numpy(), [0.03, 0.97]).tolist(), rel=1e-6
    )


@pytest.mark.parametrize("probability", [0.0, 1.0, -0.5, 94, math.nan])
def test_interval_of_no_probability_is_refused(by_hand: GatePosterior, probability: float) -> None:
    with pytest.raises(ValueError, match="probability must lie between 0 and 1; got"):
        by_hand.bops_interval(probability)


def test_a_certain_posterior_is_one_configuration(make_posterior: MakePosterior) -> None:
    posterior = make_posterior("chain", channels=[1.0, 0.0], tensors=[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    configuration = posterior.map_configuration()
    assert configuration.bits() == {"0.weight": 4, "2.weight": 2, "2.input": 8}
    assert configuration.kept() == {"0": 1, "2": 2}
    figures = [*posterior.bops_interval(), posterior.expected_bops()]
    assert figures == pytest.approx([configuration.relative_bops] * 3, rel=1e-6)


# --- the table --------------------------------------------------------------------------------------------------------


def test_every_column_of_the_table_by_hand(make_network: Callable[..., QuantizedNetwork]) -> None:
    network = make_network("chain")
    guide = StraightThroughGuide(GatePrior(network, 0.1))
    with torch.no_grad():  # here a gate is open with the sigmoid of its logit
        guide.channel_logits.copy_(torch.tensor([0.9, 0.4]).logit())
        guide.tensor_logits.copy_(torch.tensor([[0.8, 0.1], [0.3, 0.5], [0.9, 0.75]]).logit())
    table = GatePosterior.from_guide(guide, network).table()
    expected = pd.DataFrame(
        {
            "kind": ["Linear", "Linear"],
            "weight_bits": [4, 2],
            "weight_probability": [0.94 * 0.8 * 0.9, 0.7],
            "input_bits": [8, 8],
            "input_probability": [math.nan, 0.9 * 0.75],
            "kept": [1, 2],
            "channels": [2, 2],
            "expected_kept": [1.3, 2.0],
            "macs": [6, 4],
            "relative_bops": [100 * 4 * 8 * 6 * 0.5 / 10240, 100 * 2 * 8 * 4 * 0.5 / 10240],
            "note": ["", "it feeds the network's output"],
        },
        index=pd.Index(["0", "2"], name="layer"),
    )
    pd.testing.assert_frame_equal(table, expected, rtol=1e-6)


@pytest.mark.parametrize("rule", ["map", "threshold"])
@pytest.mark.parametrize(("kind", "bits"), [*SMALL, ("deep", (2, 4, 8, 16, 32))])
def test_table_agrees_with_the_configuration(
    make_posterior: MakePosterior, kind: str, bits: tuple[int, ...], rule: DecisionRule
) -> None:
    posterior = make_posterior(kind, bits)
    table, configuration = posterior.table(rule), posterior.configuration(rule)
    assert table["relative_bops"].sum() == pytest.approx(configuration.relative_bops, rel=1e-5)
    assert table["kept"].to_dict() == configuration.kept()
    widths, chosen = posterior.widths(), configuration.bits()
    for layer, row in zip(configuration.layers, table.to_dict("records"), strict=True):
        assert layer.weight is not None
        assert (row["weight_bits"], row["kind"], row["macs"]) == (chosen[layer.weight], layer.kind, layer.macs)
        assert row["weight_probability"] == pytest.approx(widths.loc[layer.weight, chosen[layer.weight]])
        assert row["input_bits"] == (8 if layer.input is None else chosen[layer.input])
        if layer.input is None:
            assert math.isnan(row["input_probability"])
        else:
            assert row["input_probability"] == pytest.approx(widths.loc[layer.input, chosen[layer.input]])


def test_a_depthwise_layer_keeps_what_the_layer_before_keeps(make_posterior: MakePosterior) -> None:
    posterior = make_posterior("depthwise", channels=[0.2, 0.9, 0.8, 0.7])
    table = posterior.table()
    assert table["kept"].to_dict() == {"conv": 1, "depth": 1, "point": 2, "head": 3}
    assert table["expected_kept"].tolist() == pytest.approx([1.1, 1.1, 1.5, 3.0])
    assert "depthwise" in table["note"].tolist()[1] and table["note"].tolist()[2] == ""
    assert posterior.map_configuration().layers[1].removed == (0,)


def test_rules_decide_differently_between_a_half_and_two_thirds(make_posterior: MakePosterior) -> None:
    posterior = make_posterior("chain", channels=[0.6, 0.4], tensors=[[0.6, 0.1], [0.9, 0.6], [0.7, 0.7]])
    by_mode, by_threshold = posterior.table("map"), posterior.table("threshold")
    assert by_mode["weight_bits"].tolist() == [4, 8] and by_threshold["weight_bits"].tolist() == [0, 4]
    assert by_mode["kept"].tolist() == [1, 2] and by_threshold["kept"].tolist() == [0, 2]
    assert by_threshold.loc["0", "weight_probability"] == pytest.approx(0.4 * 0.6)
    assert by_threshold["relative_bops"].tolist() == [0, 0]
    assert posterior.configuration("threshold").bits() == {"0.weight": 0, "2.weight": 4, "2.input": 8}


def test_an_unknown_rule_is_refused(by_hand: GatePosterior) -> None:
    for summary in (by_hand.table, by_hand.configuration):
        with pytest.raises(ValueError, match="rule must be 'map' or 'threshold'; got 'mean'"):
            summary("mean")  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(8))
def test_map_configuration_is_the_argmax_over_channels_and_widths(make_posterior: MakePosterior, seed: int) -> None:
    """Over all states of 2 channels and 3 x 3 widths; a width is that of a tensor which is not pruned away."""
    posterior = make_posterior("chain", seed=seed)
    channels, tensors = (p.double() for p in posterior.probabilities)
    rungs: list[list[float]] = [[1 - a, a * (1 - b), a * b] for a, b in tensors.tolist()]

    def joint(state: tuple[tuple[int, ...], tuple[int, ...]]) -> float:
        kept, widths = state
        chance: float = math.prod(p if on else 1 - p for p, on in zip(channels.tolist(), kept, strict=True))
        return chance * math.prod(row[rung] for row, rung in zip(rungs, widths, strict=True))

    kept, widths = max(product(product((0, 1), repeat=2), product(range(3), repeat=3)), key=joint)
    configuration = posterior.map_configuration()
    expected = [(2, 4, 8)[rung] for rung in widths]
    expected[0] = expected[0] if any(kept) else 0
    assert list(configuration.bits().values()) == expected
    assert configuration.layers[0].removed == tuple(c for c in range(2) if not kept[c])


@pytest.mark.parametrize("seed", range(8))
def test_channels_come_back_to_make_a_multiple(make_posterior: MakePosterior, seed: int) -> None:
    """Of two channels both are kept, or none; nothing else changes."""
    posterior = make_posterior("chain", seed=seed)
    plain, even = posterior.configuration(), posterior.configuration(multiple_of=2)
    kept = plain.kept()[plain.layers[0].name]
    assert even.kept()[even.layers[0].name] == (2 if kept else 0)
    assert even.bits() == plain.bits()
    assert posterior.configuration(multiple_of=1) == plain


# --- corner cases -----------------------------------------------------------------------------------------------------


def test_a_network_without_prunable_layer(make_posterior: MakePosterior) -> None:
    posterior = make_posterior("unprunable")
    assert posterior.channels().empty
    assert posterior.widths()[0].tolist() == [0]
    assert posterior.sample(7).channels.shape == (7, 0)
    assert posterior.table()[["kept", "channels", "expected_kept"]].to_numpy().tolist() == [[4, 4, 4]]
    assert posterior.map_configuration().kept() == {"0": 4}


def test_a_ladder_of_one_width(make_posterior: MakePosterior) -> None:
    posterior = make_posterior("chain", (8,), channels=[0.9, 0.4])
    np.testing.assert_allclose(posterior.inclusion().to_numpy(), [[0.94], [1.0], [1.0]], rtol=1e-6)
    assert list(posterior.inclusion()) == [8] and list(posterior.widths()) == [0, 8]
    assert posterior.sample(5).tensors.shape == (5, 3, 0)
    assert posterior.map_configuration().bits() == {"0.weight": 8, "2.weight": 8, "2.input": 8}


# --- from a guide, to a file ------------------------------------------------------------------------------------------


def test_posterior_of_a_guide_is_a_copy(make_network: Callable[..., QuantizedNetwork]) -> None:
    network = make_network("chain")
    guide = HardConcreteGuide(GatePrior(network, 0.1))
    posterior = GatePosterior.from_guide(guide, network)
    before = posterior.table(), posterior.map_configuration()
    assert not any(p.requires_grad for p in posterior.probabilities)
    with torch.no_grad():
        guide.channel_logits.fill_(-9.0)
        guide.tensor_logits.fill_(-9.0)
        network.quantizers.log_range.add_(1.0)
    pd.testing.assert_frame_equal(posterior.table(), before[0])
    assert posterior.map_configuration() == before[1]


def test_ranges_are_those_of_the_network_to_the_last_bit(make_network: Callable[..., QuantizedNetwork]) -> None:
    """Else a configuration made from the network and one made from its posterior would differ."""
    network = make_network("deep")
    with torch.no_grad():
        network.quantizers.log_range.copy_(0.3 * torch.randn(len(network.layout.tensors)))
    posterior = GatePosterior.from_guide(HardConcreteGuide(GatePrior(network, 0.1)), network)
    for name in ("log_range", "ranges"):
        assert torch.equal(getattr(posterior.structure.quantizers, name), getattr(network.quantizers, name))


@pytest.mark.parametrize("other", ["depthwise", "unprunable"])
def test_guide_of_another_network_is_refused(make_network: Callable[..., QuantizedNetwork], other: str) -> None:
    guide = HardConcreteGuide(GatePrior(make_network("chain"), 0.1))
    with pytest.raises(ValueError, match="the guide was made for another network"):
        GatePosterior.from_guide(guide, make_network(other))
    with pytest.raises(ValueError, match="the guide was made for another network"):
        GatePosterior.from_guide(guide, make_network("chain", (2, 4)))


@small
def test_saving_and_loading_keeps_everything(
    tmp_path: Path, make_posterior: MakePosterior, kind: str, bits: tuple[int, ...]
) -> None:
    posterior, path = make_posterior(kind, bits), tmp_path / "new" / "posterior.safetensors"
    with torch.no_grad():
        posterior.structure.quantizers.log_range.copy_(torch.randn(len(posterior.structure.layout.tensors)))
    posterior.save(path)
    loaded = GatePosterior.load(str(path))
    assert all(torch.equal(a, b) for a, b in zip(loaded.probabilities, posterior.probabilities, strict=True))
    assert loaded.structure.layout == posterior.structure.layout
    assert loaded.structure.layers == posterior.structure.layers
    pd.testing.assert_frame_equal(loaded.table(), posterior.table())
    assert torch.equal(loaded.sampled_bops(9), posterior.sampled_bops(9))
    for rule in ("map", "threshold"):
        assert loaded.configuration(rule) == posterior.configuration(rule)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"channels", "tensors", "log_range"}
        assert json.loads(file.metadata()["structure"])["layout"]["tensors"] == list(loaded.structure.layout.tensors)


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00" * 200, b"PK\x03\x04 something else"])
def test_files_of_another_kind_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "posterior.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"posterior\.safetensors is not a saved gate posterior"):
        GatePosterior.load(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, by_hand: GatePosterior, share: float) -> None:
    path = tmp_path / "posterior.safetensors"
    by_hand.save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"posterior\.safetensors is not a saved gate posterior"):
        GatePosterior.load(path)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.safetensors is not a saved gate posterior: .*[Nn]o such file"):
        GatePosterior.load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="is not a saved gate posterior"):
        GatePosterior.load(tmp_path)


CHANGES: list[tuple[str, Any, str]] = [
    ("metadata", {}, "structure"),
    ("metadata", {"structure": "{}"}, "does not describe a quantized network"),
    ("metadata", {"structure": "[1]"}, "does not describe a quantized network"),
    ("metadata", {"structure": "{"}, "Expecting property name"),
    ("channels", None, "channels"),
    ("log_range", None, "log_range"),
    ("channels", torch.tensor([0.5]), r"shape \(2,\)"),
    ("tensors", torch.full((3, 4), 0.5), r"shape \(3, 2\)"),
    ("tensors", torch.full((3, 2), 1.5), "between 0 and 1"),
    ("channels", torch.tensor([0.5, math.nan]), "between 0 and 1"),
    ("log_range", torch.zeros(4), "3 quantized tensors need as many finite ranges"),
    ("log_range", torch.tensor([0.0, math.nan, 0.0]), "3 quantized tensors need as many finite ranges"),
]


@pytest.mark.parametrize(("part", "value", "message"), CHANGES)
def test_foreign_contents_are_refused(
    tmp_path: Path, by_hand: GatePosterior, part: str, value: Any, message: str
) -> None:
    path = tmp_path / "posterior.safetensors"
    by_hand.save(path)
    tensors, metadata = contents(path)
    if part == "metadata":
        metadata = value
    elif value is None:
        del tensors[part]
    else:
        tensors[part] = value
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=rf"posterior\.safetensors is not a saved gate posterior: .*{message}"):
        GatePosterior.load(path)


def test_weights_are_no_posterior(tmp_path: Path) -> None:
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights\.safetensors is not a saved gate posterior"):
        GatePosterior.load(tmp_path / "weights.safetensors")


def test_a_pinned_gate_is_certain() -> None:
    network = quantize(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)), torch.rand(16, 3))
    prior = GatePrior(network, 0.1).pin("2.*", bits=4).pin_channels()
    posterior = GatePosterior.from_guide(HardConcreteGuide(prior, init=0.5), network)
    assert posterior.probabilities.channels.tolist() == [1, 1]
    assert posterior.widths().loc[["2.weight", "2.input"], 4].tolist() == [1, 1]
    assert isinstance(posterior.probabilities, GateProbabilities)


def test_repr_is_a_line_and_str_the_whole_table(make_posterior: MakePosterior) -> None:
    posterior = make_posterior("depthwise")
    expected = f"7 tensors of 2 to 8 bits, 4 prunable channels, expected BOPs {posterior.expected_bops():.3g} %"
    assert repr(posterior) == f"GatePosterior({expected})"
    head, *lines = str(posterior).splitlines()
    notes = [note for note in posterior.table()["note"] if note]
    assert head == repr(posterior) and max(map(len, notes)) > 50
    assert sum(line.endswith(note) for line in lines for note in set(notes)) == len(notes)
