"""Networks by name."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import nn

from pyro_bbits.models.digits_net import DigitsNet
from pyro_bbits.models.lenet5 import LeNet5
from pyro_bbits.models.vgg7 import VGG7

__all__ = ["NETWORKS", "build_network", "default_network", "fitting_networks"]

Value = TypeVar("Value")

NETWORKS: dict[str, Callable[..., nn.Module]] = {"digits-net": DigitsNet, "lenet5": LeNet5, "vgg7": VGG7}

_DEFAULTS: dict[str, str] = {"digits": "digits-net", "mnist": "lenet5", "cifar10": "vgg7"}


def build_network(name: str, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Build a network of `NETWORKS` that fits a data set.

    Arguments:
        name: A key of `NETWORKS`.
        input_shape: Channels, height and width of one image, e.g. `DataSplits.input_shape`.
        num_outputs: Number of classes or outputs.

    Returns:
        The network with torch's default initialization, drawn from the global generator.

    Raises:
        ValueError: If the name is unknown, inputs are not square images, or the network cannot take their size.

    Example:
        >>> build_network("lenet5", (1, 28, 28), 10).fc1
        Linear(in_features=1024, out_features=512, bias=True)
    """
    network = _look_up(NETWORKS, name, "network")
    if len(input_shape) != 3:
        raise ValueError(f"{name} needs images, (channels, height, width); got samples of shape {input_shape}.")
    channels, height, width = input_shape
    if height != width:
        raise ValueError(f"{name} needs square images; got {height}x{width}.")
    if "image_size" in inspect.signature(network).parameters:
        return network(in_channels=channels, num_classes=num_outputs, image_size=height)
    only = getattr(network, "image_size", height)
    if height != only:
        raise ValueError(f"{name} takes {only}x{only} images only; got {height}x{width}.")
    return network(in_channels=channels, num_classes=num_outputs)


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


def fitting_networks(input_shape: tuple[int, ...], num_outputs: int) -> list[str]:
    """Names of the networks of `NETWORKS` that can be built for a data set; none of them is given memory.

    Arguments:
        input_shape: Shape of one sample.
        num_outputs: Number of classes or outputs.
    """
    names = []
    for name in NETWORKS:
        with torch.device("meta"), contextlib.suppress(ValueError):
            build_network(name, input_shape, num_outputs)
            names.append(name)
    return names


def _look_up(known: Mapping[str, Value], name: str, what: str) -> Value:
    if name not in known:
        raise ValueError(f"no {what} is called {name!r}; choose one of {', '.join(known)}.")
    return known[name]
