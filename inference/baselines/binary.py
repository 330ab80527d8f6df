"""BWN: binary weights, activations in float or at a fixed width."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from pyro_bbits.inference.baselines.baseline import Baseline, RuleModel
from pyro_bbits.inference.baselines.lsq import LSQTensor
from pyro_bbits.inference.baselines.tensors import TensorFacts, TensorQuantizer, add_rule
from pyro_bbits.inference.objective import EmptyGuide
from pyro_bbits.insertion import StructureSnapshot
from pyro_bbits.models import Likelihood
from pyro_bbits.models.gated import LikelihoodName

__all__ = ["BinaryWeight", "binarize", "binary"]

BINARY_BITS = 1


class _Sign(torch.autograd.Function):
    """Sign, 1 at zero, with the gradient of the identity between -1 and 1."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return torch.where(w >= 0, 1.0, -1.0).to(w.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (w,) = ctx.saved_tensors
        return cast(Tensor, grad * (w.abs() <= 1))


def binarize(w: Tensor, *, per_channel: bool = True) -> Tensor:
    r"""The binary weight nearest to a weight.

    .. math::
        \tilde w = \alpha \, \mathrm{sign}(w), \qquad \alpha = \langle |w| \rangle

    with a scale for each output channel, or one for the tensor. Differentiated by the chain rule, with
    :math:`\partial\, \mathrm{sign}(w) / \partial w = 1[|w| \le 1]`:

    .. math::
        \frac{\partial L}{\partial w_i} = \frac{\mathrm{sign}(w_i)}{n} \sum_j g_j \, \mathrm{sign}(w_j)
        + \alpha \, g_i \, 1[|w_i| \le 1], \qquad g = \frac{\partial L}{\partial \tilde w}

    The paper writes the first term for :math:`j = i` alone, :math:`g_i / n`.

    Arguments:
        w: `(C, *)` with scales per channel, else any shape.
        per_channel: Whether each slice of dimension 0 has a scale of its own.

    References:
        Rastegari et al., XNOR-Net, 2016 (arXiv 1603.05279), section 3.1.
    """
    scale = w.abs().flatten(1).mean(1).reshape(-1, *[1] * (w.dim() - 1)) if per_channel else w.abs().mean()
    return scale * cast(Tensor, _Sign.apply(w))


class BinaryWeight(TensorQuantizer):
    """A binary weight; scales are per output channel where these are dimension 0, else one for the tensor.

    Arguments:
        facts: Of the weight.
        per_channel: Whether channels have scales of their own at all.
    """

    def __init__(self, facts: TensorFacts, per_channel: bool) -> None:
        super().__init__(BINARY_BITS)
        self.per_channel = per_channel and facts.has_rows

    def forward(self, x: Tensor) -> Tensor:
        return binarize(x, per_channel=self.per_channel)


def binary(
    net: nn.Module,
    example_inputs: Any,
    num_data: int,
    *,
    activation_bits: int = 32,
    edge_bits: int | None = None,
    per_channel: bool = True,
    likelihood: LikelihoodName | Likelihood = "categorical",
) -> Baseline:
    """Binary weights with the scales of BWN; trained by the default recipe.

    Arguments:
        net: The float network; it is copied.
        example_inputs: As for :func:`~pyro_bbits.quantize`.
        num_data: Number of training samples.
        activation_bits: Width of activations; 32, the paper's for BWN, leaves them in float, and others are quantized
            as in LSQ (XNOR-Net's signs of activations are not among them).
        edge_bits: Width of the first and last layer, quantized as in LSQ unless it is 1 or 32; the paper has them in
            float, 32. None makes no exception of them.
        per_channel: A scale for each output channel; False has one for the tensor.
        likelihood: As for :class:`~pyro_bbits.models.GatedModel`.

    References:
        Rastegari et al., XNOR-Net, 2016 (arXiv 1603.05279).
    """

    def make(facts: TensorFacts) -> TensorQuantizer:
        binarized = facts.is_weight and facts.bits == BINARY_BITS
        return BinaryWeight(facts, per_channel) if binarized else LSQTensor(facts)

    network = add_rule(net, example_inputs, (BINARY_BITS, activation_bits), edge_bits, make)
    model = RuleModel(network, num_data, likelihood)
    return Baseline("binary", model, EmptyGuide(), None, StructureSnapshot.of(network))
