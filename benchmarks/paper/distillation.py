"""Softer targets: a gated network that also learns from what a float network predicts, or from doubt (smoothing)."""

from typing import Any

import torch
from torch import Tensor, nn

from pyro_bbits.insertion import QuantizedNetwork
from pyro_bbits.models import GatedModel, sample_gates
from pyro_bbits.models.likelihoods import ScoredCategorical
from pyro_bbits.models.program import call_network, observe
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
    """

    def __init__(self, scores: Tensor, teacher: Tensor, weight: float) -> None:
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
    """A gated model whose data are labels and someone's opinion of them; evaluated as any other."""

    weight: float

    def opinion(self, x: Any, scores: Tensor) -> Tensor:
        """Scores of the teacher for a batch, given those of the student."""
        raise NotImplementedError

    def forward(self, x: Any, y: Tensor | None = None) -> Tensor:
        """Run the program on a batch."""
        gates = sample_gates(self.prior, self.num_data)
        output = call_network(self.net, x, gates=gates)
        with torch.no_grad():
            opinion = self.opinion(x, output)
        return observe(lambda scores: TaughtCategorical(scores, opinion, self.weight), output, y, self.num_data)


class SmoothedModel(_TaughtModel):
    r"""A gated model with smoothed labels: a share of each is spread over all classes.

    Arguments:
        net: The quantized network.
        prior: Its prior.
        num_data: Number of training samples.
        weight: The share, 0 to 1.

    References:
        Szegedy et al.: Rethinking the Inception architecture for computer vision, 2015, arXiv:1512.00567, section 7.
    """

    def __init__(self, net: QuantizedNetwork, prior: GatePrior, num_data: int, weight: float) -> None:
        super().__init__(net, prior, num_data)
        self.weight = weight

    def opinion(self, x: Any, scores: Tensor) -> Tensor:
        """All classes alike."""
        return torch.zeros_like(scores)


class DistilledModel(_TaughtModel):
    """A gated model whose data are labels and a float network's predictions; evaluated as any other.

    Arguments:
        net: The quantized network.
        prior: Its prior.
        num_data: Number of training samples.
        teacher: The trained float network; it is not a part of the model, and stays as it is.
        weight: Weight of its predictions, 0 to 1.
    """

    def __init__(
        self, net: QuantizedNetwork, prior: GatePrior, num_data: int, teacher: nn.Module, weight: float
    ) -> None:
        super().__init__(net, prior, num_data)
        self._teacher = (teacher.eval(),)  # in a tuple: neither trained, saved nor switched to training mode
        self.weight = weight

    def opinion(self, x: Any, scores: Tensor) -> Tensor:
        """What the float network says."""
        opinion: Tensor = call_network(self._teacher[0], x)
        return opinion
