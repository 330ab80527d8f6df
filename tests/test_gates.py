"""Hard gates are the mode they claim to be, and the layout finds every gate where the network put it."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from pyro_bbits.distributions import HardConcrete
from pyro_bbits.gates import (
    ChannelGroup,
    DecisionRule,
    GateLayout,
    GateProbabilities,
    GateValues,
    Liveness,
    LivenessBank,
    any_channel,
    decide,
    rung_probabilities,
)
from pyro_bbits.ladder import BitLadder


def bernoulli(probability: Tensor, value: int) -> float:
    return probability.item() if value else 1 - probability.item()


def enumerate_rungs(conditional: Tensor) -> Tensor:
    """Add up the probabilities of all gate patterns that end on the same rung; a gate past a closed one is idle."""
    rungs = torch.zeros(len(conditional) + 1, dtype=conditional.dtype)
    for pattern in product((0, 1), repeat=len(conditional)):
        reached = (*pattern, 0).index(0)
        rungs[reached] += math.prod(bernoulli(p, value) for p, value in zip(conditional, pattern, strict=True))
    return rungs


@pytest.mark.parametrize("gates", range(5))
def test_rung_probabilities_equal_enumeration(gates: int) -> None:
    for conditional in torch.rand(10, gates, dtype=torch.float64):
        rungs = rung_probabilities(conditional)
        torch.testing.assert_close(rungs, enumerate_rungs(conditional), rtol=0, atol=1e-15)
        torch.testing.assert_close(rungs.sum(), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-15)


def test_rung_probabilities_keep_leading_dimensions() -> None:
    conditional = torch.rand(3, 2, 4, dtype=torch.float64)
    rungs = rung_probabilities(conditional)
    assert rungs.shape == (3, 2, 5)
    torch.testing.assert_close(rungs[1, 1], rung_probabilities(conditional[1, 1]), rtol=0, atol=0)


def test_certain_gates_leave_one_rung() -> None:
    assert rung_probabilities(torch.tensor([1.0, 1.0, 0.0, 1.0])).tolist() == [0, 0, 1, 0, 0]


def joint_probability(probabilities: GateProbabilities, channels: tuple[int, ...], rungs: tuple[int, ...]) -> float:
    kept = math.prod(bernoulli(p, value) for p, value in zip(probabilities.channels, channels, strict=True))
    return kept * math.prod(
        enumerate_rungs(row)[rung].item() for row, rung in zip(probabilities.tensors, rungs, strict=True)
    )


def test_map_is_the_mode_of_the_joint_posterior() -> None:
    """Brute force over every state of 3 channels and 2 tensors with 2 gates each, for random posteriors."""
    for _ in range(25):
        probabilities = GateProbabilities(torch.rand(3, dtype=torch.float64), torch.rand(2, 2, dtype=torch.float64))
        states = product(product((0, 1), repeat=3), product(range(3), repeat=2))
        channels, rungs = max(states, key=lambda state: joint_probability(probabilities, *state))
        gates = decide(probabilities)
        assert gates.channels.tolist() == list(channels)
        assert gates.tensors.tolist() == [[float(gate < rung) for gate in range(2)] for rung in rungs]


def test_map_can_close_a_gate_that_is_more_likely_open() -> None:
    """Rungs have probability 0.4, 0.6 * 0.6 = 0.36 and 0.6 * 0.4 = 0.24: the widest single one is the coarsest."""
    gates = decide(GateProbabilities(torch.zeros(0), torch.tensor([[0.6, 0.4]])))
    assert gates.tensors.tolist() == [[0, 0]]


def test_threshold_opens_gates_whose_logit_is_above_the_papers_bound() -> None:
    """P(z = 0) < 0.34 is phi > -0.93530, whatever the gates after it do."""
    logits = torch.tensor([-6.0, -2.0, -0.9354, -0.9352, 0.0, 2.0], dtype=torch.float64)
    expected = [0, 0, 0, 1, 1, 1]
    prob_on = HardConcrete(logits).prob_on
    gates = decide(GateProbabilities(prob_on, prob_on[:, None]), "threshold")
    assert gates.channels.tolist() == expected
    assert gates.tensors.flatten().tolist() == expected


def test_rules_part_between_a_half_and_two_thirds() -> None:
    probabilities = GateProbabilities(torch.tensor([0.45, 0.6, 0.7]), torch.tensor([[0.45], [0.6], [0.7]]))
    by_mode, by_threshold = decide(probabilities, "map"), decide(probabilities, "threshold")
    assert by_mode.channels.tolist() == by_mode.tensors.flatten().tolist() == [0, 1, 1]
    assert by_threshold.channels.tolist() == by_threshold.tensors.flatten().tolist() == [0, 0, 1]


@pytest.mark.parametrize("rule", ["map", "threshold"])
def test_closed_parent_closes_finer_gates(rule: DecisionRule) -> None:
    conditional = torch.tensor([[0.01, 0.99, 0.99], [0.99, 0.01, 0.99], [0.99, 0.99, 0.01], [0.99, 0.99, 0.99]])
    gates = decide(GateProbabilities(torch.zeros(0), conditional), rule)
    assert gates.tensors.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize("rule", ["map", "threshold"])
def test_decided_gates_are_monotone_and_binary(rule: DecisionRule) -> None:
    gates = decide(GateProbabilities(torch.rand(50), torch.rand(50, 4)), rule)
    assert set(gates.channels.tolist()) | set(gates.tensors.flatten().tolist()) == {0, 1}
    assert (gates.tensors.diff(dim=1) <= 0).all()


def test_decide_works_without_residual_gates() -> None:
    gates = decide(GateProbabilities(torch.tensor([0.9]), torch.zeros(2, 0)))
    assert gates.channels.tolist() == [1] and gates.tensors.shape == (2, 0)


def test_decide_refuses_an_unknown_rule() -> None:
    with pytest.raises(ValueError, match="rule must be 'map' or 'threshold'; got 'mode'"):
        decide(GateProbabilities(torch.zeros(0), torch.zeros(0, 4)), "mode")  # type: ignore[arg-type]


@pytest.fixture
def layout() -> GateLayout:
    """Four tensors; weights 3 and 1 are prunable, in that order, with 3 and 2 channels."""
    return GateLayout(
        BitLadder((2, 4, 8)),
        ("a.input", "a.weight", "b.input", "b.weight"),
        (ChannelGroup("b", 3, 3), ChannelGroup("a", 1, 2)),
    )


def test_layout_concatenates_the_channels_of_its_groups(layout: GateLayout) -> None:
    assert layout.num_channels == 5
    assert layout.slices == {"b": slice(0, 3), "a": slice(3, 5)}
    assert layout.owner.dtype == torch.int64 and layout.owner.tolist() == [3, 3, 3, 1, 1]
    assert layout.prunable.tolist() == [False, True, False, True]
    assert layout.channel_names == ("b[0]", "b[1]", "b[2]", "a[0]", "a[1]")


def test_layout_names_its_sites_by_width(layout: GateLayout) -> None:
    assert layout.channel_site == "z2" and layout.residual_sites == ("z4", "z8")
    assert GateLayout(BitLadder((3, 6)), (), ()).channel_site == "z3"


def test_layout_without_groups_has_no_channels() -> None:
    layout = GateLayout(BitLadder((2, 4)), ("x",), ())
    gates = layout.open_gates()
    assert layout.num_channels == 0 and layout.slices == {} and layout.kept(gates) == ()
    assert layout.owner.dtype == torch.int64 and layout.owner.shape == (0,)
    assert layout.bits(gates) == (4,)


def test_layout_reads_widths_from_hard_gates(layout: GateLayout) -> None:
    tensors = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])  # 0 then 1: the closed gate decides
    assert layout.bits(GateValues(torch.ones(5), tensors)) == (8, 4, 2, 2)


def test_layout_gives_width_0_to_a_weight_without_channels(layout: GateLayout) -> None:
    open_gates = layout.open_gates()
    gates = GateValues(torch.tensor([0.0, 1, 0, 0, 0]), open_gates.tensors)
    assert layout.bits(open_gates) == (8, 8, 8, 8) and layout.kept(open_gates) == (3, 2)
    assert layout.bits(gates) == (8, 0, 8, 8) and layout.kept(gates) == (1, 0)


def test_layout_reads_every_width_of_a_ladder() -> None:
    ladder = BitLadder()
    layout = GateLayout(ladder, tuple(map(str, ladder.bits)), ())
    tensors = torch.tensor([ladder.open_gates(bits) for bits in ladder.bits]).float()
    assert layout.bits(GateValues(torch.zeros(0), tensors)) == ladder.bits


def test_any_channel_equals_a_loop_over_tensors(layout: GateLayout) -> None:
    channels = torch.rand(20, 5).sub(0.6).clamp(min=0)  # relaxed values, most of them 0
    expected = torch.tensor([[True, any(row[3:] > 0), True, any(row[:3] > 0)] for row in channels])
    assert set(expected[:, 1].tolist()) == set(expected[:, 3].tolist()) == {False, True}
    assert torch.equal(layout.any_channel(channels), expected)
    assert torch.equal(any_channel(channels[0], layout.owner, layout.prunable), expected[0])


PRODUCERS = [frozenset({0}), frozenset({1, 2}), frozenset[int](), frozenset({0, 2, 3}), frozenset({3})]


def test_liveness_of_hard_gates_is_or() -> None:
    liveness = Liveness(PRODUCERS, 4)
    for gates in product((0.0, 1.0), repeat=4):
        expected = [float(not p or any(gates[i] for i in p)) for p in PRODUCERS]
        assert liveness(torch.tensor(gates)).tolist() == expected


def test_liveness_of_probabilities_equals_enumeration() -> None:
    q = torch.rand(4, dtype=torch.float64)
    expected = torch.zeros(len(PRODUCERS), dtype=torch.float64)
    for gates in product((0, 1), repeat=4):
        probability = math.prod(bernoulli(p, value) for p, value in zip(q, gates, strict=True))
        expected += probability * torch.tensor([not p or any(gates[i] for i in p) for p in PRODUCERS]).double()
    torch.testing.assert_close(Liveness(PRODUCERS, 4)(q), expected, rtol=0, atol=1e-15)


def test_liveness_passes_gradients_of_the_product_form() -> None:
    """d/dq_1 of 1 - (1 - q_1)(1 - q_2) is 1 - q_2; a channel that is always alive passes none."""
    q = torch.tensor([0.3, 0.6], dtype=torch.float64, requires_grad=True)
    Liveness([{0, 1}, set()], 2)(q).sum().backward()
    assert q.grad is not None
    torch.testing.assert_close(q.grad, torch.tensor([1 - 0.6, 1 - 0.3], dtype=torch.float64))


def test_liveness_with_one_producer_each_picks_gates() -> None:
    gates = torch.rand(3, requires_grad=True)
    alive = Liveness([{2}, set(), {0}], 3)(gates)
    assert torch.equal(alive, torch.stack([gates[2], torch.ones(()), gates[0]]))
    alive.sum().backward()
    assert gates.grad is not None and gates.grad.tolist() == [1, 0, 1]


def test_liveness_knows_when_no_channel_depends_on_a_gate() -> None:
    assert Liveness([set(), set()], 3).constant
    assert not Liveness([set(), {1}], 3).constant


def test_liveness_keeps_nothing_in_the_state_dict() -> None:
    assert Liveness(PRODUCERS, 4).state_dict() == {}


def test_a_bank_is_the_liveness_of_each_layer() -> None:
    """Own runs, sums of producers, channels that always live, a layer that reads another one's channels."""
    layers: list[list[list[int]]] = [[[0], [1], [2]], [[0, 3], [1, 4], []], [[3], [4]], [[4], [3]], [[], []]]
    gates = torch.tensor([0.2, 1.0, 0.0, 0.7, 0.4], requires_grad=True)
    bank = LivenessBank(layers, [3, 2])
    separate = [Liveness(layer, 5)(gates) for layer in layers]
    for actual, expected in zip(bank(gates), separate, strict=True):
        torch.testing.assert_close(actual, expected)
    weights = [torch.randn(len(layer)) for layer in layers]
    gradients = [
        torch.autograd.grad(sum((w * g).sum() for w, g in zip(weights, found, strict=True)), gates)[0]
        for found in (bank(gates), separate)
    ]
    torch.testing.assert_close(*gradients)
    assert not bank.state_dict()


def test_a_bank_without_gates_has_none() -> None:
    assert LivenessBank([], [])(torch.ones(0)) == ()
