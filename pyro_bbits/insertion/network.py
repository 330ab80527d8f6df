"""A network whose weights and activations pass through gated quantizers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bbits.gates import GateLayout, GateValues, LivenessBank
from pyro_bbits.insertion.context import PassContext
from pyro_bbits.insertion.finished import SkipFinished
from pyro_bbits.insertion.rule import QuantizationRule
from pyro_bbits.insertion.structure import FloatLayer, LayerInfo
from pyro_bbits.kernels.dispatch import choose_body
from pyro_bbits.quantizer import Quantizers

__all__ = ["QuantizedNetwork"]


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
        fused: Whether, on a GPU, a batch norm may do the work of ReLU, max pooling and quantizer behind it as well in a
            training step, in the same sweep over memory; hooks on a ReLU or pooling between them see its result.
            Results agree up to rounding; switch it off to compare.
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
        self._known_widths: tuple[Tensor, int, tuple[int, ...] | None] | None = None
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
            with SkipFinished(self._context.finished) if fused else nullcontext():
                result = self.net(*args, **kwargs)
            self._context.finished.check_read()
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
        capturing = gates.tensors.is_cuda and torch.cuda.is_current_stream_capturing()
        if gates.tensors.is_inference() or gates.tensors.requires_grad or capturing:
            # these do not tell whether they have changed, are not to be held, and are not to be fixed in a graph
            return self._widths_of(gates.tensors)
        known = self._known_widths
        if known is None or known[0] is not gates.tensors or known[1] != gates.tensors._version:
            # read once for all batches of an evaluation, none of which then waits for the one before; a change past
            # autograd (`gates.tensors.data`) is not seen
            known = gates.tensors, gates.tensors._version, self._widths_of(gates.tensors)
            self._known_widths = known
        return known[2]

    def _widths_of(self, gates: Tensor) -> tuple[int, ...] | None:
        hard = gates.cumprod(1)
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
