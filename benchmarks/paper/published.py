"""Published results on MNIST and CIFAR-10, to compare with. None of them was measured here."""

from typing import NamedTuple

__all__ = ["PUBLISHED", "Published"]


class Published(NamedTuple):
    """A row of the paper's table.

    Attributes:
        dataset: `mnist` or `cifar10`.
        method: Name of the method, with the widths of weights and activations.
        accuracy: Test accuracy in percent.
        bops: Relative BOPs in percent.
        confirmed: Whether the figures were read in the authors' repository; the others are from memory of the paper,
            their BOPs in agreement with the counting rules where these can be checked.
    """

    dataset: str
    method: str
    accuracy: float
    bops: float
    confirmed: bool = False


PUBLISHED = (
    Published("mnist", "FP32", 99.36, 100.0),
    Published("mnist", "TWN 2/32", 99.35, 5.74),
    Published("mnist", "LR-Net 1/32", 99.47, 2.99),
    Published("mnist", "RQ 2/2", 99.37, 0.52),
    Published("mnist", "WAGE 2/8", 99.60, 1.56),
    Published("mnist", "Bayesian Bits, mu 0.1", 99.30, 0.36, True),
    Published("cifar10", "FP32", 93.05, 100.0),
    Published("cifar10", "TWN 2/32", 92.56, 6.22),
    Published("cifar10", "LR-Net 1/32", 93.18, 3.11),
    Published("cifar10", "RQ 8/8", 93.80, 6.25),
    Published("cifar10", "RQ 4/4", 92.04, 1.57),
    Published("cifar10", "WAGE 2/8", 93.22, 1.56),
    Published("cifar10", "DQ", 91.59, 0.48),
    Published("cifar10", "DQ, rounded up", 91.59, 0.54),
    Published("cifar10", "Bayesian Bits, mu 0.01", 93.23, 0.51, True),
    Published("cifar10", "Bayesian Bits, mu 0.1", 91.96, 0.29, True),
)
"""van Baalen et al., Bayesian Bits, 2020 (arXiv 2005.07093), table 1: means of three runs."""
