"""The state of one forward pass, shared by all quantized layers of a network."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyro_bbits.gates import GateValues
from pyro_bbits.ladder import BitLadder
from pyro_bbits.quantizer import quantize_fixed, residual_quantize

__all__ = ["PassContext"]


class PassContext:
    """Gate values and ranges of the current forward pass, and the tensors quantized so far.

    One object is shared by all layers of a network and filled by the network's forward. It lives for one pass: a
    leftover tensor would break copying and keep a graph alive. A copy of the network gets a context of its own.
    """

    def __init__(self) -> None:
        self.channel_gates: Tensor | None = None
        self._rows: tuple[tuple[Tensor, Tensor, bool], ...] = ()
        self._ladder: BitLadder | None = None
        self._widths: tuple[int, ...] | None = None
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
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
        widths: tuple[int, ...] | None = None,
    ) -> None:
        """Start a pass; where the widths of all tensors are known, they are rounded to them directly."""
        self.channel_gates, self._ladder, self._widths = gates.channels, ladder, widths
        self._rows = tuple(zip(ranges.unbind(), gates.tensors.unbind(), signed, strict=True))

    def clear(self) -> None:
        """End a pass."""
        self.channel_gates, self._ladder, self._widths, self._rows = None, None, None, ()
        self._seen.clear()

    def quantize(self, row: int, x: Tensor, *, reusable: bool = True) -> Tensor:
        """Quantize tensor number `row`; a tensor that feeds several layers is quantized once.

        Raises:
            RuntimeError: If no pass is under way.
        """
        if self._ladder is None:
            raise RuntimeError(
                "a quantized layer was called without gate values; call the QuantizedNetwork itself, "
                "network(x, gates=...), not the module inside it. Activation checkpointing, which runs parts of the "
                "network again in the backward pass, is not supported."
            )
        seen = self._seen.get(row)
        if seen is not None and seen[0] is x:
            return seen[1]
        if self.watcher is not None:
            self.watcher(row, x)
        beta, gates, signed = self._rows[row]
        if self._widths is None:
            quantized = residual_quantize(x, beta, gates, signed=signed, ladder=self._ladder)
        else:
            quantized = quantize_fixed(x, beta, self._widths[row], signed=signed)
        if reusable:
            self._seen[row] = x, quantized
        return quantized
