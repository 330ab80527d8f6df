"""What the paper's reviewers asked, each answered by a command on finished runs; answers are Markdown.

    python -m benchmarks.paper.questions savings RUN...                          # pruning or bit widths, by layer
    python -m benchmarks.paper.questions transitions RUN...                      # 32-16-8-4-2, or jumps?
    python -m benchmarks.paper.questions threshold RUN --data-path FOLDER        # the rule that decides gates
    python -m benchmarks.paper.questions lambda                                  # the strength of the prior
    python -m benchmarks.paper.questions ensemble RUN --data-path FOLDER         # are drawn configurations worth it?
    python -m benchmarks.paper.questions zeros RUN... --data-path FOLDER         # BOPs that credit zeros

`RUN` is the folder of a run of `benchmarks.paper.run`, e.g. `runs/paper/mnist/parity-seed0`. Validation rows are used,
unless `--split test` is given.
"""

import argparse
import json
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common.machine import pick_device
from benchmarks.common.pages import markdown_table
from benchmarks.paper.data import load, made
from benchmarks.paper.metrics import Predictions, pooled, predict, saving_of
from benchmarks.paper.results import RESULTS, Result, read_results
from benchmarks.paper.run import ROW
from benchmarks.paper.tables import lambda_table
from benchmarks.paper.zeros import zero_crediting_bops
from pyro_bbits import BitConfiguration
from pyro_bbits.analysis.run import RunFolder, load_weights
from pyro_bbits.data import Loaders
from pyro_bbits.gates import GateValues, decide
from pyro_bbits.inference import History, recalibrate_norms
from pyro_bbits.models import PlainModel, build_network

__all__ = ["FinishedRun", "ensemble", "savings", "threshold", "transitions", "zeros"]

THRESHOLDS = (0.05, 0.1, 0.2, 0.34, 0.5, 0.66, 0.8, 0.9)
BATCH, NORM_BATCHES = 128, 16


@dataclass(frozen=True)
class FinishedRun:
    """A run that came to its end, and the data it was trained on.

    Attributes:
        path: Its folder.
        loaders: Batches of its splits; None where a question needs none.
        device: Where networks run.
        split: The split that questions are answered on.
        outputs: Number of classes.
    """

    path: Path
    loaders: Loaders | None
    device: torch.device
    split: str = "validation"
    outputs: int = 10

    @property
    def result(self) -> Result:
        """Its figures."""
        return Result(**json.loads((self.path / ROW).read_text(encoding="utf-8")))

    @property
    def folder(self) -> RunFolder:
        """Its files."""
        return RunFolder(self.path)

    @property
    def configuration(self) -> BitConfiguration:
        """What was chosen."""
        return BitConfiguration.load(self.folder.bits_file)

    @property
    def rows(self) -> Any:
        """Batches that the question is answered on."""
        assert self.loaders is not None
        return getattr(self.loaders, self.split)

    def configured(self, configuration: BitConfiguration, *, norms: bool = True) -> PlainModel:
        """The trained network at a configuration; with `norms` its batch norms get statistics for it."""
        assert self.loaders is not None
        images, _ = next(iter(self.loaders.validation))
        net = build_network(self.result.network, tuple(images.shape[1:]), self.outputs).to(self.device)
        net.load_state_dict(load_weights(self.folder.weights_file))
        model = PlainModel(configuration.apply(net), 1)
        if norms:
            recalibrate_norms(model, self.loaders.train, batches=NORM_BATCHES)
        return model


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table of rows with the same entries; floats with three digits."""
    rows = list(rows)
    shown = [{k: f"{v:.3f}" if isinstance(v, float) else str(v) for k, v in row.items()} for row in rows]
    return markdown_table({name: [row[name] for row in shown] for name in (rows[0] if rows else ())})


# --- one function for each question -----------------------------------------------------------------------------------


def savings(run: FinishedRun) -> list[dict[str, Any]]:
    """Share of the saving by pruning and by bit widths: of the network, and of each layer by itself."""
    configuration = run.configuration
    parts = {"whole network": configuration}
    for layer in configuration.layers:
        tensors = tuple(t for t in configuration.tensors if t.name in (layer.weight, layer.input))
        bops = 100 * layer.bops / (1024 * max(1, layer.macs))
        values = {"layers": (layer,), "tensors": tensors, "float_layers": (), "relative_bops": bops}
        parts[layer.name] = configuration.model_copy(update=values)
    rows = []
    for name, part in parts.items():
        saving = saving_of(part)
        shares = {"pruning %": 100 * saving.pruning_share, "widths %": 100 * (1 - saving.pruning_share)}
        rows.append({"part": name, "relative BOPs %": saving.both, **shares})
    return rows


def transitions(history: History) -> list[dict[str, Any]]:
    """The widths that each tensor passed through, seen at the ends of epochs.

    A step to the next width of the ladder is smooth, one over a width is a jump; within an epoch more may have happened
    than is seen.
    """
    ladder = sorted({bits for record in history for bits in record.bits} | {2, 4, 8, 16, 32})
    rows = []
    for column, name in enumerate(history.tensors):
        widths = [record.bits[column] for record in history]
        path = widths[:1] + [after for before, after in pairwise(widths) if after != before]
        steps = [abs(ladder.index(b) - ladder.index(a)) for a, b in pairwise(path)]
        counts = {"smooth": steps.count(1), "jumps": sum(step > 1 for step in steps)}
        raised = sum(b > a for a, b in pairwise(path))
        rows.append({"tensor": name, "path": " ".join(map(str, path)), **counts, "raised": raised})
    return rows


def threshold(run: FinishedRun, thresholds: Sequence[float] = THRESHOLDS) -> list[dict[str, Any]]:
    """Accuracy and BOPs by the rule that decides the gates: open if the probability of being 0 is below `t`."""
    posterior = run.folder.posterior()
    q, rows = posterior.probabilities, []
    choices = {"map": decide(q, "map")} | {
        f"t = {t:g}": GateValues((1 - q.channels < t).float(), (1 - q.tensors < t).float().cumprod(1))
        for t in thresholds
    }
    for name, gates in choices.items():
        configuration = BitConfiguration.from_gates(posterior.structure, gates)
        found = predict(run.configured(configuration), run.rows)
        kept = sum(configuration.kept().values())
        cost = {"relative BOPs %": configuration.relative_bops, "kept channels": kept}
        rows.append({"rule": name, "accuracy %": found.accuracy, "NLL": found.nll, **cost})
    return rows


def ensemble(run: FinishedRun, draws: int = 10, seed: int = 0) -> list[dict[str, Any]]:
    """Configurations drawn from the posterior: one by one, and their predictions averaged."""
    posterior = run.folder.posterior()
    drawn = posterior.sample(draws, seed=seed)
    members = [
        BitConfiguration.from_gates(posterior.structure, GateValues(*gates)) for gates in zip(*drawn, strict=True)
    ]
    found = [predict(run.configured(member), run.rows) for member in members]
    bops, different = [member.relative_bops for member in members], len(set(members))
    chosen = predict(run.configured(run.configuration, norms=False), run.rows)
    single = {
        name: statistics.fmean(getattr(p, name) for p in found) for name in ("accuracy", "nll", "calibration_error")
    }
    return [
        _quality("chosen configuration", chosen, run.configuration.relative_bops),
        _row(f"one of {draws} drawn ({different} differ), mean", statistics.fmean(bops), **single),
        _quality(f"ensemble of {draws}", pooled(found), sum(bops)),
    ]


def _quality(name: str, found: Predictions, bops: float) -> dict[str, Any]:
    return _row(name, bops, found.accuracy, found.nll, found.calibration_error)


def _row(name: str, bops: float, accuracy: float, nll: float, calibration_error: float) -> dict[str, Any]:
    quality = {"accuracy %": accuracy, "NLL": nll, "calibration error %": calibration_error}
    return {"network": name, **quality, "relative BOPs %": bops}


def zeros(run: FinishedRun) -> list[dict[str, Any]]:
    """BOPs of products of two numbers that are not zero, by layer."""
    configuration = run.configuration
    net: nn.Module = run.configured(configuration, norms=False).net
    return zero_crediting_bops(net, configuration, run.rows)


# --- command line -----------------------------------------------------------------------------------------------------

NEEDS_DATA: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "threshold": threshold,
    "ensemble": ensemble,
    "zeros": zeros,
}


def open_run(path: Path, arguments: Any) -> FinishedRun:
    """The run of a folder, with its data if the question needs them."""
    if not (path / ROW).is_file():
        raise SystemExit(f"{path} holds no finished run; give the folder of a run of benchmarks.paper.run.")
    device = pick_device(arguments.device)
    run = FinishedRun(path, None, device, arguments.split)
    if arguments.question not in NEEDS_DATA:
        return run
    result = run.result
    data = made(result.dataset) if arguments.quick else load(result.dataset, arguments.data_path, result.seed)
    loaders = data.loaders(BATCH, seed=result.seed, device=device)
    return FinishedRun(path, loaders, device, arguments.split, data.num_outputs)


def answer(run: FinishedRun, arguments: Any) -> list[dict[str, Any]]:
    """Rows of the answer for one run."""
    if arguments.question == "savings":
        return savings(run)
    if arguments.question == "transitions":
        return transitions(run.folder.history())
    options = {"draws": arguments.draws} if arguments.question == "ensemble" else {}
    return NEEDS_DATA[arguments.question](run, **options)


def main(argv: Sequence[str] | None = None) -> None:
    """Answer a question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=("savings", "transitions", "lambda", *NEEDS_DATA))
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--data-path", type=Path)
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="made data, for a run that was --quick")
    arguments = parser.parse_args(argv)
    if arguments.question == "lambda":
        results = read_results(arguments.results)
        for dataset in dict.fromkeys(result.dataset for result in results):
            print(f"{dataset}\n\n{lambda_table(dataset, results)}\n")
        return
    with warnings.catch_warnings():
        if arguments.quick:
            warnings.simplefilter("ignore")
        for path in arguments.runs:
            print(f"{path}\n\n{table(answer(open_run(path, arguments), arguments))}\n")


if __name__ == "__main__":
    main()
