"""A compared method, ready for `fit`: model, guide, recipe, and what it costs."""

from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_bbits.cost import FLOAT_BITS, NetworkCost
from pyro_bbits.gates import GateValues
from pyro_bbits.inference.guides import AbstractGateGuide
from pyro_bbits.inference.recipe import Recipe
from pyro_bbits.insertion import QuantizedNetwork, StructureSnapshot
from pyro_bbits.models import AbstractModel, Likelihood
from pyro_bbits.models.gated import LikelihoodName
from pyro_bbits.models.program import call_network, observe

__all__ = ["Baseline", "RuleModel"]


class RuleModel(AbstractModel):
    r"""A network quantized by a rule, with nothing random but the data: all its gates are open.

    .. math::
        -\frac{1}{N} \log p(D \mid \theta) + P

    is the loss that :func:`~pyro_bbits.inference.fit` minimizes with an :class:`~pyro_bbits.inference.EmptyGuide`,
    `P` being the rule's penalty, a factor of the program at the site `penalty`.

    Arguments:
        net: The network, with a rule.
        num_data: Number of training samples `N`.
        likelihood: As for :class:`~pyro_bbits.models.GatedModel`.

    Raises:
        ValueError: If the network has no rule.
    """

    channels: Tensor
    tensors: Tensor

    def __init__(
        self, net: QuantizedNetwork, num_data: int, likelihood: LikelihoodName | Likelihood = "categorical"
    ) -> None:
        super().__init__(net, num_data, likelihood)
        if net.rule is None:
            raise ValueError("the network has no rule to quantize by; set network.rule, or use a GatedModel.")
        self.net: QuantizedNetwork
        gates = net.open_gates()  # kept on the device: a step that is captured cannot bring them there
        self.register_buffer("channels", gates.channels, persistent=False)
        self.register_buffer("tensors", gates.tensors, persistent=False)

    def forward(self, x: Any, y: Tensor | None = None) -> Tensor:
        """Run the program on a batch; see :meth:`~pyro_bbits.models.GatedModel.forward`."""
        assert self.net.rule is not None
        penalty = self.net.rule.penalty()
        if penalty is not None:
            pyro.factor("penalty", -self.num_data * penalty)
        return observe(self.likelihood, self._call(x, None), y, self.num_data)

    def predict(self, x: Any, gates: GateValues | None = None) -> Any:
        """Distribution of the targets given inputs."""
        return self.likelihood(self._call(x, gates))

    def _call(self, x: Any, gates: GateValues | None) -> Any:
        return call_network(self.net, x, gates=GateValues(self.channels, self.tensors) if gates is None else gates)


@dataclass(frozen=True)
class Baseline:
    """What the training loop needs of a compared method.

    `fit(b.model, b.guide, train, validation, recipe=b.recipe)` trains it, `evaluate(b.model, test, b.gates())`
    evaluates it.

    Attributes:
        name: Its name in `BASELINES`.
        model: The model.
        guide: Its guide; an :class:`~pyro_bbits.inference.EmptyGuide` where nothing is random.
        recipe: How it is trained in its paper, as far as a recipe can say it; None is the library's default.
        structure: What is known of the quantized network.
        float_bits: Width of every tensor of a network that is not quantized at all; it has no quantizers to tell it.
    """

    name: str
    model: AbstractModel
    guide: nn.Module
    recipe: Recipe | None
    structure: StructureSnapshot = field(repr=False)
    float_bits: int = FLOAT_BITS

    def gates(self) -> GateValues | None:
        """The decided gates to evaluate with; None where there are none to decide."""
        return self.guide.hard_gates() if isinstance(self.guide, AbstractGateGuide) else None

    def bits(self) -> dict[str, float]:
        """Width of each tensor in bits, by name, at present; 0 for a weight without channels."""
        gates, layout = self.gates(), self.structure.layout
        values = self._widths().tolist() if gates is None else layout.bits(gates)
        return dict(zip(layout.tensors, values, strict=True))

    def relative_bops(self) -> float:
        """BOPs of the present state in percent of 32 x 32 bits, counted as for every other network here.

        See :class:`~pyro_bbits.NetworkCost`: the network's input counts as 8 bit, so an unquantized one has less than
        100 %.
        """
        cost, gates = NetworkCost(self.structure), self.gates()
        if gates is not None:
            return float(cost(GateValues(*(g.cpu() for g in gates))))
        return float(cost.relative_bops_at(self._widths(), self.structure.layout.open_gates().channels))

    def _widths(self) -> Tensor:
        rule = self.model.net.rule if isinstance(self.model.net, QuantizedNetwork) else None
        if rule is None:
            return torch.full((len(self.structure.layout.tensors),), float(self.float_bits))
        return rule.widths().detach().float().cpu()
