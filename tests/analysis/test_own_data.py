"""Runs on the user's own data: the figures are those of the exported files, in the user's units."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pyro_bbits import BitConfiguration
from pyro_bbits.analysis import experiment
from pyro_bbits.analysis.experiment import Experiment
from pyro_bbits.analysis.run import RunFolder
from pyro_bbits.data import load_data
from pyro_bbits.models.registry import fitting_networks
from pyro_bbits.settings import RunSettings

SHORT: dict[str, Any] = {"epochs": 4, "batch_size": 16, "mu": 0.002, "gate_lr": 0.1, "weight_lr": 0.02, "device": "cpu"}


def perceptron(_: str, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), 8), nn.ReLU(), nn.Linear(8, num_outputs))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trains a small perceptron, without plots; returns results, folder and the configured network of its files."""
    monkeypatch.setattr(RunFolder, "save_plots", lambda _: [])
    monkeypatch.setattr(experiment, "build_network", perceptron)

    def train(**changes: Any) -> tuple[dict[str, Any], RunFolder, nn.Module]:
        settings = RunSettings(**(SHORT | {"network": "perceptron"} | changes))
        folder = RunFolder.create(tmp_path / "run", settings)
        results = Experiment(settings, progress=False).run(folder)
        shape, outputs = (json.loads(folder.data_file.read_text())[key] for key in ("input_shape", "num_outputs"))
        net = perceptron("", tuple(shape), outputs)
        net.load_state_dict(load_file(folder.weights_file))
        return results, folder, BitConfiguration.load(folder.bits_file).apply(net)

    return train


def write_table(path: Path) -> tuple[Path, Tensor]:
    """Features of very different sizes and a target in the thousands that depends on them, with noise."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(120, 4, generator=generator, dtype=torch.float64)
    a, b, c = 1e6 + 1e4 * noise[:, 0], 1e-3 * noise[:, 1], noise[:, 2]
    y = 5000 + 700 * noise[:, 0] - 400 * noise[:, 1] * noise[:, 2] + 20 * noise[:, 3]
    rows = torch.stack([a, b, c, y], 1)
    lines = ["a,b,c,y", *(",".join(map(repr, row)) for row in rows.tolist())]
    path.write_text("\n".join(lines) + "\n")
    return path, rows


def test_a_regression_reports_its_error_in_the_units_of_the_targets(tmp_path: Path, run: Any) -> None:
    """From the exported files, the raw table and `data.json` alone."""
    path, rows = write_table(tmp_path / "table.csv")
    results, folder, net = run(data=str(path), target="y", task="regression", epochs=30)
    about = json.loads(folder.data_file.read_text())
    assert (about["target"], about["feature_names"], about["rows"]["test"]) == ("y", ["a", "b", "c"], 24)
    test = load_data(path, target="y", task="regression").test
    scaled = (rows[:, :3] - torch.tensor(about["input_scaling"]["mean"])) / torch.tensor(about["input_scaling"]["std"])
    found = torch.stack([(scaled - row).abs().sum(1).argmin() for row in test.inputs])
    with torch.no_grad():
        predicted = net(scaled[found].float())[:, 0].double()
    mean, std = about["target_scaling"]["mean"][0], about["target_scaling"]["std"][0]
    errors = predicted * std + mean - rows[found, 3]
    assert results["test_rmse"] == pytest.approx(errors.square().mean().sqrt().item(), rel=1e-4)
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), results["noise_std"])
    assert results["test_nll"] == pytest.approx(-normal.log_prob(errors).mean().item(), rel=1e-4)
    assert results["test_rmse"] < 0.8 * rows[:, 3].std(), "it learns"
    assert 0 < results["test_rmse_float"] < rows[:, 3].std()
    assert not {key for key in results if "accuracy" in key}
    assert folder.results() == results


def test_a_classification_of_features_reports_accuracy(tmp_path: Path, run: Any) -> None:
    generator = np.random.default_rng(0)
    y = generator.integers(0, 3, 200)
    x = generator.normal(size=(200, 5)) + 3 * np.eye(5)[y]
    np.savez(tmp_path / "a.npz", x=x, y=np.array(["red", "green", "blue"])[y])
    results, folder, net = run(data=str(tmp_path / "a.npz"), baseline=False)
    test = load_data(tmp_path / "a.npz").test
    with torch.no_grad():
        right = (net(test.inputs).argmax(1) == test.targets).double().mean().item()
    assert results["test_accuracy"] == pytest.approx(100 * right) and right > 0.6
    about = json.loads(folder.data_file.read_text())
    assert about["class_names"] == ["blue", "green", "red"] and about["task"] == "classification"


def test_a_folder_read_by_workers_is_trained_on(tmp_path: Path, run: Any) -> None:
    pillow = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    for name, colour in (("a", 60), ("b", 180)):
        (tmp_path / "own" / name).mkdir(parents=True)
        for i in range(30):
            noise = torch.randint(-40, 40, (20, 16, 3), generator=generator)
            pillow.fromarray((noise + colour).byte().numpy()).save(tmp_path / "own" / name / f"{i}.png")
    results, _, _ = run(data=str(tmp_path / "own"), image_size=8, workers=0, baseline=False)
    assert results["test_samples"] == 12 and results["test_accuracy"] == 100


def test_without_a_network_those_that_fit_are_listed(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.random.default_rng(0).random((40, 1, 9, 9)), y=np.arange(40) % 4)
    with pytest.raises(ValueError, match=r"choose one with --network\. .* \(1, 9, 9\) and 4 outputs there are: .*vgg7"):
        Experiment(RunSettings(data=str(tmp_path / "a.npz"), device="cpu"))
    assert "lenet5" not in fitting_networks((1, 9, 9), 4) and "lenet5" in fitting_networks((1, 28, 28), 4)


def test_unfit_data_are_said_before_a_run(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n1,0\n2,oops,3\n")
    with pytest.raises(ValueError, match=r"a\.csv, line 3 has 3 cells"):
        Experiment(RunSettings(data=str(tmp_path / "a.csv"), target="y", network="vgg7", device="cpu"))
