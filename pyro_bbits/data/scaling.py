"""How numbers are brought to mean 0 and deviation 1, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Scaling"]


@dataclass(frozen=True)
class Scaling:
    r"""A shift and a scale for each channel or column.

    .. math::
        x \mapsto (x - \text{mean}) / \text{std}

    Arguments:
        mean: What is subtracted, one number per channel (dimension 1 of the data).
        std: What is divided by, likewise, above 0.

    Raises:
        ValueError: If the lengths differ or a deviation is not above 0.

    Example:
        >>> scaling = Scaling.of(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
        >>> scaling
        Scaling(mean=(2.0, 5.0), std=(1.0, 1.0))
        >>> scaling(torch.tensor([[4.0, 6.0]]))
        tensor([[2., 1.]])
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise ValueError(f"a scaling needs a deviation above 0 for each mean; got {self.mean} and {self.std}.")

    @classmethod
    def of(cls, data: Tensor) -> Scaling:
        """Mean and deviation of each channel of `(N, C, ...)`; a channel that never changes gets deviation 1."""
        rows = data.movedim(1, 0).flatten(1)
        std, mean = torch.std_mean(rows, dim=1, correction=0)
        low, high = rows.aminmax(dim=1)
        return cls(tuple(mean.tolist()), tuple(torch.where(low == high, 1.0, std).tolist()))

    @classmethod
    def none(cls, channels: int) -> Scaling:
        """The one that changes nothing."""
        return cls((0.0,) * channels, (1.0,) * channels)

    def __call__(self, data: Tensor) -> Tensor:
        """Scale data of shape `(N, C, ...)`; dtype and shape stay."""
        mean, std = (self._along(values, data) for values in (self.mean, self.std))
        return (data - mean).div_(std)

    @property
    def black(self) -> tuple[float, ...]:
        """What 0 becomes, for each channel."""
        return tuple(-mean / std for mean, std in zip(self.mean, self.std, strict=True))

    def to_dict(self) -> dict[str, list[float]]:
        """For a JSON file."""
        return {"mean": list(self.mean), "std": list(self.std)}

    @staticmethod
    def _along(values: Sequence[float], data: Tensor) -> Tensor:
        return torch.tensor(values, dtype=data.dtype, device=data.device).view(-1, *[1] * (data.ndim - 2))
