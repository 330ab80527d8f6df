"""The command line does what its help says; a user's error is one line and exit code 2."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyro_bbits import BitConfiguration, cli
from pyro_bbits.analysis import GatePosterior, experiment
from pyro_bbits.analysis.run import RunFolder
from pyro_bbits.inference import EmptyGuide, History, epochs
from pyro_bbits.models.registry import NETWORKS
from pyro_bbits.settings import RunSettings

FILES = {"bits.json", "data.json", "history.jsonl", "plots", "posterior.safetensors", "results.json", "settings.yaml"}
FILES |= {"weights.safetensors", "checkpoints"}
REPORT = ".verification.json"
PLOTS = ["gates", "bit_widths", "channels", "bops", "history"]
COMMANDS = ["train", "summary", "plot", "export", "bench"]
QUICK = ["--network", "tiny", "--epochs", "2", "--batch-size", "128", "--no-baseline", "--device", "cpu"]
QUICK += ["--weight-lr", "0.05", "--gate-lr", "0.3", "--init-logit", "2", "--mu", "0.002"]


class TinyNet(nn.Module):
    """A perceptron on averaged pixels of 8x8 images."""

    def __init__(self, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16 * in_channels, 12), nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc2(F.relu(self.fc1(F.avg_pool2d(x, 2).flatten(1))))
        return logits


class Result(NamedTuple):
    """What a command left behind."""

    code: object
    out: str
    err: str


def bbits(*arguments: object) -> Result:
    """Run the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["bbits", *map(str, arguments)])
        patch.setattr(sys, "excepthook", sys.__excepthook__)  # Typer sets its own
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    return Result(stopped.value.code, out.getvalue(), err.getvalue())


def words(text: str) -> str:
    """Text without the frames and line breaks of the console."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def check_error(result: Result, message: str) -> None:
    assert result.code == 2
    assert result.err.startswith("error: ") and result.err.endswith("\n") and result.err.count("\n") == 1, result.err
    assert re.search(message, result.err), result.err
    assert result.out == ""


@pytest.fixture(scope="module", autouse=True)
def _tiny_network() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, "tiny", TinyNet)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run of two epochs, and what `bbits train` said."""
    path = tmp_path_factory.mktemp("cli") / "runs" / "tiny"
    return path, bbits("train", *QUICK, "--seed", 1, "--output", path)


@pytest.fixture
def run(tmp_path: Path, trained: tuple[Path, Result]) -> Path:
    """A copy of the run's files, to be broken; without plots."""
    copy = tmp_path / "run"
    copy.mkdir()
    for file in trained[0].iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixture above draws them; other runs need not."""
    monkeypatch.setattr(RunFolder, "save_plots", lambda _: [])


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_an_example(command: str) -> None:
    result = bbits(command, "--help")
    assert (result.code, result.err) == (0, "")
    assert re.search(rf"Examples? .*bbits {command} ", words(result.out))


def test_help_names_all_commands() -> None:
    result = bbits("--help")
    assert (result.code, result.err) == (0, "")
    assert "A run is a folder" in words(result.out) and "bbits train --data digits" in words(result.out)
    for command in COMMANDS:
        assert re.search(rf"│ {command} ", result.out)


def test_no_command_shows_the_help() -> None:
    assert bbits() == bbits("--help")


def test_every_setting_has_an_option() -> None:
    text = bbits("train", "--help").out
    for name in RunSettings.model_fields:
        option = {"simplified": "simplified"}.get(name, name.replace("_", "-"))
        assert re.search(rf"--{option}\b", text), name


@pytest.mark.parametrize(
    ("option", "default"),
    [
        ("--data ", "digits"),
        ("--bits", ",".join(map(str, RunSettings().bits))),
        ("--mu", str(RunSettings().mu)),
        ("--cost", RunSettings().cost),
        ("--guide", RunSettings().guide),
        ("--init-logit", f"{RunSettings().init_logit:g}"),
        ("--rule", RunSettings().rule),
        ("--fine-tune-epochs", str(RunSettings().fine_tune_epochs)),
        ("--weight-lr", str(RunSettings().weight_lr)),
        ("--weight-decay", f"{RunSettings().weight_decay:g}"),
        ("--range-lr", str(RunSettings().range_lr)),
        ("--seed", str(RunSettings().seed)),
        ("--device", RunSettings().device),
    ],
)
def test_help_tells_the_default_that_holds(option: str, default: str) -> None:
    """The options have no defaults of their own: what is not given is left to the settings."""
    text = words(bbits("train", "--help").out)
    after = text[text.rindex(option) :]
    assert re.match(r"[^\[]*\[default: (.*?)\]", after).group(1) == default  # type: ignore[union-attr]


def test_help_names_every_network() -> None:
    text = words(bbits("train", "--help").out)
    told = re.search(r"--network.*?((?:[\w-]+, )+[\w-]+ or [\w-]+)\.", text).group(1)  # type: ignore[union-attr]
    assert set(re.split(", | or ", told)) == set(NETWORKS) - {"tiny"}


def test_version() -> None:
    assert bbits("--version") == (0, f"pyro-bbits {version('pyro-bbits')}\n", "")


def test_bbits_is_the_installed_command() -> None:
    (script,) = entry_points(group="console_scripts", name="bbits")
    assert script.load() is cli.main


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"], ["train"]], ids=" ".join)
def test_help_does_not_wait_for_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from pyro_bbits.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'pyro', 'arviz', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


# --- a run ------------------------------------------------------------------------------------------------------------


def test_train_fills_a_folder_and_reports(trained: tuple[Path, Result]) -> None:
    path, result = trained
    assert (result.code, result.err) == (0, "")
    assert {file.name for file in path.iterdir()} == FILES
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert lines[0].startswith("quantized 1/2 loss") and lines[1].startswith("quantized 2/2 loss")
    assert lines[2] == "Bit configuration (map rule)"
    assert lines[4] == "layer weight bits (p) input bits (p) channels kept MACs BOPs %"
    configuration = BitConfiguration.load(path / "bits.json")
    bits, kept = configuration.bits(), configuration.kept()
    for name, macs in (("fc1", "192.00"), ("fc2", "120.00")):
        (row,) = (line for line in lines if line.startswith(f"{name} "))
        assert re.match(
            rf"{name} {bits[f'{name}.weight']} \(\d\.\d\d\) {bits[f'{name}.input']} \(\d\.\d\d\) "
            rf"{kept[name]}/{12 if name == 'fc1' else '10[*]'} {macs} \d\.\d{{4}}$",
            row,
        ), row
    assert f"relative BOPs {configuration.relative_bops:.3f} %" in result.out
    assert re.search(r"test accuracy quantized +\d+\.\d\d %  \(\d+ samples, map rule\)", result.out)
    assert lines[-7:] == [
        str(path / name)
        for name in ("bits.json", "weights.safetensors", *(f"plots/{plot}.png" for plot in sorted(PLOTS)))
    ]
    settings = RunSettings.load(path / "settings.yaml")
    assert settings == RunSettings(
        network="tiny",
        epochs=2,
        batch_size=128,
        baseline=False,
        device="cpu",
        weight_lr=0.05,
        gate_lr=0.3,
        init_logit=2,
        mu=0.002,
        seed=1,
    )


@pytest.mark.usefixtures("no_plots")
def test_a_run_repeats_from_its_settings(tmp_path: Path, trained: tuple[Path, Result]) -> None:
    """And flags win over the file."""
    path, _ = trained
    assert bbits("train", "-q", "--config", path / "settings.yaml", "-o", tmp_path / "again").code == 0
    assert (tmp_path / "again" / "bits.json").read_bytes() == (path / "bits.json").read_bytes()
    other = bbits(
        *("train", "-q", "--config", path / "settings.yaml", "--no-prune", "--bits", "4,8"),
        *("--epochs", 1, "--full-kl", "-o", tmp_path / "other"),
    )
    assert other.code == 0
    settings = RunSettings.load(tmp_path / "other" / "settings.yaml")
    assert (settings.prune, settings.bits, settings.epochs, settings.seed) == (False, (4, 8), 1, 1)
    assert BitConfiguration.load(tmp_path / "other" / "bits.json").kept()["fc1"] == 12


@pytest.mark.usefixtures("no_plots")
def test_overwriting_a_run(run: Path) -> None:
    check_error(
        bbits("train", *QUICK, "-o", run), "holds a run already; .*pass --resume to go on with it, or --overwrite"
    )
    result = bbits("train", "--quiet", *QUICK, "--epochs", 1, "--rule", "threshold", "-o", run, "--overwrite")
    assert result.code == 0 and result.out.startswith("Bit configuration (threshold rule)"), "quiet: the report alone"
    assert RunSettings.load(run / "settings.yaml").epochs == len(History.load(run / "history.jsonl")) == 1


def test_summary_repeats_the_report(trained: tuple[Path, Result]) -> None:
    path, train = trained
    result = bbits("summary", path)
    assert (result.code, result.err) == (0, "")
    assert train.out.endswith(result.out) and result.out.startswith("Bit configuration (map rule)")
    assert bbits("summary", path, "--rule", "map") == result
    assert "Bit configuration (threshold rule)" in bbits("summary", path, "--rule", "threshold").out


def test_plot_writes_figures_and_names_them(tmp_path: Path, run: Path) -> None:
    result = bbits("plot", run, "--format", "svg", "--output", tmp_path / "figures")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines() == [str(tmp_path / "figures" / f"{name}.svg") for name in PLOTS]
    assert all(Path(line).stat().st_size > 1000 for line in result.out.splitlines())
    assert not (run / "plots").exists()


def test_export_writes_a_verified_graph_and_says_what_it_found(run: Path, tmp_path: Path) -> None:
    result = bbits("export", run, "--output", tmp_path / "deploy", "--format", "onnx,packed")
    assert (result.code, result.err) == (0, "")
    names = {f"network.{name}{ending}" for name in ("onnx", "packed.safetensors") for ending in ("", REPORT)}
    assert {path.name for path in (tmp_path / "deploy").iterdir()} == names
    assert set(result.out.splitlines()[-4:]) == {str(tmp_path / "deploy" / name) for name in names}
    figures = json.loads((tmp_path / "deploy" / "network.onnx.verification.json").read_text())
    assert figures["exact"]["accuracy"] == pytest.approx(
        json.loads((run / "results.json").read_text())["test_accuracy"]
    )
    assert f"agrees on {100 * figures['exact']['top1']:.2f} % of {figures['exact']['rows']} rows" in result.out


def test_export_verifies_on_as_many_rows_as_it_is_told(run: Path, tmp_path: Path) -> None:
    result = bbits("export", run, "--output", tmp_path / "deploy", "--format", "onnx,packed", "--rows", "7")
    assert (result.code, result.err) == (0, "")
    assert "run on up to 7 test rows" in result.out
    for name in ("network.onnx", "network.packed.safetensors"):
        figures = json.loads((tmp_path / "deploy" / f"{name}{REPORT}").read_text())
        assert {part["rows"] for part in figures.values() if isinstance(part, dict) and "rows" in part} == {7}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "onxx"], "formats are onnx, qonnx, aimet, packed, bits; got 'onxx'"),
        (["--format", ","], "formats are onnx"),
        (["--format", "onnx", "--optimize-for", "both"], "'speed' or 'size'; got 'both'"),
        (["--format", "packed", "--channel-multiple", "0"], "channel_multiple must be at least 1; got 0"),
        (["--channel-multiple", "8"], "keeps zeros in files that are run; --reopen changes bits as well"),
        (["--format", "packed", "--reopen"], "it needs a channel_multiple above 1, e.g. 8"),
        (["--format", "packed", "--channel-multiple", "8", "--mask"], "without removal all are kept"),
        (["--optimize-for", "size"], "--optimize-for and --opset are for the format onnx; got --format bits"),
        (["--format", "packed", "--opset", "21"], "are for the format onnx; got --format packed"),
        (["--mask"], "are for files that are run; bits is the configuration"),
        (["--format", "packed", "--rows", "0"], "at least 1 row; got rows=0"),
        (["--format", "onnx", "--data-path", "elsewhere"], "is not read from a folder; got path=elsewhere"),
    ],
)
def test_export_refuses_what_it_does_not_know(run: Path, tmp_path: Path, options: list[str], message: str) -> None:
    check_error(bbits("export", run, "--output", tmp_path / "deploy", *options), message)
    assert not (tmp_path / "deploy").exists()


@pytest.mark.slow
def test_bench_times_the_files_of_a_run_side_by_side(run: Path, tmp_path: Path) -> None:
    rows_file = tmp_path / "results.jsonl"
    for _ in range(2):
        timing = ["--batches", "1,4", "--seconds", "0.1"]
        result = bbits("bench", run, *timing, "--format", "packed,qonnx,aimet", "--results", rows_file)
        assert (result.code, result.err) == (0, "")
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    assert len({(row["format"], row["batch"]) for row in rows}) * 2 == len(rows)
    for row in rows:
        timed = row["format"] not in ("packed", "qonnx", "aimet")
        assert row["network"] == "tiny" and (row["latency_ms"] > 0 if timed else row["latency_ms"] is None)
        assert (row["speedup_vs_fp32_onnx"], row["size_ratio"]) == (1, 1) or row["format"] != "fp32"
        assert row["agreement_exact"] == 1 or "fp32" in row["format"]
    check_error(bbits("bench", run, "--batches", "one"), "whole numbers separated by commas; got 'one'")
    check_error(bbits("bench", run, "--threads", "0"), "must be at least 1; got threads=0")


def test_bench_refuses_what_it_cannot_do_before_it_starts(run: Path, tmp_path: Path) -> None:
    check_error(bbits("bench", run, "--batches", "4,4"), r"batch sizes must differ; got batches=\[4, 4\]")
    check_error(bbits("bench", run, "--seconds", "-1"), "seconds must be a finite number above 0; got -1.0")
    check_error(bbits("bench", run, "--results", tmp_path), "is a folder")
    check_error(bbits("bench", run, "--format", "packed,tflite"), "of qonnx, aimet, packed; got 'tflite'")


@pytest.mark.parametrize("rule", ["map", "threshold", None])
def test_export_writes_what_a_float_network_needs(tmp_path: Path, run: Path, rule: str | None) -> None:
    result = bbits("export", run, "-o", tmp_path / "deploy", *(["--rule", rule] if rule else []))
    files = [tmp_path / "deploy" / name for name in ("bits.json", "weights.safetensors")]
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines() == list(map(str, files))
    net = TinyNet()
    net.load_state_dict(load_file(files[1]))
    configuration = BitConfiguration.load(files[0])
    posterior = GatePosterior.load(run / "posterior.safetensors")
    assert configuration == posterior.configuration(rule or "map")  # type: ignore[arg-type]
    assert configuration.apply(net)(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_the_rule_of_the_run_is_the_default(run: Path, tmp_path: Path) -> None:
    (run / "settings.yaml").write_text((run / "settings.yaml").read_text().replace("rule: map", "rule: threshold"))
    assert "(threshold rule)" in bbits("summary", run).out
    bbits("export", run, "-o", tmp_path / "deploy")
    expected = GatePosterior.load(run / "posterior.safetensors").configuration("threshold")
    assert BitConfiguration.load(tmp_path / "deploy" / "bits.json") == expected


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["--frobnicate"], "No such option:? '?--frobnicate"),
        (["train"], "Missing option '--output'"),
        (["export", "run"], "Missing option '--output'"),
        (["summary"], "Missing argument 'RUN'"),
        (["summary", "a", "b"], r"unexpected extra argument.*\(b\)"),
        (["train", "--output"], "Option '--output' requires an argument"),
        (["train", "-o", "run", "--colour", "red"], "No such option:? '?--colour"),
        (["train", "-o", "run", "--mu", "much"], "Invalid value for '--mu': .*valid"),
        (["train", "-o", "run", "--epochs", "1.5"], "Invalid value for '--epochs': .*valid"),
        (["train", "-o", "run", "--mu", "-1"], r"mu: .*greater than or equal to 0; got -1\.0"),
        (["train", "-o", "run", "--mu", "nan"], "mu: .*finite number; got nan"),
        (["train", "-o", "run", "--bits", "2,3"], "bits: each bit width must be a multiple of the one before"),
        (["train", "-o", "run", "--bits", "two"], "bits.0: .*got 'two'"),
        (["train", "-o", "run", "--epochs", "0"], "epochs: .*got 0"),
        (
            ["train", "-o", "run", "--data", "letters"],
            "no data set is called 'letters', and there is no such file or folder",
        ),
        (["train", "-o", "run", "--guide", "normal"], "guide: .*got 'normal'"),
        (["train", "-o", "run", "--data-path", "x"], "the digits data ship with scikit-learn and take no data_path"),
        (["train", "-o", "run", "--config", "none.yaml"], r"the settings none\.yaml cannot be read"),
        (["train", "-o", "run", "--network", "alexnet"], "no network is called 'alexnet'; choose one of digits-net"),
        (
            ["train", "-o", "run", "--pin", "no=4", "--pin", "fc2.weight=8"],
            "pattern 'no' matches no tensor; there are ",
        ),
        (["train", "-o", "run", "--network", "lenet5"], "LeNet5 needs images of at least 16x16 pixels"),
        (["train", "-o", "run", "--pretrained", "none.st"], r"the weights none\.st cannot be read"),
        (["train", "-o", "run", "--data", "mnist", "--data-path", "none"], "there is no folder none"),
        (["summary", "run"], r"run holds no run \(no settings\.yaml\); give the --output of `bbits train`"),
        (["plot", "run"], "run holds no run"),
        (["export", "run", "-o", "deploy"], "run holds no run"),
        (["plot", "run", "--format", "bmp"], "format must be png, svg or pdf; got 'bmp'"),
    ],
    ids=" ".join,
)
def test_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    check_error(bbits(*arguments), message)
    assert list(tmp_path.iterdir()) == [], "nothing was made"


def test_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_error(bbits("train", "-o", tmp_path / "run", "--device", "cuda"), "PyTorch sees no GPU; use 'auto' or 'cpu'")
    assert not (tmp_path / "run").exists()


def test_places_that_cannot_hold_a_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    check_error(bbits("train", *QUICK, "-o", tmp_path), "is not empty and holds no run; choose another --output")
    check_error(bbits("train", *QUICK, "-o", tmp_path, "--overwrite"), "is not empty and holds no run")
    check_error(bbits("train", *QUICK, "-o", tmp_path / "thesis.tex"), r"thesis\.tex is not a folder")
    check_error(bbits("train", "-q", *QUICK, "-o", tmp_path / "thesis.tex" / "run"), r"thesis\.tex is not a folder")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_pretrained_weights_that_do_not_fit(tmp_path: Path) -> None:
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "other.st")
    result = bbits("train", *QUICK, "--pretrained", tmp_path / "other.st", "-o", tmp_path / "run")
    check_error(result, r"other\.st does not fit TinyNet: .*fc1\.weight")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rule", ["mean", ""])
def test_unknown_rules(run: Path, tmp_path: Path, rule: str) -> None:
    for command in (["summary", run], ["export", run, "-o", tmp_path / "deploy"]):
        result = bbits(*command, "--rule", rule)
        if rule:
            check_error(result, "rule must be 'map' or 'threshold'; got 'mean'")
            assert not (tmp_path / "deploy").exists()
        else:
            assert result.code == 0, "an empty rule is none"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("settings.yaml", "mu: [", r"settings\.yaml is not valid YAML"),
        ("settings.yaml", "mu: -1", "mu: .*got -1"),
        ("posterior.safetensors", "broken", r"posterior\.safetensors is not a saved gate posterior"),
        ("posterior.safetensors", None, "has no posterior: it ended before a quantized network was trained"),
        ("results.json", "{", r"results\.json cannot be read"),
    ],
)
def test_broken_runs_are_named(run: Path, file: str, content: str | None, message: str) -> None:
    if content is None:
        (run / file).unlink()
    else:
        (run / file).write_text(content)
    check_error(bbits("summary", run), message)


@pytest.mark.parametrize(
    ("file", "message"), [("weights.safetensors", "the weights .* cannot be read"), ("posterior.safetensors", "saved")]
)
def test_broken_runs_are_not_exported(run: Path, tmp_path: Path, file: str, message: str) -> None:
    (run / file).write_bytes(b"broken")
    check_error(bbits("export", run, "-o", tmp_path / "deploy"), message)


def test_a_broken_history_is_named(run: Path) -> None:
    (run / "history.jsonl").write_text("broken")
    check_error(bbits("plot", run), r"history\.jsonl is not a training history")


def test_a_fault_of_ours_is_not_hidden(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("pyro_bbits.analysis.report.print_report", fail)
    monkeypatch.setattr(sys, "argv", ["bbits", "summary", str(run)])
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    with pytest.raises(ZeroDivisionError):
        cli.main()


# --- interruptions ----------------------------------------------------------------------------------------------------


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("options", "known"),
    [([], "what was trained so far"), (["--baseline"], "its settings, and nothing trained yet")],
)
def test_interrupted_training_says_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], known: str
) -> None:
    monkeypatch.setattr(experiment, "fit", interrupt)
    result = bbits("train", *QUICK, *options, "-o", tmp_path / "run")
    assert (result.code, result.out) == (130, "")
    assert result.err.strip() == f"interrupted; {tmp_path / 'run'} holds {known}."
    summary = bbits("summary", tmp_path / "run")
    if options:
        check_error(summary, "has no posterior")
    else:
        assert summary.code == 0 and "this run did not come to its end" in summary.out


def test_other_commands_stop_without_a_word_about_training(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_bbits.analysis.run.plot_history", interrupt)
    result = bbits("plot", run)
    assert (result.code, result.out, result.err.strip()) == (130, "", "interrupted.")


def start(*arguments: object) -> subprocess.Popen[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "pyro_bbits", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})


def wait_for(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


LONG = ["train", "--epochs", "500", "--no-baseline", "--threads", "1", "--output"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_leaves_a_usable_run(tmp_path: Path, number: int, code: int, word: str) -> None:
    path = tmp_path / "run"
    process = start(*LONG, path)
    try:
        wait_for(process, lambda: len(list(path.glob("checkpoints/quantized/epoch-*"))) > 0)
        process.send_signal(number)
        process.send_signal(number)  # torchrun and an impatient user send more than one
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    again = f"`bbits train --resume --output {path}` goes on"
    assert err.strip() == f"{word}; {path} holds what was trained so far; {again}."
    assert "quantized" in out and "Traceback" not in out
    result = bbits("summary", path)
    assert result.code == 0 and "this run did not come to its end" in result.out
    assert bbits("plot", path).code == bbits("export", path, "-o", tmp_path / "deploy").code == 0
    assert len(History.load(path / "history.jsonl")) >= 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_first_seconds_is_one_line_too(tmp_path: Path, number: int) -> None:
    """While PyTorch is imported, where an interruption may come out as any error."""
    script = (
        "import builtins, os, sys\n"
        "from pyro_bbits.cli import main\n"
        "number, original = int(sys.argv.pop(1)), builtins.__import__\n"
        "def stop(name, *rest, **more):\n"
        "    if name == 'torch':\n"
        "        try: os.kill(os.getpid(), number)\n"
        "        except KeyboardInterrupt: raise ImportError('half a library')\n"
        "    return original(name, *rest, **more)\n"
        "builtins.__import__ = stop\n"
        "main()\n"
    )
    command = [sys.executable, "-c", script, str(int(number)), *LONG, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    word, code = ("interrupted", 130) if number == signal.SIGINT else ("terminated", 143)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"{word}.\n")
    assert not (tmp_path / "run").exists()


# --- going on, and replacing ------------------------------------------------------------------------------------------


def without_time(path: Path) -> dict[str, object]:
    return {key: value for key, value in json.loads((path / "results.json").read_text()).items() if key != "seconds"}


@pytest.mark.usefixtures("no_plots")
@pytest.mark.filterwarnings("ignore:the held-out accuracy of the quantized network is")
@pytest.mark.parametrize("stage", ["full precision", "quantized", "fine-tuning"])
def test_a_resumed_run_is_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Stopped in each of its stages, without a chance to save; what was finished is not trained again."""
    options = ["train", "-q", *QUICK, "--baseline", "--fine-tune-epochs", 2, "-o"]
    assert bbits(*options, tmp_path / "whole").code == 0
    steps: list[str] = []
    original = epochs.Epochs.epoch

    def epoch(self: Any, number: int, report: Any) -> float:
        now = ("full precision", "quantized", "fine-tuning")[(not isinstance(self.guide, EmptyGuide)) + fixed(self)]
        if stop and (now, number) == (stage, 1):
            raise Killed
        steps.append(now)
        return original(self, number, report)

    def fixed(self: Any) -> bool:
        strength = self.guide.prior.strength if hasattr(self.guide, "prior") else torch.ones(1)
        return bool((strength.isinf() | (strength == 0)).all())

    monkeypatch.setattr(epochs.Epochs, "epoch", epoch)
    stop = True
    with pytest.raises(Killed):
        bbits(*options, tmp_path / "run")
    stop = False
    result = bbits("train", "--resume", "-q", "-o", tmp_path / "run")
    assert result.code == 0, result.err
    assert sorted(steps) == sorted(["full precision", "quantized", "fine-tuning"] * 2), "every epoch once"
    assert without_time(tmp_path / "run") == without_time(tmp_path / "whole")
    timeless = [
        [replace(record, seconds=0.0) for record in History.load(tmp_path / name / "history.jsonl")]
        for name in ("run", "whole")
    ]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 4
    again = bbits("train", "--resume", "-q", "-o", tmp_path / "run")
    assert again == result and len(steps) == 6, "a finished run is shown"


class Killed(BaseException):
    pass


@pytest.mark.usefixtures("no_plots")
def test_a_run_killed_while_it_saved_is_told_apart_and_mended(tmp_path: Path) -> None:
    """The weights are those of this moment, the posterior beside them is older, and a file is half written."""
    path = tmp_path / "run"
    assert bbits("train", "-q", *QUICK, "-o", path).code == 0
    whole = {file.name: file.read_bytes() for file in path.iterdir() if file.suffix != ".jsonl" and file.is_file()}
    tensors = load_file(path / "weights.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, path / "weights.safetensors")
    (path / ".partial-bits.json.x").write_text("{")
    (path / "results.json").unlink()
    check_error(bbits("summary", path), r"weights\.safetensors does not belong to .*--resume` writes")
    assert bbits("train", "-q", "--resume", "-o", path).code == 0
    whole.pop("results.json")
    assert all((path / name).read_bytes() == content for name, content in whole.items())
    assert {file.name for file in path.iterdir()} == FILES - {"plots"}
    (path / "posterior.safetensors").unlink()
    check_error(bbits("summary", path), "has no posterior: .*--resume --output .* goes on")


@pytest.mark.usefixtures("no_plots")
def test_a_disk_that_is_full_when_interrupted_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object) -> None:
        raise OSError("the disk is full")

    def stop(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(RunFolder, "save_network", fill)
    monkeypatch.setattr(experiment, "fit", stop)
    assert bbits("train", *QUICK, "-o", tmp_path / "run") == (143, "", "terminated, and not saved: the disk is full\n")


@pytest.mark.usefixtures("no_plots")
def test_resuming_begins_a_run_where_there_is_none(tmp_path: Path) -> None:
    assert bbits("train", "-q", *QUICK, "--resume", "-o", tmp_path / "run").code == 0
    check_error(
        bbits("train", "--resume", "--mu", 0.5, "-o", tmp_path / "run"), r"started with mu 0\.002, .*; got 0\.5"
    )
    check_error(bbits("train", "--resume", "--overwrite", "-o", tmp_path / "run"), "give one of them")
    check_error(bbits("train", "--checkpoint-every", -1, "-o", tmp_path / "run"), "at least 0; got -1")


@pytest.mark.usefixtures("no_plots")
def test_the_old_run_stays_until_the_new_one_is_complete(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "fit", interrupt)
        result = bbits("train", *QUICK, "--overwrite", "--seed", 9, "-o", run)
    new = run.with_name("run.new")
    assert result.code == 130 and f"interrupted; {new} holds what was trained so far" in result.err
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before
    assert bbits("train", "-q", *QUICK, "--overwrite", "--seed", 9, "--checkpoint-every", 0, "-o", run).code == 0
    assert RunSettings.load(run / "settings.yaml").seed == 9 and not new.exists()
    assert {file.name for file in run.iterdir()} == FILES - {"checkpoints", "plots"}


def test_a_warning_is_one_line(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    def warn(*_: object) -> None:
        warnings.warn("look\nhere", stacklevel=2)

    monkeypatch.setattr("pyro_bbits.analysis.report.print_report", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert bbits("summary", run) == (0, "", "warning: look here\n")


@pytest.mark.slow
def test_torchrun_trains_one_run(tmp_path: Path) -> None:
    """Two processes, one report and one folder; it is replaced, gone on with and refused as by one process."""

    def torchrun(*arguments: object) -> Result:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "pyro_bbits"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command += map(str, arguments)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
        return Result(done.returncode, done.stdout, done.stderr)

    options = ["train", "--epochs", 2, "--batch-size", 256, "--fine-tune-epochs", 1, "--no-baseline", "-o"]
    for more in ([], ["--overwrite", "--seed", 5], ["--resume", "--seed", 5]):
        result = torchrun(*options, tmp_path / "run", *more)
        assert result.code == 0, result.err
        assert result.out.count("Bit configuration (map rule)") == 1
        assert result.out.count("quantized    2/2") == ("--resume" not in more)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
        assert {file.name for file in (tmp_path / "run").iterdir()} == FILES
    refused = torchrun(*options, tmp_path / "run")
    assert refused.code != 0 and refused.err.count("error: ") == 1
    assert re.search("^error: .*holds a run already", refused.err, re.MULTILINE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_capture_that_is_demanded_without_a_gpu_leaves_nothing(tmp_path: Path) -> None:
    check_error(bbits("train", *QUICK, "--capture", "always", "-o", tmp_path / "run"), "--capture always needs a GPU")
    assert not (tmp_path / "run").exists()
