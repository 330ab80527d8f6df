"""What a run deploys: its frozen network, held-out rows, and what a user of the files has to know."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyro_bbits.analysis.export.verification import HeldOut
from pyro_bbits.analysis.run import RunFolder, load_weights
from pyro_bbits.configuration import BitConfiguration
from pyro_bbits.data import DataSplits, open_data
from pyro_bbits.data.image_folder import ImageFolderData
from pyro_bbits.deployment import RemovalReport, check_channels, freeze, remove_channels
from pyro_bbits.gates import DecisionRule
from pyro_bbits.models import build_network, default_network

__all__ = ["Deployment"]

MOST_ROWS = 10_000
MOST_BYTES = 2**30
EXAMPLES = 8


@dataclass(frozen=True, eq=False)
class Deployment:
    """The networks of a run, on the CPU.

    Attributes:
        network: Name of the network.
        configuration: Widths and removed channels.
        float_net: The network with the trained weights, unquantized.
        masked: The frozen network, its removed channels zero.
        frozen: The one to deploy: the same, or with channels physically removed.
        removal: What was removed; None if channels were to stay.
        held_out: The first test rows: at most 10 000, and at most 1 GiB of them.
        about: Metadata for files: JSON by name.
    """

    network: str
    configuration: BitConfiguration
    float_net: nn.Module
    masked: nn.Module
    frozen: nn.Module
    removal: RemovalReport | None
    held_out: HeldOut
    about: Mapping[str, str]

    @classmethod
    def of_run(
        cls,
        run: RunFolder,
        rule: DecisionRule | None = None,
        *,
        remove: bool = True,
        channel_multiple: int = 1,
        reopen: bool = False,
        data_path: Path | None = None,
        rows: int = MOST_ROWS,
    ) -> "Deployment":
        """Read a run, freeze its network and remove its pruned channels.

        Arguments:
            run: The folder.
            rule: How gates are decided; None takes the run's.
            remove: Remove channels physically; otherwise they stay as zeros.
            channel_multiple: Keep just enough pruned channels, as zeros, for each layer to have a multiple of so many.
            reopen: Open the most probable of them again in place of that.
            data_path: Where the data lie now; None takes the place from the run's settings.
            rows: Test rows to take at most.

        Raises:
            ValueError: If the run has no posterior, its data or weights are not to be had, rows is below 1, or there
                is nothing to leave or to open.
        """
        check_channels(channel_multiple, reopen=reopen, remove=remove)
        if rows < 1:
            raise ValueError(f"files are verified with at least 1 row; got rows={rows}.")
        settings = run.settings()
        if data_path is not None:
            settings = settings.model_copy(update={"data_path": data_path})
        configuration = run.posterior().configuration(
            rule or settings.rule, multiple_of=channel_multiple if reopen else 1
        )
        data = open_data(settings)
        name = settings.network or default_network(data.name)
        net = build_network(name, data.input_shape, data.num_outputs)
        net.load_state_dict(load_weights(run.weights_file))
        masked, held_out = freeze(net.eval(), configuration), _held_out(data, rows)
        frozen, removal = masked, None
        if remove:
            frozen, removal = remove_channels(masked, held_out.inputs[:EXAMPLES], multiple_of=channel_multiple)
        return cls(name, configuration, net, masked, frozen, removal, held_out, _about(data))

    @property
    def examples(self) -> torch.Tensor:
        """A few rows of input."""
        return self.held_out.inputs[:EXAMPLES]


def _held_out(data: DataSplits | ImageFolderData, most: int) -> HeldOut:
    inputs: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    rows = 0
    most = max(1, min(most, MOST_ROWS, MOST_BYTES // (4 * math.prod(data.input_shape))))
    for x, y in data.loaders(1).test:
        inputs, targets, rows = [*inputs, x], [*targets, y], rows + len(x)
        if rows >= most:
            break
    return HeldOut(torch.cat(inputs)[:most], torch.cat(targets)[:most])


def _about(data: DataSplits | ImageFolderData) -> dict[str, str]:
    """`mean` and `std` that inputs are normalized by, images after division by 255, and `classes`."""
    known = data.description()
    about: dict[str, Any] = {"input_shape": known["input_shape"], "classes": known["class_names"]}
    for what, prefix in (("input_scaling", ""), ("target_scaling", "target_")):
        for key, values in (known[what] or {}).items():
            wide = not prefix and len(data.input_shape) > 1
            about[prefix + key] = [[[value]] for value in values] if wide else list(values)
    return {key: json.dumps(value) for key, value in about.items()}
