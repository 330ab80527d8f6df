"""Quantized layers: ordinary subclasses that a user's layers are turned into, and back.

`layer.__class__ = QuantConv2d` keeps the object, its parameters and their names, so state dicts, tied weights and the
user's own code go on working.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bbits.gates import Liveness
from pyro_bbits.insertion.context import PassContext

__all__ = ["GATED_NORMS", "QUANTIZED_LAYERS", "GatedNorm", "QuantizedLayer"]


class QuantizedLayer:
    """What every quantized layer adds to its float class.

    Attributes:
        context: The network's pass context.
        weight_row: Row of the weight among the quantized tensors.
        input_row: Row of the input, or None where the layer reads the network's input, which stays as it is.
        reusable: Whether other layers may share this layer's quantized input.
        output_gate: Gates of the layer's output channels, or None where a batch norm carries them or none exist.
    """

    context: PassContext
    weight_row: int
    input_row: int | None
    reusable: bool
    output_gate: Liveness | None
    weight: Any
    bias: Any

    def forward(self, x: Tensor) -> Tensor:
        """The float layer on quantized weight and input, its output channels multiplied by their gates."""
        weight, bias = self.context.quantize(self.weight_row, self.weight), self.bias
        if self.input_row is not None:
            x = self.context.quantize(self.input_row, x, reusable=self.reusable)
        if self.output_gate is not None and self.context.channel_gates is not None:
            # gating weight and bias equals gating the output, without another pass over the activation
            gate = self.output_gate(self.context.channel_gates).to(weight.dtype)
            weight = weight * gate.reshape(-1, *[1] * (weight.dim() - 1))
            bias = None if bias is None else bias * gate
        return self._multiply(x, weight, bias)

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """A quantized :class:`torch.nn.Linear`."""

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class QuantizedConv1d(QuantizedLayer, nn.Conv1d):
    """A quantized :class:`torch.nn.Conv1d`."""

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = self._conv_forward(x, weight, bias)
        return y


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """A quantized :class:`torch.nn.Conv2d`."""

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = self._conv_forward(x, weight, bias)
        return y


class GatedNorm:
    """A batch norm whose channels carry the gates of the layer before it: a closed channel is exactly zero.

    The gate multiplies scale and shift, which equals multiplying the output.
    """

    context: PassContext
    output_gate: Liveness

    def forward(self: Any, x: Tensor) -> Tensor:
        """Batch norm with gated scale and shift."""
        self._check_input_dim(x)
        gate = self.output_gate(self.context.channel_gates).to(x.dtype)
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        use_batch = self.training or self.running_mean is None
        return F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            gate if self.weight is None else self.weight * gate,
            None if self.bias is None else self.bias * gate,
            use_batch,
            self._momentum(),
            self.eps,
        )

    def _momentum(self: Any) -> float:
        if self.momentum is not None:
            return float(self.momentum)
        # momentum None means a cumulative average over all batches seen
        return 1.0 / float(self.num_batches_tracked) if self.training and self.track_running_stats else 0.0


class GatedBatchNorm1d(GatedNorm, nn.BatchNorm1d):
    """A gated :class:`torch.nn.BatchNorm1d`."""


class GatedBatchNorm2d(GatedNorm, nn.BatchNorm2d):
    """A gated :class:`torch.nn.BatchNorm2d`."""


QUANTIZED_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
}
"""Quantized class of each supported layer; exact types only, since a subclass may compute something else."""

GATED_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: GatedBatchNorm1d,
    nn.BatchNorm2d: GatedBatchNorm2d,
}
"""Gated class of each batch norm that can carry the channel gates of the layer before it."""
