"""Training on a GPU: captured steps train as steps one by one do, and what cannot be captured is taken one by one.

Convolutions and sums of a GPU repeat only up to the order of additions, so that figures are compared with tolerance.
"""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_bbits import GatePrior, quantize
from pyro_bbits.data.loader import TensorLoader
from pyro_bbits.inference import EmptyGuide, HardConcreteGuide, History, Recipe, fit
from pyro_bbits.inference.graphs import CudaGraphs, NotCapturedError
from pyro_bbits.kernels import norm
from pyro_bbits.models import GatedModel, PlainModel

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:(every channel of|channel gates are undecided):UserWarning"),
]

X = torch.rand(520, 3, 16, 16, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0].mean((1, 2)) > X[:, 1].mean((1, 2))).long()


class Images(nn.Module):
    """Two norms that can be fused, one before a pooling, dropout, a linear layer with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.fc1, self.norm3, self.fc2 = nn.Linear(24 * 64, 40, bias=False), nn.BatchNorm1d(40), nn.Linear(40, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        logits: Tensor = self.fc2(F.relu(self.norm3(self.fc1(x.flatten(1)))))
        return logits


class Reading(Images):
    """Decides on the host by a value that the device has computed."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits * 2 if logits.sum() > 1e9 else logits


def loader(kind: str) -> Any:
    if kind == "resident":
        return TensorLoader(X, Y, batch_size=64, shuffle=True, seed=3, augment=True, padding=2, device="cuda")
    return DataLoader(TensorDataset(X, Y), batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(3))


def train(capture: Any, kind: str = "resident", epochs: int = 4, fused: bool = True, **options: Any) -> History:
    torch.manual_seed(5)
    network = quantize(Images(), X[:64], bits=(2, 4, 8)).cuda()
    network.fused = fused
    model = GatedModel(network, GatePrior(network, 0.02), len(X))
    guide = HardConcreteGuide(model.prior, init=2.0)
    settings: dict[str, Any] = {"recipe": Recipe(gate_lr=0.02), "seed": 2, "progress": False, "capture": capture}
    settings |= options
    history = fit(model, guide, loader(kind), loader(kind), epochs=epochs, **settings)
    assert all(p.is_contiguous() for p in network.parameters())
    return history


def losses(history: History) -> list[float]:
    return [record.loss for record in history]


@pytest.mark.parametrize("kind", ["resident", "streamed"])
@pytest.mark.parametrize("fused", [True, False])
def test_captured_steps_train_as_steps_one_by_one(kind: str, fused: bool) -> None:
    expected = train(False, kind, fused=fused)
    assert losses(train(True, kind, fused=fused)) == pytest.approx(losses(expected), rel=0.02)


def test_fused_norms_train_as_unfused_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def count(*args: Any, **options: Any) -> Any:
        used.append(1)
        return norm.normalize_and_quantize(*args, **options)

    monkeypatch.setattr("pyro_bbits.insertion.context.normalize_and_quantize", count)
    fused = train(False)
    assert len(used) >= 2 * 4
    assert losses(fused) == pytest.approx(losses(train(False, fused=False)), rel=0.02)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_every_arithmetic_is_captured_and_learns(precision: Any) -> None:
    history = losses(train(True, precision=precision, epochs=6))
    assert history[-1] < history[0]
    assert history == pytest.approx(losses(train(False, precision="float32", epochs=6)), rel=0.1)


def test_a_plain_network_is_captured_too() -> None:
    results = []
    for capture in (True, False):
        torch.manual_seed(0)
        model = PlainModel(Images().cuda(), len(X))
        history = fit(model, EmptyGuide(), loader("resident"), epochs=3, seed=1, progress=False, capture=capture)
        results.append(losses(history))
    assert results[0] == pytest.approx(results[1], rel=0.02)


def test_a_step_that_waits_for_the_gpu_is_taken_one_by_one_and_leaves_no_harm() -> None:
    torch.manual_seed(0)
    model = PlainModel(Reading().cuda(), len(X))
    with pytest.warns(UserWarning, match=r"not captured in a CUDA graph: .*test_cuda\.py:\d+ waits for the GPU"):
        fit(model, EmptyGuide(), loader("resident"), epochs=2, seed=1, progress=False)
    assert torch.rand(3, device="cuda").shape == (3,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(train(True, epochs=2)) == 2


def test_a_capture_that_fails_leaves_the_generator_usable() -> None:
    graphs = CudaGraphs(torch.device("cuda", torch.cuda.current_device()))
    values = torch.zeros(3, device="cuda")
    torch.manual_seed(7)
    expected = torch.rand(3, device="cuda")

    def step() -> None:
        torch.rand(3, device="cuda")
        values.sum().item()

    torch.manual_seed(7)
    with graphs.working(), pytest.raises(NotCapturedError):
        graphs.capture(step)
    assert torch.equal(torch.rand(3, device="cuda"), expected)


def test_a_capture_that_fails_leaves_the_allocator_usable() -> None:
    """Memory that another stream has used comes back: the allocator does not take a capture to be under way."""
    device = torch.device("cuda", torch.cuda.current_device())
    graphs, other = CudaGraphs(device), torch.cuda.Stream(device)
    values = torch.zeros(3, device=device)

    def read() -> None:
        values.sum().item()

    def count() -> None:
        values.add_(1)

    with graphs.working(), pytest.raises(NotCapturedError, match="captur"):
        graphs.capture(read)
    before = torch.cuda.memory_stats(device)["active_bytes.all.current"]
    used = torch.empty(2**22, device=device)
    used.record_stream(other)
    del used
    torch.cuda.synchronize(device)
    torch.empty(2**20, device=device)  # looks at what is free again
    assert torch.cuda.memory_stats(device)["active_bytes.all.current"] <= before
    with graphs.working():
        graphs.capture(count)()
    assert values.tolist() == [1, 1, 1]


def test_an_interrupted_capture_leaves_the_generator_usable() -> None:
    graphs = CudaGraphs(torch.device("cuda", torch.cuda.current_device()))

    def step() -> None:
        torch.rand(3, device="cuda")
        raise KeyboardInterrupt

    with graphs.working(), pytest.raises(KeyboardInterrupt):
        graphs.capture(step)
    assert torch.rand(3, device="cuda").shape == (3,)


def test_a_temperature_that_changes_between_epochs_reaches_the_graph() -> None:
    def run(capture: Any) -> list[float]:
        guides: list[HardConcreteGuide] = []

        def cool(record: Any) -> None:
            guides[0].temperature = 0.2

        torch.manual_seed(5)
        network = quantize(Images(), X[:64], bits=(2, 4, 8)).cuda()
        model = GatedModel(network, GatePrior(network, 0.02), len(X))
        guides.append(HardConcreteGuide(model.prior, init=0.0))
        recipe = Recipe(weight_lr=1e-12, gate_lr=1e-12, range_lr=1e-12)
        history = fit(
            model, guides[0], loader("resident"), epochs=4, recipe=recipe, seed=2, progress=False, capture=capture,
            on_epoch=cool,
        )  # fmt: skip
        return losses(history)

    assert run(True) == pytest.approx(run(False), rel=0.01)
