"""What lies in a GPU's memory when a training step needs most of it, as Markdown.

    python -m benchmarks.speed.memory vgg7 --precision tf32
    python -m benchmarks.speed.memory vgg7 --variant plain --page vgg7-plain.md

A network is trained through `fit` for three epochs of few steps, uncaptured, and what is allocated and freed in the
last is recorded, with the little that is done after its steps. The table holds what has been allocated since that epoch
began, without parameters and optimizer, by the operation and the line that asked for it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.speed.command import Session, hardware, start
from benchmarks.speed.page import EPOCHS, make_page_parser, publish, train_watched
from pyro_bbits.inference import EpochRecord

OPERATION = re.compile(r"at::_ops::(\w+)::|(\w+Backward\d*)::apply")
OWN = re.compile(r"(pyro_bbits|benchmarks)/[\w/]*\.py$")


def events(session: Session, arguments: Any) -> Sequence[Mapping[str, Any]]:
    """Train, and record the allocations of the last epoch."""

    def switch(record: EpochRecord) -> None:
        if record.epoch == EPOCHS - 1:
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)

    train_watched(session, arguments, "eager", switch)
    found = torch.cuda.memory._snapshot(session.device)["device_traces"][torch.cuda.current_device()]
    torch.cuda.memory._record_memory_history(enabled=None)
    return found  # type: ignore[no-any-return]


def at_the_peak(found: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The allocations that are alive when their sum is largest, in the order in which they were made."""
    alive: dict[int, Mapping[str, Any]] = {}
    total = largest = 0
    best: list[Mapping[str, Any]] = []
    for event in found:
        if event["action"] == "alloc":
            alive[event["addr"]] = event
            total += event["size"]
            if total > largest:
                largest, best = total, list(alive.values())
        elif event["action"] == "free_completed" and event["addr"] in alive:
            total -= alive.pop(event["addr"])["size"]
    return best


def origin(event: Mapping[str, Any]) -> tuple[str, str]:
    """The operation that allocated, and the line of this package that asked for it."""
    frames = event.get("frames", ())
    operations = (OPERATION.search(frame["name"]) for frame in frames)
    operation = next((match[1] or match[2] for match in operations if match), "")
    lines = (f"{OWN.search(f['filename'])[0]}:{f['line']}" for f in frames if OWN.search(f["filename"]))  # type: ignore[index]
    return operation, next(lines, "")


def report(title: str, peak: Sequence[Mapping[str, Any]], rows: int = 30) -> str:
    """The largest entries, those of one origin together."""
    sizes: Counter[tuple[str, str]] = Counter()
    for event in peak:
        sizes[origin(event)] += event["size"]
    counts = Counter(map(origin, peak))
    lines = [f"{title}: {sum(sizes.values()) / 1e6:.1f} MB in {len(peak)} pieces", ""]
    lines += ["| MB | pieces | operation | line |", "| --- | --- | --- | --- |"]
    lines += [f"| {size / 1e6:.1f} | {counts[o]} | {o[0]} | {o[1]} |" for o, size in sizes.most_common(rows)]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Record one network."""
    parser = make_page_parser(__doc__, steps=4)
    session, arguments = start("benchmarks.speed.memory", parser, argv)
    if session.device.type != "cuda":
        parser.error("memory is recorded on a GPU only, and PyTorch sees none.")
    peak = at_the_peak(events(session, arguments))
    what = f"{arguments.case}, {arguments.variant}, batch {arguments.batch}, {arguments.precision}"
    title = f"{what}; {hardware(session.device)}; torch {torch.__version__}; `{session.command}`"
    publish(report(title, peak), arguments.page)


if __name__ == "__main__":
    main()
