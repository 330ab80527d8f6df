"""What lies in a GPU's memory when a training step needs most of it, as Markdown.

    python -m benchmarks.speed.memory vgg7 --precision tf32
    python -m benchmarks.speed.memory vgg7 --variant plain --page vgg7-plain.md

A network is trained through `fit` for three epochs of few steps, uncaptured, and what is allocated and freed in the
last is recorded, with the little that is done after its steps. The table holds what has been allocated since that epoch
began, without parameters and optimizer, by the operation and the line that asked for it.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.command import Session, hardware, make_parser, start
from benchmarks.speed.training import CASES, MODES, gated, plain
from pyro_bbits.data import TensorLoader
from pyro_bbits.files import write_text_atomically
from pyro_bbits.inference import EpochRecord, fit

OPERATION = re.compile(r"at::_ops::(\w+)::|(\w+Backward\d*)::apply")
OWN = re.compile(r"(pyro_bbits|benchmarks)/[\w/]*\.py$")


def events(session: Session, name: str, arguments: Any) -> Sequence[Mapping[str, Any]]:
    """Train, and record the allocations of the last of three epochs."""
    case, device = CASES[name], session.device
    x, y = case.data(arguments.batch * arguments.steps, device)
    train = TensorLoader(x, y, arguments.batch, shuffle=True)
    model, guide = (plain if arguments.variant == "plain" else gated)(case.network(device), x)

    def switch(record: EpochRecord) -> None:
        if record.epoch == 2:
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = MODES["eager"] | {"precision": arguments.precision}
        fit(model, guide, train, epochs=3, progress=False, on_epoch=switch, **options)
    found = torch.cuda.memory._snapshot(device)["device_traces"][torch.cuda.current_device()]
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
    parser = make_parser(__doc__)
    parser.add_argument("case", choices=tuple(CASES))
    parser.add_argument("--variant", choices=("plain", "gated"), default="gated")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4, help="steps of an epoch (default: %(default)s)")
    parser.add_argument("--precision", choices=("float32", "tf32", "bf16"), default="float32")
    parser.add_argument("--page", type=Path, help="write the table there instead of printing it")
    session, arguments = start("benchmarks.speed.memory", parser, argv)
    if arguments.quick:
        arguments.batch, arguments.steps = 4, 2
    if session.device.type != "cuda":
        parser.error("memory is recorded on a GPU only, and PyTorch sees none.")
    peak = at_the_peak(events(session, arguments.case, arguments))
    what = f"{arguments.case}, {arguments.variant}, batch {arguments.batch}, {arguments.precision}"
    text = report(f"{what}; {hardware(session.device)}; torch {torch.__version__}; `{session.command}`", peak)
    if arguments.page is None:
        print(text)
    else:
        write_text_atomically(arguments.page, text)


if __name__ == "__main__":
    main()
