"""Run experiments of the paper, one recipe on one data set with one seed or several.

    python -m benchmarks.paper.run --recipe parity --data mnist --data-path data/mnist
    python -m benchmarks.paper.run --recipe parity --data cifar10 --data-path data/cifar10 --mu 0.1 --seeds 0 1 --jobs 2
    python -m benchmarks.paper.run --recipe best --data mnist --data-path data/mnist --share 0.1 --set bops=0.3
    python -m benchmarks.paper.run --recipe lsq-w4a4 pact-w4a4 l0 --data mnist --data-path data/mnist
    python -m benchmarks.paper.run --list

A tenth of the training rows is held out, and evaluated after every epoch; `--all-rows` trains on them as well, for a
final run whose settings are chosen. The test split is used once, at the end. A run that was cut off goes on when the
same command is given again; one that has come to its end is not run again. The folder of a trained gated network is
one that `bbits summary`, `plot`, `export` and `bench` take, the last two with `--data-path` where the data lay in an
`.npz`; only this command goes on with it.
"""

import argparse
import ast
import gc
import json
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.machine import command_line, hardware, pick_device, versions
from benchmarks.paper.data import joined, load, made
from benchmarks.paper.experiment import Experiment, find_baselines
from benchmarks.paper.recipes import DATA, RECIPES, PaperRecipe, make_recipe, overridden, shortened
from benchmarks.paper.results import RESULTS, Result, append_results
from pyro_bbits.analysis.run import RunFolder
from pyro_bbits.data import DataSplits, ImageFolderData
from pyro_bbits.files import write_text_atomically
from pyro_bbits.inference import Checkpoint, Checkpoints
from pyro_bbits.models import NETWORKS
from pyro_bbits.settings import RunSettings

MODULE = "benchmarks.paper.run"
ROW = "row.json"
CHOICES: dict[str, Any] = {"auto": "auto", "always": True, "never": False}
QUICK = {"batch": 16, "epochs": 1}

APART: dict[str, str | None] = {"--recipe": "+", "--seeds": "+", "--jobs": None}
PLACES: dict[str, str | None] = {"--output": None, "--results": None}
SETTINGS = (
    *("mu", "simplified", "guide", "prune", "rule", "augment", "epochs"),
    *("weight_lr", "weight_decay", "gate_lr", "range_lr"),
)
"""Settings of the command line of the library that recipes have under the same name."""

FIGURES = ("network", "seed", "epochs", "test_accuracy", "test_nll", "test_samples", "relative_bops", "bits", "kept")
"""Figures of its runs that results have under the same name."""

Data = DataSplits | ImageFolderData

load_once = lru_cache(maxsize=1)(load)


def make_parser() -> argparse.ArgumentParser:
    """All arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", nargs="+", default=["parity"], help="names of recipes; --list names them")
    parser.add_argument("--data", choices=tuple(DATA), default="mnist")
    parser.add_argument("--data-path", type=Path, help="folder with parquet files, or .npz (default: the hub)")
    parser.add_argument("--network", choices=tuple(NETWORKS), help="default: the paper's for these data")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side on the one device")
    parser.add_argument("--mu", type=float, help="strength of the prior (default: the recipe's)")
    parser.add_argument("--epochs", type=int, help="default: the recipe's, times the share")
    parser.add_argument("--share", type=float, default=1.0, help="share of all epochs, gates moving as far")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="other values of the recipe")
    parser.add_argument("--all-rows", action="store_true", help="train on the validation rows as well")
    parser.add_argument("--pretrained", type=Path, help="weights of a float network, not to train it here")
    parser.add_argument("--image-size", type=int, default=224, help="of imagenet")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("float32", "tf32", "bf16"), help="default: PyTorch's settings")
    parser.add_argument("--capture", choices=tuple(CHOICES), default="auto")
    parser.add_argument("--compile", choices=tuple(CHOICES), default="auto")
    parser.add_argument("--output", type=Path, default=Path("runs/paper"), help="folder of all runs")
    parser.add_argument(
        "--results", type=Path, help=f"JSON lines to append to (default: {RESULTS.name}; none if quick)"
    )
    parser.add_argument("--quick", action="store_true", help="made data, one epoch: shows that it runs, no results")
    parser.add_argument("--list", action="store_true", help="name the recipes, and stop")
    return parser


def settings_of(arguments: Any) -> dict[str, Any]:
    """What `--set` and `--mu` say, by name."""
    found: dict[str, Any] = {}
    for text in arguments.set:
        name, sign, value = text.partition("=")
        if not sign:
            raise ValueError(f"--set takes NAME=VALUE; got {text!r}.")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found | ({} if arguments.mu is None else {"mu": arguments.mu})


def recipe_of(arguments: Any, name: str) -> PaperRecipe:
    """The recipe of this name, as the arguments ask for it."""
    recipe = overridden(make_recipe(name, arguments.data, find_baselines()), settings_of(arguments))
    recipe = shortened(recipe, arguments.share)
    if arguments.quick:
        parts = {stage: min(1, getattr(recipe, stage)) for stage in ("float_epochs", "fine_tune")}
        recipe = replace(recipe, **QUICK | parts)
    return recipe if arguments.epochs is None else replace(recipe, epochs=arguments.epochs)


def network_of(arguments: Any) -> str:
    """The network that is asked for, or the paper's for these data."""
    return str(arguments.network or DATA[arguments.data].network)


def folder_of(arguments: Any, name: str, seed: int) -> Path:
    """A folder for this run alone: what differs from the recipe is in its name."""
    parts = {"network": arguments.network, "epochs": arguments.epochs} | settings_of(arguments)
    parts |= {"share": None if arguments.share == 1 else arguments.share, "precision": arguments.precision}
    parts |= {"all": arguments.all_rows or None, "quick": arguments.quick or None}
    named = [f"{part}={value}" for part, value in sorted(parts.items()) if value is not None]
    folder = "-".join([name, *named, f"seed{seed}"])
    return Path(arguments.output, arguments.data, re.sub(r"[^\w.=+-]+", "_", folder))


def describe(folder: RunFolder, arguments: Any, recipe: PaperRecipe, result: Result) -> None:
    """Write settings and figures by which the command line of the library finds network and data of this folder.

    Prices of BOPs, distillation and schedules are no settings of that command line, which cannot go on with the run.
    """
    pictures = arguments.data == "imagenet"
    parquet = arguments.data_path is not None and arguments.data_path.suffix != ".npz" and not pictures
    logits = set(recipe.initial_logits.values())
    settings = {name: getattr(recipe, name) for name in SETTINGS}
    settings |= {
        "data": str(arguments.data_path) if pictures else arguments.data,
        "data_path": arguments.data_path if parquet else None,
        "image_size": arguments.image_size if pictures else None,
        "network": result.network,
        "bits": recipe.ladder,
        "init_logit": logits.pop() if len(logits) == 1 else None,
        "fine_tune_epochs": recipe.fine_tune,
        "batch_size": recipe.batch,
        "baseline": False,
        "seed": result.seed,
    }
    RunSettings.make(settings).save(folder.settings_file)
    results = {name: getattr(result, name) for name in (*FIGURES, "versions")}
    results |= {"data": result.dataset, "rule": recipe.rule, "files": folder.digests()}
    folder.save_results(results)


def data_of(arguments: Any, seed: int) -> Data:
    """The data of a run: made ones if it shall be quick, and without validation rows if all are trained on."""
    if arguments.quick:
        data: Data = made(arguments.data)
    else:
        data = load_once(arguments.data, arguments.data_path, seed, arguments.image_size)
    return joined(data) if arguments.all_rows else data


def experiment_of(
    arguments: Any, recipe: PaperRecipe, data: Data, seed: int, folder: Path, device: torch.device
) -> Experiment:
    """The recipe on data, ready to run."""
    options: dict[str, Any] = {option: CHOICES[getattr(arguments, option)] for option in ("capture", "compile")}
    return Experiment(
        recipe,
        data,
        network_of(arguments),
        seed=seed,
        folder=folder,
        device=device,
        options=options | {"precision": arguments.precision, "progress": sys.stderr.isatty()},
        pretrained=arguments.pretrained,
        choose=not arguments.all_rows,
    )


def seconds_before(folder: Path) -> float:
    """What the stages of a run that was cut off have taken up to their last checkpoints."""
    stages = (Checkpoints(stage).paths() for stage in RunFolder(folder).checkpoints.glob("*"))
    return sum(Checkpoint.load_facts(paths[-1]).history[-1].seconds for paths in stages if paths)


def run_one(arguments: Any, name: str, seed: int, command: str) -> Result:
    """Run a recipe with one seed, and record it; one that is finished is read."""
    folder = folder_of(arguments, name, seed)
    if (folder / ROW).exists():
        print(f"{folder} is finished already")
        return Result(**json.loads((folder / ROW).read_text(encoding="utf-8")))
    recipe, device = recipe_of(arguments, name), pick_device(arguments.device)
    data, started = data_of(arguments, seed), time.perf_counter() - seconds_before(folder)
    outcome = experiment_of(arguments, recipe, data, seed, folder, device).run()
    result = Result(
        dataset=arguments.data,
        network=network_of(arguments),
        method=recipe.method,
        recipe=name,
        seed=seed,
        epochs=recipe.epochs,
        seconds=round(time.perf_counter() - started, 1),
        hardware=hardware(device),
        command=command,
        date=datetime.now(UTC).date().isoformat(),
        mu=recipe.mu if recipe.kind == "gated" else None,
        settings=settings_of(arguments),
        share=arguments.share,
        all_rows=arguments.all_rows,
        versions=versions(),
        **outcome.entries(),
    )
    if recipe.kind == "gated":
        describe(RunFolder(folder), arguments, recipe, result)
    write_text_atomically(folder / ROW, json.dumps(asdict(result)) + "\n")
    results = arguments.results or (None if arguments.quick else RESULTS)
    if results is not None:
        append_results(results, [result])
    return result


def common_arguments(argv: Sequence[str], left_out: Mapping[str, str | None] = APART) -> list[str]:
    """The arguments but for those left out: by default, for what tells runs of one command apart."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option, count in left_out.items():
        parser.add_argument(option, nargs=count)
    return parser.parse_known_args(argv)[1]


def command_of(argv: Sequence[str], name: str, seed: int) -> str:
    """What repeats one run alone, wherever its files shall go."""
    return command_line(MODULE, ["--recipe", name, *common_arguments(argv, APART | PLACES), "--seeds", str(seed)])


def run_side_by_side(argv: Sequence[str], runs: Sequence[tuple[str, int]], jobs: int) -> int:
    """A process for each run, so many at a time; returns how many failed."""

    def start(run: tuple[str, int]) -> int:
        name, seed = run
        command = [sys.executable, "-m", MODULE, "--recipe", name, *common_arguments(argv), "--seeds", str(seed)]
        return subprocess.run(command, check=False).returncode

    with ThreadPoolExecutor(jobs) as pool:
        return sum(code != 0 for code in pool.map(start, runs))


def run_in_turn(arguments: Any, argv: Sequence[str], runs: Sequence[tuple[str, int]]) -> int:
    """One run after the other; one that fails does not keep the next from its turn. Returns how many failed."""
    failed = 0
    for name, seed in runs:
        try:
            result = run_one(arguments, name, seed, command_of(argv, name, seed))
        except Exception:
            if len(runs) == 1:
                raise
            traceback.print_exc()
            failed += 1
            continue
        finally:
            gc.collect()  # what a captured network has held of the device
        print(
            f"{result.dataset}, {result.label}, seed {seed}: test accuracy {result.test_accuracy:.2f} %, "
            f"relative BOPs {result.relative_bops:.3f} %, {result.seconds:.0f} s on {result.hardware}",
            flush=True,
        )
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for."""
    given = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser()
    arguments = parser.parse_args(given)
    if arguments.list:
        print("\n".join([*RECIPES, *(f"{name} (baseline)" for name in find_baselines() if name not in RECIPES)]))
        return 0
    try:
        for name in arguments.recipe:
            recipe_of(arguments, name)  # what is wrong with it is said before anything is loaded
    except ValueError as error:
        parser.error(str(error))
    runs = [(name, seed) for seed in arguments.seeds for name in arguments.recipe]  # a seed's data are read once
    if arguments.jobs > 1 and len(runs) > 1:
        return run_side_by_side(given, runs, arguments.jobs)
    with warnings.catch_warnings():
        if arguments.quick:
            warnings.simplefilter("ignore")
        return run_in_turn(arguments, given, runs)


if __name__ == "__main__":
    raise SystemExit(main())
