"""Adam on a GPU for networks whose weights are not large enough to fill it."""

from typing import Any

from torch import Tensor
from torch.optim import Adam

from pyro_bbits.kernels.layout import is_dense

__all__ = ["SpreadAdam", "piece_length"]

CHUNK = 65_536
"""Numbers that one block of PyTorch's fused kernel updates, one multiprocessor working through them."""

PIECES = 32
"""About how many blocks a step is spread over; one launch takes 36 tensors, and as many blocks as these have chunks."""

LEAST = 4096
"""Numbers in a piece; a multiple of any vector."""


class SpreadAdam(Adam):
    """Fused Adam that updates a small network in pieces, which keeps more of a GPU busy.

    PyTorch's fused kernel gives 65,536 numbers to a block, so that a network of half a million weights uses a dozen of
    the 132 multiprocessors of an H200. Here the kernel is handed views, so short that there are about 32 of them. A
    network of two million weights has as many chunks, and is left as it is. The arithmetic is the same, and so is the
    state: what one class has saved, the other loads.

    Arguments:
        params: As for :class:`torch.optim.Adam`, and so all others; `fused` and `capturable` are on.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, fused=True, capturable=True, **options)

    def _init_group(self, group: dict[str, Any], *lists: list[Any]) -> bool:
        """Fill the lists that the kernel takes: parameters, gradients, moments, and steps."""
        found: bool = super()._init_group(group, *lists)
        *values, largest, steps = lists
        length = piece_length(sum(parameter.numel() for parameter in values[0]))
        if largest or length >= CHUNK:  # there is a largest moment with amsgrad alone
            return found
        columns = [_pieces(tensors, step, length) for *tensors, step in zip(*values, steps, strict=True)]
        for place, filled in enumerate((*values, steps)):
            filled[:] = [piece for column in columns for piece in column[place]]
        return found


def piece_length(total: int) -> int:
    """Numbers in a piece, for so many numbers in all.

    Example:
        >>> piece_length(1000), piece_length(583_000), piece_length(13_000_000)
        (4096, 20480, 409600)
    """
    return max(LEAST, -(-total // (PIECES * LEAST)) * LEAST)


def _pieces(tensors: list[Tensor], step: Tensor, length: int) -> list[list[Tensor]]:
    """A parameter, its gradient and moments in pieces, with a step count for each, which the optimizer counts up."""
    first = tensors[0]
    # one order in memory for all, without gaps: else pieces would not hold the same numbers
    if first.numel() <= length or not is_dense(first) or any(one.stride() != first.stride() for one in tensors):
        return [[tensor] for tensor in (*tensors, step)]
    parts = [list(tensor.as_strided((tensor.numel(),), (1,)).split(length)) for tensor in tensors]
    copies = step.expand(len(parts[0]) - 1).clone().unbind()
    return [*parts, [step, *copies]]
