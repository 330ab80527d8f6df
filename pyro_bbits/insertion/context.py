"""The state of one forward pass, shared by all quantized layers of a network."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_bbits.gates import GateValues
from pyro_bbits.insertion.finished import FinishedTensors
from pyro_bbits.insertion.rule import QuantizationRule, apply_rule
from pyro_bbits.kernels import quantize_row
from pyro_bbits.kernels.linear import can_spare, quantized_linear
from pyro_bbits.kernels.norm import can_fuse, normalize_and_quantize
from pyro_bbits.ladder import BitLadder
from pyro_bbits.quantizer import quantize_fixed

__all__ = ["PassContext"]


class PassContext:
    """Ranges and gates of the current forward pass, and the tensors quantized so far.

    One object is shared by all layers of a network and filled by the network's forward. It lives for one pass: a
    leftover tensor would break copying and keep a graph alive. A copy of the network gets a context of its own.

    Attributes:
        alive: Gates of the output channels of each layer that has any, in the order of the network's bank.
        finished: Tensors that a batch norm has quantized.
        watcher: Called with row and tensor before a tensor is quantized.
    """

    def __init__(self) -> None:
        self.alive: tuple[Tensor, ...] = ()
        self._rows: tuple[Tensor, ...] = ()
        self._signed: tuple[bool, ...] = ()
        self._ladder: BitLadder | None = None
        self._widths: tuple[int, ...] | None = None
        self._fused = False
        self._rule: QuantizationRule | None = None
        self._seen: dict[tuple[int, int | None], tuple[Tensor, Tensor]] = {}
        self.finished = FinishedTensors()
        self.watcher: Callable[[int, Tensor], None] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "PassContext":
        copied: PassContext = memo.setdefault(id(self), PassContext())
        return copied

    def __reduce__(self) -> tuple[type["PassContext"], tuple[()]]:
        return PassContext, ()

    def fill(
        self,
        gates: GateValues,
        ranges: Tensor,
        signed: tuple[bool, ...],
        ladder: BitLadder,
        alive: tuple[Tensor, ...] = (),
        widths: tuple[int, ...] | None = None,
        fused: bool = False,
        rule: QuantizationRule | None = None,
    ) -> None:
        """Start a pass.

        Arguments:
            gates: All gates.
            ranges: `(T,)` ranges.
            signed: Whether each tensor takes negative values.
            ladder: The bit widths.
            alive: Gates of the output channels of each layer that has any.
            widths: Width of each tensor where it is known: then tensors are rounded to it directly.
            fused: Whether batch norms may quantize their own output.
            rule: What quantizes in place of the gated residual quantizer, if anything.
        """
        self.alive, self._signed, self._ladder, self._widths, self._fused = alive, signed, ladder, widths, fused
        self._rule = rule
        # one row [range, gates...] for each tensor: whole-network operations instead of some for each
        self._rows = torch.cat([ranges[:, None], gates.tensors], 1).unbind()

    def clear(self) -> None:
        """End a pass."""
        self.alive, self._rows, self._signed, self._ladder, self._widths, self._fused = (), (), (), None, None, False
        self._rule = None
        self._seen.clear()
        self.finished.clear()

    def quantize(
        self,
        row: int,
        x: Tensor,
        *,
        gate: int | None = None,
        reusable: bool = True,
        multiplied: bool = True,
        spend_grad: bool = False,
    ) -> Tensor:
        """Quantize tensor number `row`; a tensor that feeds several layers is quantized once.

        Arguments:
            row: Number of the tensor.
            x: The tensor.
            gate: Which of :attr:`alive` multiplies the slices of dimension 0; None for none.
            reusable: Whether another reader of the same tensor may be given this result.
            multiplied: Whether the result enters a product, which autocast computes in its own type: then it has this
                type at once, and need not be cast. The quantizer's arithmetic is float32 all the same.
            spend_grad: As for :func:`pyro_bbits.kernels.quantize_row`.

        Raises:
            RuntimeError: If no pass is under way.
        """
        if self._ladder is None:
            raise RuntimeError(
                "a quantized layer was called without gate values; call the QuantizedNetwork itself, "
                "network(x, gates=...), not the module inside it. Activation checkpointing, which runs parts of the "
                "network again in the backward pass, is not supported."
            )
        if x in self.finished:
            self.finished.read(x)
            return x
        seen = self._seen.get((row, gate))
        if seen is not None and seen[0] is x:
            return seen[1]
        if self.watcher is not None:
            self.watcher(row, x)
        dtype = _product_type(x) if multiplied else None
        alive = None if gate is None else self.alive[gate]
        quantized = self._quantized(row, x, alive, self._ladder, dtype, spend_grad)
        if reusable:
            self._seen[row, gate] = x, quantized
        return quantized

    def _quantized(
        self,
        row: int,
        x: Tensor,
        gate: Tensor | None,
        ladder: BitLadder,
        dtype: torch.dtype | None,
        spend_grad: bool,
    ) -> Tensor:
        values, signed = self._rows[row], self._signed[row]
        if self._rule is not None:
            quantized = apply_rule(self._rule, row, x, dtype)
        elif self._widths is None:
            return quantize_row(x, values, gate, signed=signed, ladder=ladder, dtype=dtype, spend_grad=spend_grad)
        else:
            quantized = quantize_fixed(x, values[0], self._widths[row], signed=signed)
        return quantized if gate is None else quantized * gate.to(quantized.dtype).reshape(-1, *[1] * (x.dim() - 1))

    def normalize(
        self, row: int, y: Tensor, weight: Tensor, bias: Tensor, gate: int | None, eps: float, pooled: bool
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Batch norm, channel gates, pooling, ReLU and quantizer of tensor `row`; what reads it finds it finished.

        Arguments and result are those of :func:`pyro_bbits.kernels.norm.normalize_and_quantize`, `gate` being one of
        :attr:`alive`. There is no result where there are no kernels for it, or the pass shall not use them.
        """
        ladder = self._ladder
        if not self._fused or ladder is None or self._signed[row] or not can_fuse(y, ladder, pooled):
            return None
        alive = None if gate is None else self.alive[gate]
        values = self._rows[row]
        result = normalize_and_quantize(y, weight, bias, alive, values, eps=eps, ladder=ladder, pooled=pooled)
        self.finished.add(result[0], pooled)
        return result

    def spares(self, weight: Tensor) -> bool:
        """Whether :meth:`linear` takes a layer with this weight: there are kernels, and something is to be learned."""
        ladder = self._ladder
        return (
            ladder is not None
            and self._rule is None
            and self._widths is None
            and torch.is_grad_enabled()
            and can_spare(weight, ladder)
        )

    def linear(self, row: int, x: Tensor, weight: Tensor, bias: Tensor | None, *, gate: int | None = None) -> Tensor:
        """A linear layer whose weight, tensor number `row`, is not kept quantized, where :meth:`spares` says so.

        Arguments:
            row: Number of the weight.
            x: Its input, quantized if it is to be.
            weight: The weight, which is read once in a pass.
            bias: The bias, gated.
            gate: Which of :attr:`alive` multiplies the output channels; None for none.
        """
        assert self._ladder is not None
        if self.watcher is not None:
            self.watcher(row, weight)
        alive, signed = None if gate is None else self.alive[gate], self._signed[row]
        options: dict[str, Any] = {"ladder": self._ladder, "signed": signed, "dtype": _product_type(weight)}
        if options["dtype"] is not None:  # as autocast does
            x, bias = x.to(options["dtype"]), None if bias is None else bias.to(options["dtype"])
        return quantized_linear(x, weight, self._rows[row], alive, bias, **options)


def _product_type(x: Tensor) -> torch.dtype | None:
    """Type that autocast gives the operands of products; None where that is the tensor's own."""
    kind = x.device.type
    if x.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
