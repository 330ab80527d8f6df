"""What is recorded after an epoch, and what is said at the end of a run."""

import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pyro import poutine
from torch import Tensor, nn

from pyro_bbits.cost import NetworkCost
from pyro_bbits.gates import DecisionRule, GateProbabilities, GateValues
from pyro_bbits.inference.distributed import Ranks
from pyro_bbits.inference.evaluation import Evaluation, device_of, evaluate
from pyro_bbits.inference.guides import AbstractGateGuide
from pyro_bbits.inference.history import EpochRecord, History
from pyro_bbits.inference.norms import (
    norm_statistics,
    recalibrate_norms,
    set_norm_statistics,
    tracked_norms,
)
from pyro_bbits.inference.objective import gate_kl_nats
from pyro_bbits.inference.precision import FINEST_BITS, Precision
from pyro_bbits.inference.randomness import undisturbed
from pyro_bbits.insertion import QuantizedNetwork
from pyro_bbits.models import AbstractModel, sample_gates

__all__ = ["DecidedGates", "Recorder"]

ACCURACY_DROP = 5.0
"""Percentage points that the decided gates may cost against drawn ones before `fit` warns."""

UNDECIDED_SHARE, UNDECIDED_CHANNELS = 0.25, 16
"""A layer of at least so many channels is undecided if kept and expected channels differ by more than this share."""


@dataclass(frozen=True)
class DecidedGates:
    """Gates as a rule decides them, and what they were decided by.

    Attributes:
        gates: On the device of the guide.
        on_host: The same on the CPU, fetched before further work keeps the device busy.
        probabilities: Of the gates, on the CPU.
    """

    gates: GateValues
    on_host: GateValues
    probabilities: GateProbabilities


class Recorder:
    """Fills in the record of an epoch.

    Arguments:
        model: The model.
        guide: Its guide.
        validation: Held-out batches, or None.
        rule: How gates are decided.
        ranks: The processes of the run.
    """

    def __init__(
        self,
        model: AbstractModel,
        guide: nn.Module,
        validation: Iterable[Any] | None,
        rule: DecisionRule,
        ranks: Ranks,
    ) -> None:
        self.model, self.guide, self.validation, self.rule, self.ranks = model, guide, validation, rule, ranks
        self.network = model.net if isinstance(model.net, QuantizedNetwork) else None
        self.gate_guide = guide if isinstance(guide, AbstractGateGuide) else None
        # hundreds of small operations and reads, which a GPU is slow at
        self.cost = NetworkCost(self.network).cpu() if self.network is not None else None
        if self.gate_guide is not None:
            self.gate_guide.hard_gates(rule)  # an unknown rule is an error now, not after an epoch
        self.start = time.perf_counter()

    def history(self) -> History:
        """A history without epochs."""
        if self.network is None or self.gate_guide is None:
            return History()
        return History(self.network.layout.tensors, tuple(self.network.layout.slices))

    def go_on_from(self, history: History) -> None:
        """Count the time from what an earlier part of the run has taken."""
        self.start = time.perf_counter() - history[-1].seconds

    def norms_follow_gates(self) -> bool:
        """Whether there are batch norms whose statistics were collected under drawn gates."""
        return self.gate_guide is not None and any(norm.training for norm in tracked_norms(self.model).values())

    def decide(self) -> DecidedGates | None:
        """The gates as they are decided now; None without gates."""
        if self.gate_guide is None:
            return None
        gates, probabilities = self.gate_guide.hard_gates(self.rule), self.gate_guide.probabilities()
        on_host = GateValues(*(values.cpu() for values in gates))
        return DecidedGates(gates, on_host, GateProbabilities(*(values.cpu() for values in probabilities)))

    def decided_norms(self, recent: Iterable[Any], decided: DecidedGates | None) -> dict[str, Tensor]:
        """Statistics of the batch norms for the decided gates; those of the training are left as they are."""
        if decided is None or not self.norms_follow_gates() or not recent:
            return {}
        own = norm_statistics(self.model)
        try:
            recalibrate_norms(self.model, recent, decided.gates)
            return self.ranks.means(norm_statistics(self.model))
        finally:
            set_norm_statistics(self.model, own)

    def record(self, epoch: int, loss: float, decided: DecidedGates | None, norms: dict[str, Tensor]) -> EpochRecord:
        """The record of an epoch, from 1.

        Arguments:
            epoch: Its number.
            loss: Its mean training loss.
            decided: Its gates, from :meth:`decide`.
            norms: Statistics of the batch norms to evaluate with, from :meth:`decided_norms`.
        """
        entries = {} if decided is None or self.network is None else self._gate_entries(decided)
        if self.validation is not None:
            own = norm_statistics(self.model)
            try:
                set_norm_statistics(self.model, norms)
                result = evaluate(self.model, self.validation, None if decided is None else decided.gates)
            finally:
                set_norm_statistics(self.model, own)
            entries |= {"validation_nll": result.nll, "validation_accuracy": result.accuracy}
        return EpochRecord(epoch, loss, seconds=round(time.perf_counter() - self.start, 3), **entries)

    def _gate_entries(self, decided: DecidedGates) -> dict[str, Any]:
        assert self.gate_guide is not None and self.network is not None and self.cost is not None
        gates = decided.on_host
        entries = {
            "expected_bops": self.cost(decided.probabilities).item(),
            "bops": self.cost(gates).item(),
            "bits": self.network.layout.bits(gates),
            "kept": self.network.layout.kept(gates),
        }
        # last, since it waits for what the device is still doing
        kl = gate_kl_nats(self.gate_guide, self.gate_guide.prior, self.model.num_data)
        return entries | {"kl": kl / self.model.num_data}

    def drawn(self) -> Evaluation | None:
        """Held-out quality with gates drawn from the guide; None without gates or data."""
        if self.gate_guide is None or self.validation is None:
            return None
        with undisturbed(device_of(self.model)):
            drawn = poutine.trace(self.gate_guide).get_trace()
            gates = poutine.replay(sample_gates, trace=drawn)(self.gate_guide.prior, self.model.num_data)
            gates = GateValues(*(value.detach() for value in gates))
            return evaluate(self.model, self.validation, gates)

    def warn(self, history: History, drawn: Evaluation | None, precision: Precision | None = None) -> None:
        """Say at the end of a run what makes its result doubtful."""
        last = history[-1]
        if fine := self._unresolved(last, precision):
            _warn(
                f"{', '.join(fine)} {'is' if len(fine) == 1 else 'are'} more than {FINEST_BITS} bits wide, which "
                f"training in {precision} cannot tell apart: it sees noise at those gates. Train in float32, or on "
                "a ladder such as (2, 4, 8)."
            )
        empty = [layer for layer, kept in zip(history.layers, last.kept, strict=True) if not kept]
        if empty:
            _warn(
                f"every channel of {', '.join(empty)} is removed; unless a skip connection leads past it, the output "
                "no longer depends on the input. A smaller mu or a lower gate learning rate keeps channels, or a lower "
                "price of BOPs."
            )
        if undecided := self._undecided(last):
            _warn(
                f"channel gates are undecided: {'; '.join(undecided)}. The decided network is another than the one "
                "that was trained; more epochs or a higher gate learning rate decide gates, fine_tune adapts the "
                "weights, and prior.pin_channels() (--no-prune) keeps all channels."
            )
        accuracy = last.validation_accuracy
        if accuracy is None or drawn is None or drawn.accuracy is None:
            return
        chance = 100 / drawn.samples**0.5  # two standard errors at most
        if drawn.accuracy - accuracy > max(ACCURACY_DROP, chance):
            _warn(
                f"the held-out accuracy with the decided gates is {accuracy:.2f} %, with gates drawn from the guide "
                f"{drawn.accuracy:.2f} %; more epochs or a higher gate learning rate decide gates, fine_tune adapts "
                "the weights."
            )

    def _unresolved(self, record: EpochRecord, precision: Precision | None) -> list[str]:
        """Tensors whose decided width is beyond what the arithmetic of the training resolves."""
        if self.network is None or precision not in ("tf32", "bf16"):
            return []
        names = zip(self.network.layout.tensors, record.bits, strict=False)
        return [name for name, bits in names if bits > FINEST_BITS]

    def _undecided(self, record: EpochRecord) -> list[str]:
        if self.network is None or self.gate_guide is None:
            return []
        probabilities, found = self.gate_guide.probabilities().channels, []
        for (layer, part), kept in zip(self.network.layout.slices.items(), record.kept, strict=True):
            channels, expected = part.stop - part.start, probabilities[part].sum().item()
            if channels >= UNDECIDED_CHANNELS and abs(expected - kept) > UNDECIDED_SHARE * channels:
                found.append(f"{layer} keeps {kept} of {channels} channels where {expected:.1f} are expected")
        return found


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)  # the caller of fit
