"""The prior program: its sites, its chain, its pins."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_bbits import GatePrior, QuantizedNetwork, quantize
from pyro_bbits.models import categorical, sample_gates
from pyro_bbits.models.program import call_network, observe

LADDER = (2, 4, 8, 16, 32)


def chain(depth: int, bits: tuple[int, ...] = LADDER) -> QuantizedNetwork:
    """A perceptron with `depth` linear layers, all but the last prunable."""
    layers = [layer for _ in range(depth - 1) for layer in (nn.Linear(3, 3), nn.ReLU())]
    return quantize(nn.Sequential(*layers, nn.Linear(3, 2)), torch.rand(8, 3), bits=bits)


def run(program: Callable[..., object], *args: object) -> Any:
    """The trace of one run; Pyro's types are vague."""
    return poutine.trace(program).get_trace(*args)


def plates(prior: GatePrior) -> dict[str, list[tuple[str, int]]]:
    """Sample sites in their order, with the names and sizes of their plates."""
    nodes = run(sample_gates, prior, 10).nodes
    return {
        name: [(frame.name, frame.size) for frame in node["cond_indep_stack"]]
        for name, node in nodes.items()
        if node["type"] == "sample" and not site_is_subsample(node)
    }


def draws(prior: GatePrior, num_data: int, count: int) -> tuple[Tensor, Tensor]:
    samples = [sample_gates(prior, num_data) for _ in range(count)]
    return torch.stack([s.channels for s in samples]), torch.stack([s.tensors for s in samples])


def deviations(successes: Tensor, trials: Tensor, probability: Tensor) -> Tensor:
    """How many standard deviations each count lies from its expectation."""
    return (successes - trials * probability).abs() / (trials * probability * (1 - probability)).sqrt()


@pytest.mark.parametrize("depth", [2, 3, 6])
def test_sites_and_plates_do_not_depend_on_the_depth(depth: int) -> None:
    tensors = [("tensors", 2 * depth - 1)]
    expected = {"z2": [("channels", 3 * (depth - 1))], **{f"z{b}": tensors for b in LADDER[1:]}}
    sites = plates(GatePrior(chain(depth), mu=0.1))
    assert sites == expected
    assert list(sites) == list(expected)


def test_sites_follow_the_ladder() -> None:
    assert list(plates(GatePrior(chain(2, (2, 4, 8)), mu=0.1))) == ["z2", "z4", "z8"]
    assert list(plates(GatePrior(chain(2, (8,)), mu=0.1))) == ["z8"]


def test_a_network_without_prunable_channels_has_no_channel_site() -> None:
    prior = GatePrior(chain(1), mu=0.1)
    assert list(plates(prior)) == ["z4", "z8", "z16", "z32"]
    assert sample_gates(prior, 10).channels.shape == (0,)


@pytest.mark.parametrize("bits", [LADDER, (2, 4, 8), (8,)])
def test_samples_have_the_shapes_that_the_network_takes(bits: tuple[int, ...]) -> None:
    network = chain(3, bits)
    gates = sample_gates(GatePrior(network, mu=0.01), 10)
    assert network(torch.rand(4, 3), gates=gates).shape == (4, 2)


def test_sampling_frequencies_are_the_prior_probabilities_along_the_chain() -> None:
    """With 4000 draws, a deviation of 5 has a chance of 6e-7 per entry, and there are 15 entries."""
    prior, num_data = GatePrior(chain(2, (2, 4, 8, 16, 32)), mu=0.002), 20
    channels, tensors = draws(prior, num_data, 4000)
    kept = torch.exp(-num_data * prior.channel_strength)
    assert deviations(channels.sum(0), torch.tensor(4000.0), kept).max() < 5
    parent = torch.ones(4000, 3)
    parent[:, 0] = (channels > 0).any(1).float()  # row 0 is the weight whose channels can go
    for column, strength in zip(tensors.unbind(2), prior.strength.unbind(1), strict=True):
        assert (column[parent == 0] == 0).all()
        open_probability = torch.exp(-num_data * strength)
        assert deviations((column * parent).sum(0), parent.sum(0), open_probability).max() < 5
        parent = column


def test_the_constant_price_is_mu_per_gate_and_data_point() -> None:
    prior = GatePrior(chain(2), mu=0.01, cost="constant")
    trace = run(sample_gates, prior, 50)
    torch.testing.assert_close(trace.nodes["z4"]["fn"].cost, torch.full((3,), 0.5))
    torch.testing.assert_close(trace.nodes["z2"]["fn"].cost, torch.full((3,), 0.5 / 3))


def test_a_weight_without_channels_has_no_residual_gates() -> None:
    prior = GatePrior(chain(2), mu=0.0)  # every gate pinned on
    prior.channel_strength[:2] = math.inf
    assert (sample_gates(prior, 10).tensors == 1).all()
    prior.channel_strength[2] = math.inf
    gates = sample_gates(prior, 10)
    assert gates.channels.tolist() == [0, 0, 0]
    assert gates.tensors.tolist() == [[0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert prior.layout.bits(gates) == (0, 32, 32)


def test_pins_hold_in_every_sample() -> None:
    prior = GatePrior(chain(2), mu=0.02).pin("0.weight", bits=8).pin("2.input", bits=2).pin_channels()
    channels, tensors = draws(prior, 10, 50)
    assert (channels == 1).all()
    assert (tensors[:, 0] == torch.tensor([1.0, 1, 0, 0])).all()
    assert (tensors[:, 2] == 0).all()
    assert tensors[:, 1, 0].unique().tolist() == [0, 1]  # the tensor that is not pinned stays random


def test_log_probability_of_a_sample_is_that_of_its_path() -> None:
    prior, num_data = GatePrior(chain(2, (2, 4, 8)), mu=0.01), 10
    for seed in range(20):
        pyro.set_rng_seed(seed)
        trace = run(sample_gates, prior, num_data)
        channels, *residuals = (trace.nodes[site]["value"] for site in ("z2", "z4", "z8"))
        cost = num_data * prior.channel_strength
        expected = torch.where(channels > 0, -cost, (1 - (-cost).exp()).log()).sum()
        parent = torch.tensor([channels.any().item(), True, True])
        for value, strength in zip(residuals, prior.strength.unbind(1), strict=True):
            cost = num_data * strength
            expected = expected + torch.where(value > 0, -cost, (1 - (-cost).exp()).log())[parent].sum()
            parent = value > 0
        torch.testing.assert_close(trace.log_prob_sum(), expected)


class Sum(nn.Module):
    def forward(self, a: Tensor, b: Tensor, *, scale: float = 1.0) -> Tensor:
        return scale * (a + b)


@pytest.mark.parametrize("pack", [lambda a, b: (a, b), lambda a, b: [a, b], lambda a, b: {"b": b, "a": a}])
def test_networks_take_several_inputs(pack: Callable[[Tensor, Tensor], object]) -> None:
    a, b = torch.randn(3), torch.randn(3)
    torch.testing.assert_close(call_network(Sum(), pack(a, b), scale=2.0), 2 * (a + b))


def test_a_batch_counts_as_the_whole_data_set() -> None:
    logits, y = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    trace = run(observe, categorical, logits, y, 40)
    torch.testing.assert_close(trace.log_prob_sum(), -10 * F.cross_entropy(logits, y, reduction="sum"))
    assert trace.nodes["data"]["value"].tolist() == [0, 1, 2, 3]
    assert trace.nodes["obs"]["is_observed"]


def test_targets_are_sampled_when_none_are_given() -> None:
    logits = torch.tensor([[50.0, 0, 0], [0, 0, 50.0]])
    assert observe(categorical, logits, None, 2).tolist() == [0, 2]
