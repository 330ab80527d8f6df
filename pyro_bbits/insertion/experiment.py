"""A copy of a network with stand-ins for its layers, run on marked channels; see :mod:`~pyro_bbits.insertion.probe`."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from pyro_bbits.insertion.products import ProductForward, product_name, product_place
from pyro_bbits.insertion.trace import Inputs, Trace, Wire

__all__ = ["ALL_BUT_ONE", "ALL_OFF", "ALL_ON", "FIRST_BIT", "TOLERANCE", "Experiment"]

TOLERANCE = 1e-9
"""Differences below this are rounding."""

ALL_OFF, ALL_ON, ALL_BUT_ONE, FIRST_BIT = 0, 1, 2, 3
"""Lanes of a producer's marks; from `FIRST_BIT` on come two for each bit of its channels' numbers."""

OBJECTS = 3
"""How deep tensors are looked for in objects that a network returns."""


def _random(shape: Sequence[int], seed: int, sign: int | None = None) -> Tensor:
    """Numbers away from 0: positive, or of random signs, all of them turned around by `sign` = -1."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = 0.5 + torch.rand(shape, generator=generator, dtype=torch.double)
    if sign is None:
        return magnitude
    return magnitude * sign * (2 * torch.randint(2, shape, generator=generator) - 1)


def _lane_count(needed: int, sizes: set[int]) -> int:
    """A prime that divides no length seen in the network, so that the dimension of the lanes is known by its length."""
    count = needed
    while any(count % n == 0 for n in range(2, int(count**0.5) + 1)) or any(n % count == 0 for n in sizes if n):
        count += 1
    return count


def _unwatched(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A stand-in's own arithmetic is none of the network's."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        with torch._C.DisableTorchFunction():
            return forward(*args, **kwargs)

    return run


class _Watcher:
    """Shows the operands of the products of one module to an experiment."""

    def __init__(self, experiment: "Experiment", owner: str) -> None:
        self.experiment, self.owner = experiment, owner

    def __call__(self, index: int, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        for x in (left, right):
            self.experiment.watch(product_name(self.owner, index), x)
        return left, right

    def finish(self, count: int) -> None:
        """A path that only training takes is not seen here."""


class _Doubles(TorchFunctionMode):
    """Keeps the network in double precision where its code asks for another one."""

    CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)
    DTYPES: Mapping[Any, torch.dtype] = {
        **dict.fromkeys([torch.float32, torch.float16, torch.bfloat16], torch.double),
        torch.complex64: torch.complex128,
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func in self.CASTS else func
        args, kwargs = tree_map(self._double, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _double(self, x: Any) -> Any:
        return self.DTYPES.get(x, x) if isinstance(x, torch.dtype) else x


@contextlib.contextmanager
def _double_precision() -> Iterator[None]:
    """New tensors are double, and stay so."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.double)
    try:
        with _Doubles():
            yield
    finally:
        torch.set_default_dtype(before)


class Experiment:
    """One network with stand-ins for its layers; `run` marks the channels of all layers, lane by lane."""

    def __init__(self, net: nn.Module, traced: Trace, inputs: Inputs, sizes: set[int]) -> None:
        self.wires = wires = {name: wire for name, wire in traced.wires.items() if not wire.is_product}
        self.bits = max(w.out_channels for w in wires.values()).bit_length()
        self.used = FIRST_BIT + 2 * self.bits
        self.lanes = _lane_count(self.used + 1, sizes)  # the rest are all off, one at least
        self.twin = copy.deepcopy(net).cpu().double().eval()
        self.inputs = inputs.map(self._lane_inputs)
        self.marks: Mapping[str, Tensor] = {}
        self.look: Callable[[str, Tensor], None] = lambda name, x: None
        self.operands: list[tuple[str, Tensor]] = []
        self.values: dict[tuple[int, torch.Size, int | None], Tensor] = {}
        modules = dict(self.twin.named_modules())
        for seed, wire in enumerate(wires.values()):
            self._replace_layer(wire, modules[wire.name], seed)
            if wire.norm is not None:
                self._replace_norm(wire, modules[wire.norm], seed)
        for owner in {product_place(name)[0] for name, wire in traced.wires.items() if wire.is_product}:
            modules[owner].forward = ProductForward(modules[owner], _Watcher(self, owner))
        self.draw(None)

    def draw(self, sign: int | None) -> None:
        """Give all values random numbers, so that every shift shows: positive ones, but negative running means."""
        self.sign = sign
        self.values.clear()
        used = [m for name, m in self.twin.named_modules() if name not in self.wires]
        tensors = [(n, t) for m in used for n, t in (*m._parameters.items(), *m._buffers.items()) if t is not None]
        for seed, (name, tensor) in enumerate(tensors):
            if tensor.is_floating_point():
                values = _random(tensor.shape, seed, None if name == "running_var" else sign)
                tensor.data = -values if name == "running_mean" else values

    def _lane_inputs(self, x: Tensor) -> Tensor:
        """The first example in every lane, positive where it is a float."""
        first = x[:1].cpu()
        first = first.double().abs() + 1 if first.is_floating_point() else first
        return first.repeat(self.lanes, *[1] * (first.dim() - 1))

    def codes(self, channels: int) -> Tensor:
        """Bits of each channel number, (bits, channels)."""
        numbers = torch.arange(channels)
        return torch.stack([numbers >> k & 1 for k in range(self.bits)]).bool()

    def marks_of_all(self, value: float) -> dict[str, Tensor]:
        """The same mark for all channels in all lanes, `(lanes, channels)`; what stays in float is on."""
        return {
            name: torch.full((self.lanes, w.out_channels), value if w.is_quantized else 1.0, dtype=torch.double)
            for name, w in self.wires.items()
        }

    def producer_marks(self, active: str) -> dict[str, Tensor]:
        """Marks of every layer, (lanes, channels), that single out one producer."""
        marks = self.marks_of_all(0.0)
        for name in marks:
            marks[name][ALL_ON] = 1
            marks[name][ALL_BUT_ONE] = float(name != active)
        codes = self.codes(self.wires[active].out_channels)
        marks[active][FIRST_BIT : self.used : 2] = codes.double()
        marks[active][FIRST_BIT + 1 : self.used : 2] = (~codes).double()
        return marks

    def has_lanes(self, x: Tensor) -> bool:
        """Whether the batch is anywhere in a tensor."""
        return any(length % self.lanes == 0 for length in x.shape)

    def lanes_first(self, name: str, x: Tensor) -> Tensor:
        """The lanes in a dimension of their own before all others, wherever the user's code has put the batch."""
        own = [d for d in range(x.dim()) if x.shape[d] == self.lanes]
        if len(own) == 1:
            return x.movedim(own[0], 0)
        folded = [d for d in range(x.dim()) if x.shape[d] % self.lanes == 0]
        if len(folded) != 1 or own:
            raise ValueError(
                f"the batch is lost on the way to {name!r}: it is called on a tensor of shape {tuple(x.shape)} for "
                f"{self.lanes} samples; leave it out of quantization, exclude=({name!r},)."
            )
        unfolded: Tensor = x.unflatten(folded[0], (self.lanes, -1))
        return unfolded.movedim(folded[0], 0)

    def _fold_back(self, y: Tensor, like: torch.Size) -> Tensor:
        """The reverse of :meth:`lanes_first`, for a result whose shape the layer has told."""
        own = [d for d in range(len(like)) if like[d] == self.lanes]
        if own:
            return y.movedim(0, own[0])
        folded = next(d for d in range(len(like)) if like[d] % self.lanes == 0)
        return y.movedim(0, folded).flatten(folded, folded + 1)

    def _positions(self, seed: int, shape: torch.Size) -> Tensor:
        key = seed, shape, self.sign
        if key not in self.values:
            self.values[key] = _random(shape, seed, self.sign)
        values: Tensor = self.values[key]
        return values

    def _emit(self, wire: Wire, shape: torch.Size, seed: int, raw: bool) -> Tensor:
        """Values that differ by position but not by lane, times the marks; before a gated norm no channel is zero.

        The values are drawn for one sample, so that a batch folded with another dimension differs along that one too.
        """
        sample = self.lanes_first(wire.name, torch.empty(shape, device="meta")).shape[1:]
        marks = self.marks[wire.name]
        channel = len(sample) - 1 if wire.is_channels_last else self._channel_dim(shape)
        marks = marks.reshape(self.lanes, *(-1 if d == channel else 1 for d in range(len(sample))))
        values = self._positions(seed, sample) * (1 + marks if raw else marks)
        return self._fold_back(values, shape)

    def _channel_dim(self, shape: torch.Size) -> int:
        """Where the channels of a convolution are in a sample: behind what is folded with the batch, if anything."""
        return 0 if shape[0] == self.lanes else 1

    def watch(self, name: str, x: Tensor) -> None:
        """Keep an operand of a product."""
        if self.has_lanes(x):
            self.operands.append((name, self.lanes_first(name, x).clone()))

    def _replace_layer(self, wire: Wire, module: Any, seed: int) -> None:
        on_meta, real = copy.deepcopy(module).to("meta"), type(module).forward
        # the bias of a depthwise layer stays where its norm carries the gate, or where another call keeps it alive
        shift = float(getattr(module, "bias", None) is not None and (wire.norm is not None or wire.calls > 1))

        def forward(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            x = input
            if wire.is_embedding:
                shape = torch.Size([*x.shape, wire.out_channels])
            elif wire.is_channels_last:  # on the meta device it would import the whole of torch's compiler
                shape = torch.Size([*x.shape[:-1], wire.out_channels])
            else:
                shape = real(on_meta, x.to("meta", torch.double), *args, **kwargs).shape
            if not wire.is_quantized and not wire.is_channels_last and x.shape[0] % self.lanes:
                unquantized: Tensor = real(module, x, *args, **kwargs)  # nothing is asked of a layer in float
                return unquantized
            if not self.has_lanes(x):  # the same for all samples, as the embedding of a position is
                return self._positions(seed, shape)
            if not wire.is_embedding:
                self.look(wire.name, self._channels_last(wire, x))
            if wire.is_depthwise and wire.is_quantized:  # passes its producers' marks on, and will carry their gates
                peak = x.abs().amax(tuple(range(2, x.dim())), keepdim=True)
                peak = peak.repeat_interleave(wire.out_channels // wire.in_channels, 1)
                return peak * self._positions(seed, shape[1:]) + shift
            return self._emit(wire, shape, seed, raw=wire.norm is not None)

        module.forward = _unwatched(forward)

    def _channels_last(self, wire: Wire, x: Tensor) -> Tensor:
        """A view, or else a copy, as (lanes, positions, channels)."""
        if not wire.is_channels_last:
            if x.shape[0] % self.lanes:
                raise ValueError(
                    f"layer {wire.name!r} is called on a tensor whose dimension 0 is not the batch (it has length "
                    f"{x.shape[0]} for {self.lanes} samples); leave it out of quantization, exclude=({wire.name!r},)."
                )
            x = x.movedim(1, -1)
        return self.lanes_first(wire.name, x).reshape(self.lanes, -1, wire.in_channels)

    def _replace_norm(self, wire: Wire, module: nn.Module, seed: int) -> None:
        shift = float(wire.module.bias is not None)

        def forward(input: Tensor) -> Tensor:
            return input - shift if wire.is_depthwise else self._emit(wire, input.shape, seed, raw=False)

        module.forward = _unwatched(forward)

    def run(self, marks: Mapping[str, Tensor], look: Callable[[str, Tensor], None]) -> list[Tensor]:
        """Mark the channels of all layers.

        Arguments:
            marks: `(lanes, channels)` for each layer.
            look: Called with the name of each layer and its input, `(lanes, positions, channels)`.

        Returns:
            The tensors that the network gives out.
        """
        self.marks, self.look = marks, look
        self.operands.clear()
        with torch.random.fork_rng(devices=[]), torch.no_grad(), _double_precision():
            return _tensors(self.inputs.run(self.twin))

    def without_lanes(self, outputs: list[Tensor]) -> list[Tensor]:
        """Those that are one value for all samples."""
        return [x for x in outputs if not self.has_lanes(x)]

    def blame(self, producer: str) -> str:
        """Name of the function that keeps a producer's closed channels from arriving as zero, if there is one."""
        mode = _Blame(self)
        with contextlib.suppress(_Found), mode:
            self.run(self.producer_marks(producer), lambda name, x: None)
        return mode.name


def _tensors(outputs: Any, depth: int = 0) -> list[Tensor]:
    """The tensors among a network's outputs, attributes of objects included."""
    found = []
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif depth < OBJECTS and hasattr(leaf, "__dict__"):
            found += _tensors(list(vars(leaf).values()), depth + 1)
    return found


class _Found(Exception):
    """Ends a pass whose question is answered."""


class _Blame(TorchFunctionMode):
    """Finds the first function that makes something other than zero of the zeros of closed channels."""

    def __init__(self, experiment: Experiment) -> None:
        super().__init__()
        self.experiment, self.name = experiment, ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            if isinstance(result, Tensor) and self._is_off(result) is False:
                states = [self._is_off(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
                if True in states and False not in states:
                    self.name = func.__name__.strip("_")
                    raise _Found
        return result

    def _is_off(self, x: Tensor) -> bool | None:
        """Whether what depends on the active producer is zero when it is off; None if nothing depends on it."""
        if not x.is_floating_point() or not self.experiment.has_lanes(x):
            return None
        x = self.experiment.lanes_first("", x)
        depends = (x[ALL_ON] - x[ALL_BUT_ONE]).abs() > TOLERANCE
        return bool((x[ALL_OFF][depends].abs() <= TOLERANCE).all()) if depends.any() else None
