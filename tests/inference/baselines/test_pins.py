"""Uniform quantization, quantization only and pruning only are pins of the same model, and nothing else."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pyro_bbits.inference import HardConcreteGuide
from pyro_bbits.inference.baselines import Baseline, pruning_only, quantization_only, uniform
from pyro_bbits.inference.objective import gate_kl_nats
from pyro_bbits.models import GatedModel
from pyro_bbits.quantizer import quantize_fixed

Make = Callable[..., Baseline]


def parts(baseline: Baseline) -> tuple[GatedModel, HardConcreteGuide]:
    assert isinstance(baseline.model, GatedModel) and isinstance(baseline.guide, HardConcreteGuide)
    return baseline.model, baseline.guide


@pytest.mark.parametrize("bits", [(2, 2), (4, 4), (8, 8), (4, 8)])
def test_uniform_has_nothing_random_and_a_kl_of_zero(bits: tuple[int, int], make: Make) -> None:
    model, guide = parts(make(uniform, bits=bits))
    assert gate_kl_nats(guide, model.prior, 48) == 0
    q = guide.probabilities()
    assert all(((p == 0) | (p == 1)).all() for p in q)
    assert model.net.layout.ladder.bits == tuple(sorted({*bits}))


def test_uniform_quantizes_as_a_uniform_quantizer(make: Make) -> None:
    model, guide = parts(make(uniform, bits=(4, 8)))
    head, ranges = model.net.get_submodule("net.6"), model.net.quantizers.ranges.detach()
    assert isinstance(head, nn.Linear)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    head.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    head.register_forward_hook(lambda module, args, output: outputs.append(output))
    model.eval()
    with torch.no_grad():
        model.predict(torch.rand(4, 1, 6, 6), guide.hard_gates())
    weight = quantize_fixed(head.weight, ranges[2], 4, signed=True)
    activation = quantize_fixed(inputs[0], ranges[4], 8, signed=False)
    torch.testing.assert_close(outputs[0], torch.nn.functional.linear(activation, weight, head.bias))


def test_quantization_only_keeps_every_channel(make: Make) -> None:
    model, guide = parts(make(quantization_only, mu=0.3, bits=(2, 4, 8)))
    with torch.no_grad():
        guide.channel_logits.fill_(-9.0)
        guide.tensor_logits.fill_(-9.0)
    assert guide.hard_gates().channels.all()
    assert set(model.net.layout.bits(guide.hard_gates())) == {2}


@pytest.mark.parametrize("bits", [(32, 32), (8, 8), (4, 8)])
def test_pruning_only_keeps_its_widths(bits: tuple[int, int], make: Make) -> None:
    model, guide = parts(make(pruning_only, bits=bits))
    with torch.no_grad():
        guide.tensor_logits.fill_(-9.0)
        guide.channel_logits[0] = -9.0
    gates = guide.hard_gates()
    assert model.net.layout.bits(gates) == (bits[0],) * 3 + (bits[1],) * 2
    assert gates.channels.sum() == 7


def test_a_channel_is_priced_at_the_width_of_its_weight(make: Make) -> None:
    prices = {}
    for bits in ((4, 8), (8, 4), (8, 8)):
        model, _ = parts(make(pruning_only, mu=0.1, bits=bits))
        prices[bits] = model.prior.channel_strength
        # the largest layer has 4 channels and weight 1: 0.1 * bits / 4 each
        torch.testing.assert_close(model.prior.channel_strength[4:], torch.full((4,), 0.1 * bits[0] / 4))
    torch.testing.assert_close(prices[8, 4], prices[8, 8])
