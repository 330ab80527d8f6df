"""Likelihoods: from what a network returns to a distribution over the target of each sample."""

import math
from collections.abc import Callable
from typing import Any, Literal

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions.utils import lazy_property

__all__ = ["Likelihood", "NormalLikelihood", "ScoredCategorical", "categorical", "resolve_likelihood"]

NO_CLASS = torch.iinfo(torch.int64).min

Likelihood = Callable[[Any], Any]
"""Takes the network's output `(N, ...)`, returns a distribution with batch shape `(N,)`."""


class ScoredCategorical(dist.Categorical):
    r"""A categorical distribution that normalizes its logits only when they are read.

    The log-probability of targets of the batch shape is the usual loss,
    :math:`s_y - \log \sum_k e^{s_k}` from unnormalized scores `s`, by PyTorch's cross entropy: a few kernels instead of
    some sixteen. It is computed in float32 at least. Everything else is as in :class:`pyro.distributions.Categorical`.

    Arguments:
        scores: Unnormalized log-probabilities, `(*, K)`.

    Attributes:
        logits: Normalized log-probabilities.
        probs: Probabilities.

    Raises:
        ValueError: If the scores have no dimension, or under validation are not finite.

    Example:
        >>> ScoredCategorical(torch.tensor([[0.0, 0.0], [0.0, 100.0]])).log_prob(torch.tensor([1, 1]))
        tensor([-0.6931,  0.0000])
    """

    has_enumerate_support = True

    def __init__(self, scores: Tensor, validate_args: bool | None = None) -> None:
        if scores.dim() < 1:
            raise ValueError(f"scores must have a dimension of classes, (..., K); got shape {tuple(scores.shape)}.")
        self.scores = self._param = scores if scores.dtype == torch.float64 else scores.float()
        self._num_events = scores.shape[-1]
        if self._validate_args if validate_args is None else validate_args:
            self.logits  # noqa: B018  # what validation looks at
        torch.distributions.Distribution.__init__(self, scores.shape[:-1], validate_args=validate_args)

    @lazy_property
    def logits(self) -> Tensor:
        """Normalized log-probabilities, `(*, K)`."""
        return self.scores.log_softmax(-1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "ScoredCategorical":
        """Expand to a larger batch shape."""
        new = type(self)(self.scores.expand(*batch_shape, self._num_events), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of classes, in nats."""
        if value.shape != self.batch_shape or self._validate_args:
            return super().log_prob(value)  # type: ignore[no-any-return]
        scores = self.scores.movedim(-1, 1) if self.batch_shape else self.scores
        # no class is to be left out: one that does not exist is an error, as elsewhere
        return -F.cross_entropy(scores, value.long(), reduction="none", ignore_index=NO_CLASS)

    def summed_loss(self, value: Tensor) -> Tensor | None:
        """Minus the log-probabilities of a batch of classes, summed, in one kernel; None if it is no such batch.

        A scalar, in nats.
        """
        if value.dim() != 1 or value.shape != self.batch_shape or self._validate_args:
            return None
        return F.cross_entropy(self.scores, value.long(), reduction="sum", ignore_index=NO_CLASS)


def categorical(logits: Tensor) -> Any:
    """Classes with logits in dimension 1, `(N, K, *)`; further dimensions (pixels) are independent.

    Returns:
        A categorical distribution with batch shape `(N,)` and one class per remaining position.
    """
    return ScoredCategorical(logits.movedim(1, -1)).to_event(logits.dim() - 2)


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
