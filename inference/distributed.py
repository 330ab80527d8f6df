"""Training by several processes: what they have to agree on."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Ranks", "of_first_process", "process_group"]


@contextmanager
def process_group() -> Iterator[None]:
    """PyTorch's default process group as torchrun's environment describes it: NCCL with GPUs, else Gloo.

    Nothing happens without that environment, or if there is a group already.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def of_first_process(value: str) -> str:
    """The text that rank 0 has."""
    values = [value]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(values, 0)
    return values[0]


class _Through(torch.autograd.Function):
    """A loss as it is, and tensors that take part in its graph without a gradient."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *others: Tensor) -> Tensor:
        ctx.count = len(others)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *[None] * ctx.count


class _AllUsed(nn.Module):
    """An objective whose graph holds each parameter: the processes wait for the gradients of all of them."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, *args: Any) -> Tensor:
        parameters = [p for p in self.objective.parameters() if p.requires_grad]
        return _Through.apply(self.objective(*args), *parameters)  # type: ignore[no-any-return]


class Ranks:
    """The processes of a run: one, or all of PyTorch's default process group if it is initialized.

    Attributes:
        rank: Number of this process; 0 reports and writes.
        size: Number of processes.
    """

    def __init__(self, device: torch.device) -> None:
        active = dist.is_available() and dist.is_initialized()
        self.device = device
        self.rank = dist.get_rank() if active else 0
        self.size = dist.get_world_size() if active else 1

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""
        return self.size > 1

    @property
    def first(self) -> bool:
        """Whether this process reports and writes."""
        return self.rank == 0

    def wrap(self, objective: nn.Module) -> nn.Module:
        """The objective, its gradients averaged over all processes; weights and buffers are those of rank 0.

        On a GPU gradients are made on the stream that is current now; steps are best taken on it too.
        """
        if not self.several or not any(p.requires_grad for p in objective.parameters()):
            return objective
        places = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(_AllUsed(objective), device_ids=places)

    def shares(self, rows: int, error: Exception | None = None) -> list[int]:
        """Rows of the batch that each process has.

        Arguments:
            rows: Rows of this process.
            error: What this process found wrong with its part; then every process raises.

        Raises:
            Exception: The error of this process, or a ValueError with that of another one.
        """
        if not self.several:
            if error is not None:
                raise error
            return [rows]
        mine = torch.tensor([-1 if error is not None else rows], device=self.device)
        every = [torch.zeros_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine)
        shares = [int(share) for share in torch.cat(every).tolist()]
        if min(shares) < 0:
            self._raise(error)
        if 0 in shares:
            raise ValueError(
                f"process {shares.index(0)} of {self.size} got no row of a batch; every process needs at least one: "
                "use larger batches, or fewer processes."
            )
        return shares

    def _raise(self, error: Exception | None) -> None:
        messages: list[Any] = [None] * self.size
        dist.all_gather_object(messages, None if error is None else str(error))
        if error is not None:
            raise error
        rank = next(i for i, message in enumerate(messages) if message is not None)
        raise ValueError(f"process {rank}: {messages[rank]}")

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the processes of a detached tensor."""
        if self.several:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.size
        return value

    def means(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same for each of several tensors."""
        return {name: self.mean(value) for name, value in values.items()}

    def share_buffers(self, module: nn.Module) -> None:
        """Give every process the buffers of rank 0: running statistics of batch norms differ until then."""
        if self.several:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def share_generators(self) -> None:
        """Give every process PyTorch's random states of rank 0, so that all draw the same gates."""
        if not self.several:
            return
        state = torch.get_rng_state().to(self.device)
        dist.broadcast(state, 0)
        torch.set_rng_state(state.cpu())
        if self.device.type == "cuda":
            state = torch.cuda.get_rng_state(self.device).to(self.device)
            dist.broadcast(state, 0)
            torch.cuda.set_rng_state(state.cpu(), self.device)
