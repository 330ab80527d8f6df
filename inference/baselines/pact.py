"""PACT: learned clips of activations, and DoReFa's weights."""

from typing import Any

import torch
from torch import Tensor, nn

from pyro_bbits.inference.baselines.baseline import Baseline, RuleModel
from pyro_bbits.inference.baselines.tensors import TensorFacts, TensorQuantizer, TensorRule, add_rule
from pyro_bbits.inference.objective import EmptyGuide
from pyro_bbits.inference.recipe import Recipe
from pyro_bbits.insertion import StructureSnapshot
from pyro_bbits.models import Likelihood
from pyro_bbits.models.gated import LikelihoodName

__all__ = ["DoReFaWeight", "PACTActivation", "dorefa_weight", "pact", "pact_quantize"]

PACT_RECIPE = Recipe(weight_lr=1e-2, weight_optimizer="sgd")


def _round(x: Tensor) -> Tensor:
    """Round with derivative 1; the value is exact."""
    return x.round().detach() + (x - x.detach())


def pact_quantize(x: Tensor, alpha: Tensor, bits: int, *, signed: bool = False) -> Tensor:
    r"""Clip at a learned level and quantize.

    .. math::
        y = \tfrac12 (|x| - |x - \alpha| + \alpha), \qquad
        y_q = \mathrm{round}\Big(y \frac{2^k - 1}{\alpha}\Big) \frac{\alpha}{2^k - 1}

    Rounding is passed straight through, the scale as if it were constant: :math:`\partial y_q / \partial \alpha` is 0
    below :math:`\alpha` and 1 from there on, :math:`\partial y_q / \partial x` is 1 inside and 0 outside.

    Arguments:
        x: Any shape.
        alpha: The clip, a scalar above 0.
        bits: `k`.
        signed: Clip to both sides, :math:`[-\alpha, \alpha]` with :math:`2^{k-1} - 1` levels on each; the paper has
            ReLU in front of every activation and no such case. The gradient of the clip is then -1 at the lower end.

    References:
        Choi et al., PACT, 2018 (arXiv 1805.06085), section 3.
    """
    levels = 2 ** (bits - signed) - 1
    scale = (levels / alpha).detach()
    above = x >= alpha
    clipped = torch.where(above, alpha, x)
    low = -alpha if signed else torch.zeros_like(alpha)
    clipped = torch.where(x <= low, low, clipped)
    quantized: Tensor = _round(clipped * scale) / scale
    return quantized


def dorefa_weight(w: Tensor, bits: int) -> Tensor:
    r"""DoReFa's weights in [-1, 1].

    .. math::
        w_q = 2 \, \mathrm{quantize}_k\Big(\frac{\tanh w}{2 \max |\tanh w|} + \frac12\Big) - 1, \qquad
        \mathrm{quantize}_k(r) = \frac{\mathrm{round}((2^k - 1) r)}{2^k - 1}

    Rounding is passed straight through; all else is differentiated as it stands, the maximum included.

    Arguments:
        w: Any shape.
        bits: `k`.

    References:
        Zhou et al., DoReFa-Net, 2016 (arXiv 1606.06160), sections 2.2 and 2.3.
    """
    squashed, levels = w.tanh(), 2**bits - 1
    unit = squashed / (2 * squashed.abs().amax().clamp_min(1e-12)) + 0.5
    quantized: Tensor = 2 * (_round(unit * levels) / levels) - 1
    return quantized


class PACTActivation(TensorQuantizer):
    """An activation with a learned clip, which starts at the largest magnitude that the example inputs show.

    Raises:
        ValueError: If the width leaves no level beside zero.
    """

    def __init__(self, facts: TensorFacts) -> None:
        super().__init__(facts.bits)
        if facts.bits < 1 + facts.signed:
            raise ValueError(f"a signed activation needs at least 2 bits; got {facts.bits} for {facts.name!r}.")
        self.signed = facts.signed
        self.alpha = nn.Parameter(torch.tensor(facts.max_abs))

    def forward(self, x: Tensor) -> Tensor:
        return pact_quantize(x, self.alpha.abs().clamp_min(1e-12), self.bits, signed=self.signed)


class DoReFaWeight(TensorQuantizer):
    """A weight as DoReFa quantizes it, perhaps times its largest magnitude.

    Arguments:
        facts: Of the weight.
        keep_scale: See :func:`pact`.
    """

    def __init__(self, facts: TensorFacts, keep_scale: bool) -> None:
        super().__init__(facts.bits)
        self.keep_scale = keep_scale

    def forward(self, x: Tensor) -> Tensor:
        weight = dorefa_weight(x, self.bits)
        return weight * x.detach().abs().amax() if self.keep_scale else weight


class _PACTRule(TensorRule):
    """All quantizers, and the decay of the clips."""

    decay = 0.0

    def penalty(self) -> Tensor | None:
        alphas: list[Tensor] = [
            quantizer.alpha for quantizer in self.quantizers if isinstance(quantizer, PACTActivation)
        ]
        return self.decay / 2 * torch.stack(alphas).square().sum() if alphas else None

    def extra_repr(self) -> str:
        return f"decay={self.decay}"


def pact(
    net: nn.Module,
    example_inputs: Any,
    num_data: int,
    *,
    bits: tuple[int, int] = (4, 4),
    edge_bits: int | None = 32,
    decay: float = 1e-4,
    keep_scale: bool = True,
    likelihood: LikelihoodName | Likelihood = "categorical",
) -> Baseline:
    r"""PACT: activations clipped at learned levels, weights as in DoReFa.

    The loss has :math:`\frac{\lambda}{2} \sum \alpha^2` added, as weight decay on the clips would. Weights and clips
    are trained by one Nesterov SGD. Clips start at the largest magnitude that the example inputs show; the paper takes
    a constant that is safely larger.

    Arguments:
        net: The float network; it is copied.
        example_inputs: As for :func:`~pyro_bbits.quantize`.
        num_data: Number of training samples.
        bits: Width of weights and of activations; 32 leaves them in float.
        edge_bits: Width of the first and last layer; the paper leaves them in float, None is that of all others.
        decay: :math:`\lambda` in nats per sample; the paper takes that of the weights' decay.
        keep_scale: Multiply weights by their largest magnitude (as a constant). DoReFa's lie in [-1, 1], which a batch
            norm behind the layer makes good, and nothing else: a network without norms starts to overflow. False is
            the formula.
        likelihood: As for :class:`~pyro_bbits.models.GatedModel`.

    Raises:
        ValueError: If the decay is negative or not finite.

    References:
        Choi et al., PACT, 2018 (arXiv 1805.06085); weights as in Zhou et al., DoReFa-Net, 2016 (arXiv 1606.06160).
    """
    if not 0 <= decay < float("inf"):
        raise ValueError(f"decay must be a finite number of at least 0; got {decay}.")

    def make(facts: TensorFacts) -> TensorQuantizer:
        return DoReFaWeight(facts, keep_scale) if facts.is_weight else PACTActivation(facts)

    network = add_rule(net, example_inputs, bits, edge_bits, make)
    assert isinstance(network.rule, TensorRule)
    network.rule = _PACTRule(list(network.rule.quantizers))  # type: ignore[arg-type]
    network.rule.decay = decay
    model = RuleModel(network, num_data, likelihood)
    return Baseline("pact", model, EmptyGuide(), PACT_RECIPE, StructureSnapshot.of(network))
