"""A run as files for deployment, in all formats."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from pyro_bbits.analysis.export.aimet_file import export_aimet
from pyro_bbits.analysis.export.deployment import MOST_ROWS, Deployment
from pyro_bbits.analysis.export.lowering import Box
from pyro_bbits.analysis.export.onnx_file import export_onnx
from pyro_bbits.analysis.export.place import check_place, scratch
from pyro_bbits.analysis.export.qonnx_file import export_qonnx
from pyro_bbits.analysis.export.report import ExportReport
from pyro_bbits.analysis.export.verification import agreement, outputs_of
from pyro_bbits.analysis.run import RunFolder
from pyro_bbits.deployment import check_channels, load_packed, save_packed
from pyro_bbits.gates import DecisionRule

__all__ = ["FORMATS", "export_run"]

FORMATS = ("onnx", "qonnx", "aimet", "packed", "bits")
FILES = {
    "onnx": "network.onnx",
    "qonnx": "network.qonnx.onnx",
    "aimet": "network.aimet.onnx",
    "packed": "network.packed.safetensors",
    "bits": "bits.json",
}


def export_run(
    run: RunFolder | Path | str,
    formats: Sequence[str],
    output: str | Path,
    *,
    rule: DecisionRule | None = None,
    optimize_for: Box = "speed",
    remove: bool = True,
    channel_multiple: int = 1,
    reopen: bool = False,
    opset: int | None = None,
    data_path: Path | None = None,
    rows: int = MOST_ROWS,
    tell: Callable[[str], object] = lambda line: None,
) -> list[Path]:
    """Write a run in some formats; each file is verified with the test rows, and not left there if that fails.

    Arguments:
        run: The run, or its folder.
        formats: Of `onnx`, `qonnx`, `aimet`, `packed`, `bits`.
        output: Folder for the files, made if need be.
        rule: How gates are decided; None takes the run's.
        optimize_for: As for :func:`export_onnx`.
        remove: Remove pruned channels physically; otherwise they stay as zeros. `bits` always has all.
        channel_multiple: Keep just enough pruned channels, as zeros, for each layer to have a multiple of so many.
        reopen: Open the most probable of them again in place of that, which changes what the network computes.
        opset: As for :func:`export_onnx`.
        data_path: Where the data lie now; None takes the place from the run's settings.
        rows: Test rows to run each file on at most.
        tell: Takes the figures line by line, as they are found.

    Returns:
        The files.

    Raises:
        ValueError: If a format is unknown, the run is not complete, or a file cannot be written or fails.
    """
    if unknown := [name for name in formats if name not in FORMATS] or [""] * (not formats):
        raise ValueError(f"formats are {', '.join(FORMATS)}; got {unknown[0]!r}.")
    if optimize_for not in get_args(Box):
        raise ValueError(f"optimize_for must be 'speed' or 'size'; got {optimize_for!r}.")
    run, output = run if isinstance(run, RunFolder) else RunFolder.open(Path(run)), Path(output)
    rule = rule or run.settings().rule
    for name in formats:
        check_place(output / FILES[name])
    check_channels(channel_multiple, reopen=reopen, remove=remove)
    files = run.export(output, rule, multiple_of=channel_multiple if reopen else 1) if "bits" in formats else []
    if set(formats) <= {"bits"}:
        return files
    deployment = Deployment.of_run(
        run, rule, remove=remove, channel_multiple=channel_multiple, reopen=reopen, data_path=data_path, rows=rows
    )
    for line in _removal_lines(deployment):
        tell(line)
    tell(f"files are run on up to {len(deployment.held_out.inputs)} test rows")
    for report in graphs_of(deployment, formats, output, optimize_for, opset):
        for line in report.lines():
            tell(line)
        files += [report.path, report.file]
        if (encodings := report.path.with_suffix(".encodings")).exists() and report.figures["format"] == "aimet":
            files.append(encodings)
    return files


def graphs_of(
    deployment: Deployment, formats: Sequence[str], output: Path, optimize_for: Box = "speed", opset: int | None = None
) -> Iterator[ExportReport]:
    """Write a deployment in some formats into a folder, one file after the other as they are asked for, verified."""
    net, examples, rows = deployment.frozen, deployment.examples, deployment.held_out
    if "packed" in formats:
        yield _packed(deployment, output / FILES["packed"])
    if "onnx" in formats:
        options = {"optimize_for": optimize_for, "opset": opset, "about": deployment.about}
        yield export_onnx(net, output / FILES["onnx"], examples, held_out=rows, **options)  # type: ignore[arg-type]
    if "qonnx" in formats:
        yield export_qonnx(net, output / FILES["qonnx"], examples, held_out=rows)
    if "aimet" in formats:
        yield export_aimet(net, output / FILES["aimet"], examples, held_out=rows)


def _packed(deployment: Deployment, path: Path) -> ExportReport:
    """Write the packed file, and keep it only if the network that is read from it computes exactly the same."""
    rows = deployment.held_out
    expected = outputs_of(deployment.frozen, rows.inputs)
    with scratch(path) as (draft,):
        size = save_packed(deployment.frozen, draft)
        outputs = outputs_of(load_packed(draft, deployment.float_net), rows.inputs)
        if not np.array_equal(outputs, expected):
            raise ValueError(f"{path} was not written: the network read from it is another one. Please report this.")
        figures = {"format": "packed", "size_bytes": size.file, "smaller_than_float32": round(size.ratio, 3)}
        found = agreement(outputs, expected, regression=rows.regression)
        report = ExportReport(path, {**figures, "loaded": found.figures() | rows.score(outputs)})
    report.save()
    return report


def _removal_lines(deployment: Deployment) -> list[str]:
    removal = deployment.removal
    if removal is None:
        return []
    channels = sum(len(gone) for gone in removal.removed.values())
    lines = [
        f"{channels} channels removed: {removal.macs_after:,} of {removal.macs_before:,} MACs left".replace(",", " ")
    ]
    return lines + [f"  {name} keeps pruned channels as zeros: {reason}" for name, reason in removal.masked.items()]
