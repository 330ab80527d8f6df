"""Products of two activations, such as attention's: found, watched and quantized where a module's code makes them.

They are function calls, not modules, so they are intercepted while the forward of the module that makes them runs, and
known by that module and their number within one call: `attention.matmul0` is the first product in `attention`.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_bbits.insertion.context import PassContext

__all__ = [
    "MATMUL",
    "ProductForward",
    "QuantizedProducts",
    "Visitor",
    "WatchProducts",
    "check_count",
    "product_name",
    "product_place",
]

MATMUL = "MatMul"
"""The kind of a product among the layers of a network."""


class Visitor(Protocol):
    """Sees the operands of a product before it is computed, and may replace them."""

    def __call__(self, index: int, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Product number `index` of the module's current call."""

    def finish(self, count: int) -> None:
        """The call is over, after so many products."""


def check_count(owner: str, expected: int, count: int) -> None:
    """Raise a RuntimeError if a module made another number of products than expected: they are told by their number."""
    if count != expected:
        pattern = product_name(owner, 0)[:-1] + "*"
        raise RuntimeError(
            f"{owner or 'the network'} made {count} products of activations in a call, and {expected} on the example "
            "inputs; products are told apart by their number. Quantize it on inputs, and in the mode (train or eval), "
            f"that take this path, or leave its products in float, exclude=({pattern!r},)."
        )


Visit = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def product_name(owner: str, index: int) -> str:
    """Name of a product: the path of the module that makes it, and its number there."""
    return f"{owner}.matmul{index}".removeprefix(".")


def product_place(name: str) -> tuple[str, int]:
    """Module path and number of a product, from its name."""
    owner, _, index = name.rpartition("matmul")
    return owner.removesuffix("."), int(index)


def _two_operands(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], visit: Visit) -> Any:
    """`matmul(left, right)` and its like; the operands may be given by name."""
    names, given = ("input", "mat2" if function in BATCHED else "other"), list(args)
    operands = [given[i] if i < len(given) else kwargs[names[i]] for i in range(2)]
    left, right = visit(*operands)
    return function(left, right, *given[2:], **{k: v for k, v in kwargs.items() if k not in names})


def _reflected(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], visit: Visit) -> Any:
    """`right.__rmatmul__(left)`."""
    left, right = visit(args[1], args[0])
    return torch.matmul(left, right)


def _added(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], visit: Visit) -> Any:
    """`baddbmm(added, left, right)`."""
    left, right = visit(args[1], args[2])
    return function(args[0], left, right, *args[3:], **kwargs)


def _einsum(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], visit: Visit) -> Any:
    """`einsum(equation, left, right)`; other numbers of operands are left as they are."""
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return function(*args, **kwargs)
    return function(equation, *visit(*operands))


def _attention(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], visit: Visit) -> Any:
    """Scaled dot-product attention in two products, `softmax(q k^T / sqrt(d)) v`."""
    return _spelled_out(visit, *args, **kwargs)


def _spelled_out(
    visit: Visit,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    query, key = visit(query, key)
    scores = torch.matmul(query, key.transpose(-2, -1)) * (1 / math.sqrt(query.size(-1)) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    empty = scores.isneginf().all(-1, keepdim=True)  # all keys masked: torch gives zeros there
    probabilities = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    probabilities, value = visit(probabilities, value)
    return torch.matmul(F.dropout(probabilities, dropout_p) if dropout_p else probabilities, value)


BATCHED = (torch.bmm, Tensor.bmm, torch.mm, Tensor.mm)

PRODUCTS: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any], Visit], Any]] = {
    torch.matmul: _two_operands,
    Tensor.matmul: _two_operands,
    Tensor.__matmul__: _two_operands,
    Tensor.__rmatmul__: _reflected,
    **dict.fromkeys(BATCHED, _two_operands),
    torch.baddbmm: _added,
    Tensor.baddbmm: _added,
    torch.einsum: _einsum,
    F.scaled_dot_product_attention: _attention,
}
"""How each function hands its operands to a visitor."""


class WatchProducts(TorchFunctionMode):
    """While active, every product hands its two operands to a visitor, which may replace them."""

    def __init__(self, visit: Visit) -> None:
        super().__init__()
        self._visit = visit

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = PRODUCTS.get(func)
        if product is None:
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():  # else the module around this one would see the product too
            return product(func, args, kwargs or {}, self.visit)

    def visit(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Hand real numbers to the visitor; integers and complex numbers are nothing to quantize."""
        if left.is_floating_point() and right.is_floating_point():
            return self._visit(left, right)
        return left, right


class ProductForward:
    """The forward of a module that makes products, its operands shown to a visitor.

    Set as the module's own `forward`; its class and its parameters stay what they are.

    Arguments:
        module: The module.
        visitor: Sees the operands of each product of a call, numbered from 0.
    """

    def __init__(self, module: nn.Module, visitor: Visitor) -> None:
        self.module, self.visitor = module, visitor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        count = 0

        def visit(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal count
            count += 1
            return self.visitor(count - 1, left, right)

        with WatchProducts(visit):
            result = type(self.module).forward(self.module, *args, **kwargs)
        self.visitor.finish(count)
        return result


class QuantizedProducts:
    """Quantizes the operands of the products that a module makes; a visitor for :class:`ProductForward`.

    Arguments:
        owner: Module path, for the message.
        context: The network's pass context.
        count: Products per call that the example inputs showed.

    Attributes:
        rows: Rows of the two operands of each product among the quantized tensors; None stays as it is. A product that
            is not named stays in float.
    """

    def __init__(self, owner: str, context: PassContext, count: int) -> None:
        self.owner, self.context, self.count = owner, context, count
        self.rows: dict[int, tuple[int | None, int | None]] = {}

    def __call__(self, index: int, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize the operands of one product."""
        rows = self.rows.get(index, (None, None))
        return self._quantize(rows[0], left), self._quantize(rows[1], right)

    def finish(self, count: int) -> None:
        """Raise if the call made other products than the example inputs showed, which may then be mistaken.

        Raises:
            RuntimeError: If the number differs.
        """
        check_count(self.owner, self.count, count)

    def _quantize(self, row: int | None, x: Tensor) -> Tensor:
        return x if row is None else self.context.quantize(row, x, reusable=False)
