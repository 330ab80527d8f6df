"""Networks by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import nn

from pyro_bbits.models.digits_net import DigitsNet
from pyro_bbits.models.lenet5 import LeNet5
from pyro_bbits.models.vgg7 import VGG7

__all__ = ["NETWORKS", "build_network", "default_network"]

Value = TypeVar("Value")

NETWORKS: dict[str, Callable[..., nn.Module]] = {"digits-net": DigitsNet, "lenet5": LeNet5, "vgg7": VGG7}

_DEFAULTS: dict[str, str] = {"digits": "digits-net", "mnist": "lenet5", "cifar10": "vgg7"}


def build_network(name: str, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Build a network of `NETWORKS` that fits a data set.

    Arguments:
        name: A key of `NETWORKS`.
        image_shape: Channels, height and width of one image, e.g. `DataSplits.image_shape`.
        num_classes: Number of logits.

    Returns:
        The network with torch's default initialization, drawn from the global generator.

    Raises:
        ValueError: If the name is unknown, images are not square, or the network cannot take their size.

    Example:
        >>> build_network("lenet5", (1, 28, 28), 10).fc1
        Linear(in_features=1024, out_features=512, bias=True)
    """
    network = _look_up(NETWORKS, name, "network")
    channels, height, width = image_shape
    if height != width:
        raise ValueError(f"{name} needs square images; got {height}x{width}.")
    if "image_size" in inspect.signature(network).parameters:
        return network(in_channels=channels, num_classes=num_classes, image_size=height)
    only = getattr(network, "image_size", height)
    if height != only:
        raise ValueError(f"{name} takes {only}x{only} images only; got {height}x{width}.")
    return network(in_channels=channels, num_classes=num_classes)


def default_network(data_name: str) -> str:
    """Name the network that a data set is trained with unless another is asked for.

    Arguments:
        data_name: A name that `pyro_bbits.data.load_data` knows.

    Returns:
        A key of `NETWORKS`.

    Raises:
        ValueError: If there is none for this data set.
    """
    return _look_up(_DEFAULTS, data_name, "default network for data")


def _look_up(known: Mapping[str, Value], name: str, what: str) -> Value:
    if name not in known:
        raise ValueError(f"no {what} is called {name!r}; choose one of {', '.join(known)}.")
    return known[name]
