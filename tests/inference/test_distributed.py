"""Several processes train as one does; run as a script, this file is one of them."""

import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyro_bbits import GatePrior, quantize
from pyro_bbits.data import TensorLoader
from pyro_bbits.inference import (
    Checkpoints,
    EmptyGuide,
    HardConcreteGuide,
    NonFiniteError,
    Recipe,
    StraightThroughGuide,
    fine_tune,
    fit,
)
from pyro_bbits.models import GatedModel, PlainModel

EPOCHS = 3
RECIPE = Recipe(weight_lr=0.02, gate_lr=0.2)
OPTIONS: dict[str, Any] = {"epochs": EPOCHS, "recipe": RECIPE, "progress": False}

pytestmark = pytest.mark.filterwarnings("ignore:every channel of:UserWarning")


def points(count: int = 40) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 3, generator=torch.Generator().manual_seed(1))
    return x, (x[:, 0] > x[:, 1]).long()


class Parts:
    """Batches of 13, 13, 13 and 1 + 2 rows: the parts of two processes differ."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(*(values.split([13, 13, 11, 3]) for values in points()), strict=True):
            yield x.tensor_split(self.size)[self.rank], y.tensor_split(self.size)[self.rank]


def network(*, norm: bool = False, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(7)
    layers: list[nn.Module] = [nn.Linear(3, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def gated(**options: Any) -> GatedModel:
    net = quantize(network(**options), points()[0])
    prior = GatePrior(net, 0.02).pin("0.weight", bits=8).pin_channels("4")  # pinned gates get no gradient
    return GatedModel(net, prior, 40)


def train(case: str, rank: int, size: int, folder: Path) -> tuple[dict[str, Tensor], list[float]]:
    """Train; final state and losses."""
    loader: Iterable[Any] = TensorLoader(
        *points(), batch_size=16, shuffle=True, seed=3, rank=rank, world_size=size
    ) if case not in ("unequal", "dropout") else Parts(rank, size)  # fmt: skip
    if case == "plain":
        torch.manual_seed(7 + rank)  # rank 0 decides where all begin
        plain = PlainModel(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), 40)
        history = fit(plain, EmptyGuide(), loader, seed=1, **OPTIONS)
        return state(plain), [record.loss for record in history]
    model = gated(norm=case == "norm", dropout=0.3 if case == "dropout" else 0.0)
    guide = (StraightThroughGuide if case == "straight-through" else HardConcreteGuide)(model.prior, init=1.0)
    if case in ("nan", "label") and rank == size - 1:
        x, y = points()
        x, y = (x.where(x < 0.9, torch.nan), y) if case == "nan" else (x, y + 1)
        loader = TensorLoader(x, y, batch_size=16, rank=rank, world_size=size)
    saved: dict[str, Any] = {"checkpoints": Checkpoints(folder), "resume": "auto"} if case == "resumed" else {}
    history = fit(model, guide, loader, [points()], seed=1 + 7 * rank * (case == "seed"), **saved, **OPTIONS)
    losses = [record.loss for record in history] + [record.validation_nll or 0.0 for record in history]
    if case == "tuned":
        losses += [record.loss for record in fine_tune(model, guide, loader, epochs=2, progress=False)]
    return state(model, guide), losses


def state(*modules: nn.Module) -> dict[str, Tensor]:
    return {name: value.contiguous().clone() for name, value in nn.ModuleList(modules).state_dict().items()}


def main(case: str, rank: int, folder: Path) -> None:
    """Train as one of two processes; write the end, or what was raised."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        end, losses = train(case, rank, 2, folder / "checkpoints")
    except (ValueError, NonFiniteError) as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    else:
        save_file(end | {"losses": torch.tensor(losses, dtype=torch.double)}, folder / f"{rank}.safetensors")
    dist.barrier()  # none leaves while another is still in a collective
    dist.destroy_process_group()


def two_processes(case: str, folder: Path) -> list[Any]:
    """What each of them came to: its state, or the text of its error."""
    folder.mkdir(exist_ok=True)
    (folder / "store").unlink(missing_ok=True)
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore::FutureWarning", __file__, case, str(rank), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "Warning" not in err
    if (folder / "0.txt").exists():
        return [(folder / f"{rank}.txt").read_text() for rank in (0, 1)]
    return [load_file(folder / f"{rank}.safetensors") for rank in (0, 1)]


SLOW = pytest.mark.slow  # every case starts two processes


@pytest.mark.parametrize(
    "case", ["tuned", *(pytest.param(case, marks=SLOW) for case in ("gated", "straight-through", "unequal", "plain"))]
)
def test_two_processes_train_as_one(tmp_path: Path, case: str) -> None:
    """Up to the order of sums in float32; gates are drawn alike although only rank 0 draws for both."""
    expected, losses = train(case, 0, 1, tmp_path / "checkpoints")
    first, second = two_processes(case, tmp_path / "two")
    for name, value in expected.items():
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=2e-5)
        assert torch.equal(first[name], second[name]), name
    torch.testing.assert_close(first["losses"], torch.tensor(losses, dtype=torch.double), rtol=1e-5, atol=1e-6)
    assert torch.equal(first["losses"], second["losses"])


@pytest.mark.parametrize("case", ["norm", *(pytest.param(case, marks=SLOW) for case in ("dropout", "seed"))])
def test_processes_agree_whatever_they_draw(tmp_path: Path, case: str) -> None:
    """Batch norms see a part of the batch each, parts differ in size, seeds differ: the networks are the same."""
    first, second = two_processes(case, tmp_path / "two")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_two_processes_go_on_where_two_stopped(tmp_path: Path) -> None:
    one, _ = two_processes("gated", tmp_path / "whole")
    two_processes("resumed", tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "epoch-000003.safetensors").unlink()
    first, second = two_processes("resumed", tmp_path / "run")
    assert all(torch.equal(first[name], one[name]) and torch.equal(second[name], one[name]) for name in one)
    assert len(Checkpoints(tmp_path / "run" / "checkpoints").paths()) == 2


@pytest.mark.parametrize(
    ("case", "message"),
    [
        pytest.param("nan", "ValueError: {}the inputs hold NaN", marks=SLOW),
        ("label", "ValueError: {}labels must lie between 0 and 1"),
    ],
)
def test_what_one_process_finds_wrong_ends_all(tmp_path: Path, case: str, message: str) -> None:
    first, second = two_processes(case, tmp_path / "two")
    assert first.startswith(message.format("process 1: ")) and second.startswith(message.format(""))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
