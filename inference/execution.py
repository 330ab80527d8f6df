"""How a run is computed: captured or not, compiled or not, in which arithmetic."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from torch import nn

from pyro_bbits.inference.compiled import CompiledNetwork, pays_to_compile
from pyro_bbits.inference.distributed import Ranks
from pyro_bbits.inference.evaluation import device_of
from pyro_bbits.inference.graphs import CudaGraphs, Graphs
from pyro_bbits.inference.memory_format import has_images
from pyro_bbits.inference.precision import Precision, check_precision_name
from pyro_bbits.models import AbstractModel

__all__ = ["Automatic", "Execution"]

Automatic = Literal["auto"] | bool
"""Chosen by the library, demanded, or switched off."""


@dataclass(frozen=True)
class Execution:
    """Options of :func:`fit` that decide how its steps are computed.

    Attributes:
        capture: Whether steps are captured in CUDA graphs.
        precision: Arithmetic of the network; None is PyTorch's own setting.
        compile: Whether the network is compiled.
        freeze_norms: Whether batch norms stay in evaluation mode.

    Raises:
        ValueError: If an option is something else.
    """

    capture: Automatic = "auto"
    precision: Precision | None = None
    compile: Automatic = "auto"
    freeze_norms: bool = False

    def __post_init__(self) -> None:
        check_precision_name(self.precision)
        for name in ("capture", "compile"):
            if getattr(self, name) not in ("auto", True, False):
                raise ValueError(f"{name} must be True, False or 'auto'; got {getattr(self, name)!r}.")

    def compiled(self, model: AbstractModel, x: Any, steps: int) -> CompiledNetwork | None:
        """The compiled network of a run of so many steps; None where it is used as it is.

        Arguments:
            model: The model.
            x: Inputs of the first batch.
            steps: Steps of the run.
        """
        auto = self.compile == "auto" and device_of(model).type == "cpu"
        wanted = self.compile is True or (auto and pays_to_compile(model, x, steps))
        return CompiledNetwork(model.net) if wanted else None

    def channels_last(self, model: nn.Module) -> bool:
        """Whether convolutions of images are computed in channels-last order, as GPUs prefer."""
        return has_images(model) and all(p.device.type == "cuda" for p in model.parameters())

    def graphs(self, ranks: Ranks, train: Iterable[Any]) -> Graphs | None:
        """What captures the steps; None where they are taken as they come.

        Raises:
            ValueError: If capture is demanded and the run is none that can be captured.
        """
        reason = self._obstacle(ranks, train)
        if reason is None:
            return CudaGraphs(ranks.device)
        if self.capture is True:
            raise ValueError(f"capture=True needs a run on a GPU, alone or over NCCL with equal parts; {reason}.")
        return None

    def _obstacle(self, ranks: Ranks, train: Iterable[Any]) -> str | None:
        if self.capture is False:
            return "it is switched off"
        if ranks.device.type != "cuda":
            return f"the model is on {ranks.device.type!r}"
        if ranks.several and "nccl" not in str(dist.get_backend_config()):
            return f"the processes speak {dist.get_backend()}"
        if ranks.several and not _equal_parts(train, ranks.size):
            return "it is not known whether the processes have batches of one size"
        return None


def _equal_parts(train: Any, processes: int) -> bool:
    """Whether it is known that all processes have as many rows of each batch: they share one shuffled plan."""
    plan = getattr(train, "plan", None)
    return bool(getattr(plan, "shuffle", False)) and getattr(plan, "world_size", 1) == processes
