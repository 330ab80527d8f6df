"""Whole runs from the first step to the last evaluation: seconds, accuracy and BOPs, on the paper's schedules.

    python -m benchmarks.speed.end_to_end mnist --data-path data/mnist         # LeNet-5, 100 epochs
    python -m benchmarks.speed.end_to_end cifar10 --data-path data/cifar10 --precision bf16    # VGG-7, 300 epochs
    python -m benchmarks.speed.end_to_end mnist --synthetic --epochs 3         # the speed alone, on made data
    python -m benchmarks.speed.end_to_end mnist --data-path data/mnist --modes auto eager --seeds 0 1 2

All published training rows are trained on, and the published test rows are evaluated after every epoch, with decided
gates; nothing is chosen by them, and the accuracy is that of the last epoch. CIFAR-10 is cropped and mirrored at
random. Objective, ladder, initial gates and decision rule are the paper's. The clock runs from the call of `fit` to its
return: compiling and capturing are in it, reading the data is not.
"""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.command import Session, make_parser, start
from benchmarks.speed.training import CASES, MODES
from pyro_bbits import GatePrior, quantize
from pyro_bbits.data import DataSplits, Loaders, Scaling, Split, load_data
from pyro_bbits.inference import EmptyGuide, HardConcreteGuide, History, fit
from pyro_bbits.models import GatedModel, PlainModel


@dataclass(frozen=True)
class Schedule:
    """A run of the paper.

    Attributes:
        network: Its network.
        epochs: Passes over the training data.
        mu: Strength of the prior.
        bits: Widths that a tensor can end with: those whose gates do not start closed.
        test: Test rows, for made data.
    """

    network: str
    epochs: int
    mu: float
    bits: tuple[int, ...]
    test: int = 10_000


SCHEDULES = {
    "mnist": Schedule("lenet5", 100, 0.1, (2, 4, 8)),
    "cifar10": Schedule("vgg7", 300, 0.01, (2, 4, 8, 16, 32)),
}


def load(name: str, arguments: Any) -> DataSplits:
    """The data with all training rows in one split."""
    case = CASES[SCHEDULES[name].network]
    if arguments.synthetic:
        rows, held_out = (64, 16) if arguments.quick else (case.samples, SCHEDULES[name].test)
        train, test = (Split(*case.data(size, torch.device("cpu"))) for size in (rows, held_out))
        scaling = Scaling.none(case.shape[0])
        return DataSplits(name, train, test, test, case.classes, augment=name == "cifar10", input_scaling=scaling)
    own = arguments.data_path is not None and arguments.data_path.suffix == ".npz"
    data = load_data(arguments.data_path) if own else load_data(name, path=arguments.data_path)
    parts = data.train, data.validation
    rows_of_both = Split(*(torch.cat([getattr(part, which) for part in parts]) for which in ("inputs", "targets")))
    return replace(data, train=rows_of_both, augment=name == "cifar10")


def train(schedule: Schedule, loaders: Loaders, variant: str, seed: int, options: dict[str, Any]) -> History:
    """One run."""
    examples = next(iter(loaders.train))[0][:64]
    loaders.train.set_epoch(0)
    torch.manual_seed(seed)
    net = CASES[schedule.network].make().to(examples.device)
    num_data = loaders.train.num_data
    if variant == "plain":
        model, guide = PlainModel(net, num_data), EmptyGuide()
        return fit(model, guide, loaders.train, loaders.test, seed=seed, progress=False, **options)
    network = quantize(net, examples, bits=schedule.bits)
    prior = GatePrior(network, schedule.mu, simplified=True)
    gated, gates = GatedModel(network, prior, num_data), HardConcreteGuide(prior)
    options = options | {"rule": "threshold"}
    return fit(gated, gates, loaders.train, loaders.test, seed=seed, progress=False, **options)


def measure(session: Session, name: str, data: DataSplits, mode: str, seed: int, arguments: Any) -> None:
    """The variants of one seed and mode, one after the other."""
    schedule = replace(SCHEDULES[name], epochs=arguments.epochs or SCHEDULES[name].epochs)
    options = MODES[mode] | {"precision": arguments.precision, "epochs": schedule.epochs}
    plain_ms = None
    for variant in arguments.variants:
        loaders = data.loaders(arguments.batch, seed=seed, device=session.device)
        started = time.perf_counter()
        history = train(schedule, loaders, variant, seed, options)
        ms = 1e3 * (time.perf_counter() - started)
        plain_ms = ms if variant == "plain" else plain_ms
        figures = {"accuracy %": history[-1].validation_accuracy, "BOPs %": history[-1].bops}
        session.add(
            "end_to_end",
            f"{name}{' (made data)' * arguments.synthetic}, {schedule.epochs} epochs",
            f"{variant}, {mode}, seed {seed}",
            batch=arguments.batch,
            dtype=arguments.precision,
            ms=ms,
            ratio_to_plain=ms / plain_ms if plain_ms else None,
            details={"seconds": ms / 1e3} | {key: value for key, value in figures.items() if value is not None},
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is asked for."""
    parser = make_parser(__doc__)
    parser.add_argument("data", choices=tuple(SCHEDULES))
    parser.add_argument("--data-path", type=Path, help="folder with parquet files, or .npz (default: the hub)")
    parser.add_argument("--synthetic", action="store_true", help="made data of the same shape")
    parser.add_argument("--epochs", type=int, help="default: the paper's")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--variants", nargs="+", choices=("plain", "gated"), default=["gated"])
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=["auto"])
    parser.add_argument("--precision", choices=("float32", "tf32", "bf16"), default="tf32")
    session, arguments = start("benchmarks.speed.end_to_end", parser, argv)
    if session.device.type == "cpu":
        arguments.precision = "float32"
    if arguments.quick:
        arguments.synthetic, arguments.epochs, arguments.batch = True, 1, 16
    data = load(arguments.data, arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if arguments.synthetic else "default")
        for seed in arguments.seeds:
            for mode in arguments.modes:
                measure(session, arguments.data, data, mode, seed, arguments)
    session.print_table()


if __name__ == "__main__":
    main()
