"""DQ: learned step and learned range, and by them a learned width for each tensor."""

import math
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pyro_bbits.cost import NetworkCost
from pyro_bbits.inference.baselines.baseline import Baseline, RuleModel
from pyro_bbits.inference.baselines.tensors import TensorFacts, TensorQuantizer, TensorRule, add_rule
from pyro_bbits.inference.evaluation import device_of
from pyro_bbits.inference.objective import EmptyGuide
from pyro_bbits.inference.recipe import Recipe
from pyro_bbits.insertion import QuantizedNetwork, StructureSnapshot
from pyro_bbits.models import Likelihood
from pyro_bbits.models.gated import LikelihoodName

__all__ = ["DQRule", "DQTensor", "dq", "dq_quantize", "dq_width"]

DQ_RECIPE = Recipe(range_lr=1e-2)
LEAST_BITS, MOST_BITS = 2, 16
ROUNDING = 1e-4
"""In bits: a range of exactly so many steps shall not be counted one bit wider for float32's sake."""


class _DQ(torch.autograd.Function):
    """The paper's parametrization by step and range, differentiated as its table says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, top: Tensor, signed: bool) -> Tensor:
        magnitude = x.abs() if signed else x.clamp_min(0)
        above = magnitude > top
        quantized = torch.where(above, top.to(x.dtype), step * (magnitude / step + 0.5).floor()) * x.sign()
        ctx.save_for_backward(x, step, top, quantized)
        ctx.signed = signed
        return quantized

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, step, top, quantized = ctx.saved_tensors
        above = x.abs() > top
        inside = ~above & (x >= 0) if not ctx.signed else ~above
        outside = above if ctx.signed else above & (x > 0)
        dstep = (grad * (quantized - x) * inside).sum() / step
        dtop = (grad * x.sign() * outside).sum()
        return grad * inside, dstep.to(step.dtype), dtop.to(top.dtype), None


def dq_quantize(x: Tensor, step: Tensor, top: Tensor, *, signed: bool) -> Tensor:
    r"""Quantize with a learned step `d` and a learned range :math:`q`.

    .. math::
        Q(x) = \mathrm{sign}(x) \begin{cases} d \lfloor |x| / d + 1/2 \rfloor & |x| \le q \\ q & |x| > q \end{cases}

    with :math:`\partial Q / \partial x = 1`, :math:`\partial Q / \partial d = (Q(x) - x) / d`,
    :math:`\partial Q / \partial q = 0` inside, and 0, 0, :math:`\mathrm{sign}(x)` outside. Unsigned tensors are cut off
    at 0, where all three are 0.

    Arguments:
        x: Any shape.
        step: `d`, a scalar above 0.
        top: :math:`q`, a scalar above 0.
        signed: Whether there are levels below 0.

    References:
        Uhlich et al., Mixed precision DNNs, 2020 (arXiv 1905.11452), section 2: case U3, by step and range.
    """
    return cast(Tensor, _DQ.apply(x, step, top, signed))


def dq_width(step: Tensor, top: Tensor, *, signed: bool) -> Tensor:
    r"""Width that step and range need, rounded up; the gradient is that of the width before rounding.

    .. math:: b = \lceil \log_2(q / d + 1) \rceil + 1[\text{signed}]

    Arguments:
        step: `d`.
        top: :math:`q`.
        signed: Whether there are levels below 0.

    Example:
        >>> dq_width(torch.tensor(1.0), torch.tensor([3.0, 7.0, 7.5]), signed=False)
        tensor([2., 3., 4.])
    """
    width = torch.log2(top / step + 1) + signed
    return (width - ROUNDING).ceil().detach() + (width - width.detach())


class DQTensor(TensorQuantizer):
    """The DQ quantizer of one tensor; step and range are kept as logarithms.

    The width stays between 2 and 16 bits: beyond, the step is taken that has the width at the bound, while gradients
    of the loss still reach the step's parameter and can bring it back.

    Arguments:
        facts: Of the tensor; its width is where training starts.

    Raises:
        ValueError: If that is not between 2 and 16.
    """

    def __init__(self, facts: TensorFacts) -> None:
        super().__init__(facts.bits)
        if not LEAST_BITS <= facts.bits <= MOST_BITS:
            raise ValueError(f"DQ starts from {LEAST_BITS} to {MOST_BITS} bits; got {facts.bits} for {facts.name!r}.")
        self.signed = facts.signed
        self.log_top = nn.Parameter(torch.tensor(facts.max_abs).log())
        self.log_step = nn.Parameter(self.log_top.detach() - self._log_levels(facts.bits))

    def forward(self, x: Tensor) -> Tensor:
        step = self._bounded().detach() + (self.log_step - self.log_step.detach())
        return dq_quantize(x, step.exp(), self.log_top.exp(), signed=self.signed)

    def width(self) -> Tensor:
        return dq_width(self._bounded().exp(), self.log_top.exp(), signed=self.signed)

    def _log_levels(self, bits: int) -> float:
        return math.log(2 ** (bits - self.signed) - 1)

    def _bounded(self) -> Tensor:
        low, high = self.log_top - self._log_levels(MOST_BITS), self.log_top - self._log_levels(LEAST_BITS)
        return torch.maximum(torch.minimum(self.log_step, high), low)


class DQRule(TensorRule):
    r"""All quantizers, and the paper's penalty on a budget that is exceeded.

    .. math:: P = \lambda \max(0, C - C_0)^2

    with `C` the BOPs in percent of 32 x 32 bits; the paper has bounds on the memory of weights and activations.

    Arguments:
        network: The network, with a rule whose quantizers become those of this one.
        budget: :math:`C_0` in percent.
        strength: :math:`\lambda` in nats per sample.

    Attributes:
        powers_of_two: Whether widths are counted as the next power of two, which hardware has. The penalty does not.
    """

    own_rate: ClassVar[bool] = True
    channels: Tensor

    def __init__(self, network: QuantizedNetwork, budget: float, strength: float) -> None:
        assert isinstance(network.rule, TensorRule)
        super().__init__(list(network.rule.quantizers))  # type: ignore[arg-type]
        self.cost, self.budget, self.strength = NetworkCost(network), budget, strength
        self.register_buffer("channels", network.open_gates().channels, persistent=False)
        self.powers_of_two = False
        self.to(device_of(network))

    def widths(self) -> Tensor:
        widths = super().widths()
        return torch.exp2((torch.log2(widths) - ROUNDING).ceil()) if self.powers_of_two else widths

    def penalty(self) -> Tensor | None:
        excess = self.cost.relative_bops_at(super().widths(), self.channels) - self.budget
        return self.strength * excess.clamp_min(0).square()

    def extra_repr(self) -> str:
        return f"budget={self.budget}, strength={self.strength}"


def dq(
    net: nn.Module,
    example_inputs: Any,
    num_data: int,
    *,
    bits: tuple[int, int] = (8, 8),
    edge_bits: int | None = None,
    budget: float = 1.0,
    strength: float = 0.1,
    powers_of_two: bool = False,
    likelihood: LikelihoodName | Likelihood = "categorical",
) -> Baseline:
    """DQ-like continuous widths: step and range are learned, the width follows, and BOPs beyond a budget are penalized.

    What differs from the paper: step and range are logarithms with an Adam of their own, the step is not rounded to a
    power of two, and the budget is one of BOPs.

    Arguments:
        net: The float network, pretrained in the paper; it is copied.
        example_inputs: As for :func:`~pyro_bbits.quantize`.
        num_data: Number of training samples.
        bits: Width of weights and of activations at the start, 2 to 16; 32 leaves them in float for good.
        edge_bits: The same for the first and last layer; None for that of all others.
        budget: BOPs in percent of 32 x 32 bits.
        strength: Of the penalty, in nats per sample and squared percent.
        powers_of_two: Count widths as the next power of two.
        likelihood: As for :class:`~pyro_bbits.models.GatedModel`.

    Raises:
        ValueError: If budget or strength is negative or not finite.

    References:
        Uhlich et al., Mixed precision DNNs: all you need is a good parametrization, 2020 (arXiv 1905.11452).
    """
    for name, value in (("budget", budget), ("strength", strength)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0; got {value}.")
    network = add_rule(net, example_inputs, bits, edge_bits, DQTensor)
    network.rule = rule = DQRule(network, budget, strength)
    rule.powers_of_two = powers_of_two
    model = RuleModel(network, num_data, likelihood)
    return Baseline("dq", model, EmptyGuide(), DQ_RECIPE, StructureSnapshot.of(network))
