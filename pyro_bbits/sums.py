"""Many weighted sums over the same values at once, in few operations and in a fixed order."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["WeightedSums"]

LONGEST = 1024
"""Terms of a sum that are held in one row; longer sums are sums of rows, so that one of them does not pad all."""


class WeightedSums(nn.Module):
    r"""A sparse matrix times a vector, :math:`y = A x`, whose gradient is :math:`A^\top` times a vector.

    Both products gather and add along rows of equal length: a handful of kernels on a GPU whatever there is to add, and
    no scattered additions, whose order would be left to chance.

    Arguments:
        sums: For each sum the weight of each value that it has, by the value's position.
        num_values: Length `N` of `x`, at least 1.

    Raises:
        ValueError: If there is no sum or no value.

    Example:
        >>> WeightedSums([{0: 1, 2: 3}, {}], 3)(torch.tensor([1.0, 10.0, 100.0]))
        tensor([301.,   0.])
    """

    def __init__(self, sums: Iterable[Mapping[int, float]], num_values: int) -> None:
        super().__init__()
        rows = [list(terms.items()) for terms in sums]
        if not rows or num_values < 1:
            raise ValueError(f"sums need a sum and a value; got {len(rows)} sums of {num_values} values.")
        columns: list[list[tuple[int, float]]] = [[] for _ in range(num_values)]
        for row, terms in enumerate(rows):
            for column, weight in terms:
                columns[column].append((row, weight))
        self.forwards, self.backwards = _Rows(rows), _Rows(columns)

    def forward(self, values: Tensor) -> Tensor:
        """Values `(N,)` to sums `(S,)`."""
        sums: Tensor = _Product.apply(values, self.forwards, self.backwards)
        return sums


class _Rows(nn.Module):
    """Rows of a sparse matrix, padded with terms of weight 0; rows of rows where some are long."""

    def __init__(self, rows: Sequence[Sequence[tuple[int, float]]]) -> None:
        super().__init__()
        parts: list[Sequence[tuple[int, float]]] = []
        whole: list[list[tuple[int, float]]] = []
        for terms in rows:
            pieces = [terms[i : i + LONGEST] for i in range(0, len(terms), LONGEST)] or [[]]
            whole.append([(len(parts) + i, 1.0) for i in range(len(pieces))])
            parts += pieces
        self.levels = 1 if len(parts) == len(rows) else 2
        for level, entries in enumerate((parts, whole)[: self.levels]):
            index, weight = _padded(entries)
            self.register_buffer(f"index{level}", index, persistent=False)
            self.register_buffer(f"weight{level}", weight, persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        for level in range(self.levels):
            weight = self.get_buffer(f"weight{level}").to(values.dtype)
            values = (values[self.get_buffer(f"index{level}")] * weight).sum(1)
        return values


def _padded(rows: Sequence[Sequence[tuple[int, float]]]) -> tuple[Tensor, Tensor]:
    shape = len(rows), max(1, *map(len, rows))
    # what pads a row is a value that it has, so that one that is not a number stays out of the others
    own = torch.tensor([entries[0][0] if entries else 0 for entries in rows])
    index, weight = own[:, None].repeat(1, shape[1]), torch.zeros(shape)
    terms = [(row, place, *term) for row, entries in enumerate(rows) for place, term in enumerate(entries)]
    if terms:
        row, place, position, weights = zip(*terms, strict=True)
        at = torch.tensor(row), torch.tensor(place)
        index[at], weight[at] = torch.tensor(position), torch.tensor(weights, dtype=weight.dtype)
    return index, weight


class _Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, forwards: _Rows, backwards: _Rows) -> Tensor:
        result: Tensor = forwards(values)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.transposed = inputs[1:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        forwards, backwards = ctx.transposed
        return _Product.apply(gradient, backwards, forwards), None, None
