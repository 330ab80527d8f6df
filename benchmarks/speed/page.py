"""What the scripts share that look into one network and write a page: arguments, training, and where the page goes."""

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.speed.command import Session, make_parser
from benchmarks.speed.training import CASES, MODES, gated, plain
from pyro_bbits.data import TensorLoader
from pyro_bbits.files import write_text_atomically
from pyro_bbits.inference import EpochRecord, fit

__all__ = ["EPOCHS", "make_page_parser", "publish", "train_watched"]

EPOCHS = 3
"""Of a training that is watched in its last one."""


def make_page_parser(description: str | None, steps: int) -> argparse.ArgumentParser:
    """A parser with the arguments that these scripts have.

    Arguments:
        description: What the script does.
        steps: Steps of an epoch, if no others are asked for.
    """
    parser = make_parser(description)
    parser.add_argument("case", choices=tuple(CASES))
    parser.add_argument("--variant", choices=("plain", "gated"), default="gated")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=steps, help="steps of an epoch (default: %(default)s)")
    parser.add_argument("--precision", choices=("float32", "tf32", "bf16"), default="float32")
    parser.add_argument("--page", type=Path, help="write the tables there instead of printing them")
    return parser


def train_watched(session: Session, arguments: Any, mode: str, on_epoch: Callable[[EpochRecord], None]) -> int:
    """Train the network that is asked for through `fit`; returns the steps of an epoch.

    Arguments:
        session: Tells the device.
        arguments: Parsed by :func:`make_page_parser`; if quick, batch and steps are made tiny.
        mode: Key of `MODES`.
        on_epoch: Called after each of the epochs.
    """
    if arguments.quick:
        arguments.batch, arguments.steps = 4, 2
    case, device = CASES[arguments.case], session.device
    x, y = case.data(arguments.batch * arguments.steps, device)
    train = TensorLoader(x, y, arguments.batch, shuffle=True)
    model, guide = (plain if arguments.variant == "plain" else gated)(case.network(device), x)
    options = MODES[mode] | {"precision": arguments.precision}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(model, guide, train, epochs=EPOCHS, progress=False, on_epoch=on_epoch, **options)
    return len(train)


def publish(text: str, page: Path | None) -> None:
    """Print a page, or write it."""
    if page is None:
        print(text)
    else:
        write_text_atomically(page, text)
