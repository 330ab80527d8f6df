"""Where the time of a training step goes: kernels by time, and the share of each kind, as Markdown.

    python -m benchmarks.speed.profile vgg7 --precision bf16
    python -m benchmarks.speed.profile lenet5 --variant plain --page lenet5.md

A network is trained through `fit`, and the last epoch is profiled; times are per step. On a GPU these are kernels,
those of a replayed graph included. On a CPU they are PyTorch's operations without what they call, so that what a
quantizer computes counts as element by element, as far as it is not compiled. What `fit` does once an epoch is in the
figures, spread over its steps.
"""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed.command import Session, hardware, make_parser, start
from benchmarks.speed.training import CASES, MODES, gated, plain
from pyro_bbits.data import TensorLoader
from pyro_bbits.files import write_text_atomically
from pyro_bbits.inference import EpochRecord, fit

KINDS = {
    "quantizers": r"^(flat|channels)_\w+$|quantize",
    "optimizer": r"adam|sgd|optimizer|multi_tensor",
    "gates": r"sigmoid|logit|softplus|gate|uniform|bernoulli|distribution",
    "norm": r"batch_?norm|layer_?norm|\bbn_",
    "products": r"conv|gemm|cutlass|cudnn|xmma|wgmma|matmul|\bmm\b|addmm|bmm|nvjet|winograd|attention|linear",
    "pooling": r"pool",
    "copies": r"copy|memcpy|memset|fill|cat\b|index|gather|nchw",
    "element by element": r"elementwise|relu|vectorized|reduce|aten::",
}
"""Patterns of names, of which the first that fits counts. Small kernels of the gates that carry the name of their
arithmetic alone count as element by element; kernels that Inductor makes are named after what they fuse."""

Entry = tuple[str, float, float]
"""Name, microseconds and calls per step."""


def kind_of(name: str) -> str:
    """The kind of a kernel or operation, by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def entries(session: Session, name: str, arguments: Any) -> list[Entry]:
    """Train, and profile the last of three epochs."""
    case, device = CASES[name], session.device
    x, y = case.data(arguments.batch * arguments.steps, device)
    train = TensorLoader(x, y, arguments.batch, shuffle=True)
    model, guide = (plain if arguments.variant == "plain" else gated)(case.network(device), x)
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    profiler = profile(activities=activities)

    def switch(record: EpochRecord) -> None:
        if record.epoch == 2:
            profiler.start()
        elif record.epoch == 3:
            profiler.stop()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = MODES[arguments.mode] | {"precision": arguments.precision}
        fit(model, guide, train, epochs=3, progress=False, on_epoch=switch, **options)
    found = [
        (e.key, (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / len(train), e.count / len(train))
        for e in profiler.key_averages()
    ]
    return sorted((entry for entry in found if entry[1] > 0), key=lambda entry: -entry[1])


def report(title: str, found: Sequence[Entry], rows: int = 30) -> str:
    """Two tables: kinds with their share, and the longest entries."""
    total = sum(us for _, us, _ in found)
    kinds: dict[str, float] = {}
    for name, us, _ in found:
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + us
    lines = [f"{title}: {total:.0f} us per step in {sum(calls for *_, calls in found):.0f} calls", ""]
    lines += ["| kind | us | share |", "| --- | --- | --- |"]
    lines += [f"| {k} | {us:.1f} | {100 * us / total:.1f} % |" for k, us in sorted(kinds.items(), key=lambda e: -e[1])]
    lines += ["", "| us | calls | kind | name |", "| --- | --- | --- | --- |"]
    lines += [f"| {us:.1f} | {n:.1f} | {kind_of(name)} | `{_short(name)}` |" for name, us, n in found[:rows]]
    return "\n".join(lines) + "\n"


def _short(name: str) -> str:
    return name[:100].replace("|", "/").replace("`", "'")


def main(argv: Sequence[str] | None = None) -> None:
    """Profile one network."""
    parser = make_parser(__doc__)
    parser.add_argument("case", choices=tuple(CASES))
    parser.add_argument("--variant", choices=("plain", "gated"), default="gated")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50, help="steps of an epoch (default: %(default)s)")
    parser.add_argument("--mode", choices=tuple(MODES), default="auto")
    parser.add_argument("--precision", choices=("float32", "tf32", "bf16"), default="float32")
    parser.add_argument("--page", type=Path, help="write the tables there instead of printing them")
    session, arguments = start("benchmarks.speed.profile", parser, argv)
    if arguments.quick:
        arguments.batch, arguments.steps = 4, 2
    found = entries(session, arguments.case, arguments)
    what = f"{arguments.case}, {arguments.variant}, batch {arguments.batch}, {arguments.precision}, {arguments.mode}"
    text = report(f"{what}; {hardware(session.device)}; torch {torch.__version__}; `{session.command}`", found)
    if arguments.page is None:
        print(text)
    else:
        write_text_atomically(arguments.page, text)


if __name__ == "__main__":
    main()
