"""The network itself, in float32 and in bfloat16."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyro_bbits.inference.baselines import Baseline, bfloat16, float32
from pyro_bbits.inference.objective import elbo_module

Make = Callable[..., Baseline]


def test_float32_is_the_network(make: Make, net: nn.Module) -> None:
    x = torch.rand(4, 1, 6, 6)
    baseline = make(float32)
    net.eval()
    baseline.model.eval()
    torch.testing.assert_close(baseline.model.predict(x).logits.softmax(-1), net(x).softmax(-1))


def test_bfloat16_multiplies_in_bfloat16_in_training_and_evaluation(make: Make, net: nn.Module) -> None:
    baseline = make(bfloat16)
    x, y = torch.rand(4, 1, 6, 6), torch.tensor([0, 1, 0, 1])
    kinds: list[torch.dtype] = []
    head = next(m for m in baseline.model.modules() if isinstance(m, nn.Linear))
    head.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    elbo_module(baseline.model, baseline.guide)(x, y).backward()
    baseline.model.eval()
    with torch.no_grad():
        logits: Tensor = baseline.model.predict(x).logits
    assert kinds == [torch.bfloat16] * 2
    assert logits.dtype == torch.float32
    assert all(p.dtype == torch.float32 and p.grad is not None for p in baseline.model.parameters())
    baseline.model.eval()
    reference = net.eval()(x).softmax(-1)
    error = (logits.softmax(-1) - reference).abs().max()
    assert 0 < error < 0.02  # operands have 8 bits
