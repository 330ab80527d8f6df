"""One training step on a batch."""

from typing import Any

from torch import Tensor, nn

from pyro_bbits.inference.compiled import CompiledNetwork
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

    Attributes:
        compiled: The network in compiled form, to be used; None uses it as it is.
    """

    def __init__(
        self, objective: nn.Module, optimizers: Optimizers, ranks: Ranks, num_data: int, precision: Precision | None
    ) -> None:
        self.objective, self.optimizers, self.ranks = objective, optimizers, ranks
        self.num_data, self.precision = num_data, precision
        self.compiled: CompiledNetwork | None = None

    def loss(self, x: Any, y: Tensor, share: float = 1.0) -> Tensor:
        """The loss of a batch in nats per sample.

        Arguments:
            x: Inputs.
            y: Targets.
            share: Rows of this process over the mean of all: the KL is the same in every process and these weights
                have mean 1, so the mean of the losses is that of the whole batch.
        """
        with autocast(self.precision, self.ranks.device):
            loss = self._objective(x, y)
        return loss * (share / self.num_data)

    def _objective(self, x: Any, y: Tensor) -> Tensor:
        if self.compiled is None or self.compiled.reason is not None:
            return self.objective(x, y)  # type: ignore[no-any-return]
        try:
            with self.compiled.running(len(y)):
                return self.objective(x, y)  # type: ignore[no-any-return]
        except Exception as error:
            value = self.objective(x, y)  # an error of the network's own is raised here
            self.compiled.give_up(error)
            return value  # type: ignore[no-any-return]

    def __call__(self, x: Any, y: Tensor) -> Tensor:
        """Take the step at the learning rates that are set, all processes having as many rows; returns the loss."""
        loss = self.loss(x, y)
        self.optimizers.update(loss)
        return self.ranks.mean(loss.detach())

    def forget_gradients(self) -> None:
        """Let go of all gradients."""
        self.optimizers.forget_gradients()
