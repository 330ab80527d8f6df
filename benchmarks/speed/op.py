"""Forward, and forward with backward, of one quantizer: the published arithmetic, ours, and the byte floor.

    python -m benchmarks.speed.op                            # tensors of the device's list, float32 and bfloat16
    python -m benchmarks.speed.op --device cpu --threads 2 --dtypes float32
    python -m benchmarks.speed.op --variants published triton --tensors 128x128x32x32

All variants of a tensor are timed in turn in one run, every level of the quantizer live (soft gates). The floor is what
reading the input and writing the output take at the speed of a copy; with backward, reading input and gradient and
writing the input's gradient as well. On a GPU, what needs no decision on the host is timed as the replay of a graph
over inputs in rotation, too many for the cache. "Plain" is the ReLU whose place an unsigned quantizer takes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.authors import published_quantize
from benchmarks.speed.command import Session, make_parser, start
from benchmarks.speed.timing import Timing, captured, copy_bandwidth, peak_mb, time_interleaved
from benchmarks.speed.variants import OURS

GPU = ("128x128x32x32", "128x256x16x16", "128x512x8x8", "w512x512x3x3")
CPU = ("64x32x28x28", "128x64x8x8", "w64x32x5x5")
QUICK = ("2x3x4x4", "w3x2x3x3")
ROTATION = 300_000_000
"""Bytes of inputs and outputs in rotation on a GPU: several times its cache."""


class Operands:
    """Input, gradient, range and gates of one quantizer, with soft gates.

    Arguments:
        name: The shape, `64x32x28x28`; with a `w` in front it is a weight: signed, with channel gates.
        dtype: Type of the tensor.
        device: Where it lies.
    """

    def __init__(self, name: str, dtype: torch.dtype, device: torch.device) -> None:
        self.signed, shape = name.startswith("w"), tuple(int(side) for side in name.lstrip("w").split("x"))
        memory = torch.channels_last if len(shape) == 4 and not self.signed else torch.contiguous_format
        options: Any = {"device": device, "dtype": dtype}
        self.x = (0.8 * torch.randn(shape, **options)).contiguous(memory_format=memory).requires_grad_()
        self.grad = torch.randn(shape, **options).contiguous(memory_format=memory)
        self.row = torch.tensor([1.3, 0.9, 0.7, 0.5, 0.3], device=device, requires_grad=True)
        self.parts = [part.detach().clone().requires_grad_() for part in self.row.split(1)]
        self.channel_gates = torch.rand(shape[0], device=device).requires_grad_() if self.signed else None

    @property
    def leaves(self) -> list[Tensor]:
        """All that may get a gradient."""
        return [self.x, self.row, *self.parts, *([] if self.channel_gates is None else [self.channel_gates])]


@dataclass(frozen=True)
class Variant:
    """A body, and whether a graph can hold it."""

    run: Callable[[Operands], Tensor]
    capturable: bool = True


def _published(o: Operands) -> Tensor:
    return published_quantize(o.x, o.parts[0], o.parts[1:], o.channel_gates, signed=o.signed).to(o.x.dtype)


def _ours(name: str, o: Operands) -> Tensor:
    return OURS[name](o.x, o.row, o.channel_gates, o.signed)


def variants(names: Sequence[str] | None, signed: bool) -> dict[str, Variant]:
    """The variants that are asked for, or all that there are here."""
    known = {"published": Variant(_published, capturable=False)}
    known |= {} if signed else {"plain": Variant(lambda o: F.relu(o.x))}
    known |= {name: Variant(partial(_ours, name)) for name in OURS}
    return {name: variant for name, variant in known.items() if names is None or name in names}


def forward(variant: Variant, operands: Sequence[Operands]) -> object:
    """One pass over all operands; results are kept until its end, so that none is written where one has just been."""
    return [variant.run(o).detach() for o in operands]


def both(variant: Variant, operands: Sequence[Operands]) -> object:
    """The same with the backward pass."""
    return [torch.autograd.grad(variant.run(o), o.leaves, o.grad, allow_unused=True) for o in operands]


def measure(session: Session, name: str, dtype: torch.dtype, arguments: Any) -> None:
    """All variants of one tensor, both passes."""
    on_gpu = session.device.type == "cuda"
    first = Operands(name, dtype, session.device)
    count = max(4, -(-ROTATION // (2 * first.x.nbytes))) if on_gpu else 1
    operands = [first, *(Operands(name, dtype, session.device) for _ in range(count - 1))]
    chosen = variants(arguments.variants, first.signed)
    bandwidth = copy_bandwidth(session.device, 2**29 if on_gpu else first.x.numel(), bursts=arguments.bursts)
    for what, run, passes in (("forward", forward, 2), ("forward + backward", both, 5)):
        calls = {key: partial(run, variant, operands) for key, variant in chosen.items()}
        memory = {key: peak_mb(partial(run, variant, operands[:1]), session.device) for key, variant in chosen.items()}
        modes = {key: captured(call) if on_gpu and chosen[key].capturable else call for key, call in calls.items()}
        timings = time_interleaved(modes, session.device, bursts=arguments.bursts, seconds=arguments.seconds)
        timings = {key: Timing(t.ms / count, t.low / count, t.high / count) for key, t in timings.items()}
        for key, timing in timings.items():
            plain, published = timings.get("plain"), timings.get("published")
            session.add(
                "op",
                f"{name.lstrip('w')} {'weight' if first.signed else 'activation'}, {what}",
                f"{key}, graph" if modes[key] is not calls[key] else key,
                batch=None if first.signed else first.x.shape[0],
                dtype="bf16" if dtype == torch.bfloat16 else "float32",
                ms=timing.ms,
                ms_low=timing.low,
                ms_high=timing.high,
                ratio_to_plain=timing.ms / plain.ms if plain else None,
                ratio_to_floor=timing.ms / (1e3 * passes * first.x.nbytes / bandwidth),
                speedup=published.ms / timing.ms if published else None,
                peak_mb=memory[key],
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the tensors that are asked for."""
    parser = make_parser(__doc__)
    parser.add_argument("--tensors", nargs="+", metavar="SHAPE", help="such as 64x32x28x28; w64x32x5x5 is a weight")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--variants", nargs="+", choices=("published", "plain", *OURS), help="all by default")
    parser.add_argument("--bursts", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.1, help="length of a burst (default: %(default)s)")
    session, arguments = start("benchmarks.speed.op", parser, argv)
    torch.manual_seed(0)
    tensors = arguments.tensors or (GPU if session.device.type == "cuda" else CPU)
    if arguments.quick:
        tensors, arguments.bursts, arguments.seconds = QUICK, 2, 0.001
        arguments.variants = arguments.variants or ["published", "plain", "eager"]
    for name in tensors:
        for dtype in arguments.dtypes:
            measure(session, name, getattr(torch, dtype), arguments)
    session.print_table()


if __name__ == "__main__":
    main()
