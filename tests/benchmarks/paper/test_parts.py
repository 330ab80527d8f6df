"""The parts that recipes are made of: data, warm-up, the search without training."""

import io
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.paper.data import augmented, first_rows, joined, load, made, write_archive
from benchmarks.paper.experiment import _Warmup
from benchmarks.paper.sensitivity import gates_at, sensitivity_curve
from pyro_bbits import GatePrior, QuantizedNetwork, quantize
from pyro_bbits.data import DataSplits, TensorLoader
from pyro_bbits.inference import EpochRecord
from pyro_bbits.models import GatedModel


@pytest.fixture
def network() -> QuantizedNetwork:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    return quantize(net, torch.rand(16, 3), bits=(2, 4, 8, 16))


def batch() -> tuple[Tensor, Tensor]:
    x = torch.rand(24, 3)
    return x, (x[:, 0] > x[:, 1]).long()


def test_strength_rises_linearly_and_pins_stay(network: QuantizedNetwork) -> None:
    prior = GatePrior(network, 0.1).pin("0.weight", bits=4)
    full = prior.strength.clone()
    warm = _Warmup(prior, 0.3, 10)
    seen = []
    for epoch in range(1, 11):
        assert torch.equal(prior.strength[0], full[0])
        seen.append((prior.strength[1, 0] / full[1, 0]).item())
        warm(EpochRecord(epoch, 0.0))
    assert seen == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 7])


def test_the_search_lowers_one_width_after_the_other(network: QuantizedNetwork) -> None:
    x, y = batch()
    model = GatedModel(network, GatePrior(network, 0.1), 24)
    curve = sensitivity_curve(model, [(x, y)], [(x, y)])
    assert curve[0].widths == (16, 16, 16) and curve[-1].widths == (4, 4, 4)
    for before, after in pairwise(curve):
        changed = [(a, b) for a, b in zip(before.widths, after.widths, strict=True) if a != b]
        assert len(changed) == 1 and changed[0][1] < changed[0][0]
        assert after.relative_bops < before.relative_bops
    assert network.layout.bits(gates_at(network, (8, 2, 16))) == (8, 2, 16)


def test_archives_hold_the_published_normalization(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    pixels = numpy.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), dtype="uint8")
    path, y = tmp_path / "cifar10.npz", numpy.arange(20) % 10
    numpy.savez(path, x_train=pixels, y_train=y, x_test=pixels[:5], y_test=y[:5])
    data = load("cifar10", path, seed=0)
    assert (len(data.train), len(data.validation), len(data.test), data.augment) == (18, 2, 5, True)
    expected = (torch.from_numpy(pixels[:5]) / 255 - torch.tensor([0.4914, 0.4822, 0.4465]).view(-1, 1, 1)) / (
        torch.tensor([0.2023, 0.1994, 0.2010]).view(-1, 1, 1)
    )
    assert isinstance(data, DataSplits)
    torch.testing.assert_close(data.test.inputs, expected)
    assert len(joined(data).train) == 20 and len(first_rows(data, 7).train) == 7
    assert augmented(first_rows(data, 7), "crop").augment
    assert augmented(data, None) is data and not augmented(data, "none").augment
    painted = augmented(data, "crop-flip-cutout")
    train = painted.loaders(8).train
    assert isinstance(train, TensorLoader) and train.augment and train.cutout == 16
    with pytest.raises(ValueError, match="digits is not read from an archive"):
        load("digits", path, seed=0)
    assert made("mnist").input_shape == (1, 28, 28)


def test_an_archive_has_the_validation_rows_of_the_folder(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pillow, numpy = pytest.importorskip("PIL.Image"), pytest.importorskip("numpy")
    for part, rows in (("train", 30), ("test", 4)):
        pixels = numpy.random.default_rng(rows).integers(0, 256, (rows, 28, 28), dtype="uint8")
        cells = []
        for image in pixels:
            buffer = io.BytesIO()
            pillow.fromarray(image).save(buffer, "PNG")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        table = arrow.table({"image": cells, "label": [row % 10 for row in range(rows)]})
        parquet.write_table(table, tmp_path / f"{part}-0.parquet")
    write_archive("mnist", tmp_path, tmp_path / "mnist.npz")
    folder, archive = (load("mnist", path, seed=3) for path in (tmp_path, tmp_path / "mnist.npz"))
    for part in ("train", "validation", "test"):
        torch.testing.assert_close(getattr(archive, part).inputs, getattr(folder, part).inputs, rtol=0, atol=1e-6)
        assert getattr(archive, part).targets.equal(getattr(folder, part).targets)
