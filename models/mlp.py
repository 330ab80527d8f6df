"""A fully connected network for tables of features."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["MLP"]


class MLP(nn.Module):
    """Linear layers with ReLU between them, and batch normalization before each ReLU if asked for.

    Arguments:
        in_features: Numbers per sample; an image is flattened to them.
        num_outputs: Number of logits, or of regression outputs.
        widths: Units of each hidden layer; empty makes it a linear model.
        batch_norm: Whether hidden layers are normalized over the batch; then they have no bias of their own.

    Raises:
        ValueError: If a count is below 1.

    Example:
        >>> MLP(8, 1, widths=(16,))
        MLP(
          (hidden): Sequential(
            (0): Linear(in_features=8, out_features=16, bias=True)
            (1): ReLU()
          )
          (head): Linear(in_features=16, out_features=1, bias=True)
        )
    """

    def __init__(
        self, in_features: int, num_outputs: int, widths: Sequence[int] = (128, 128), batch_norm: bool = False
    ) -> None:
        super().__init__()
        if min(in_features, num_outputs, *widths) < 1:
            raise ValueError(
                f"MLP needs at least one feature, output and unit; got {in_features=}, {num_outputs=}, {widths=}."
            )
        layers: list[nn.Module] = []
        for width in widths:
            layers.append(nn.Linear(in_features, width, bias=not batch_norm))
            layers += [nn.BatchNorm1d(width), nn.ReLU()] if batch_norm else [nn.ReLU()]
            in_features = width
        self.hidden, self.head = nn.Sequential(*layers), nn.Linear(in_features, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map samples to outputs.

        Arguments:
            x: Shape `(N, in_features)`, or `(N, ...)` with as many numbers per sample.

        Returns:
            Outputs of shape `(N, num_outputs)`.
        """
        outputs: Tensor = self.head(self.hidden(x.flatten(1)))
        return outputs
