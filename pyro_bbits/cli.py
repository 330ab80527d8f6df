"""The command line `bbits`: train, summary, plot, export, bench. A run is a folder."""

import os
import re
import signal
import sys
import threading
import warnings
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pyro_bbits.analysis.run import RunFolder

# the rooms are imported inside the commands, so that --help does not wait for torch

__all__ = ["app", "main"]

# Typer raises Click's exceptions, since 0.26 as copies of its own; this public one leads to either
ClickException: Any = typer.BadParameter.__mro__[2]

NO_SETTINGS = ("context", "output", "config", "overwrite", "resume", "checkpoint_every", "quiet")
"""Parameters of `train` that are not settings of the run."""

app = typer.Typer(
    name="bbits",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Learn the bit width of every tensor of a network, and which channels to prune.

A run is a folder: `train` fills it; `summary`, `plot`, `export` and `bench` read it.

**Example**

    bbits train --data digits --output runs/digits

    bbits summary runs/digits

    bbits export runs/digits --output deploy
""",
)

RunArgument = Annotated[Path, typer.Argument(help="Folder of the run, the --output of `bbits train`.", metavar="RUN")]
RuleOption = Annotated[
    str | None,
    typer.Option(help="How gates are decided: `map` or `threshold` (the paper's). [default: as trained]"),
]
ALL_ROWS = 10_000
RowsOption = Annotated[int, typer.Option(help="Test rows that files are run on, from the first: at most 10 000.")]
ReopenOption = Annotated[
    bool, typer.Option("--reopen", help="Open pruned channels again in place of zeros, the most probable first.")
]
DataPathOption = Annotated[
    Path | None, typer.Option(help="Where the test data lie now. [default: as when the run was trained]")
]


def _version(asked: bool) -> None:
    if asked:
        from pyro_bbits import __version__

        typer.echo(f"pyro-bbits {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    """Options of all commands."""


class Stop:
    """Ctrl-C and SIGTERM while a command runs: the first one ends it, later ones do not disturb what is saved then.

    Attributes:
        word: What happened.
        code: The exit code for it: 128 and the number of the signal.
        told: Whether the user has been told.
    """

    def __init__(self) -> None:
        self.word, self.code, self.told, self.received = "interrupted", 130, False, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            return
        self.received = True
        if number == signal.SIGTERM:
            self.word, self.code = "terminated", 143
        raise KeyboardInterrupt

    def tell(self, rest: str = ".") -> None:
        """Say what happened, once, and in one process."""
        if not self.told and _first():
            typer.echo(f"{self.word}{rest}", err=True)
        self.told = True


def _first() -> bool:
    """Whether this process speaks: it is the only one, or rank 0 of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


@app.command()
def train(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run, made if need be.")],
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; flags win over it.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that is in the folder, once the new one is complete.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder; begin it if there is none.")
    ] = False,
    checkpoint_every: Annotated[
        int, typer.Option(help="Epochs between checkpoints; 0 keeps none. [default: 1]", show_default=False)
    ] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="`digits`, `mnist`, `cifar10`, or your own: a folder with a folder of pictures per class, a `.npz` or "
            "a `.csv` file. [default: digits]"
        ),
    ] = None,
    data_path: Annotated[
        Path | None, typer.Option(help="Folder with the parquet files of mnist or cifar10. [default: from the hub]")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Column of targets in a `.csv`.")] = None,
    task: Annotated[
        str | None, typer.Option(help="`classification` or `regression`. [default: classification]")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            help="Scale and crop pictures to this many pixels, read while training. [default: as they are, in memory]"
        ),
    ] = None,
    bad_images: Annotated[
        str | None, typer.Option(help="Undecodable pictures: `raise` or `skip`. [default: raise]")
    ] = None,
    augment: Annotated[
        str | None,
        typer.Option(
            help="One of `none`, `crop`, `crop-flip`, `crop-flip-cutout`. "
            "[default: crop-flip for cifar10 and with --image-size]"
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that decode pictures. [default: cores - 1]")] = None,
    picture_cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps decoded pictures: later epochs read several times as fast.")
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            help="`digits-net`, `lenet5`, `vgg7`, `resnet20`, `resnet18`, `mobilenetv2`, `vit` or `mlp`. "
            "[default: the one for the data]"
        ),
    ] = None,
    pretrained: Annotated[
        Path | None,
        typer.Option(help="Weights to start from: the float network's state dict, safetensors or `.pth`."),
    ] = None,
    pretrained_head: Annotated[
        str | None, typer.Option(help="`keep`, or `reset` for another number of classes. [default: keep]")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Patterns of modules to quantize, e.g. `layer1,layer2.*`. [default: all]")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Patterns of modules left in float, e.g. `conv1,fc`. [default: none]")
    ] = None,
    bits: Annotated[str | None, typer.Option(help="Ladder of bit widths. [default: 2,4,8,16,32]")] = None,
    mu: Annotated[
        float | None, typer.Option(help="Prior strength, nats per sample; more means fewer bits. [default: 0.1]")
    ] = None,
    cost: Annotated[str | None, typer.Option(help="Price of a gate: `bops` or `constant`. [default: bops]")] = None,
    bops_price: Annotated[
        float | None,
        typer.Option(
            help="Price of the BOPs as a whole, nats per sample and percent of the float network's. With a mu of "
            "1e-6 and `simplified` it alone decides; try 1. [default: 0]"
        ),
    ] = None,
    simplified: Annotated[
        bool | None, typer.Option("--simplified/--full-kl", help="The paper's penalty, or the full KL. [default: full]")
    ] = None,
    guide: Annotated[
        str | None, typer.Option(help="`hard-concrete` or `straight-through`. [default: hard-concrete]")
    ] = None,
    prune: Annotated[bool | None, typer.Option("--prune/--no-prune", help="Remove channels. [default: prune]")] = None,
    pin: Annotated[
        list[str] | None,
        typer.Option(help="Tensors of a fixed width, e.g. `*.input=8`; several by commas, or again. [default: none]"),
    ] = None,
    ranges: Annotated[
        str | None,
        typer.Option(
            help="Where ranges start: `max`, the largest magnitude, or `mse`, the least squared error of 4 bits. "
            "[default: max]"
        ),
    ] = None,
    init_logit: Annotated[float | None, typer.Option(help="Initial logit of the gates. [default: 6]")] = None,
    rule: Annotated[
        str | None, typer.Option(help="How gates are decided: `map` or `threshold`. [default: map]")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="Weights to begin with: the `initial` ones, or those of the trained `float` network. "
            "[default: initial]"
        ),
    ] = None,
    distill: Annotated[
        float | None,
        typer.Option(help="Weight of the float network's predictions in the targets, 0 to 1. [default: 0]"),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the data. [default: 40 digits, 100 cifar10, else 20]")
    ] = None,
    fine_tune_epochs: Annotated[
        int | None, typer.Option(help="Further passes with the gates fixed. [default: 0]")
    ] = None,
    float_epochs: Annotated[
        int | None, typer.Option(help="Passes of the full-precision network. [default: as many as --epochs]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples per step. [default: 64 digits, else 128]")] = None,
    weight_lr: Annotated[float | None, typer.Option(help="Learning rate of the weights. [default: 0.001]")] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Decay of the weights, per unit of learning rate; try 0.1. [default: 0]")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="Of the weights' learning rate: `tail` (falls in the last third), `cosine`, `steps` or `constant`. "
            "[default: tail]"
        ),
    ] = None,
    gate_lr: Annotated[
        float | None, typer.Option(help="Learning rate of the gates. [default: 0.001, more for short runs]")
    ] = None,
    range_lr: Annotated[float | None, typer.Option(help="Learning rate of the ranges. [default: 0.001]")] = None,
    baseline: Annotated[
        bool | None,
        typer.Option("--baseline/--no-baseline", help="Train the full-precision network too. [default: baseline]"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random. [default: 0]")] = None,
    device: Annotated[str | None, typer.Option(help="`auto`, `cpu` or `cuda`. [default: auto]")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Arithmetic of training: `float32`, `tf32` or `bf16`. [default: PyTorch's]")
    ] = None,
    capture: Annotated[
        str | None,
        typer.Option(help="CUDA graphs of whole steps: `auto`, `always` or `never`. [default: auto]"),
    ] = None,
    compile: Annotated[
        str | None,
        typer.Option(help="Compile the network: `auto` (on CPUs, in long runs), `always`, `never`. [default: auto]"),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [default: PyTorch's choice]")] = None,
) -> None:
    """Train a network with gated quantizers and write a run folder.

    Ends with a table of bits and kept channels, the test accuracy of the full-precision and of the quantized network,
    and the files written.

    **Examples**

        bbits train --data digits --output runs/digits

        bbits train --data mnist --mu 0.05 --epochs 10 --output runs/mnist

        bbits train --data pictures/ --network vgg7 --output runs/pictures

        bbits train --start float --distill 0.5 --bops-price 1 --mu 1e-6 --simplified --bits 2,4,8 --output runs/small

        bbits train --config runs/mnist/settings.yaml --seed 1 --output runs/mnist-1

        bbits train --resume --output runs/mnist-1

        torchrun --nproc-per-node 2 -m pyro_bbits train --data cifar10 --output runs/cifar10
    """
    values = {k: v for k, v in locals().items() if k not in NO_SETTINGS}
    if resume and overwrite:
        raise ValueError("--resume goes on with the run in the folder and --overwrite replaces it; give one of them.")
    if checkpoint_every < 0:
        raise ValueError(f"--checkpoint-every must be at least 0; got {checkpoint_every}.")
    from pyro_bbits.settings import RunSettings

    going_on = resume and (output / "settings.yaml").is_file()
    settings = (
        RunSettings.resumed(output / "settings.yaml", values, config) if going_on else RunSettings.make(values, config)
    )
    if resume and not going_on:
        typer.echo(f"there is no run in {output} yet: beginning one", err=True)
    from pyro_bbits.analysis.experiment import Experiment
    from pyro_bbits.analysis.run import RunFolder
    from pyro_bbits.inference.distributed import of_first_process, process_group

    folder = RunFolder(output)
    if going_on and not folder.finished and folder.posterior_file.exists() and not folder.checkpoints.is_dir():
        raise ValueError(f"the run in {output} kept no checkpoints to go on from; --overwrite begins it anew.")
    if not (going_on and folder.finished):
        if not going_on and _first():
            RunFolder.check(output, overwrite=overwrite)
        with process_group():
            experiment = Experiment(settings, progress=not quiet, checkpoint_every=checkpoint_every)
            if going_on and _first():
                folder.remove_leftovers()
            elif _first():
                folder = RunFolder.create(output, settings, overwrite=overwrite)
            folder = RunFolder(Path(of_first_process(str(folder.path))))
            try:
                experiment.run(folder, resume=resume)
            except KeyboardInterrupt:
                _tell_of_run(context.obj or Stop(), folder)
                raise
        if _first():
            folder.move_to(output)
    if _first():
        _show(RunFolder(output), settings.rule)


def _tell_of_run(stop: Stop, folder: "RunFolder") -> None:
    going_on = any(folder.checkpoints.glob("*/epoch-*"))
    known = "its last checkpoint" if going_on else "its settings, and nothing trained yet"
    if folder.posterior_file.exists():
        known = "what was trained so far"
    again = f"; `bbits train --resume --output {folder.path}` goes on" if going_on else ""
    stop.tell(f"; {folder.path} holds {known}{again}.")


@app.command()
def summary(run: RunArgument, rule: RuleOption = None) -> None:
    """Show bits, kept channels and figures of a run.

    **Example**

        bbits summary runs/digits
    """
    folder = _open(run)
    _show(folder, rule or folder.settings().rule)


@app.command()
def plot(
    run: RunArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the plots. [default: RUN/plots]")
    ] = None,
    kind: Annotated[str, typer.Option("--format", help="`png`, `svg` or `pdf`.")] = "png",
) -> None:
    """Draw gate probabilities, bit widths, kept channels, BOPs and training curves.

    **Example**

        bbits plot runs/digits --format svg --output figures
    """
    if kind not in ("png", "svg", "pdf"):
        raise ValueError(f"format must be png, svg or pdf; got {kind!r}.")
    for path in _open(run).save_plots(output, kind):
        typer.echo(path)


@app.command()
def export(
    run: RunArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the files, made if need be.")],
    formats: Annotated[
        str, typer.Option("--format", help="Of `onnx`, `qonnx`, `aimet`, `packed`, `bits`, separated by commas.")
    ] = "bits",
    rule: RuleOption = None,
    optimize_for: Annotated[
        str, typer.Option(help="Weights of `onnx`: `speed` stores bytes, `size` packs 2 and 4 bits.")
    ] = "speed",
    channel_multiple: Annotated[
        int, typer.Option(help="Keep zeros for multiples of so many channels, 8 or 16, as fast kernels like them.")
    ] = 1,
    reopen: ReopenOption = False,
    remove: Annotated[
        bool, typer.Option("--remove/--mask", help="Remove pruned channels, or leave them there as zeros.")
    ] = True,
    data_path: DataPathOption = None,
    rows: RowsOption = ALL_ROWS,
    opset: Annotated[
        int | None, typer.Option(help="ONNX opset of `onnx`. [default: the oldest of 21 and 25 that holds the types]")
    ] = None,
) -> None:
    """Write what is deployed: `bits.json` and the weights it belongs to, or the network itself.

    `onnx` is for ONNX Runtime, `qonnx` for FINN and hls4ml, `aimet` for Qualcomm's tools, `packed` a small file for
    `pyro_bbits.deployment.load_packed`. Each graph is run on the test data and compared with the frozen network; the
    figures are printed and written beside the file, and a file that fails is not left there. Needs the extra `deploy`.

    In Python, `BitConfiguration.load("bits.json").apply(net)` quantizes the float network that holds the weights.

    **Examples**

        bbits export runs/digits --output deploy

        bbits export runs/digits --output deploy --format onnx,qonnx,aimet,packed

        bbits export runs/digits --output deploy --format onnx --optimize-for size
    """
    folder = _open(run)
    chosen = _check_rule(rule or folder.settings().rule)
    names = _names(formats)
    if "onnx" not in names and (optimize_for != "speed" or opset is not None):
        raise ValueError(f"--optimize-for and --opset are for the format onnx; got --format {formats}.")
    if names == ["bits"]:
        from pyro_bbits.deployment import check_channels

        check_channels(channel_multiple, reopen=reopen, remove=remove)
        if channel_multiple > 1 and not reopen:
            raise ValueError("--channel-multiple keeps zeros in files that are run; --reopen changes bits as well.")
        if not remove or rows != ALL_ROWS or data_path is not None:
            raise ValueError("--mask, --rows and --data-path are for files that are run; bits is the configuration.")
        files = folder.export(output, chosen, multiple_of=channel_multiple)
    else:
        options = {"optimize_for": optimize_for, "remove": remove, "channel_multiple": channel_multiple, "opset": opset}
        options |= {"reopen": reopen, "data_path": data_path, "rows": rows}
        files = _deploy().export_run(folder, names, output, rule=chosen, tell=typer.echo, **options)
    for path in files:
        typer.echo(path)


@app.command()
def bench(
    run: RunArgument,
    rule: RuleOption = None,
    threads: Annotated[int, typer.Option(help="Threads of the runtime.")] = 1,
    batches: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,64",
    seconds: Annotated[float, typer.Option(help="Time for each batch size, over all files.")] = 4.0,
    formats: Annotated[
        str, typer.Option("--format", help="Further files, not timed: of `qonnx`, `aimet`, `packed`, by commas.")
    ] = "",
    channel_multiple: Annotated[int, typer.Option(help="As for `bbits export`.")] = 1,
    reopen: ReopenOption = False,
    data_path: DataPathOption = None,
    rows: RowsOption = ALL_ROWS,
    accuracy_float: Annotated[
        float | None,
        typer.Option(
            help="Test accuracy of the full-precision network in percent. [default: the run's, if it has one]"
        ),
    ] = None,
    results: Annotated[Path | None, typer.Option(help="File of JSON lines that the figures are appended to.")] = None,
) -> None:
    """Time the float and the exported networks in ONNX Runtime, side by side, with sizes, test accuracy and BOPs.

    **Examples**

        bbits bench runs/digits

        bbits bench runs/digits --threads 2 --batches 1,16 --results bench.jsonl
    """
    folder = _open(run)
    rule, sizes = _check_rule(rule or folder.settings().rule), _numbers(batches)
    further, deploy = _names(formats), _deploy()
    deploy.check_bench(threads, sizes, seconds, further)
    if results is not None:
        deploy.check_place(results)
    options = {"channel_multiple": channel_multiple, "reopen": reopen, "data_path": data_path, "rows": rows}
    deployment = deploy.Deployment.of_run(folder, rule, **options)
    found = deploy.bench_deployment(
        deployment,
        threads=threads,
        batches=sizes,
        seconds=seconds,
        further=further,
        accuracy_float=folder.results().get("test_accuracy_float") if accuracy_float is None else accuracy_float,
        command=" ".join(["bbits", *sys.argv[1:]]),
        tell=typer.echo,
    )
    deploy.print_bench(found)
    if results is not None:
        deploy.save_rows(found, results)
        typer.echo(results)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"batch sizes are whole numbers separated by commas; got {text!r}.") from None


def _deploy() -> Any:
    try:
        from pyro_bbits.analysis import export as deploy
    except ModuleNotFoundError as error:
        hint = 'run pip install "pyro-bbits[deploy]".'
        raise ImportError(f"exporting graphs needs {error.name}; {hint}") from error
    return deploy


def _open(run: Path) -> "RunFolder":
    from pyro_bbits.analysis.run import RunFolder

    return RunFolder.open(run)


def _check_rule(rule: str) -> Any:
    if rule not in ("map", "threshold"):
        raise ValueError(f"rule must be 'map' or 'threshold'; got {rule!r}.")
    return rule


def _show(folder: "RunFolder", rule: str) -> None:
    from pyro_bbits.analysis.report import print_report

    print_report(folder, _check_rule(rule))


def main() -> None:
    """Run the command line; a user's error is one line and exit code 2, Ctrl-C is exit code 130, SIGTERM 143."""
    stop, code, failure = Stop(), None, None
    try:
        with stop, warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = app(sys.argv[1:] or ["--help"], standalone_mode=False, obj=stop, prog_name="bbits")
    except BaseException as error:
        failure = error
    # an import that is interrupted may fail with any error, and Typer may turn an interruption into an exit code
    if stop.received or code == stop.code or isinstance(failure, KeyboardInterrupt | typer.Abort):
        stop.tell(f", and not saved: {failure}" if isinstance(failure, OSError) else ".")
        sys.exit(stop.code)
    if failure is not None:
        _fail(failure)
        raise failure
    sys.exit(code if isinstance(code, int) else 0)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    if _first():
        typer.echo(f"warning: {' '.join(str(message).split())}", err=True)


def _fail(error: BaseException) -> None:
    """Stop with one line if the error is one for users."""
    if isinstance(error, ClickException):
        message = error.format_message()
    elif isinstance(error, ValueError | TypeError | OSError | ImportError):
        message = str(error)
    elif _lost_peer(error):
        message = "another process of the run ended; its own error says why. The last checkpoint is kept."
    else:
        return
    if _first():  # processes that torchrun started find the same errors, or tell each other
        typer.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(2)


def _lost_peer(error: BaseException) -> bool:
    """Whether this is what a process is told whose fellow is gone in the middle of an exchange."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return several and isinstance(error, RuntimeError) and re.search("gloo|nccl", str(error), re.IGNORECASE) is not None


if __name__ == "__main__":
    main()
