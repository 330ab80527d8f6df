"""Epochs of captured steps: the host only replays graphs, and looks at the losses now and then."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch

from pyro_bbits.inference.batches import BatchSource, Check
from pyro_bbits.inference.checks import NonFiniteError
from pyro_bbits.inference.graphs import Graphs, NotCapturedError
from pyro_bbits.inference.progress import Reporter
from pyro_bbits.inference.step import TrainingStep

__all__ = ["CapturedEpochs"]

LOOK_EVERY = 64
"""Steps between two looks at the losses; each one lets the device run dry for a moment."""

REHEARSALS = 3
MOST_GRAPHS = 8
"""Kinds of batches that are captured; further ones are taken step by step."""

Explain = Callable[[Any], str]


class CapturedEpochs:
    """Trains epochs with one graph for each kind of batch.

    The first steps of a kind are taken as they are, which lets libraries choose their algorithms and shows whether the
    step reads on the host; then it is recorded, and replayed from there on. They are the steps of an ordinary run in
    its order: nothing is taken twice or put back. Where a step cannot be captured, the run goes on without graphs.

    Arguments:
        step: The step.
        source: The batches.
        graphs: What records them.
        device: Where the losses lie.
        explain: Names what is not finite, given the inputs of a batch.
        required: Raise where a step cannot be captured, in place of going on without.
        rehearsals: Steps of the first kind that are taken as they are; of further kinds it is one.
    """

    def __init__(
        self,
        step: TrainingStep,
        source: BatchSource,
        graphs: Graphs,
        device: torch.device,
        *,
        explain: Explain,
        required: bool = False,
        rehearsals: int = REHEARSALS,
    ) -> None:
        self.step, self.source, self.graphs, self.explain = step, source, graphs, explain
        self.required, self.rehearsals = required, rehearsals
        self.reason: str | None = None
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
        total, steps, pending = 0.0, 0, _nothing
        with self.graphs.working():
            self._slot.zero_()
            for kind in self.source.begin(check):
                self.step.optimizers.schedule(epoch, steps)
                self._take(kind)
                steps += 1
                if steps % LOOK_EVERY == 0 or steps == len(self.source):
                    # what was fetched before is read while the device works on what was launched since
                    earlier, pending = pending, self._fetch(epoch, steps, report)
                    total += earlier()
            total += pending()
        return total / steps

    def close(self) -> None:
        """Let go of the graphs and their memory."""
        self._replays.clear()
        self.step.forget_gradients()

    def _take(self, kind: Hashable) -> None:
        replay = self._replays.get(kind)
        if replay is None and self._is_ready(kind):
            replay = self._capture(kind)
        if replay is not None:
            replay()
        else:
            self._rehearse(kind)

    def _is_ready(self, kind: Hashable) -> bool:
        needed = 1 if self._replays else self.rehearsals
        return self.reason is None and self._seen[kind] >= needed and len(self._replays) < MOST_GRAPHS

    def _rehearse(self, kind: Hashable) -> None:
        self._seen[kind] += 1
        if self.reason is not None or self._seen[kind] == 1:
            self._run(kind)  # what happens once, such as tuning, may read on the host
            return
        try:
            self.graphs.rehearse(lambda: self._run(kind))
        except NotCapturedError as error:
            self._give_up(error)

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

    def _fetch(self, epoch: int, steps: int, report: Reporter) -> Callable[[], float]:
        """Start to fetch the last losses; the result waits for them, reports, and returns their sum."""
        count = (steps - 1) % LOOK_EVERY + 1
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


def _nothing() -> float:
    return 0.0
