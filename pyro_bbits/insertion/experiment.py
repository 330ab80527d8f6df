"""A copy of a network with stand-ins for its layers, run on marked channels; see :mod:`~pyro_bbits.insertion.probe`."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from pyro_bbits.insertion.inputs import Inputs
from pyro_bbits.insertion.products import ProductForward, product_name, product_place
from pyro_bbits.insertion.wires import Trace, Wire

__all__ = ["ALL_OFF", "ALL_ON", "TOLERANCE", "Experiment", "Look", "Marks"]

Marks = Callable[[str], Tensor]
"""Tells the marks of a layer: `(lanes, channels)`, or `(lanes, 1)` where all its channels have the same."""

Look = Callable[[str, Tensor], None]
"""Is shown a tensor, lanes first, with the name of the layer or product that reads it."""

TOLERANCE = 1e-9
"""Differences below this are rounding."""

ALL_OFF, ALL_ON, FIRST = 0, 1, 2
"""Lanes of every pass; from `FIRST` on come those of the producers that it singles out."""

ROOM = 2**17
"""Numbers that the largest tensor of a pass may have before producers are spread over several passes."""

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


def _overlook(name: str, x: Tensor) -> None:
    """Look at nothing."""


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
    """One network with stand-ins for its layers; `run` marks the channels of all layers, lane by lane.

    A producer takes one lane in which everything but itself is on, one for each bit of its channels' numbers with those
    on that have the bit, and one for each with those on that have not.

    Arguments:
        net: The network.
        traced: Its layers and products.
        inputs: Example inputs, batch in dimension 0.
        seen: What a forward pass on just these inputs has shown, for the lengths of all dimensions.

    Attributes:
        wires: The layers by name.
        producers: Those whose channels are followed, in the order of their calls.
        bits: Bits of a channel's number.
        used: Lanes that a pass may mark.
        lanes: All lanes; the rest are off, one at least.
    """

    def __init__(self, net: nn.Module, traced: Trace, inputs: Inputs, seen: Trace) -> None:
        self.wires = wires = {name: wire for name, wire in traced.wires.items() if not wire.is_product}
        self.producers = [name for name, wire in wires.items() if wire.is_quantized and not wire.is_depthwise]
        self.bits = max(w.out_channels for w in wires.values()).bit_length()
        self.each = 1 + 2 * self.bits
        self.together = max(1, min(len(self.producers), ROOM // (self.each * max(1, seen.largest))))
        self.used = FIRST + self.together * self.each
        self.lanes = _lane_count(self.used + 1, seen.sizes)
        self.twin = copy.deepcopy(net).cpu().double().eval()
        self.inputs = inputs.map(self._lane_inputs)
        self.marks: Marks = self.all_off
        self.look: Look = _overlook
        self.touch: Look = _overlook
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

    def batches(self, producers: Sequence[str]) -> Iterator[Sequence[str]]:
        """As many producers at a time as a pass can single out."""
        for start in range(0, len(producers), self.together):
            yield producers[start : start + self.together]

    def all_off(self, name: str) -> Tensor:
        """Marks of a layer when nothing is on but what stays in float."""
        return torch.full((self.lanes, 1), float(not self.wires[name].is_quantized), dtype=torch.double)

    def singling_out(self, producers: Sequence[str]) -> Marks:
        """Marks that single out some producers, each in lanes of its own."""
        end = FIRST + len(producers) * self.each
        order = {name: i for i, name in enumerate(producers)}

        def marks(name: str) -> Tensor:
            marked = self.all_off(name)
            marked[ALL_ON] = marked[FIRST : end : self.each] = 1.0
            if name not in order:
                return marked
            start = FIRST + order[name] * self.each
            marked = marked.repeat(1, self.wires[name].out_channels)
            marked[start : start + self.each] = self._codes(self.wires[name].out_channels)
            return marked

        return marks

    def _codes(self, channels: int) -> Tensor:
        """Marks of a producer in its own lanes, `(each, channels)`."""
        has_bit = torch.arange(channels) >> torch.arange(self.bits)[:, None] & 1
        return torch.cat([torch.zeros(1, channels), has_bit, 1 - has_bit])

    def split(self, x: Tensor, producers: int) -> tuple[Tensor, Tensor, Tensor]:
        """Lanes of a pass that singles out so many producers.

        Returns:
            Those in which all but one producer are on, `(producers, ...)`; those of the bits of its channels' numbers,
            first with and then without each bit, `(producers, 2 * bits, ...)`; and those left over, all off.
        """
        end = FIRST + producers * self.each
        own = x[FIRST:end].unflatten(0, (producers, self.each))
        return own[:, 0], own[:, 1:], x[end:]

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
        marks = self.marks(wire.name)
        channel = len(sample) - 1 if wire.is_channels_last else self._channel_dim(shape)
        marks = marks.reshape(self.lanes, *(-1 if d == channel else 1 for d in range(len(sample))))
        values = self._positions(seed, sample) * (1 + marks if raw else marks)
        return self._fold_back(values, shape)

    def _channel_dim(self, shape: torch.Size) -> int:
        """Where the channels of a convolution are in a sample: behind what is folded with the batch, if anything."""
        return 0 if shape[0] == self.lanes else 1

    def watch(self, name: str, x: Tensor) -> None:
        """Show an operand of a product."""
        if self.has_lanes(x):
            self.touch(name, self.lanes_first(name, x))

    def _replace_layer(self, wire: Wire, module: Any, seed: int) -> None:
        # channels in the last dimension need no layer on the meta device, which would import torch's compiler
        on_meta = None if wire.is_channels_last else copy.deepcopy(module).to("meta")
        real = type(module).forward
        # the bias of a depthwise layer stays where its norm carries the gate, or where another call keeps it alive
        shift = float(getattr(module, "bias", None) is not None and (wire.norm is not None or wire.calls > 1))

        def forward(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            x = input
            if wire.is_embedding:
                shape = torch.Size([*x.shape, wire.out_channels])
            elif wire.is_channels_last:
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

    def run(self, marks: Marks, look: Look = _overlook, touch: Look = _overlook) -> list[Tensor]:
        """Mark the channels of all layers.

        Arguments:
            marks: Marks of each layer.
            look: Is shown the input of each layer, `(lanes, positions, channels)`.
            touch: Is shown the operands of each product, lanes first.

        Returns:
            The tensors that the network gives out.
        """
        self.marks, self.look, self.touch = marks, look, touch
        with torch.random.fork_rng(devices=[]), torch.no_grad(), _double_precision():
            return _tensors(self.inputs.run(self.twin))

    def without_lanes(self, outputs: list[Tensor]) -> list[Tensor]:
        """Those that are one value for all samples."""
        return [x for x in outputs if not self.has_lanes(x)]


def _tensors(outputs: Any, depth: int = 0) -> list[Tensor]:
    """The tensors among a network's outputs, attributes of objects included."""
    found = []
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif depth < OBJECTS and hasattr(leaf, "__dict__"):
            found += _tensors(list(vars(leaf).values()), depth + 1)
    return found
