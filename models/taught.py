"""Softer targets: a gated network that also learns from what a float network predicts, or from doubt (smoothing)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bbits.insertion import QuantizedNetwork
from pyro_bbits.models.gated import GatedModel
from pyro_bbits.models.likelihoods import Likelihood, ScoredCategorical
from pyro_bbits.models.program import call_network
from pyro_bbits.prior import GatePrior

__all__ = ["DistilledModel", "SmoothedModel", "TaughtCategorical"]


class TaughtCategorical(ScoredCategorical):
    r"""Classes that are observed together with a teacher's opinion of them.

    .. math::
        (1 - w) \log p(y) + w \sum_k t_k \log p_k

    Arguments:
        scores: Unnormalized log-probabilities of the student, `(N, K)`.
        teacher: Those of the teacher.
        weight: Its weight `w`, 0 to 1.

    Raises:
        ValueError: If the teacher's scores have another shape.
    """

    def __init__(self, scores: Tensor, teacher: Tensor, weight: float) -> None:
        if teacher.shape != scores.shape:
            raise ValueError(
                f"teacher and student must score the same classes; got {tuple(teacher.shape)} of the teacher and "
                f"{tuple(scores.shape)} of the student."
            )
        super().__init__(scores, validate_args=False)
        self.teacher, self.weight = teacher, weight

    def log_prob(self, value: Tensor) -> Tensor:
        """The weighted log-probability, in nats."""
        taught = (self.teacher.softmax(-1) * self.logits).sum(-1)
        return (1 - self.weight) * super().log_prob(value) + self.weight * taught

    def expand(self, batch_shape: Any, _instance: Any = None) -> "TaughtCategorical":
        """Expand to a larger batch shape."""
        scores, teacher = (t.expand(*batch_shape, self._num_events) for t in (self.scores, self.teacher))
        return type(self)(scores, teacher, self.weight)


class _TaughtModel(GatedModel):
    """A gated model whose data are labels and someone's opinion of them; evaluated as any other.

    Arguments:
        net: The quantized network.
        prior: Its prior.
        num_data: Number of training samples.
        weight: Weight of the opinion, 0 to 1.

    Raises:
        ValueError: As for :class:`GatedModel`, or if the weight is no share of 1.
    """

    def __init__(self, net: QuantizedNetwork, prior: GatePrior, num_data: int, weight: float) -> None:
        super().__init__(net, prior, num_data)
        if not 0 <= weight <= 1:
            raise ValueError(f"the weight of an opinion must lie between 0 and 1; got {weight}.")
        self.weight = weight

    def opinion(self, x: Any) -> Callable[[Tensor], Tensor]:
        """Scores of the teacher for a batch, given those of the student."""
        raise NotImplementedError

    def likelihood_of(self, x: Any) -> Likelihood:
        """Labels and opinion of a batch, given the student's scores."""
        opinion = self.opinion(x)

        def taught(scores: Tensor) -> TaughtCategorical:
            return TaughtCategorical(scores, opinion(scores.detach()), self.weight)

        return taught


class SmoothedModel(_TaughtModel):
    r"""A gated model with smoothed labels: a share of each is spread over all classes.

    Arguments:
        net: The quantized network.
        prior: Its prior.
        num_data: Number of training samples.
        weight: The share, 0 to 1.

    Raises:
        ValueError: As for :class:`GatedModel`, or if the weight is no share of 1.

    References:
        Szegedy et al.: Rethinking the Inception architecture for computer vision, 2015, arXiv:1512.00567, section 7.
    """

    def opinion(self, x: Any) -> Callable[[Tensor], Tensor]:
        """All classes alike."""
        return torch.zeros_like


class DistilledModel(_TaughtModel):
    r"""A gated model whose data are labels and a float network's predictions; evaluated as any other.

    With probabilities `t` of the float network and weight `w` a sample adds

    .. math::
        (1 - w) \log p(y \mid x, z) + w \sum_k t_k(x) \log p_k(x, z)

    Arguments:
        net: The quantized network, best with the weights of the float network.
        prior: Its prior.
        num_data: Number of training samples.
        teacher: The trained float network, on the device of the model. It is put into evaluation mode, is no part of
            the model and does not learn.
        weight: Weight `w` of its predictions, 0 to 1.

    Raises:
        TypeError: If the teacher is no module, or a quantized network.
        ValueError: As for :class:`GatedModel`, or if the weight is no share of 1.

    References:
        Hinton et al.: Distilling the knowledge in a neural network, 2015, arXiv:1503.02531, at temperature 1.

    Example:
        >>> import pyro_bbits as bb
        >>> teacher, x = nn.Linear(3, 2), torch.rand(8, 3)  # trained before
        >>> net = bb.quantize(teacher, x)
        >>> model = DistilledModel(net, bb.GatePrior(net, mu=0.1), num_data=8, teacher=teacher, weight=0.5)
        >>> model(x, torch.zeros(8, dtype=torch.long)).shape
        torch.Size([8])
    """

    def __init__(
        self, net: QuantizedNetwork, prior: GatePrior, num_data: int, teacher: nn.Module, weight: float
    ) -> None:
        super().__init__(net, prior, num_data, weight)
        if not isinstance(teacher, nn.Module) or isinstance(teacher, QuantizedNetwork):
            raise TypeError(f"teacher must be a trained float network; got {type(teacher).__name__}.")
        self._teacher = (teacher.eval(),)  # in a tuple: neither trained, saved nor switched to training mode

    def opinion(self, x: Any) -> Callable[[Tensor], Tensor]:
        """What the float network says."""

        @torch.no_grad()
        def says(scores: Tensor) -> Tensor:
            said: Tensor = call_network(self._teacher[0], x)
            return said

        return says
