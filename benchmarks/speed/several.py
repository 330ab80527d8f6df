"""A training step shared by several GPUs, through the public `fit`: the plain network and the gated one.

    torchrun --nproc-per-node 2 -m benchmarks.speed.several                 # VGG-7 and ResNet-18 in TF32
    torchrun --nproc-per-node 2 -m benchmarks.speed.several --modes auto eager --batch 512
    python -m benchmarks.speed.several --quick                              # one process, to see that it runs

Each process has `--batch` rows of random data in a step, so that the work of a GPU stays the same however many there
are. Steps and rounds are those of `benchmarks.speed.step`; rank 0 writes. Without GPUs the processes talk by Gloo.
"""

import gc
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.speed.command import Session, make_parser, start
from benchmarks.speed.step import cost
from benchmarks.speed.training import CASES, MODES, Cost, summary
from pyro_bbits.data import TensorLoader
from pyro_bbits.inference.distributed import process_group

VARIANTS = ("plain", "gated")


def measure(session: Session, name: str, mode: str, arguments: Any) -> None:
    """Both variants of one network, in turn."""
    case = CASES[name]
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batch = size * arguments.batch
    samples = 2 * batch if arguments.quick else arguments.samples or case.samples
    data = case.data(samples, session.device)
    train = TensorLoader(*data, batch_size=batch, shuffle=True, rank=rank, world_size=size)
    costs: dict[str, list[Cost]] = {variant: [] for variant in VARIANTS}
    for _ in range(arguments.rounds):
        for variant in VARIANTS:
            costs[variant].append(cost(case, variant, train, mode, arguments.precision, arguments))
            gc.collect()
    if rank:
        return
    session.command = session.command.replace("python -m", f"torchrun --nproc-per-node {size} -m")
    total = {variant: summary(parts) for variant, parts in costs.items()}
    for variant, each in total.items():
        ms = each.timing.ms
        session.add(
            "several",
            name,
            f"{variant}, {mode}, {size} processes",
            batch=arguments.batch,
            dtype=arguments.precision,
            ms=ms,
            ms_low=each.timing.low,
            ms_high=each.timing.high,
            ratio_to_plain=ms / total["plain"].timing.ms,
            peak_mb=each.peak_mb,
            details={"samples per second": 1e3 * batch / ms},
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is asked for, as one of the processes."""
    parser = make_parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=["vgg7", "resnet18"])
    parser.add_argument("--batch", type=int, default=128, help="rows of each process")
    parser.add_argument("--precision", choices=("float32", "tf32", "bf16"), default="tf32")
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=["auto"])
    parser.add_argument("--epochs", type=int, default=4, help="per round; the first does not count")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each variant")
    parser.add_argument("--samples", type=int, help="of an epoch (default: those of the real data)")
    session, arguments = start("benchmarks.speed.several", parser, argv)
    if arguments.quick:
        arguments.cases, arguments.batch, arguments.epochs, arguments.rounds = arguments.cases[:1], 4, 2, 1
    if session.device.type == "cuda":
        session.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(session.device)
    else:
        arguments.precision = "float32"
    with process_group():
        for name in arguments.cases:
            for mode in arguments.modes:
                measure(session, name, mode, arguments)
        if not dist.is_initialized() or dist.get_rank() == 0:
            session.print_table()


if __name__ == "__main__":
    main()
