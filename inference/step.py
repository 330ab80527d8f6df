"""One training step on a batch."""

from typing import Any

from torch import Tensor, nn

from pyro_bbits.inference.distributed import Ranks
from pyro_bbits.inference.precision import Precision, autocast
from pyro_bbits.inference.recipe import Optimizers

__all__ = ["TrainingStep"]


class TrainingStep:
    """Objective, backward pass and optimizers on one batch; nothing is read back from the device.

    Arguments:
        objective: The negative ELBO in nats per data set, of a batch `(x, y)`.
        optimizers: What to update.
        ranks: The processes of the run.
        num_data: Data points of the data set.
        precision: Arithmetic of the network.
    """

    def __init__(
        self, objective: nn.Module, optimizers: Optimizers, ranks: Ranks, num_data: int, precision: Precision | None
    ) -> None:
        self.objective, self.optimizers, self.ranks = objective, optimizers, ranks
        self.num_data, self.precision = num_data, precision

    def loss(self, x: Any, y: Tensor, share: float = 1.0) -> Tensor:
        """The loss of a batch in nats per sample.

        Arguments:
            x: Inputs.
            y: Targets.
            share: Rows of this process over the mean of all: the KL is the same in every process and these weights
                have mean 1, so the mean of the losses is that of the whole batch.
        """
        with autocast(self.precision, self.ranks.device):
            loss: Tensor = self.objective(x, y)
        return loss * (share / self.num_data)

    def __call__(self, x: Any, y: Tensor) -> Tensor:
        """Take the step at the learning rates that are set, all processes having as many rows; returns the loss."""
        loss = self.loss(x, y)
        self.optimizers.update(loss)
        return self.ranks.mean(loss.detach())

    def forget_gradients(self) -> None:
        """Let go of all gradients."""
        self.optimizers.forget_gradients()
