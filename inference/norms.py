"""Running statistics of batch norms, for gates that are decided."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_bbits.gates import GateValues
from pyro_bbits.inference.evaluation import device_of, evaluation_mode, to_device
from pyro_bbits.inference.joining import in_groups
from pyro_bbits.inference.randomness import undisturbed
from pyro_bbits.models import AbstractModel

__all__ = [
    "RecentBatches",
    "norm_statistics",
    "recalibrate_norms",
    "recent_batches",
    "set_norm_statistics",
    "tracked_norms",
]


def tracked_norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms that keep running statistics, by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}


def norm_statistics(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all running means and variances, under their names in the state dict."""
    return {
        f"{name}.{kind}": getattr(norm, kind).clone()
        for name, norm in tracked_norms(module).items()
        for kind in ("running_mean", "running_var")
    }


def set_norm_statistics(module: nn.Module, statistics: Mapping[str, Tensor]) -> None:
    """Write running means and variances from :func:`norm_statistics` back."""
    for name, values in statistics.items():
        module.get_buffer(name).copy_(values)


class _Averaging:
    """A hook that makes a batch norm average its batches, each with the weight of its values."""

    def __init__(self) -> None:
        self.seen: dict[nn.Module, int] = {}

    def __call__(self, norm: Any, args: tuple[Tensor, ...]) -> None:
        count = args[0].numel() // args[0].shape[1]
        norm.training = count > 1  # a single value has no variance
        if norm.training:
            self.seen[norm] = self.seen.get(norm, 0) + count
            norm.momentum = count / self.seen[norm]


def recalibrate_norms(
    model: AbstractModel, loader: Iterable[Any], gates: GateValues | None = None, *, batches: int | None = None
) -> None:
    r"""Estimate the running statistics of all batch norms anew, with the gates fixed.

    In training, running statistics are collected under sampled gates, many of them half open; under the decided gates
    the same layers see other means and variances, and a network with stale ones can be far worse than the trained one.
    Each mean and variance becomes the average over batches of `n_b` values per channel,

    .. math::
        \hat\mu = \frac{\sum_b n_b \mu_b}{\sum_b n_b}, \qquad \hat\sigma^2 = \frac{\sum_b n_b s_b^2}{\sum_b n_b},

    each batch being normalized by its own statistics on the way, as in training; everything but the batch norms is in
    evaluation mode. Weights, momenta, counters, modes and random generators stay what they are. Batch norms that keep
    no statistics, or that are not called, are left alone. :func:`fit` and :func:`fine_tune` call this for you.

    Arguments:
        model: A model of this package.
        loader: Batches `(x, y)` of training data; the targets are not used.
        gates: Hard gates, e.g. `guide.hard_gates()`; all open if None.
        batches: How many batches to use; None uses all of one pass.

    Raises:
        ValueError: If the loader gives no batch.
    """
    norms, device = list(tracked_norms(model).values()), device_of(model)
    if not norms:
        return
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    averaging, used = _Averaging(), 0
    with evaluation_mode(model), undisturbed(device):
        handles = [norm.register_forward_pre_hook(averaging) for norm in norms]
        for norm in norms:
            norm.num_batches_tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
        try:
            for x, _ in islice(loader, batches):
                model.predict(to_device(x, device), gates)
                used += 1
        finally:
            for handle in handles:
                handle.remove()
            for norm, momentum, counter in before:
                norm.momentum, norm.num_batches_tracked = momentum, counter
    if not used:
        raise ValueError("there is no data to estimate the batch norms' statistics on: the loader gives no batch.")


def recent_batches(sizes: Sequence[int], samples: int) -> int:
    """How many of the last batches hold so many samples, or all of them if they do not.

    Example:
        >>> recent_batches([8, 8, 8, 3], 10)
        2
    """
    held = 0
    for count, size in enumerate(reversed(sizes), start=1):
        held += size
        if held >= samples:
            return count
    return len(sizes)


class RecentBatches:
    """The last batches of an epoch, for statistics that need no pass of their own over the data.

    Arguments:
        samples: How many samples to hold at least, once as many have come.
        together: How many batches are given out as one.
    """

    def __init__(self, samples: int, together: int = 2) -> None:
        self.samples, self.together, self._held = samples, together, 0
        self._batches: deque[tuple[Any, Tensor]] = deque()

    def add(self, x: Any, y: Tensor) -> None:
        """Take a batch in, and let go of those no longer needed."""
        self._batches.append((x, y))
        self._held += len(y)
        while self._held - len(self._batches[0][1]) >= self.samples:
            self._held -= len(self._batches.popleft()[1])

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        yield from in_groups(list(self._batches), self.together)

    def __len__(self) -> int:
        return len(self._batches)
