"""Recipes say what the paper says, each of them trains, and its line comes back as it was."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.paper import experiment
from benchmarks.paper.recipes import DATA, RECIPES, PaperRecipe, make_recipe, overridden, shortened
from benchmarks.paper.results import read_results
from benchmarks.paper.run import (
    command_of,
    common_arguments,
    folder_of,
    main,
    make_parser,
    recipe_of,
    run_one,
    seconds_before,
    settings_of,
)
from pyro_bbits.analysis.export import Deployment
from pyro_bbits.analysis.report import print_report
from pyro_bbits.analysis.run import RunFolder

SHORT = ["--data", "digits", "--quick", "--device", "cpu", "--compile", "never"]


def recipe(name: str, data: str = "mnist") -> PaperRecipe:
    return make_recipe(name, data, {})


@pytest.mark.parametrize(
    ("data", "network", "epochs", "mu", "ladder"),
    [("mnist", "lenet5", 100, 0.1, (2, 4, 8)), ("cifar10", "vgg7", 300, 0.01, (2, 4, 8, 16, 32))],
)
def test_parity_is_the_paper_s_recipe(data: str, network: str, epochs: int, mu: float, ladder: tuple[int, ...]) -> None:
    parity = recipe("parity", data)
    assert DATA[data].network == network
    assert (parity.epochs, parity.batch, parity.mu, parity.ladder) == (epochs, 128, mu, ladder)
    assert (parity.simplified, parity.rule, parity.prune, parity.pins, parity.bops) == (True, "threshold", True, (), 0)
    assert (parity.weight_lr, parity.gate_lr, parity.range_lr) == (1e-3, 1e-3, 1e-3)
    assert (parity.weight_optimizer, parity.schedule, parity.guide) == ("adam", "tail", "hard-concrete")
    assert parity.temperature == pytest.approx(2 / 3) and parity.examples == 2 and parity.ranges == "max"
    assert set(parity.initial_logits.values()) == {6.0}
    assert {parity.logits[bits] for bits in {16, 32} - set(ladder)} <= {-6.0}
    assert (parity.float_epochs, parity.fine_tune, parity.distill, parity.warmup) == (0, 0, 0, 0)


def test_parity_on_imagenet_is_the_paper_s_recipe() -> None:
    parity = recipe("parity", "imagenet")
    assert (parity.epochs, parity.batch, parity.ladder, parity.fine_tune) == (30, 384, (2, 4, 8, 16), 10)
    optimizers = parity.optimizers
    assert (optimizers.weight_optimizer, optimizers.weight_lr, optimizers.gate_lr) == ("sgd", 3e-3, 1e-3)
    assert (optimizers.range_lr, optimizers.anneal_gates, optimizers.anneal_ranges) == (1e-3, True, True)
    assert [optimizers.factor(epoch, 30, 0.0) for epoch in (9, 10, 20)] == pytest.approx([1, 0.1, 0.01])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the held-out accuracy", "ignore:channel gates are undecided")
@pytest.mark.parametrize("network", ["resnet18", "mobilenetv2"])
def test_pictures_on_disk_train(network: str, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for number in range(24):
        place = tmp_path / "pictures" / ("train" if number < 16 else "val") / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (40, 40), (10 * number, 80, 255 * (number % 2))).save(place / f"{number}.png")
    given = [
        "--recipe",
        "parity",
        "--data",
        "imagenet",
        "--data-path",
        str(tmp_path / "pictures"),
        "--network",
        network,
    ]
    small = ["--image-size", "32", "--epochs", "1", "--set", "batch=8", "fine_tune=1", "--device", "cpu"]
    results = tmp_path / "results.jsonl"
    main([*given, *small, "--output", str(tmp_path), "--results", str(results)])
    (result,) = read_results(results)
    assert result.network == network and set(result.bits.values()) == {16}
    assert result.test_accuracy in (0, 12.5, 25, 37.5, 50, 62.5, 75, 87.5, 100)


def test_ablations_differ_from_parity_by_what_they_are_called() -> None:
    parity = asdict(recipe("parity"))
    changed = {
        name: {key for key, value in asdict(recipe(name)).items() if value != parity[key]}
        for name in ("fine-tuned", "quantization-only", "straight-through", "expected-bops", "pruning-only-w4a8")
    }
    assert changed == {
        "fine-tuned": {"fine_tune"},
        "quantization-only": {"prune"},
        "straight-through": {"guide"},
        "expected-bops": {"mu", "bops"},
        "pruning-only-w4a8": {"pins", "logits"},
    }


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_trains_and_records_its_line(name: str, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    main([*SHORT, "--recipe", name, "--output", str(tmp_path), "--results", str(results)])
    (line,) = results.read_text().splitlines()
    needed = "dataset network method recipe seed test_accuracy relative_bops epochs seconds hardware command date"
    assert set(needed.split()) <= json.loads(line).keys()
    (result,) = read_results(results)
    assert json.loads(json.dumps(asdict(result))) == json.loads(line)
    assert (result.dataset, result.recipe, result.epochs) == ("digits", name, 1)
    assert result.command.endswith(" ".join(["--recipe", name, *SHORT, "--seeds 0"]))
    expected = {
        "float32": 100,
        "bfloat16": 25,
        "quantization-only": 99.24,
        "pruning-only-fp32": 99.24,
        "pruning-only-w8a8": 6.25,
    }
    assert result.relative_bops == pytest.approx(expected.get(name, result.relative_bops), abs=0.01)


def test_fixed_widths_hold(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    main([*SHORT, "--recipe", "pruning-only-w4a8", "--output", str(tmp_path), "--results", str(results)])
    bits = read_results(results)[0].bits
    assert {name.rpartition(".")[2]: width for name, width in bits.items()} == {"weight": 4, "input": 8}


def test_a_finished_run_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SHORT, "--recipe", "float32", "--output", str(tmp_path), "--results", str(tmp_path / "results")]
    for _ in range(2):
        assert main(arguments) == 0
    assert "is finished already" in capsys.readouterr().out
    assert len(read_results(tmp_path / "results")) == 1


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parsed(folder: str) -> Any:
        given = [*SHORT, "--recipe", "own", "--epochs", "2", "--set", "warmup=1.0", "--output", str(tmp_path / folder)]
        return make_parser().parse_args(given)

    def cut_off(warmup: Any, record: Any) -> None:
        if record.epoch == 2:
            raise KeyboardInterrupt
        warm_up(warmup, record)

    expected, warm_up = run_one(parsed("whole"), "own", 0, ""), experiment._Warmup.__call__
    with monkeypatch.context() as patch:
        patch.setattr(experiment._Warmup, "__call__", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run_one(parsed("cut"), "own", 0, "")
    before = seconds_before(folder_of(parsed("cut"), "own", 0))
    found = run_one(parsed("cut"), "own", 0, "")
    assert 0 < before < found.seconds
    assert (found.test_nll, found.relative_bops) == (expected.test_nll, expected.relative_bops)
    epochs = RunFolder(folder_of(parsed("cut"), "own", 0)).history()
    assert [record.epoch for record in epochs] == [1, 2]
    assert epochs[0].seconds == before


def test_settings_are_read_and_named_in_the_folder() -> None:
    given = [
        "--data",
        "mnist",
        "--mu",
        "0.3",
        "--set",
        "bops=0.5",
        "guide=straight-through",
        "logits={2: 1.0, 4: -3.0}",
    ]
    arguments = make_parser().parse_args(given)
    assert settings_of(arguments) == {
        "mu": 0.3,
        "bops": 0.5,
        "guide": "straight-through",
        "logits": {2: 1.0, 4: -3.0},
    }
    found = recipe_of(arguments, "parity")
    assert (found.mu, found.bops, found.guide, found.ladder) == (0.3, 0.5, "straight-through", (2,))
    assert {"bops=0.5", "mu=0.3", "seed1"} <= set(folder_of(arguments, "parity", 1).name.split("-"))


def test_runs_of_one_command_are_told_apart() -> None:
    common = ["--set", "mu=0.3", "distill=0", "--output", "here", "--quick"]
    given = ["--recipe", "own", "l0", "--seeds", "0", "1", "--jobs", "2", *common]
    assert common_arguments(given) == common
    expected = "-m benchmarks.paper.run --recipe l0 --set mu=0.3 distill=0 --quick --seeds 1"
    assert command_of(given, "l0", 1).endswith(expected)


def test_one_run_that_fails_does_not_keep_the_others_from_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Any) -> Any:
        raise RuntimeError("this one is broken")

    results = tmp_path / "results.jsonl"
    monkeypatch.setattr(experiment.Experiment, "_float", fail)
    names = ["--recipe", "float32", "own", "--output", str(tmp_path), "--results", str(results)]
    assert main([*SHORT, *names]) == 1
    assert [result.recipe for result in read_results(results)] == ["own"]
    assert "this one is broken" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:channel gates are undecided")
@pytest.mark.parametrize("name", ["own", "best"])
def test_the_folder_of_a_run_can_be_deployed(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is deployed and reported is what the row is about."""
    results = tmp_path / "results.jsonl"
    real = [argument for argument in SHORT if argument != "--quick"]
    price = ["--set", "bops=0.1", "gate_lr=0.05", "float_epochs=2", "fine_tune=1"] if name == "best" else []
    places = ["--output", str(tmp_path), "--results", str(results)]
    main([*real, "--recipe", name, "--epochs", "8" if price else "1", *price, *places])
    (result,) = read_results(results)
    assert (result.relative_bops < 2) == (name == "best")
    (path,) = (tmp_path / "digits").iterdir()
    folder = RunFolder.open(path)
    deployment = Deployment.of_run(folder, remove=False)
    assert deployment.configuration.bits() == result.bits and deployment.configuration.kept() == result.kept
    with torch.no_grad():
        right = deployment.masked(deployment.held_out.inputs).argmax(1) == deployment.held_out.targets
    assert 100 * right.double().mean().item() == pytest.approx(result.test_accuracy)
    print_report(folder, folder.settings().rule)
    assert f"{result.test_accuracy:.2f} %" in capsys.readouterr().out
    padded, reopened = (Deployment.of_run(folder, channel_multiple=4, reopen=again) for again in (False, True))
    assert padded.configuration == deployment.configuration
    pruned = [layer for layer in padded.configuration.layers if layer.removed]
    uneven = any((layer.channels - len(layer.removed)) % 4 for layer in pruned)
    assert (reopened.configuration != padded.configuration) == uneven
    x = deployment.held_out.inputs[:64]
    for each in (padded, reopened):
        assert each.removal is not None
        assert all(after % 4 == 0 or after == before for before, after in each.removal.channels.values())
        with torch.no_grad():
            torch.testing.assert_close(each.frozen(x), each.masked(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--recipe", "parity", "nonsense"], "no recipe is called 'nonsense'"),
        (["--set", "guide=abc"], "guide must be one of hard-concrete, straight-through; got 'abc'"),
        (["--set", "mu=abc"], "mu must be a number; got 'abc'"),
        (["--set", "prize=1"], "a recipe has no 'prize'"),
        (["--set", "mu"], "--set takes NAME=VALUE; got 'mu'"),
    ],
)
def test_wrong_arguments_are_one_line_before_anything_is_loaded(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--data", "mnist", "--data-path", "nowhere", *given])
    assert stopped.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_a_shorter_run_moves_its_gates_as_far() -> None:
    tenth = shortened(recipe("fine-tuned", "cifar10"), 0.1)
    assert (tenth.epochs, tenth.fine_tune, tenth.float_epochs) == (30, 1, 0)
    assert tenth.gate_lr == pytest.approx(1e-2)
    with pytest.raises(ValueError, match="share must be"):
        shortened(tenth, 0.0)


def test_fixed_widths_of_a_baseline_are_in_its_name() -> None:
    found = make_recipe("lsq-w4a8", "cifar10", {"lsq": None})
    assert (found.kind, found.method, found.options, found.epochs) == ("baseline", "lsq", {"bits": (4, 8)}, 300)


@pytest.mark.parametrize(("name", "bops"), [("lsq-w4a4", 1.58), ("uniform-w2a2", 0.40)])
def test_compared_methods_train_where_the_library_has_them(name: str, bops: float, tmp_path: Path) -> None:
    pytest.importorskip("pyro_bbits.inference.baselines")
    results = tmp_path / "results.jsonl"
    main([*SHORT, "--recipe", name, "--output", str(tmp_path), "--results", str(results)])
    (result,) = read_results(results)
    assert result.relative_bops == pytest.approx(bops, abs=0.01) and result.method == name.partition("-")[0]
    assert set(result.bits.values()) == {int(name[-1])}


def test_the_search_needs_rows_to_choose_by(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sensitivity search chooses by validation rows"):
        main([*SHORT, "--recipe", "sensitivity", "--all-rows", "--output", str(tmp_path)])


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no recipe is called 'lsq-w4a8'"):
        recipe("lsq-w4a8")
    with pytest.raises(ValueError, match="a recipe has no 'moo'"):
        overridden(recipe("own"), {"moo": 1})
    with pytest.raises(ValueError, match="distillation needs a float network"):
        overridden(recipe("own"), {"distill": 0.5})
    for name in ("float32", "sensitivity"):
        with pytest.raises(ValueError, match="distill and smoothing are for gated networks"):
            overridden(recipe(name), {"smoothing": 0.1})
    with pytest.raises(ValueError, match="set distill or smoothing to 0"):
        overridden(recipe("own"), {"distill": 0.5, "float_epochs": 1, "smoothing": 0.1})
    with pytest.raises(ValueError, match=r"augment must be one of none, crop, .*; got 'mixup'"):
        overridden(recipe("own"), {"augment": "mixup"})
