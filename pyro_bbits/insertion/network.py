"""Put residual quantizers and channel gates into any network."""

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from pyro_bbits.gates import ChannelGroup, GateLayout, GateValues, LivenessBank
from pyro_bbits.insertion.attention import expand_attention
from pyro_bbits.insertion.context import PassContext
from pyro_bbits.insertion.fusion import SkipReLU, find_fusions
from pyro_bbits.insertion.layers import GATED_NORMS, QUANTIZED_LAYERS
from pyro_bbits.insertion.probe import Channel, Wiring, probe
from pyro_bbits.insertion.products import MATMUL, ProductForward, QuantizedProducts, product_place
from pyro_bbits.insertion.rule import QuantizationRule
from pyro_bbits.insertion.selection import Patterns, Selection
from pyro_bbits.insertion.structure import FloatLayer, LayerInfo
from pyro_bbits.insertion.trace import Inputs, Operand, Trace, Wire, trace
from pyro_bbits.kernels.dispatch import choose_body
from pyro_bbits.ladder import BitLadder
from pyro_bbits.quantizer import Quantizers

__all__ = ["QuantizedNetwork", "quantize"]


class QuantizedNetwork(nn.Module):
    """A network whose weights and activations pass through gated quantizers.

    `network(*inputs, gates=...)` calls the user's own forward with the given gate values. The user's network is
    `network.net`: its parameters keep their names, so `network.net.state_dict()` loads into the float network and back.

    Attributes:
        net: The network itself, its layers turned into quantized ones.
        quantizers: Learned ranges and signs of the `T` quantized tensors.
        layout: Names and order of the gates.
        layers: What is known of each quantized layer and product, in the order of the calls.
        float_layers: What multiplies in float, with the reason.
        fused: Whether, on a GPU, a batch norm may do the work of the ReLU and the quantizer behind it as well in a
            training step, in the same sweep over memory. Results agree up to rounding; switch it off to compare.
        rule: Another quantizer for all tensors, see :class:`~pyro_bbits.insertion.QuantizationRule`; None for the gated
            residual one.
    """

    rule: QuantizationRule | None

    def __init__(
        self,
        net: nn.Module,
        quantizers: Quantizers,
        layout: GateLayout,
        layers: Sequence[LayerInfo],
        context: PassContext,
        float_layers: Sequence[FloatLayer],
        alive: LivenessBank,
    ) -> None:
        super().__init__()
        self.net, self.quantizers, self._alive = net, quantizers, alive
        self.layout, self.layers, self.float_layers = layout, tuple(layers), tuple(float_layers)
        self._context = context
        self.fused = True
        self.register_module("rule", None)
        self._has_fusions = any(getattr(module, "output_row", None) is not None for module in net.modules())
        self.training = net.training

    def forward(self, *args: Any, gates: GateValues | None = None, **kwargs: Any) -> Any:
        """Call the network with gate values.

        Arguments:
            args: Positional arguments of the network.
            gates: `(C,)` channel gates and `(T, R)` residual gates.
            kwargs: Keyword arguments of the network.

        Returns:
            What the network returns. In evaluation mode, without gradients and with gates of 0 and 1 it is computed as
            the float network at this configuration does, ties of rounding included.

        Raises:
            TypeError: If there are no gates.
            ValueError: If the gates do not fit the layout.
        """
        if gates is None:
            raise TypeError(
                "a quantized network is called with gate values, network(x, gates=...): network.open_gates() for all "
                "open, guide.hard_gates() for the trained ones."
            )
        shapes = tuple(gates.channels.shape), tuple(gates.tensors.shape)
        expected = (self.layout.num_channels,), (len(self.layout.tensors), len(self.layout.ladder.residuals))
        if shapes != expected:
            raise ValueError(f"gates must have shapes {expected}: (channels,), (tensors, rungs - 1); got {shapes}.")
        quantizers = self.quantizers
        try:
            widths = self._fixed_widths(gates)
            alive, fused = self._alive(gates.channels), self._fuses()
            parts = quantizers.ranges, quantizers.signed, quantizers.ladder
            self._context.fill(gates, *parts, alive, widths, fused, self.rule)
            with SkipReLU(self._context.is_finished) if fused else nullcontext():
                result = self.net(*args, **kwargs)
            self._context.check_read()
            return result
        finally:
            self._context.clear()

    def _fuses(self) -> bool:
        """Whether batch norms quantize their output in this pass, where the network has kernels for it."""
        if not (self.fused and self._has_fusions and self.training and self.rule is None):
            return False
        if self._context.watcher is not None:
            return False
        ranges, ladder = self.quantizers.log_range, self.layout.ladder
        return not torch.compiler.is_compiling() and choose_body(ranges, ladder) == "triton"

    def _fixed_widths(self, gates: GateValues) -> tuple[int, ...] | None:
        """Width of each tensor under hard gates in an evaluation: then it computes what is deployed, ties included."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or self.rule is not None:
            return None
        hard = gates.tensors.cumprod(1)
        if not ((hard == 0) | (hard == 1)).all():
            return None
        bits = self.layout.ladder.bits
        return tuple(bits[rung] for rung in hard.sum(1).long().tolist())

    @contextmanager
    def watching(self, watcher: Callable[[int, Tensor], None]) -> Iterator[None]:
        """While active, every tensor is shown with its row before it is quantized.

        Arguments:
            watcher: Called with a row of `layout.tensors` and the tensor.
        """
        self._context.watcher = watcher
        try:
            yield
        finally:
            self._context.watcher = None

    def open_gates(self) -> GateValues:
        """All gates open, on the device of the network."""
        device = self.quantizers.log_range.device
        return GateValues(*(g.to(device) for g in self.layout.open_gates()))


def quantize(
    net: nn.Module,
    example_inputs: Any,
    *,
    bits: Sequence[int] | BitLadder = (2, 4, 8, 16, 32),
    include: Patterns = "*",
    exclude: Patterns = (),
) -> QuantizedNetwork:
    """Put a gated quantizer on every weight and every activation that is multiplied in a network.

    The network is copied; the original is not touched. Quantized are linear layers, convolutions and transposed
    convolutions of one to three dimensions, embeddings, and products of two activations (`@`, `matmul`, `bmm`,
    `einsum`, `scaled_dot_product_attention`); :class:`torch.nn.MultiheadAttention` is spelled out in these. A tensor
    that is read several times has one quantizer. Sums, concatenations and the network's own input stay as they are.
    What multiplies otherwise stays in float, is listed in :attr:`QuantizedNetwork.float_layers` and counts as
    32 x 32 bit.

    Output channels get a gate wherever a closed channel is exactly zero for everything that reads it;
    :attr:`LayerInfo.refused` tells why not elsewhere.

    Ranges and signs are calibrated on the example inputs, as the largest magnitude seen, in the mode (train or eval)
    the network is in.

    Arguments:
        net: Any network whose inputs have the batch in dimension 0.
        example_inputs: A tensor (the only argument), a tuple of arguments or a dict of keyword arguments; a few tens of
            real samples.
        bits: The ladder of bit widths.
        include: Shell-style pattern, or several, of module paths to quantize. A path stands for all that is inside it.
        exclude: Of module paths that stay in float, e.g. `("head", "blocks.*.attention")`; wins over `include`.

    Returns:
        The quantized network. With all gates open at 32 bits it equals the original to float precision.

    Raises:
        TypeError: If `net` is no module, or one that cannot be changed (compiled, scripted, wrapped).
        ValueError: If the examples are empty or not finite, if no layer can be quantized, a pattern matches nothing, or
            a layer's weights are not finite.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> network = quantize(net, torch.rand(16, 4))
        >>> network.layout.tensors
        ('0.weight', '2.weight', '2.input')
        >>> [layer.refused for layer in network.layers]
        [None, "it feeds the network's output"]
        >>> network(torch.rand(16, 4), gates=network.open_gates()).shape
        torch.Size([16, 2])
    """
    ladder = _ladder(bits)
    _check_net(net)
    inputs, selection = Inputs.of(example_inputs), Selection.of(include, exclude)
    net = expand_attention(_copy(net), selection.excluded)
    _check_weights(net)
    traced = _run_trace(net, inputs)
    float_layers = selection.apply(net, traced)
    _warn_of_float_layers(float_layers, sum(wire.macs for wire in traced.wires.values() if wire.is_quantized))
    wiring, fusions = _run_probe(net, traced, inputs), find_fusions(net, inputs)
    builder = _Builder(net, traced, wiring, ladder)
    builder.fuse(fusions)
    parts = builder.quantizers(), builder.layout, builder.layers, builder.context, float_layers, builder.alive()
    return QuantizedNetwork(net, *parts)


def _ladder(bits: Any) -> BitLadder:
    if isinstance(bits, BitLadder):
        return bits
    if not isinstance(bits, Sequence) or isinstance(bits, str):
        raise TypeError(f"bits must be a sequence of widths, e.g. (2, 4, 8); got {bits!r}.")
    return BitLadder(tuple(bits))


def _check_net(net: Any) -> None:
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module; got {type(net).__name__}.")
    if isinstance(net, DataParallel | DistributedDataParallel):
        raise TypeError(f"net is wrapped in {type(net).__name__}; quantize the network inside it, net.module.")
    for name, module in net.named_modules():
        if isinstance(module, QuantizedNetwork) or type(module) in QUANTIZED_LAYERS.values():
            raise TypeError(f"{name or 'net'} is quantized already; quantize the float network.")
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{name or 'net'} is a script module, whose code is fixed; quantize the module it is from.")
        if isinstance(module, torch._dynamo.OptimizedModule):
            raise TypeError(f"{name or 'net'} is compiled; quantize the network itself and compile the result.")


def _copy(net: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(net)
    except RuntimeError as error:
        raise ValueError(
            f"the network cannot be copied ({error}); a tensor that is computed from parameters, as "
            "torch.nn.utils.weight_norm keeps one, has to be made a parameter first (remove_weight_norm)."
        ) from error


def _check_weights(net: nn.Module) -> None:
    for name, parameter in net.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ValueError(f"parameter {name!r} is not initialized yet; run the network once before quantizing it.")
        if not parameter.isfinite().all():
            raise ValueError(
                f"parameter {name!r} holds NaN or infinite values; quantize a network with finite weights."
            )


def _run_trace(net: nn.Module, inputs: Inputs) -> Trace:
    try:
        return trace(net, inputs)
    except Exception as error:
        raise ValueError(
            f"the network could not be run on example_inputs ({type(error).__name__}: {error}); "
            "give inputs it accepts: a tensor, a tuple of arguments or a dict of keyword arguments."
        ) from error


def _run_probe(net: nn.Module, traced: Trace, inputs: Inputs) -> Wiring:
    try:
        return probe(net, traced, inputs)
    except Exception as error:
        if type(error) is ValueError and "exclude=" in str(error):
            raise
        raise ValueError(
            "the wiring could not be found: the network runs on example_inputs, but not on another number of them in "
            f"evaluation mode ({type(error).__name__}: {error}). Dimension 0 of every input tensor must be the batch, "
            "and no batch size may be kept in the network."
        ) from error


def _warn_of_float_layers(float_layers: Sequence[FloatLayer], quantized: int) -> None:
    """What stays in float without the user's wish should not be found out from the cost."""
    unasked = [layer for layer in float_layers if layer.macs and not layer.is_excluded]
    uncalled = [layer.name for layer in float_layers if not layer.macs and not layer.is_excluded]
    if uncalled:
        warnings.warn(
            f"{', '.join(uncalled[:5])}{' and more' * (len(uncalled) > 5)} stay in float: not called on the example "
            "inputs, or of a class that is not supported.",
            stacklevel=3,
        )
    if unasked:
        total = quantized + sum(layer.macs for layer in float_layers)
        share = 100 * sum(layer.macs for layer in unasked) / total
        names = ", ".join(f"{layer.name or 'the network'} ({layer.reason})" for layer in unasked[:5])
        more = f" and {len(unasked) - 5} more" if len(unasked) > 5 else ""
        warnings.warn(f"{share:.3g} % of the multiplications stay in float: {names}{more}.", stacklevel=3)


class _Builder:
    """Assign rows and channel gates, then turn the layers of a (copied) network into quantized ones."""

    def __init__(self, net: nn.Module, traced: Trace, wiring: Wiring, ladder: BitLadder) -> None:
        self.wires = {name: wire for name, wire in traced.wires.items() if wire.is_quantized}
        self.products = [wire.name for wire in traced.wires.values() if wire.is_product]
        self.wiring, self.ladder = wiring, ladder
        self.gated: list[tuple[frozenset[int], ...]] = []
        self.modules = dict(net.named_modules())
        self.context = PassContext()
        self.peers: dict[str | None, list[Operand]] = {}
        for operand in (operand for wire in self.wires.values() for operand in wire.operands):
            self.peers.setdefault(operand.group, []).append(operand)
        self.rows: dict[Any, int] = {}
        self.tensors: list[str] = []
        self.ranges: list[float] = []
        self.signed: list[bool] = []
        layers = [wire for wire in self.wires.values() if not wire.is_product]
        weights = {wire.name: self._weight_row(wire) for wire in layers}
        self.readers: Counter[int | None] = Counter(weights.values())
        operands = {name: [self._operand_row(o) for o in wire.operands] for name, wire in self.wires.items()}
        self._refuse_tied(weights, operands)
        prunable = [wire for wire in layers if wire.name not in wiring.refused]
        groups = tuple(ChannelGroup(wire.name, weights[wire.name], wire.out_channels) for wire in prunable)
        self.layout = GateLayout(ladder, tuple(self.tensors), groups)
        self.layers = [
            self._describe_product(wire, operands[wire.name])
            if wire.is_product
            else self._describe(wire, weights[wire.name], operands[wire.name][0])
            for wire in self.wires.values()
        ]
        for layer in self.layers:
            if not layer.is_product:
                self._convert(layer)
        self._convert_owners()

    def quantizers(self) -> Quantizers:
        device = next(wire for wire in self.wires.values() if not wire.is_product).module.weight.device
        return Quantizers(self.ranges, self.signed, self.ladder).to(device)

    def alive(self) -> LivenessBank:
        """Liveness of the output channels of all layers that have gates."""
        sizes = [group.channels for group in self.layout.groups]
        return LivenessBank(self.gated, sizes).to(self.quantizers().log_range.device)

    def fuse(self, fusions: Mapping[str, frozenset[str]]) -> None:
        """Let batch norms quantize what is behind their ReLU, if all that reads it takes it by one unsigned row."""
        inputs = {layer.name: layer.input for layer in self.layers}
        for name, readers in fusions.items():
            rows = {inputs.get(reader) for reader in readers}
            row = rows.pop()
            if rows or row is None or self.signed[row]:
                continue
            norm: Any = self.modules[name]
            norm.__class__ = GATED_NORMS.get(type(norm), type(norm))
            norm.context, norm.output_row = self.context, row

    def _row(self, identity: Any, name: str, low: float, high: float) -> int:
        if identity not in self.rows:
            if low > high:  # nothing but empty tensors
                low = high = 0.0
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError(f"{name} is infinite or NaN on the example inputs; its range cannot be calibrated.")
            self.rows[identity] = len(self.tensors)
            self.tensors.append(name)
            self.ranges.append(max(abs(low), abs(high)) or 1.0)  # an all-zero tensor has no scale of its own
            self.signed.append(low < 0)
        return self.rows[identity]

    def _weight_row(self, wire: Wire) -> int:
        weight = wire.module.weight.detach()
        return self._row(id(wire.module.weight), f"{wire.name}.weight", weight.min().item(), weight.max().item())

    def _operand_row(self, operand: Operand) -> int | None:
        if operand.parameter is not None and id(operand.parameter) in self.rows:
            return self.rows[id(operand.parameter)]  # a layer's weight, or a view of it
        if operand.group is None:
            return None
        peers = self.peers[operand.group]
        return self._row(operand.group, operand.group, min(o.low for o in peers), max(o.high for o in peers))

    def _refuse_tied(self, weights: Mapping[str, int], operands: Mapping[str, list[int | None]]) -> None:
        """A weight that something with all its channels uses is never without channels, so its width always counts."""
        whole = {row: name for name, rows in operands.items() if self.wires[name].is_product for row in rows}
        whole |= {weights[name]: name for name in self.wiring.refused if name in weights}
        for name, row in weights.items():
            if row in whole:
                self.wiring.refused.setdefault(
                    name, f"it shares its weight with {whole[row]}, which keeps all channels"
                )

    def _gate_indices(self, channels: set[Channel]) -> frozenset[int]:
        """Global indices of the gates behind (layer, channel) pairs; empty if one of them is never pruned."""
        try:
            return frozenset([self.layout.slices[layer].start + c for layer, c in channels])
        except KeyError:
            return frozenset()

    def _outputs(self, wire: Wire, inputs: tuple[frozenset[int], ...]) -> tuple[frozenset[int], ...]:
        if wire.is_depthwise:
            return tuple(inputs[c // (wire.out_channels // wire.in_channels)] for c in range(wire.out_channels))
        gates = self.layout.slices.get(wire.name)
        if gates is None:
            return (frozenset[int](),) * wire.out_channels
        return tuple(frozenset([gate]) for gate in range(gates.start, gates.stop))

    def _describe(self, wire: Wire, weight: int, input_row: int | None) -> LayerInfo:
        inputs = tuple(self._gate_indices(channels) for channels in self.wiring.reach[wire.name])
        return LayerInfo(
            name=wire.name,
            kind=type(wire.module).__name__,
            macs=wire.macs,
            weight=weight,
            input=input_row,
            norm=wire.norm,
            groups=wire.groups,
            depthwise=wire.is_depthwise,
            inputs=inputs,
            outputs=self._outputs(wire, inputs),
            refused=self.wiring.refused.get(wire.name),
            lookups=wire.lookups,
        )

    def _describe_product(self, wire: Wire, operands: list[int | None]) -> LayerInfo:
        always = (frozenset[int](),)
        return LayerInfo(
            name=wire.name,
            kind=MATMUL,
            macs=wire.macs,
            weight=operands[1],
            input=operands[0],
            norm=None,
            groups=1,
            depthwise=False,
            inputs=always,
            outputs=always,
            refused=self.wiring.refused[wire.name],
        )

    def _convert_owners(self) -> None:
        """Let the modules that make products quantize their operands."""
        counts = Counter(product_place(name)[0] for name in self.products)
        visitors = {owner: QuantizedProducts(owner, self.context, count) for owner, count in counts.items()}
        for layer in self.layers:
            if layer.is_product:
                owner, index = product_place(layer.name)
                visitors[owner].rows[index] = layer.input, layer.weight
        for owner, visitor in visitors.items():
            module: Any = self.modules[owner]
            module.forward = ProductForward(module, visitor)

    def _convert(self, layer: LayerInfo) -> None:
        wire = self.wires[layer.name]
        module: Any = wire.module
        module.__class__ = QUANTIZED_LAYERS[type(module)]
        module.context, module.weight_row, module.input_row = self.context, layer.weight, layer.input
        module.reusable, module.output_gate = self._reusable(wire), None
        module.sole_reader = self.readers[module.weight_row] == 1
        if not any(layer.outputs):
            return
        gate = len(self.gated)
        self.gated.append(layer.outputs)
        if layer.norm is None:
            module.output_gate = gate
            return
        norm: Any = self.modules[layer.norm]
        norm.__class__ = GATED_NORMS[type(norm)]
        norm.context, norm.output_gate = self.context, gate

    def _reusable(self, wire: Wire) -> bool:
        """Whether the same input is read again: one that is kept for nobody fills memory until the pass ends.

        An input changed in place between its readers is not one tensor, though it is one object.
        """
        peers = self.peers[wire.operands[0].group]
        keys = set().union(*(operand.keys for operand in peers))
        return (len(peers) > 1 or wire.calls > 1) and len({key[:3] for key in keys}) == len(keys)
