"""A whole training step through the public `fit`: the plain network, the gated one, and the published arithmetic.

    python -m benchmarks.speed.step                                    # all networks, batch 128 and 512, TF32 and bf16
    python -m benchmarks.speed.step --cases lenet5 --batches 128 --precisions float32 --modes eager --threads 1
    python -m benchmarks.speed.step --cases vgg7 --variants plain ranges widths gated    # what each kind of gate costs

Each variant is trained for some epochs on random data that lie on the device; a step takes the time between the ends of
two epochs over the steps of an epoch, so it holds all that a user pays but validation. Variants take turns, round by
round, each time with new weights. The floor is the plain step and the bytes of all quantizers at the speed of a copy.
The published arithmetic runs eagerly in a loop of its own, on one batch, for fewer steps. Epochs of a second length,
with `--split`, tell the step itself from what `fit` does once an epoch. `ranges` learns the ranges at fixed 8 bits,
`widths` the gates of each tensor as well, `gated` those of the channels too.
"""

import gc
from collections.abc import Sequence
from typing import Any, get_args

import torch

from benchmarks.speed.command import Session, make_parser, start
from benchmarks.speed.timing import copy_bandwidth
from benchmarks.speed.training import (
    CASES,
    MODES,
    Case,
    Cost,
    Learned,
    gated,
    plain,
    published_cost,
    summary,
    timed_fit,
)
from pyro_bbits.data import TensorLoader
from pyro_bbits.inference.precision import Precision
from pyro_bbits.insertion import QuantizedNetwork

VARIANTS = ("plain", *get_args(Learned), "published")
DEFAULT = ("lenet5", "vgg7", "resnet18", "vit")


def cost(case: Case, variant: Any, train: TensorLoader, mode: str, precision: Precision, arguments: Any) -> Cost:
    """Train one variant anew."""
    net = case.network(train.inputs.device)
    if variant == "published":
        return published_cost(net, train, steps=arguments.published_steps, precision=precision)
    x = train.inputs
    model, guide = plain(net, x) if variant == "plain" else gated(net, x, learned=variant)
    return timed_fit(model, guide, train, epochs=arguments.epochs, options=MODES[mode] | {"precision": precision})


def quantizer_bytes(case: Case, batch: int, precision: str, device: torch.device) -> int:
    """Bytes that all quantizers of a step must move: two passes forward and three backward over each tensor."""
    model, _ = gated(case.network(device), case.data(max(batch, 64), device)[0])
    network, size, total = model.net, 2 if precision == "bf16" else 4, 0
    assert isinstance(network, QuantizedNetwork)
    weights = {layer.weight for layer in network.layers if not layer.is_product}

    def look(row: int, tensor: torch.Tensor) -> None:
        nonlocal total
        total += tensor.numel() * (3 * (4 if row in weights else size) + 2 * size)

    with torch.no_grad(), network.watching(look):
        model.predict(case.data(batch, device)[0])
    return total


def measure(session: Session, name: str, batch: int, precision: Precision, mode: str, arguments: Any) -> None:
    """All variants of one network, in turn."""
    case = CASES[name]
    samples = 2 * batch if arguments.quick else arguments.samples or case.samples
    train = TensorLoader(*case.data(samples, session.device), batch_size=batch, shuffle=True)
    short = TensorLoader(train.inputs[: -(-samples // 4)], train.targets[: -(-samples // 4)], batch, shuffle=True)
    costs: dict[str, list[Cost]] = {variant: [] for variant in arguments.variants}
    short_costs: dict[str, list[Cost]] = {variant: [] for variant in set(arguments.variants) - {"published"}}
    for _ in range(arguments.rounds):
        for variant in arguments.variants:
            costs[variant].append(cost(case, variant, train, mode, precision, arguments))
            if arguments.split and variant in short_costs:
                short_costs[variant].append(cost(case, variant, short, mode, precision, arguments))
            gc.collect()
    bandwidth = copy_bandwidth(session.device, 2**29 if session.device.type == "cuda" else 2**24)
    extra = 1e3 * quantizer_bytes(case, batch, precision, session.device) / bandwidth
    total = {variant: summary(parts) for variant, parts in costs.items()}
    medians = {variant: each.timing.ms for variant, each in total.items()}
    reference, published = medians.get("plain"), medians.get("published")
    for variant, each in total.items():
        session.add(
            "step",
            name,
            _label(variant, mode, several=len(arguments.modes) > 1),
            batch=batch,
            dtype=precision,
            ms=medians[variant],
            ms_low=each.timing.low,
            ms_high=each.timing.high,
            ratio_to_plain=medians[variant] / reference if reference else None,
            ratio_to_floor=medians[variant] / (reference + extra) if reference else None,
            speedup=published / medians[variant] if published else None,
            peak_mb=each.peak_mb,
            details={"first epoch s": each.start}
            | _split(each, short_costs.get(variant, []), len(train), len(short))
            | each.extra,
        )


def _label(variant: str, mode: str, *, several: bool) -> str:
    """The published arithmetic is eager always, and measured anew in each mode's turns."""
    if variant != "published":
        return f"{variant}, {mode}"
    return f"published, eager beside {mode}" if several else "published, eager"


def _split(whole: Cost, short: Sequence[Cost], steps: int, short_steps: int) -> dict[str, float]:
    """The step alone, and what is done once an epoch, from epochs of two lengths; nothing if there is one length."""
    if not short or steps == short_steps:
        return {}
    whole_ms, short_ms = whole.timing.ms * steps, summary(short).timing.ms * short_steps
    alone = (whole_ms - short_ms) / (steps - short_steps)
    return {"ms of the step alone": alone, "ms once an epoch": whole_ms - alone * steps}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is asked for."""
    parser = make_parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(DEFAULT))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["plain", "gated", "published"])
    parser.add_argument("--batches", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--precisions", nargs="+", choices=("float32", "tf32", "bf16"), help="default: tf32 and bf16")
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=["auto"])
    parser.add_argument("--epochs", type=int, default=5, help="per round; the first does not count")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each variant")
    parser.add_argument("--samples", type=int, help="of an epoch (default: those of the real data)")
    parser.add_argument("--split", action="store_true", help="train on a quarter of the samples too: see below")
    parser.add_argument("--published-steps", type=int, default=10, help="steps of the published arithmetic per round")
    session, arguments = start("benchmarks.speed.step", parser, argv)
    default: list[Precision] = ["tf32", "bf16"] if session.device.type == "cuda" else ["float32"]
    precisions: list[Precision] = arguments.precisions or default
    if arguments.quick:
        arguments.cases, arguments.batches, arguments.epochs = arguments.cases[:1], [4], 2
        arguments.rounds = arguments.published_steps = 1
    for name in arguments.cases:
        for batch in arguments.batches:
            for precision in precisions:
                for mode in arguments.modes:
                    measure(session, name, batch, precision, mode, arguments)
    session.print_table()


if __name__ == "__main__":
    main()
