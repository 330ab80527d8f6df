"""LSQ: uniform quantization at fixed widths with learned steps."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pyro_bbits.inference.baselines.baseline import Baseline, RuleModel
from pyro_bbits.inference.baselines.tensors import TensorFacts, TensorQuantizer, add_rule
from pyro_bbits.inference.objective import EmptyGuide
from pyro_bbits.inference.recipe import Recipe
from pyro_bbits.insertion import StructureSnapshot
from pyro_bbits.models import Likelihood
from pyro_bbits.models.gated import LikelihoodName

__all__ = ["LSQTensor", "lsq", "lsq_quantize"]

LSQ_RECIPE = Recipe(weight_lr=1e-2, weight_optimizer="sgd", schedule="cosine")


class _LSQ(torch.autograd.Function):
    """Forward and backward pass from the input and the step alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, negative: int, positive: int, scale: float) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.limits, ctx.scale = (-negative, positive), scale
        return (x / step).clamp(-negative, positive).round() * step

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, step = ctx.saved_tensors
        low, high = ctx.limits
        ratio = x / step
        inside = (ratio > low) & (ratio < high)
        code = ratio.clamp(low, high).round()
        noise = torch.where(inside, code - ratio, code)
        return grad * inside, ((grad * noise).sum() * ctx.scale).to(step.dtype).reshape(step.shape), None, None, None


def lsq_quantize(x: Tensor, step: Tensor, negative: int, positive: int, scale: float = 1.0) -> Tensor:
    r"""Quantize with a learned step.

    .. math::
        \bar v = \mathrm{round}(\mathrm{clip}(v / s, -Q_N, Q_P)), \qquad \hat v = \bar v s

    with :math:`\partial \hat v / \partial v = 1` where :math:`-Q_N < v / s < Q_P`, else 0, and

    .. math::
        \frac{\partial \hat v}{\partial s} = g \cdot
        \begin{cases} -v / s + \mathrm{round}(v / s) & -Q_N < v / s < Q_P \\
        -Q_N & v / s \le -Q_N \\ Q_P & v / s \ge Q_P \end{cases}

    Arguments:
        x: Any shape.
        step: The step `s`, a scalar above 0.
        negative: :math:`Q_N`, levels below zero.
        positive: :math:`Q_P`, levels above zero.
        scale: `g`, which the gradient of the step is multiplied by.

    References:
        Esser et al., Learned step size quantization, 2020 (arXiv 1902.08153), section 2.
    """
    return cast(Tensor, _LSQ.apply(x, step, negative, positive, scale))


class LSQTensor(TensorQuantizer):
    r"""The LSQ quantizer of one tensor.

    :math:`Q_N = 2^{b-1}, Q_P = 2^{b-1} - 1` if signed, else :math:`Q_N = 0, Q_P = 2^b - 1`. The step starts at
    :math:`2 \langle |v| \rangle / \sqrt{Q_P}`, and its gradient is scaled by :math:`g = 1 / \sqrt{n Q_P}` with `n` the
    numbers in the weight, or in the activation of one sample. Its magnitude is what is used, so that a step that an
    optimizer takes past zero comes back; the paper leaves that open.

    Raises:
        ValueError: If the tensor shall have less than 2 bits.
    """

    def __init__(self, facts: TensorFacts) -> None:
        super().__init__(facts.bits)
        if facts.bits < 2:
            raise ValueError(f"LSQ has a grid from 2 bits on; got {facts.bits} for {facts.name!r}.")
        self.negative = 2 ** (facts.bits - 1) if facts.signed else 0
        self.positive = 2 ** (facts.bits - facts.signed) - 1
        self.scale = 1 / math.sqrt(facts.numel * self.positive)
        self.step = nn.Parameter(torch.tensor(2 * facts.mean_abs / math.sqrt(self.positive)))

    def forward(self, x: Tensor) -> Tensor:
        return lsq_quantize(x, self.step.abs().clamp_min(1e-12), self.negative, self.positive, self.scale)


def lsq(
    net: nn.Module,
    example_inputs: Any,
    num_data: int,
    *,
    bits: tuple[int, int] = (4, 4),
    edge_bits: int | None = None,
    likelihood: LikelihoodName | Likelihood = "categorical",
) -> Baseline:
    """LSQ: weights and activations at fixed widths, their steps learned together with the weights.

    The recipe is the paper's: Nesterov SGD at 0.01 with cosine decay, for weights and steps alike. (The paper's SGD is
    not Nesterov's, and has weight decay.) With Adam the gradient scale would have no effect, as Adam undoes it. The
    paper sets steps from the first batch; here the example inputs are that batch, seen by the float network.

    Arguments:
        net: The float network, pretrained in the paper; it is copied.
        example_inputs: As for :func:`~pyro_bbits.quantize`.
        num_data: Number of training samples.
        bits: Width of weights and of activations, from 2; 32 leaves them in float.
        edge_bits: Width of the first and last layer; 8 in the paper, None for that of all others.
        likelihood: As for :class:`~pyro_bbits.models.GatedModel`.

    References:
        Esser et al., Learned step size quantization, 2020 (arXiv 1902.08153).
    """
    network = add_rule(net, example_inputs, bits, edge_bits, LSQTensor)
    model = RuleModel(network, num_data, likelihood)
    return Baseline("lsq", model, EmptyGuide(), LSQ_RECIPE, StructureSnapshot.of(network))
