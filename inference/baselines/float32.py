"""The float32 network, trained as it is."""

import copy
from typing import Any

from torch import nn

from pyro_bbits.cost import FLOAT_BITS
from pyro_bbits.inference.baselines.baseline import Baseline
from pyro_bbits.inference.objective import EmptyGuide
from pyro_bbits.insertion import StructureSnapshot, quantize
from pyro_bbits.models import Likelihood, PlainModel
from pyro_bbits.models.gated import LikelihoodName

__all__ = ["float32"]


def float32(
    net: nn.Module,
    example_inputs: Any,
    num_data: int,
    *,
    likelihood: LikelihoodName | Likelihood = "categorical",
) -> Baseline:
    """Full precision: no quantizer and no gate. Its products count as 32 x 32 bit, with an input of 8.

    Arguments:
        net: The network; it is copied.
        example_inputs: As for :func:`~pyro_bbits.quantize`; they serve to count.
        num_data: Number of training samples.
        likelihood: As for :class:`~pyro_bbits.models.GatedModel`.
    """
    structure = StructureSnapshot.of(quantize(net, example_inputs, bits=(FLOAT_BITS,)))
    model = PlainModel(copy.deepcopy(net), num_data, likelihood)
    return Baseline("float32", model, EmptyGuide(), None, structure)
