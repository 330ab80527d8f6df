"""A compiled network trains as it does uncompiled, in runs that are long enough to pay for it."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyro_bbits import GatePrior, quantize
from pyro_bbits.inference import EmptyGuide, HardConcreteGuide, Recipe, fit
from pyro_bbits.inference.compiled import CompiledNetwork, pays_to_compile
from pyro_bbits.models import GatedModel, PlainModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:(every channel of|channel gates are undecided):UserWarning"),
    # what the compiler itself does, and hides unless warnings are errors
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

X = torch.rand(22, 1, 6, 6, generator=torch.Generator().manual_seed(1))
Y = (X.mean((1, 2, 3)) * 8).long() % 3
BATCHES = [(X[:8], Y[:8]), (X[8:16], Y[8:16]), (X[16:], Y[16:])]


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.norm(self.conv(x))).flatten(1))
        return logits


def make() -> tuple[GatedModel, HardConcreteGuide]:
    torch.manual_seed(5)
    network = quantize(Net(), X, bits=(2, 4, 8))
    model = GatedModel(network, GatePrior(network, 0.05), len(X))
    return model, HardConcreteGuide(model.prior, init=1.0)


def losses(compile_it: Any, batches: Any = BATCHES) -> list[float]:
    model, guide = make()
    options: dict[str, Any] = {"recipe": Recipe(gate_lr=0.05), "seed": 2, "progress": False}
    return [r.loss for r in fit(model, guide, batches, BATCHES, epochs=3, compile=compile_it, **options)]


def test_it_pays_in_long_runs_of_quantized_networks_alone() -> None:
    model, _ = make()
    assert not pays_to_compile(model, X, steps=1000)
    assert pays_to_compile(model, X, steps=10**8)
    assert not pays_to_compile(PlainModel(Net(), len(X)), X, steps=10**8)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_is_training(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Traced without a break, by the quantizers' body for compilers; gates are drawn outside, and so alike."""
    counted: list[int] = []
    original = CompiledNetwork.running

    def running(self: CompiledNetwork, rows: int) -> Any:
        counted.append(rows)
        return original(self, rows)

    monkeypatch.setattr(CompiledNetwork, "running", running)
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend=backend, fullgraph=True))
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = losses(True)
    assert counted == [8, 8, 6] * 3
    assert compiled == pytest.approx(losses(False), rel=1e-3)
    assert len(counted) == 9


def test_the_network_is_as_it_was_afterwards() -> None:
    net = nn.Linear(2, 2)
    compiled = CompiledNetwork(net)
    with compiled.running(3):
        assert net._compiled_call_impl is not None
    assert net._compiled_call_impl is None
    with compiled.running(4):  # another size of batch
        assert net._compiled_call_impl is None


def test_where_compiling_fails_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr("torch.compile", partial(torch.compile, backend=backend))
    with pytest.warns(UserWarning, match="the network is not compiled .*; it runs as it is") as caught:
        assert losses(True) == pytest.approx(losses(False), rel=0.1)  # the failed pass has drawn gates
    assert sum("not compiled" in str(w.message) for w in caught) == 1


def test_an_error_of_the_network_itself_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Net):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise KeyError("mine")
            return super().forward(x)

    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="eager"))
    model = PlainModel(Wrong(), len(X))
    with pytest.raises(KeyError, match="mine"):
        fit(model, EmptyGuide(), BATCHES, epochs=1, progress=False, compile=True)
