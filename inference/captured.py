"""Epochs of captured steps: the host only replays graphs, and looks at the losses now and then."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn

from pyro_bbits.inference.batches import BatchSource, Check
from pyro_bbits.inference.checks import NonFiniteError
from pyro_bbits.inference.graphs import Graphs, NotCapturedError
from pyro_bbits.inference.progress import Reporter
from pyro_bbits.inference.step import TrainingStep

__all__ = ["REHEARSALS", "CapturedEpochs", "frozen_in"]

LOOK_EVERY = 64
"""Steps between two looks at the losses; each one lets the device run dry for a moment."""

REHEARSALS = 3
"""Steps before the first one is captured, unless more are asked for."""

SETTING = (bool, int, float, str)

Explain = Callable[[Any], str]


class CapturedEpochs:
    """Trains epochs with one graph for each kind of batch.

    The first steps of a kind are taken as they are, which lets libraries choose their algorithms; the last of them
    shows whether the step reads on the host. Then it is recorded, and replayed from there on. They are the steps of an
    ordinary run in its order: nothing is taken twice or put back. Where a step cannot be captured, the run goes on
    without graphs; where what a graph takes for granted has changed between two epochs, it is recorded anew.

    Arguments:
        step: The step.
        source: The batches.
        graphs: What records them.
        device: Where the losses lie.
        explain: Names what is not finite, given the inputs of a batch.
        granted: What a recorded step cannot follow, such as switches of modules and where tensors lie; equal as long as
            nothing of it has changed.
        required: Raise where a step cannot be captured, in place of going on without.
        rehearsals: Steps of the first kind that are taken as they are, at least 2; of further kinds it is one.
    """

    def __init__(
        self,
        step: TrainingStep,
        source: BatchSource,
        graphs: Graphs,
        device: torch.device,
        *,
        explain: Explain,
        granted: Callable[[], object] = lambda: None,
        required: bool = False,
        rehearsals: int = REHEARSALS,
    ) -> None:
        self.step, self.source, self.graphs, self.explain, self.granted = step, source, graphs, explain, granted
        self.required, self.rehearsals = required, rehearsals
        self.reason: str | None = None
        self._recorded_for: object = None
        self._told = False
        self._losses = torch.zeros(LOOK_EVERY, device=device)
        self._slot = torch.zeros(1, dtype=torch.long, device=device)
        self._replays: dict[Hashable, Callable[[], None]] = {}
        self._seen: Counter[Hashable] = Counter()

    def epoch(self, epoch: int, check: Check | None, report: Reporter) -> float:
        """Train for an epoch; returns the mean loss.

        Arguments:
            epoch: Its number, from 0.
            check: Sees the data before they are used; None looks at nothing.
            report: Told of steps taken.

        Raises:
            NonFiniteError: If a loss is NaN or infinite; it is found some steps later.
            NotCapturedError: If a step cannot be captured and that is required.
        """
        total, steps, unread, pending = 0.0, 0, 0, _nothing
        self._forget_if_changed()
        with self.graphs.working():
            self._slot.zero_()
            for kind in self.source.begin(check):
                self.step.optimizers.schedule(epoch, steps)
                self._take(kind)
                steps, unread = steps + 1, unread + 1
                if unread == LOOK_EVERY:
                    # what was fetched before is read while the device works on what was launched since
                    earlier, pending = pending, self._fetch(epoch, steps, unread, report)
                    total, unread = total + earlier(), 0
            last = self._fetch(epoch, steps, unread, report)
            total += pending() + last()
        return total / steps

    def close(self) -> None:
        """Let go of the graphs and their memory."""
        self._replays.clear()
        self.step.forget_gradients()

    def _forget_if_changed(self) -> None:
        now = self.granted()
        if now != self._recorded_for:
            self._replays.clear()
            self._seen.clear()
        self._recorded_for = now

    def _take(self, kind: Hashable) -> None:
        if kind is None:
            self._tell_of_many_kinds()
            self._run(kind)
            return
        replay = self._replays.get(kind)
        if replay is None and self._is_ready(kind):
            replay = self._capture(kind)
        if replay is not None:
            replay()
        else:
            self._rehearse(kind)

    def _is_ready(self, kind: Hashable) -> bool:
        needed = 1 if self._replays else self.rehearsals
        return self.reason is None and self._seen[kind] >= needed

    def _rehearse(self, kind: Hashable) -> None:
        self._seen[kind] += 1
        # what happens in the first steps alone, such as tuning, may read on the host
        if self.reason is not None or self._seen[kind] != self.rehearsals:
            self._run(kind)
            return
        try:
            self.graphs.rehearse(lambda: self._run(kind))
        except NotCapturedError as error:
            self._give_up(error)

    def _tell_of_many_kinds(self) -> None:
        if self._told or self.reason is not None:
            return
        self._told = True
        reason = (
            "batches are of too many kinds for a graph each; they differ in shape, type, or what is no tensor, such as "
            "names of files"
        )
        if self.required:
            raise NotCapturedError(reason)
        warnings.warn(
            f"some training steps are not captured in a CUDA graph: {reason}. These are taken step by step, with the "
            "same result and more slowly; capture=False says nothing of it.",
            stacklevel=7,
        )

    def _capture(self, kind: Hashable) -> Callable[[], None] | None:
        self.step.forget_gradients()
        try:
            self._replays[kind] = self.graphs.capture(lambda: self._run(kind))
        except NotCapturedError as error:
            self._give_up(error)
        return self._replays.get(kind)

    def _run(self, kind: Hashable) -> None:
        loss = self.step(*self.source.take(kind))
        self._losses.index_copy_(0, self._slot, loss.reshape(1).to(self._losses.dtype))
        self._slot.add_(1)

    def _give_up(self, error: NotCapturedError) -> None:
        self.step.forget_gradients()
        self._replays.clear()
        self.reason = str(error)
        if self.required:
            raise error
        warnings.warn(
            f"the training step is not captured in a CUDA graph: {self.reason}. It is taken step by step, with the "
            "same result and more slowly; capture=False says nothing of it.",
            stacklevel=7,
        )

    def _fetch(self, epoch: int, steps: int, count: int, report: Reporter) -> Callable[[], float]:
        """Start to fetch the last losses; the result waits for them, reports, and returns their sum."""
        if count == 0:
            return _nothing
        arrived = self.graphs.fetch(self._losses[:count])
        self._slot.zero_()

        def read() -> float:
            losses = arrived()
            for index, value in enumerate(losses):
                if not math.isfinite(value):
                    inputs, _ = next(iter(self.source.recent()))
                    raise NonFiniteError.at(value, epoch, steps - count + index, self.explain(inputs))
                report(None, value)
            return math.fsum(losses)

        return read


def frozen_in(module: nn.Module) -> object:
    """What a graph of a module's step does not read again: numbers and switches of modules, hooks, places of tensors.

    Example:
        >>> drop = nn.Dropout(0.5)
        >>> before = frozen_in(drop)
        >>> drop.p = 0.4
        >>> before == frozen_in(drop)
        False
    """
    modules = tuple(_settings(part) for part in module.modules())
    parameters = tuple((p.data_ptr(), p.requires_grad) for p in module.parameters())
    return modules, parameters, tuple(b.data_ptr() for b in module.buffers())


def _settings(module: nn.Module) -> tuple[object, ...]:
    values = vars(module)
    hooks = tuple(tuple(held) for name, held in values.items() if name.endswith("hooks") and isinstance(held, dict))
    return type(module), hooks, tuple((k, v) for k, v in values.items() if isinstance(v, SETTING))


def _nothing() -> float:
    return 0.0
