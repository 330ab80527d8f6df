"""An independent count of what the layers of a network multiply."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

CountMacs = Callable[[nn.Module, tuple[int, ...]], dict[str, int]]


def count_macs_of(network: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
    """Count the multiply-accumulates of each layer for one sample; the counter reports two operations each.

    The network moves to the meta device, where nothing is computed.
    """
    network = network.to("meta").eval()
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, *shape, device="meta"))
    counts = counter.get_flop_counts()
    layers = {f"{type(network).__name__}.{n}": n for n, m in network.named_modules() if hasattr(m, "weight")}
    return {layers[name]: sum(ops.values()) // 2 for name, ops in counts.items() if name in layers and ops}


@pytest.fixture
def count_macs() -> CountMacs:
    """The function that counts."""
    return count_macs_of
