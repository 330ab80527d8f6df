"""TWN: ternary weights, activations in float or at a fixed width."""

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

__all__ = ["TernaryWeight", "ternarize", "ternary"]

TERNARY_BITS = 2
THRESHOLD = 0.7


class _Ternarize(torch.autograd.Function):
    """The gradient of the ternary weight is that of the float one."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        magnitude = w.abs()
        kept = magnitude > THRESHOLD * magnitude.mean()
        scale = (magnitude * kept).sum() / kept.sum().clamp_min(1)
        return w.sign() * kept * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def ternarize(w: Tensor) -> Tensor:
    r"""The ternary weight nearest to a weight, by the paper's rule.

    .. math::
        \Delta = 0.7 \, \langle |w| \rangle, \qquad \alpha = \langle |w_i| \rangle_{|w_i| > \Delta}, \qquad
        w_t = \alpha \, \mathrm{sign}(w) \, 1[|w| > \Delta]

    The gradient is passed straight through.

    Arguments:
        w: Any shape.

    References:
        Li, Zhang, Liu, Ternary weight networks, 2016 (arXiv 1605.04711), section 2.
    """
    return cast(Tensor, _Ternarize.apply(w))


class TernaryWeight(TensorQuantizer):
    """A ternary weight with one scale; it counts as 2 bit."""

    def __init__(self, facts: TensorFacts) -> None:
        super().__init__(TERNARY_BITS)

    def forward(self, x: Tensor) -> Tensor:
        return ternarize(x)


def ternary(
    net: nn.Module,
    example_inputs: Any,
    num_data: int,
    *,
    activation_bits: int = 32,
    edge_bits: int | None = None,
    likelihood: LikelihoodName | Likelihood = "categorical",
) -> Baseline:
    """Ternary weights with the thresholds and scales of TWN, one of each per tensor; trained by the default recipe.

    Arguments:
        net: The float network; it is copied.
        example_inputs: As for :func:`~pyro_bbits.quantize`.
        num_data: Number of training samples.
        activation_bits: Width of activations; 32, the paper's, leaves them in float, and others are quantized as in
            LSQ.
        edge_bits: Width of the first and last layer, quantized as in LSQ unless it is 2 (ternary) or 32 (float); None,
            the paper's, makes no exception of them.
        likelihood: As for :class:`~pyro_bbits.models.GatedModel`.

    References:
        Li, Zhang, Liu, Ternary weight networks, 2016 (arXiv 1605.04711).
    """

    def make(facts: TensorFacts) -> TensorQuantizer:
        ternarized = facts.is_weight and facts.bits == TERNARY_BITS
        return TernaryWeight(facts) if ternarized else LSQTensor(facts)

    network = add_rule(net, example_inputs, (TERNARY_BITS, activation_bits), edge_bits, make)
    model = RuleModel(network, num_data, likelihood)
    return Baseline("ternary", model, EmptyGuide(), None, StructureSnapshot.of(network))
