"""Quantized layers: ordinary subclasses that a user's layers are turned into, and back.

`layer.__class__ = QuantizedConv2d` keeps the object, its parameters and their names, so state dicts, tied weights and
the user's own code go on working.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from pyro_bbits.insertion.context import PassContext

__all__ = [
    "GATED_NORMS",
    "QUANTIZED_LAYERS",
    "GatedNorm",
    "QuantizedLayer",
    "gate_outputs",
    "out_channels",
    "unsupported_option",
]


def gate_outputs(layer: nn.Module, weight: Tensor, gate: Tensor) -> Tensor:
    """A weight with its output channels multiplied by their gates.

    Arguments:
        layer: The layer, which tells where its weight has the output channels.
        weight: Its weight, perhaps quantized.
        gate: `(channels,)` gates.
    """
    gate = gate.to(weight.dtype)
    if isinstance(layer, nn.Embedding):  # (entries, channels)
        return weight * gate
    if isinstance(layer, _ConvTransposeNd):  # (in, out / groups, *kernel)
        gate = gate.reshape(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
        gated: Tensor = (weight.unflatten(0, (layer.groups, -1)) * gate).flatten(0, 1)
        return gated
    return weight * gate.reshape(-1, *[1] * (weight.dim() - 1))  # (out, in / groups, *kernel)


def _leads_with_outputs(layer: nn.Module) -> bool:
    """Whether dimension 0 of the weight are the output channels, so that the quantizer can gate them."""
    return not isinstance(layer, nn.Embedding | _ConvTransposeNd)


def out_channels(layer: Any) -> int:
    """Output channels (or features) of a layer of a supported class."""
    if isinstance(layer, nn.Linear):
        return int(layer.out_features)
    return int(layer.embedding_dim if isinstance(layer, nn.Embedding) else layer.out_channels)


def unsupported_option(layer: nn.Module) -> str | None:
    """Why a layer of a supported class cannot be quantized, if so."""
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.sparse):
        return f"its option {'sparse' if layer.max_norm is None else 'max_norm'} is not supported"
    if layer._parameters.get("weight") is None:
        return "its weight is no parameter but computed from others, e.g. by weight_norm"
    return None


class QuantizedLayer:
    """What every quantized layer adds to its float class.

    Attributes:
        context: The network's pass context.
        weight_row: Row of the weight among the quantized tensors.
        input_row: Row of the input, or None where it is the network's own or holds indices: it stays as it is.
        reusable: Whether other layers may share this layer's quantized input.
        sole_reader: Whether no other layer has the same weight, which then is quantized once for all of them.
        read_once: Whether moreover the layer is called once in a pass.
        output_gate: Number of the layer's gates among those of the pass, or None where a batch norm carries them or
            none exist.
    """

    context: PassContext
    weight_row: int
    input_row: int | None
    reusable: bool
    sole_reader: bool = True
    read_once: bool = False
    output_gate: int | None
    weight: Any
    bias: Any

    def forward(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The float layer on quantized weight and input, its output channels multiplied by their gates."""
        if self.input_row is not None:
            input = self.context.quantize(self.input_row, input, reusable=self.reusable)
        result: Tensor = self._computed(input, *args, **kwargs)
        return result

    def _computed(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight, bias = self._gated_parameters()
        result: Tensor = self._multiply(x, weight, bias, *args, **kwargs)
        return result

    def _gated_parameters(self: Any) -> tuple[Tensor, Tensor | None]:
        """Quantized weight, and bias: gating both equals gating the output, without a pass over the activation."""
        # products make the gradient of a quantized weight, and nobody else reads it
        options = {"multiplied": not isinstance(self, nn.Embedding), "spend_grad": True}
        if self.output_gate is None:
            return self.context.quantize(self.weight_row, self.weight, **options), self._gated_bias()
        leading = self.sole_reader and _leads_with_outputs(self)
        gated = self.output_gate if leading else None
        weight = self.context.quantize(self.weight_row, self.weight, gate=gated, **options)
        weight = weight if leading else gate_outputs(self, weight, self.context.alive[self.output_gate])
        return weight, self._gated_bias()

    def _gated_bias(self: Any) -> Tensor | None:
        bias: Tensor | None = getattr(self, "bias", None)
        if bias is None or self.output_gate is None:
            return bias
        gated: Tensor = bias * self.context.alive[self.output_gate].to(bias.dtype)
        return gated

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """A quantized :class:`torch.nn.Linear`; a large weight is quantized once more in the backward pass, not kept."""

    def _computed(self, x: Tensor) -> Tensor:
        if self.read_once and self.context.spares(self.weight):
            return self.context.linear(self.weight_row, x, self.weight, self._gated_bias(), gate=self.output_gate)
        return super()._computed(x)

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


class QuantizedConv3d(QuantizedLayer, nn.Conv3d):
    """A quantized :class:`torch.nn.Conv3d`."""

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = self._conv_forward(x, weight, bias)
        return y


class _Transposed(QuantizedLayer):
    """What the three transposed convolutions share."""

    def _multiply(
        self: Any, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None
    ) -> Tensor:
        dims = weight.dim() - 2
        padding = self._output_padding(x, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation)
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        return convolve(x, weight, bias, self.stride, self.padding, padding, self.groups, self.dilation)


class QuantizedConvTranspose1d(_Transposed, nn.ConvTranspose1d):
    """A quantized :class:`torch.nn.ConvTranspose1d`."""


class QuantizedConvTranspose2d(_Transposed, nn.ConvTranspose2d):
    """A quantized :class:`torch.nn.ConvTranspose2d`."""


class QuantizedConvTranspose3d(_Transposed, nn.ConvTranspose3d):
    """A quantized :class:`torch.nn.ConvTranspose3d`."""


class QuantizedEmbedding(QuantizedLayer, nn.Embedding):
    """A quantized :class:`torch.nn.Embedding`: a table of quantized vectors, looked up by index."""

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.embedding(x, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)


class GatedNorm:
    """A batch norm whose channels carry the gates of the layer before it: a closed channel is exactly zero.

    The gate multiplies scale and shift, which equals multiplying the output. Where only a ReLU reads the norm, or one
    and a max pooling, and only quantized layers the last of them, the norm may do the work of all in a training step;
    see :func:`pyro_bbits.kernels.norm.normalize_and_quantize`.

    Attributes:
        context: The network's pass context.
        output_gate: Number of the layer's gates among those of the pass, or None where it has none.
        output_row: Row of the tensor behind the ReLU that this norm may quantize, or None.
        output_pooled: Whether that tensor is behind a max pooling, too.
    """

    context: PassContext
    output_gate: int | None = None
    output_row: int | None = None
    output_pooled: bool = False

    def forward(self: Any, input: Tensor) -> Tensor:
        """Batch norm with gated scale and shift."""
        self._check_input_dim(input)
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        quantized: Tensor | None = self._quantized(input)
        if quantized is not None:
            return quantized
        weight, bias = self._gated_parameters(input)
        use_batch = self.training or self.running_mean is None
        result: Tensor = F.batch_norm(
            input,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            weight,
            bias,
            use_batch,
            self._momentum(),
            self.eps,
        )
        return result

    def _gated_parameters(self: Any, input: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self.output_gate is None:
            return self.weight, self.bias
        gate = self.context.alive[self.output_gate]
        gate = gate.to(input.dtype if self.weight is None else self.weight.dtype)
        return gate if self.weight is None else self.weight * gate, None if self.bias is None else self.bias * gate

    def _momentum(self: Any) -> float:
        if self.momentum is not None:
            return float(self.momentum)
        # momentum None means a cumulative average over all batches seen
        return 1.0 / float(self.num_batches_tracked) if self.training and self.track_running_stats else 0.0

    def _quantized(self: Any, input: Tensor) -> Tensor | None:
        """The finished tensor behind the ReLU, if this norm may make it; running statistics are those of any norm."""
        if self.output_row is None or not (self.training and self.track_running_stats):
            return None
        if self._forward_hooks or self._backward_hooks:  # they are to see what a batch norm gives out
            return None
        if any(needed is None for needed in (self.weight, self.bias, self.running_mean, self.momentum)):
            return None
        gate, pooled = self.output_gate, self.output_pooled
        done = self.context.normalize(self.output_row, input, self.weight, self.bias, gate, self.eps, pooled)
        if done is None:
            return None
        out, mean, variance = done
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)
        result: Tensor = out
        return result


class GatedBatchNorm1d(GatedNorm, nn.BatchNorm1d):
    """A gated :class:`torch.nn.BatchNorm1d`."""


class GatedBatchNorm2d(GatedNorm, nn.BatchNorm2d):
    """A gated :class:`torch.nn.BatchNorm2d`."""


class GatedBatchNorm3d(GatedNorm, nn.BatchNorm3d):
    """A gated :class:`torch.nn.BatchNorm3d`."""


QUANTIZED_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.ConvTranspose1d: QuantizedConvTranspose1d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.ConvTranspose3d: QuantizedConvTranspose3d,
    nn.Embedding: QuantizedEmbedding,
}
"""Quantized class of each supported layer; exact types only, since a subclass may compute something else."""

GATED_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: GatedBatchNorm1d,
    nn.BatchNorm2d: GatedBatchNorm2d,
    nn.BatchNorm3d: GatedBatchNorm3d,
}
"""Gated class of each batch norm that can carry the channel gates of the layer before it."""
