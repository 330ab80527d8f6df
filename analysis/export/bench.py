"""How fast, how small and how good the files of a run are: timed side by side in ONNX Runtime, in one process."""

import copy
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pyro_bbits.analysis.export.deployment import Deployment
from pyro_bbits.analysis.export.graph import INPUT, traced
from pyro_bbits.analysis.export.onnx_file import DEFAULT_OPSET, export_onnx, save_checked
from pyro_bbits.analysis.export.report import ExportReport
from pyro_bbits.analysis.export.run_export import graphs_of
from pyro_bbits.analysis.export.runtime import Mode, open_session, run_rows, runtime_version
from pyro_bbits.deployment import FrozenQuantizer, frozen_layers

__all__ = ["BenchRow", "bench_deployment", "bench_table", "check_bench", "honest_lines", "print_bench", "save_rows"]

FLOAT = "fp32"
FURTHER = ("qonnx", "aimet", "packed")
SIZE = ", size"
SECONDS = 4.0
LEAST_ROUNDS = 15
WARM_UP = 3
WIDE = {
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX VNNI",
    "avx512bw": "AVX-512 without VNNI",
    "avx2": "AVX2 without VNNI",
    "i8mm": "int8 matrix products",
    "asimddp": "int8 dot products",
    "asimd": "Advanced SIMD",
}


@dataclass(frozen=True)
class BenchRow:
    """A file at one batch size.

    Attributes:
        network: Name of the network.
        format: `fp32`, `int8`, `pruned fp32`, `pruned int8`, or these with `size`: 2 and 4 bits packed in the file;
            `qonnx`, `aimet` or `packed`, which are not timed.
        threads: Threads of the runtime.
        batch: Rows of a call; None if it was not timed.
        latency_ms: Median time of a call; None if it was not timed, as the speedup is then.
        speedup_vs_fp32_onnx: How many times faster than `fp32`.
        size_bytes: Size of the file.
        size_ratio: How many times smaller than `fp32`.
        accuracy_float: Test accuracy in percent of the full-precision network of the run; None if none was trained.
            (`fp32` has weights that were trained to be quantized, and may be useless without.)
        accuracy_file: Test accuracy of the file in percent; None of a regression.
        agreement_exact: Share of the test rows on which it agrees with the frozen network in exact mode, of `packed`
            once it is loaded; None in float.
        relative_bops: BOPs in percent of the unpruned network at 32 x 32 bit; of a pruned file those between channels
            that are in use, without zeros that are kept for the kernels' sake.
        session_mode: How it was run for time and accuracy: `fused`, or `fast` where that computes the same; `exact` or
            `loaded` if it was not timed.
        hardware: Processor.
        runtime: Name and version of what times the files.
        command: How the row was made.
        date: Day.
        rmse_file: Root of the mean squared error of the file, in the targets' units; None of a classification.
    """

    network: str
    format: str
    threads: int
    batch: int | None
    latency_ms: float | None
    speedup_vs_fp32_onnx: float | None
    size_bytes: int
    size_ratio: float
    accuracy_float: float | None
    accuracy_file: float | None
    agreement_exact: float | None
    relative_bops: float
    session_mode: str
    hardware: str
    runtime: str
    command: str
    date: str
    rmse_file: float | None = None


@dataclass(frozen=True)
class _File:
    name: str
    path: Path
    size: int
    mode: Mode | None
    score: Mapping[str, float]
    agreement: float | None
    bops: float


def bench_deployment(
    deployment: Deployment,
    *,
    threads: int = 1,
    batches: Sequence[int] = (1, 64),
    seconds: float = SECONDS,
    further: Sequence[str] = (),
    accuracy_float: float | None = None,
    command: str = "",
    tell: Callable[[str], object] = lambda line: None,
) -> list[BenchRow]:
    """Time the float and the exported networks of a run in ONNX Runtime.

    All files are loaded at once and called in turns, so that a busy machine disturbs all alike; figures are medians.

    Arguments:
        deployment: What the run deploys.
        threads: Threads of the runtime.
        batches: Rows of a call.
        seconds: Time for each batch size, over all files.
        further: Files to make, verify and list beside them without timing: of `qonnx`, `aimet` and `packed`.
        accuracy_float: Test accuracy of the full-precision network, if it was trained.
        command: Written into the rows.
        tell: Takes progress line by line.

    Raises:
        ValueError: As :func:`check_bench`, or if a file cannot be made (see :func:`export_onnx`).
    """
    check_bench(threads, batches, seconds, further)
    with tempfile.TemporaryDirectory() as folder:
        files = _files(deployment, Path(folder), tell)
        others = list(_further(deployment, further, Path(folder), tell))
        sessions = {file.name: open_session(file.path, file.mode, threads) for file in files if file.mode is not None}
        times = {batch: _medians(sessions, deployment.held_out.inputs, batch, seconds) for batch in batches}
    about = {
        "network": deployment.network,
        "threads": threads,
        "accuracy_float": accuracy_float,
        "hardware": hardware(),
        "runtime": runtime_version(),
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
    }
    timed = [_row(file, files[0], batch, times[batch], about) for batch in batches for file in files]
    return timed + [_row(file, files[0], None, {}, about) for file in others]


def _row(
    file: _File, reference: _File, batch: int | None, times: Mapping[str, float], about: Mapping[str, Any]
) -> BenchRow:
    seconds = times.get(file.name)
    return BenchRow(
        format=file.name,
        batch=batch,
        latency_ms=None if seconds is None else round(1e3 * seconds, 4),
        speedup_vs_fp32_onnx=None if seconds is None else round(times[reference.name] / seconds, 3),
        size_bytes=file.size,
        size_ratio=round(reference.size / file.size, 3),
        accuracy_file=_rounded(file.score.get("accuracy")),
        rmse_file=_rounded(file.score.get("rmse")),
        agreement_exact=file.agreement,
        relative_bops=file.bops,
        session_mode=file.mode or "loaded",
        **about,
    )


def check_bench(threads: int, batches: Sequence[int], seconds: float, further: Sequence[str] = ()) -> None:
    """Whether a benchmark can be run so.

    Raises:
        ValueError: If a number is below 1, a batch size is there twice, the time is not finite and above 0, or a
            further format is unknown.
    """
    if threads < 1 or not batches or min(batches) < 1:
        raise ValueError(f"threads and batch sizes must be at least 1; got {threads=}, {batches=}.")
    if len(set(batches)) < len(batches):
        raise ValueError(f"batch sizes must differ; got {batches=}.")
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be a finite number above 0; got {seconds}.")
    if unknown := [name for name in further if name not in FURTHER]:
        raise ValueError(f"further files are of {', '.join(FURTHER)}; got {unknown[0]!r}.")


def _rounded(score: float | None) -> float | None:
    return None if score is None else round(score, 4)


def _files(deployment: Deployment, folder: Path, tell: Callable[[str], object]) -> list[_File]:
    configuration, bops, name = deployment.configuration, _bops(deployment), "int8"
    files = [_float_file(deployment, FLOAT, deployment.float_net, folder, 100.0)]
    files.append(_integer_file(deployment, name, deployment.masked, folder, configuration.unpruned_bops, tell))
    if _is_pruned(deployment):
        plain, name = without_quantizers(deployment.frozen), "pruned int8"
        files.append(_float_file(deployment, "pruned fp32", plain, folder, configuration.relative_macs))
        files.append(_integer_file(deployment, name, deployment.frozen, folder, bops, tell))
    return [*files, _integer_file(deployment, name + SIZE, deployment.frozen, folder, bops, tell)]


def _is_pruned(deployment: Deployment) -> bool:
    return deployment.removal is not None and bool(deployment.removal.removed)


def _bops(deployment: Deployment) -> float:
    """Of the network as it is deployed."""
    configuration = deployment.configuration
    return configuration.relative_bops if _is_pruned(deployment) else configuration.unpruned_bops


def _float_file(deployment: Deployment, name: str, net: nn.Module, folder: Path, bops: float) -> _File:
    path = folder / f"{name}.onnx"
    save_checked(traced(net, deployment.examples, opset=DEFAULT_OPSET, batch="any"), path)
    outputs = run_rows(open_session(path), deployment.held_out.inputs)[0]
    return _File(name, path, path.stat().st_size, "fused", deployment.held_out.score(outputs), None, bops)


def _integer_file(
    deployment: Deployment, name: str, net: nn.Module, folder: Path, bops: float, tell: Callable[[str], object]
) -> _File:
    report = export_onnx(
        net,
        folder / f"{name}.onnx",
        deployment.examples,
        optimize_for="size" if name.endswith(SIZE) else "speed",
        held_out=deployment.held_out,
    )
    _tell_figures(name, report, tell)
    mode: Mode = "fused" if report.figures["may_saturate_without_vnni"] else "fast"
    return _File(name, report.path, report.size, mode, report.figures[mode], report.figures["exact"]["top1"], bops)


def _further(
    deployment: Deployment, formats: Sequence[str], folder: Path, tell: Callable[[str], object]
) -> Iterator[_File]:
    """The network as it is deployed in formats that are not timed."""
    for report in graphs_of(deployment, formats, folder):
        name = str(report.figures["format"])
        _tell_figures(name, report, tell)
        mode: Mode | None = "exact" if "exact" in report.figures else None
        found = report.figures[mode or "loaded"]
        yield _File(name, report.path, report.size, mode, found, found["top1"], _bops(deployment))


def _tell_figures(name: str, report: ExportReport, tell: Callable[[str], object]) -> None:
    for line in report.lines()[1:]:
        tell(f"{name}: {line.strip()}")


def without_quantizers(frozen: nn.Module) -> nn.Module:
    """A copy of a frozen network with its weights on their grids, and nothing else quantized."""
    net = copy.deepcopy(frozen)
    for layer in frozen_layers(net).values():
        layer.input_quantizer, layer.scale = None, None
    for module in net.modules():
        for name, child in module.named_children():
            if isinstance(child, FrozenQuantizer):
                setattr(module, name, nn.Identity())
    return net


def _medians(sessions: Mapping[str, Any], inputs: Tensor, batch: int, seconds: float) -> dict[str, float]:
    """Median seconds of a call of each session, called in turns."""
    feed = {INPUT: inputs[[row % len(inputs) for row in range(batch)]].numpy()}
    for session in sessions.values():
        for _ in range(WARM_UP):
            session.run(None, feed)
    times: dict[str, list[float]] = {name: [] for name in sessions}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < LEAST_ROUNDS or time.perf_counter() < end:
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, feed)
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


def hardware() -> str:
    """Name of the processor, and the widest integer arithmetic that it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = (known.get("flags") or known.get("Features", "")).split()  # as x86 and Arm call them
    wide = next((name for flag, name in WIDE.items() if flag in flags), "no integer arithmetic that is known here")
    return f"{known.get('model name', platform.machine())}, {wide}"


def bench_table(rows: Sequence[BenchRow]) -> Table:
    """Files, sizes, latencies, accuracy and BOPs side by side."""
    first = rows[0]
    batches = list(dict.fromkeys(row.batch for row in rows if row.batch is not None))
    title = f"{first.network}, {first.runtime}, threads: {first.threads}, {first.hardware}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("file")
    for name in ("KiB", "smaller", *(f"batch {n}, ms" for n in batches), *(f"batch {n}, faster" for n in batches)):
        table.add_column(name, justify="right", no_wrap=True)
    score = "accuracy %" if all(row.rmse_file is None for row in rows) else "RMSE"
    for name in (score, "agreement %", "BOPs %"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in dict.fromkeys(row.format for row in rows):
        ours = {row.batch: row for row in rows if row.format == name}
        row, timed = next(iter(ours.values())), [ours.get(batch) for batch in batches]
        table.add_row(
            name,
            f"{row.size_bytes / 1024:.1f}",
            f"{row.size_ratio:.1f}x",
            *("" if each is None else f"{each.latency_ms:.3f}" for each in timed),
            *("" if each is None else f"{each.speedup_vs_fp32_onnx:.2f}x" for each in timed),
            _score(row),
            "" if row.agreement_exact is None else f"{100 * row.agreement_exact:.2f}",
            f"{row.relative_bops:.3f}",
        )
    return table


def _score(row: BenchRow) -> str:
    if row.rmse_file is not None:
        return f"{row.rmse_file:.4f}"
    return "" if row.accuracy_file is None else f"{row.accuracy_file:.2f}"


def print_bench(rows: Sequence[BenchRow]) -> None:
    """Print the table, and what BOPs promise beyond it."""
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    table = bench_table(rows)
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=4096)).maximum)
    console.print(table)
    for line in honest_lines(rows):
        console.print(line)


def honest_lines(rows: Sequence[BenchRow]) -> list[str]:
    """Where BOPs promise more than the machine gives."""
    lines = []
    for row in rows:
        promised, speedup = 100 / max(row.relative_bops, 1e-9), row.speedup_vs_fp32_onnx
        if row.format == FLOAT or row.format.endswith(SIZE) or speedup is None or speedup >= promised:
            continue
        lines.append(
            f"{row.format}, batch {row.batch}: {promised:.1f} times fewer BOPs, {speedup:.2f} times as fast here"
        )
    if lines:
        lines.append(
            "this processor multiplies 2- and 4-bit codes as bytes: below 8 bits the files get smaller, not faster, "
            "and layers of few channels may be slower than in float"
        )
    return lines


def save_rows(rows: Sequence[BenchRow], path: str | Path) -> None:
    """Append the rows to a file of JSON lines."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
