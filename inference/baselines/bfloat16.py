"""The network in bfloat16 arithmetic, in training and in evaluation."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pyro_bbits.cost import FLOAT_BITS
from pyro_bbits.inference.baselines.baseline import Baseline
from pyro_bbits.inference.objective import EmptyGuide
from pyro_bbits.inference.precision import autocast
from pyro_bbits.insertion import StructureSnapshot, quantize
from pyro_bbits.models import Likelihood, PlainModel
from pyro_bbits.models.gated import LikelihoodName

__all__ = ["BFloat16Network", "bfloat16"]

BFLOAT16_BITS = 16


class BFloat16Network(nn.Module):
    """A network whose products are computed from bfloat16 operands wherever it is called; its output is float32.

    Arguments:
        net: The network.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network under autocast."""
        device = next(leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        with autocast("bf16", device):
            result = self.net(*args, **kwargs)
        return tree_map(lambda t: t.float() if isinstance(t, Tensor) and t.dtype == torch.bfloat16 else t, result)


def bfloat16(
    net: nn.Module,
    example_inputs: Any,
    num_data: int,
    *,
    likelihood: LikelihoodName | Likelihood = "categorical",
) -> Baseline:
    """Products of bfloat16 operands, weights and optimizers in float32. Counted as 16 x 16 bit, with an input of 8.

    `fit(precision="bf16")` trains alike, but evaluates in float32; this evaluates as it trains.

    Arguments:
        net: The network; it is copied.
        example_inputs: As for :func:`~pyro_bbits.quantize`; they serve to count.
        num_data: Number of training samples.
        likelihood: As for :class:`~pyro_bbits.models.GatedModel`.
    """
    structure = StructureSnapshot.of(quantize(net, example_inputs, bits=(FLOAT_BITS,)))
    model = PlainModel(BFloat16Network(copy.deepcopy(net)), num_data, likelihood)
    return Baseline("bfloat16", model, EmptyGuide(), None, structure, float_bits=BFLOAT16_BITS)
