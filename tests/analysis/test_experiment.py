"""A run from settings to a finished folder: what it writes is what it measured, whatever interrupts it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyro_bbits import BitConfiguration
from pyro_bbits.analysis import GatePosterior, experiment
from pyro_bbits.analysis.experiment import Experiment
from pyro_bbits.analysis.run import RunFolder
from pyro_bbits.data import load_data
from pyro_bbits.inference import NonFiniteError
from pyro_bbits.models import DistilledModel, build_network
from pyro_bbits.settings import RunSettings

TENSORS = {"fc1.weight", "fc1.input", "fc2.weight", "fc2.input"}
FILES = ["bits.json", "checkpoints", "data.json", "history.jsonl", "plots", "posterior.safetensors", "results.json"]
FILES += ["settings.yaml"]
PLOTS = ["bit_widths.png", "bops.png", "channels.png", "gates.png", "history.png"]

SHORT: dict[str, Any] = {
    "network": "tiny",
    "epochs": 2,
    "batch_size": 128,
    "mu": 0.002,
    "init_logit": 2.0,
    "weight_lr": 0.05,
    "gate_lr": 0.3,
    "baseline": False,
    "device": "cpu",
}

Train = Callable[..., tuple[dict[str, Any], RunFolder]]


def settings(**changes: Any) -> RunSettings:
    """Two short epochs of the tiny network, which leave gates of every kind: open, closed and undecided."""
    return RunSettings(**(SHORT | changes))


def results_without_time(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if key != "seconds"}


@pytest.fixture
def train(tmp_path: Path, tiny_network: str, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Trains into a folder of its own each time; without plots, which one run below has."""
    monkeypatch.setattr(RunFolder, "save_plots", lambda _: [])
    assert tiny_network == "tiny"

    def run(**changes: Any) -> tuple[dict[str, Any], RunFolder]:
        chosen = settings(**changes)
        folder = RunFolder.create(tmp_path / f"run{len(list(tmp_path.iterdir()))}", chosen)
        return Experiment(chosen, progress=False).run(folder), folder

    return run


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], RunFolder]:
    """The one full run: an epoch of the default network on all digits, baseline and plots included."""
    chosen = RunSettings(epochs=1, batch_size=32, seed=3, device="cpu")
    folder = RunFolder.create(tmp_path_factory.mktemp("digits") / "run", chosen)
    return Experiment(chosen, progress=False).run(folder), folder


# --- a full run -------------------------------------------------------------------------------------------------------


def test_a_run_fills_its_folder(digits_run: tuple[dict[str, Any], RunFolder]) -> None:
    _, folder = digits_run
    assert sorted(file.name for file in folder.path.iterdir()) == [*FILES, "weights.safetensors"]
    assert sorted(file.name for file in folder.plots.iterdir()) == PLOTS
    assert folder.settings() == RunSettings(epochs=1, batch_size=32, seed=3, device="cpu")


def test_results_are_complete_and_those_of_the_posterior(digits_run: tuple[dict[str, Any], RunFolder]) -> None:
    results, folder = digits_run
    assert folder.results() == results
    assert set(results) == {
        *(
            "data",
            "network",
            "mu",
            "simplified",
            "bops_price",
            "distill",
            "seed",
            "rule",
            "epochs",
            "test_samples",
            "test_accuracy_float",
            "test_accuracy",
        ),
        *("test_nll", "relative_bops", "expected_relative_bops", "relative_bops_94_interval", "bits", "kept"),
        *("device", "versions", "seconds", "files"),
    }
    settings_given = {"data": "digits", "network": "digits-net", "mu": 0.1, "seed": 3, "rule": "map", "epochs": 1}
    assert {key: results[key] for key in settings_given} == settings_given
    posterior, configuration = folder.posterior(), BitConfiguration.load(folder.bits_file)
    assert configuration == posterior.map_configuration()
    assert (results["bits"], results["kept"]) == (configuration.bits(), configuration.kept())
    assert results["relative_bops"] == configuration.relative_bops
    assert results["expected_relative_bops"] == posterior.expected_bops()
    assert results["relative_bops_94_interval"] == list(posterior.bops_interval())
    assert 50 < results["test_accuracy"] <= 100 and 50 < results["test_accuracy_float"] <= 100, "it learns"


def accuracy_and_nll(net: nn.Module, seed: int) -> tuple[float, float]:
    """In percent and nats per sample, on the test split and in plain PyTorch."""
    test = load_data("digits", seed=seed).test
    with torch.no_grad():
        logits = net(test.inputs)
    right = (logits.argmax(1) == test.targets).double().mean().item()
    return 100 * right, nn.functional.cross_entropy(logits, test.targets).item()


def test_reported_accuracy_is_that_of_the_exported_files(
    tmp_path: Path, digits_run: tuple[dict[str, Any], RunFolder]
) -> None:
    results, folder = digits_run
    bits_file, weights_file = folder.export(tmp_path / "deploy", "map")
    net = build_network("digits-net", (1, 8, 8), 10)
    net.load_state_dict(load_file(weights_file))
    accuracy, nll = accuracy_and_nll(BitConfiguration.load(bits_file).apply(net), seed=3)
    assert results["test_accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert results["test_nll"] == pytest.approx(nll, rel=1e-5)
    assert results["test_samples"] == len(load_data("digits").test)


def test_history_ends_where_the_run_ended(digits_run: tuple[dict[str, Any], RunFolder]) -> None:
    results, folder = digits_run
    history = folder.history()
    assert len(history) == 1 and history.tensors == tuple(results["bits"])
    assert history[-1].bits == tuple(results["bits"].values())
    assert history[-1].bops == pytest.approx(results["relative_bops"])
    assert history[-1].expected_bops == pytest.approx(results["expected_relative_bops"])


# --- the same, and other settings -------------------------------------------------------------------------------------


def test_a_seed_gives_a_run(train: Train) -> None:
    first, folder = train(seed=5)
    torch.manual_seed(123)
    again, other_folder = train(seed=5)
    assert results_without_time(first) == results_without_time(again)
    assert folder.weights_file.read_bytes() == other_folder.weights_file.read_bytes()
    assert folder.posterior_file.read_bytes() == other_folder.posterior_file.read_bytes()
    other, _ = train(seed=6)
    assert other["test_nll"] != first["test_nll"]
    assert other["expected_relative_bops"] != first["expected_relative_bops"]


@pytest.mark.filterwarnings("ignore:the held-out accuracy of the quantized network is")
def test_the_baseline_does_not_touch_the_quantized_run(train: Train) -> None:
    with_baseline, _ = train(baseline=True)
    without, _ = train()
    assert with_baseline.pop("test_accuracy_float") > 50 and without.pop("test_accuracy_float") is None
    assert results_without_time(with_baseline) == results_without_time(without)


@pytest.mark.parametrize("rule", ["map", "threshold"])
def test_fine_tuning_keeps_the_gates_and_the_belief(train: Train, rule: str) -> None:
    """Weights and ranges move on; bits, channels and the posterior are those from before."""
    before, plain = train(rule=rule)
    after, tuned = train(rule=rule, fine_tune_epochs=2)
    for key in ("bits", "kept", "relative_bops", "expected_relative_bops", "relative_bops_94_interval"):
        assert after[key] == before[key], key
    decided = tuned.posterior().configuration(rule)  # type: ignore[arg-type]
    assert (after["bits"], after["kept"]) == (decided.bits(), decided.kept())
    assert BitConfiguration.load(tuned.bits_file) == decided
    belief, expected = tuned.posterior().probabilities, plain.posterior().probabilities
    assert all(torch.equal(a, b) for a, b in zip(belief, expected, strict=True))
    assert belief.channels.min() > 0 and belief.channels.max() < 1, "not that of the fixed gates"
    weights = [load_file(folder.weights_file)["fc1.weight"] for folder in (plain, tuned)]
    ranges = [folder.posterior().structure.quantizers.ranges for folder in (plain, tuned)]
    assert not torch.equal(*weights) and not torch.equal(*ranges)
    history = tuned.history()
    assert [record.epoch for record in history] == [1, 2, 3, 4]
    assert [record.kl for record in history][2:] == [0, 0]
    assert history[2].bits == history[3].bits == tuple(after["bits"].values())


def test_accuracy_after_fine_tuning_is_that_of_the_files(train: Train) -> None:
    results, folder = train(fine_tune_epochs=1)
    net = build_network("tiny", (1, 8, 8), 10)
    net.load_state_dict(load_file(folder.weights_file))
    accuracy, nll = accuracy_and_nll(BitConfiguration.load(folder.bits_file).apply(net), seed=0)
    assert results["test_accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert results["test_nll"] == pytest.approx(nll, rel=1e-5)


def test_without_pruning_all_channels_stay(train: Train) -> None:
    results, folder = train(prune=False, mu=0.02)
    assert results["kept"] == {"fc1": 12, "fc2": 10}
    assert folder.posterior().probabilities.channels.tolist() == [1.0] * 12
    assert train(mu=0.02)[0]["kept"]["fc1"] < 12, "pruning would have removed some"


def test_a_ladder_of_ones_own(train: Train) -> None:
    results, folder = train(bits=(2, 4, 8))
    assert BitConfiguration.load(folder.bits_file).ladder == (2, 4, 8)
    assert set(results["bits"]) == TENSORS and set(results["bits"].values()) <= {0, 2, 4, 8}
    assert max(bits for record in folder.history() for bits in record.bits) <= 8
    assert list(folder.posterior().widths()) == [0, 2, 4, 8]


CHEAPER = pytest.mark.filterwarnings("ignore:the held-out accuracy of the quantized network is:UserWarning")


@CHEAPER
@pytest.mark.parametrize(
    "change",
    [
        {"guide": "straight-through"},
        {"mu": 1.0},
        {"cost": "constant"},
        {"simplified": True},
        {"init_logit": 1.0},
        {"gate_lr": 0.01},
        {"weight_lr": 0.01},
        {"range_lr": 0.1},
        {"batch_size": 256},
        {"bops_price": 2.0},
        {"schedule": "cosine"},
        {"ranges": "mse"},
        {"baseline": True, "distill": 0.9},
        {"baseline": True, "start": "float"},
        {"weight_decay": 2.0},
    ],
    ids=lambda change: list(change)[-1],
)
def test_every_setting_reaches_the_training(train: Train, change: dict[str, Any]) -> None:
    """Its first epoch differs from that of the settings it is compared to."""
    usual, changed = (train(**({"epochs": 1, "batch_size": 512} | c))[1].history()[0] for c in ({}, change))
    assert math.isfinite(changed.loss)
    assert (changed.loss, changed.kl, changed.validation_nll) != (usual.loss, usual.kl, usual.validation_nll)


def test_the_guide_is_the_one_asked_for(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(experiment, "fit", lambda model, guide, *_, **__: made.append(type(guide).__name__))
    for guide in ("straight-through", "hard-concrete"):
        train(guide=guide)
    assert made == ["StraightThroughGuide", "HardConcreteGuide"]


def test_pinned_tensors_have_their_width(train: Train) -> None:
    results, _ = train(pin=("*.input=4", "fc2.weight=8"), bits=(2, 4, 8), mu=1.0, prune=False)
    bits = results["bits"]
    assert (bits["fc1.input"], bits["fc2.input"], bits["fc2.weight"], bits["fc1.weight"]) == (4, 4, 8, 2)


@CHEAPER
@pytest.mark.parametrize("pretrained", [False, True])
def test_the_float_network_teaches_and_is_what_is_started_from(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretrained: bool
) -> None:
    """Weights that the quantized network begins with are those that its teacher has, trained or given."""
    begun: list[tuple[Any, dict[str, Tensor]]] = []

    def fit(model: Any, *args: Any, **options: Any) -> Any:
        begun.append((model, {name: value.clone() for name, value in weights_of(model).items()}))
        options["epochs"] = min(2, options["epochs"])
        return real(model, *args, **options)

    def weights_of(model: Any) -> dict[str, Tensor]:
        net: nn.Module = getattr(model.net, "net", model.net)
        return dict(net.named_parameters())

    real = vars(experiment)["fit"]
    monkeypatch.setattr(experiment, "fit", fit)
    if pretrained:
        state = build_network("tiny", (1, 8, 8), 10).state_dict()
        save_file({name: value + 0.01 for name, value in state.items()}, tmp_path / "float.safetensors")
        train(distill=0.5, pretrained=tmp_path / "float.safetensors")
        expected = load_file(tmp_path / "float.safetensors")
    else:
        train(distill=0.5, baseline=True, start="float", float_epochs=7)
        expected = {name: value.detach() for name, value in weights_of(begun[0][0]).items()}
    model, start = begun[-1]
    assert isinstance(model, DistilledModel) and model.weight == 0.5
    taught = dict(model._teacher[0].named_parameters())
    for name, value in expected.items():
        assert torch.equal(start[name], value) and torch.equal(taught[name], value)
        assert not torch.equal(weights_of(model)[name], value), "the student has moved on"


@CHEAPER
def test_the_float_network_has_epochs_of_its_own(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs = []
    real = vars(experiment)["fit"]

    def fit(*args: Any, **options: Any) -> Any:
        epochs.append(options["epochs"])
        return real(*args, **options)

    monkeypatch.setattr(experiment, "fit", fit)
    train(baseline=True, float_epochs=1)
    assert epochs == [1, 2]


def test_the_rule_decides_what_is_tested(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates left between a half and two thirds are open for `map` and closed for `threshold`."""

    def fit(model: Any, guide: Any, *_: Any, **__: Any) -> None:
        with torch.no_grad():
            guide.channel_logits.fill_(9.0)
            guide.tensor_logits.fill_(math.log(0.6 / 0.4))

    monkeypatch.setattr(experiment, "fit", fit)
    for rule, width in (("map", 8), ("threshold", 4)):
        results, folder = train(rule=rule, guide="straight-through", bits=(4, 8))
        assert results["bits"] == dict.fromkeys(TENSORS, width)
        net = build_network("tiny", (1, 8, 8), 10)
        net.load_state_dict(load_file(folder.weights_file))
        _, nll = accuracy_and_nll(BitConfiguration.load(folder.bits_file).apply(net), seed=0)
        assert results["test_nll"] == pytest.approx(nll, rel=1e-5), "the figures are those of this rule"


# --- interruptions ----------------------------------------------------------------------------------------------------


def check_usable(folder: RunFolder, epochs: int) -> GatePosterior:
    """Settings, history, weights, posterior and configuration load and belong together; there are no results."""
    assert len(folder.history()) == epochs and folder.results() == {}
    posterior = folder.posterior()
    assert BitConfiguration.load(folder.bits_file) == posterior.configuration(folder.settings().rule)
    net = build_network("tiny", (1, 8, 8), 10)
    net.load_state_dict(load_file(folder.weights_file))
    logits = BitConfiguration.load(folder.bits_file).apply(net)(torch.rand(3, 1, 8, 8))
    assert logits.isfinite().all()
    return posterior


class Stop:
    """Interrupts a training loop after an epoch."""

    def __init__(self, original: Callable[..., Any], error: type[BaseException], after: int) -> None:
        self.original, self.error, self.after = original, error, after

    def __call__(self, *args: Any, on_epoch: Callable[..., Any], **kwargs: Any) -> Any:
        if self.after == 0:
            raise self.error("stopped")

        def counted(record: Any) -> None:
            on_epoch(record)
            if record.epoch == self.after:
                raise self.error("stopped")

        return self.original(*args, on_epoch=counted, **kwargs)


@pytest.mark.parametrize(
    ("error", "stage", "after", "epochs"),
    [
        (KeyboardInterrupt, "fit", 0, 0),
        (KeyboardInterrupt, "fit", 1, 1),
        (RuntimeError, "fit", 1, 1),
        (KeyboardInterrupt, "fine_tune", 1, 3),
    ],
)
def test_an_interrupted_run_leaves_a_usable_folder(
    tmp_path: Path,
    tiny_network: str,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    stage: str,
    after: int,
    epochs: int,
) -> None:
    chosen = settings(network=tiny_network, fine_tune_epochs=2)
    folder = RunFolder.create(tmp_path / "run", chosen)
    monkeypatch.setattr(experiment, stage, Stop(getattr(experiment, stage), error, after))
    with pytest.raises(error, match="stopped"):
        Experiment(chosen, progress=False).run(folder)
    posterior = check_usable(folder, epochs)
    assert posterior.probabilities.channels.min() < 1, "fixed gates are no belief"
    assert not folder.plots.exists()
    if not epochs:
        assert sorted(file.name for file in folder.save_plots()) == [p for p in PLOTS if p != "history.png"]


def test_a_loss_that_is_not_finite_is_what_the_user_hears_of(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that ranges which are no numbers cannot be saved; and the broken network is not kept."""

    def fit(model: Any, *_: Any, **__: Any) -> None:
        with torch.no_grad():
            model.net.quantizers.log_range.fill_(math.nan)
        raise NonFiniteError("the loss is nan at epoch 1, step 2")

    monkeypatch.setattr(experiment, "fit", fit)
    with pytest.raises(NonFiniteError, match="the loss is nan at epoch 1, step 2"):
        train()
    (folder,) = (RunFolder(path) for path in tmp_path.iterdir())
    assert sorted(file.name for file in folder.path.iterdir()) == ["data.json", "history.jsonl", "settings.yaml"]


# --- what is wrong before a run ---------------------------------------------------------------------------------------


def test_training_starts_from_given_weights(tmp_path: Path, tiny_network: str) -> None:
    torch.manual_seed(77)
    state = build_network(tiny_network, (1, 8, 8), 10).state_dict()
    save_file(state, tmp_path / "float.safetensors")
    started = Experiment(settings(pretrained=tmp_path / "float.safetensors"), progress=False).net.state_dict()
    assert started.keys() == state.keys() and all(torch.equal(started[name], state[name]) for name in state)


def test_initial_weights_follow_the_seed(tiny_network: str) -> None:
    weights = [Experiment(settings(seed=seed), progress=False).net.state_dict()["fc1.weight"] for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_weights_of_another_network_are_refused(tmp_path: Path, tiny_network: str) -> None:
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors does not fit TinyNet: .*fc1\.weight") as caught:
        Experiment(settings(network=tiny_network, pretrained=tmp_path / "other.safetensors"))
    assert "\n" not in str(caught.value)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, tiny_network: str) -> None:
    state = build_network(tiny_network, (1, 8, 8), 10).state_dict()
    state["fc2.bias"][3] = math.inf
    save_file(state, tmp_path / "float.safetensors")
    with pytest.raises(ValueError, match=r"float\.safetensors holds NaN or infinite weights"):
        Experiment(settings(network=tiny_network, pretrained=tmp_path / "float.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pin": ("*.weights=8",)}, r"pattern '\*\.weights' matches no tensor; there are "),
        ({"pin": ("*.weight=3",)}, r"3 is not a width of the ladder \(2, 4, 8, 16, 32\)"),
        ({"network": "alexnet"}, "no network is called 'alexnet'; choose one of digits-net"),
        ({"network": "lenet5"}, "LeNet5 needs images of at least 16x16 pixels"),
        ({"pretrained": Path("none.safetensors")}, r"the weights none\.safetensors cannot be read"),
        ({"data": "mnist", "data_path": Path("nowhere")}, "there is no folder nowhere"),
    ],
)
def test_what_cannot_be_had_is_said_before_a_run(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Experiment(RunSettings(**change), progress=False)


def test_a_gpu_that_is_not_there_is_said_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="PyTorch sees no GPU"):
        Experiment(RunSettings(device="cuda"), progress=False)


def test_a_failing_resume_keeps_what_an_earlier_part_has_saved(tmp_path: Path) -> None:
    """Damaged checkpoints end the run before a step; the weights from the interruption are perhaps the last copy."""
    settings = RunSettings(**SHORT)
    folder = RunFolder.create(tmp_path / "run", settings)
    Experiment(settings, progress=False).run(folder)
    folder.results_file.unlink()
    before = folder.weights_file.read_bytes()
    for path in folder.checkpoints.glob("*/*.safetensors"):
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="checkpoint"):
        Experiment(settings, progress=False).run(folder, resume=True)
    assert folder.weights_file.read_bytes() == before
