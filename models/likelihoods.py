"""Likelihoods: from what a network returns to a distribution over the target of each sample."""

import math
from collections.abc import Callable
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn

__all__ = ["Likelihood", "NormalLikelihood", "categorical", "resolve_likelihood"]

Likelihood = Callable[[Any], Any]
"""Takes the network's output `(N, ...)`, returns a distribution with batch shape `(N,)`."""


def categorical(logits: Tensor) -> Any:
    """Classes with logits in dimension 1, `(N, K, *)`; further dimensions (pixels) are independent.

    Returns:
        A categorical distribution with batch shape `(N,)` and one class per remaining position.
    """
    return dist.Categorical(logits=logits.movedim(1, -1)).to_event(logits.dim() - 2)


class NormalLikelihood(nn.Module):
    """Real-valued targets of the output's shape, with one learned standard deviation.

    Arguments:
        scale: Initial standard deviation, above 0.

    Raises:
        ValueError: If `scale` is not positive.
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale must be above 0; got {scale}.")
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def forward(self, output: Tensor) -> Any:
        """A normal distribution around the output, with batch shape `(N,)`."""
        return dist.Normal(output, self.log_scale.exp()).to_event(output.dim() - 1)


def resolve_likelihood(likelihood: Literal["categorical", "normal"] | Likelihood) -> Likelihood:
    """A likelihood by name, or the user's own callable.

    Raises:
        ValueError: If the name is unknown.
    """
    if likelihood == "categorical":
        return categorical
    if likelihood == "normal":
        return NormalLikelihood()
    if callable(likelihood):
        return likelihood
    raise ValueError(f"likelihood must be 'categorical', 'normal' or a callable; got {likelihood!r}.")
