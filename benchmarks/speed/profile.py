"""Where the time of a training step goes: kernels by time, and the share of each kind, as Markdown.

    python -m benchmarks.speed.profile vgg7 --precision bf16
    python -m benchmarks.speed.profile lenet5 --variant plain --page lenet5.md

A network is trained through `fit`, and the last epoch is profiled; times are per step. On a GPU these are kernels,
those of a replayed graph included. On a CPU they are PyTorch's operations without what they call, so that what a
quantizer computes counts as element by element, as far as it is not compiled. What `fit` does once an epoch is in the
figures, spread over its steps.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed.command import Session, hardware, start
from benchmarks.speed.page import EPOCHS, make_page_parser, publish, train_watched
from benchmarks.speed.training import MODES
from pyro_bbits.inference import EpochRecord

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


def entries(session: Session, arguments: Any) -> list[Entry]:
    """Train, and profile the last epoch."""
    on_gpu = session.device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    profiler = profile(activities=activities)

    def switch(record: EpochRecord) -> None:
        if record.epoch == EPOCHS - 1:
            profiler.start()
        elif record.epoch == EPOCHS:
            profiler.stop()

    steps = train_watched(session, arguments, arguments.mode, switch)
    found = [
        (e.key, (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / steps, e.count / steps)
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
    parser = make_page_parser(__doc__, steps=50)
    parser.add_argument("--mode", choices=tuple(MODES), default="auto")
    session, arguments = start("benchmarks.speed.profile", parser, argv)
    found = entries(session, arguments)
    what = f"{arguments.case}, {arguments.variant}, batch {arguments.batch}, {arguments.precision}, {arguments.mode}"
    title = f"{what}; {hardware(session.device)}; torch {torch.__version__}; `{session.command}`"
    publish(report(title, found), arguments.page)


if __name__ == "__main__":
    main()
