"""The names that are promised are there, load late, and lead from a network of one's own to its configuration."""

import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_bbits as bb
from pyro_bbits import analysis, inference, models
from pyro_bbits.analysis import GatePosterior, plot_gates
from pyro_bbits.inference import HardConcreteGuide, fit
from pyro_bbits.models import GatedModel


@pytest.mark.parametrize("room", [bb, models, inference, analysis], ids=lambda room: str(room.__name__))
def test_every_promised_name_is_there(room: object) -> None:
    names: list[str] = room.__all__  # type: ignore[attr-defined]
    assert len(set(names)) == len(names)
    for name in names:
        assert getattr(room, name) is not None
        assert name in dir(room)


def test_promised_names_are_the_ones_of_their_modules() -> None:
    assert sorted(bb.__all__) == sorted(bb._HOMES)
    for name, module in bb._HOMES.items():
        assert name in sys.modules[f"pyro_bbits.{module}"].__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'pyro_bbits' has no attribute 'Quantize'"):
        bb.Quantize  # noqa: B018
    with pytest.raises(ImportError, match="Quantize"):
        from pyro_bbits import Quantize  # noqa: F401


def test_dir_is_complete_before_anything_is_loaded() -> None:
    code = "import pyro_bbits as bb; print(set(bb.__all__) <= set(dir(bb)), dir(bb) == sorted(set(dir(bb))))"
    assert run_python(code) == "True True"


def run_python(code: str) -> str:
    """Output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_imports_are_late() -> None:
    """The package itself loads nothing; its analysis neither ArviZ nor pyplot, which would choose a display."""
    heavy = "[m for m in ('torch', 'pyro', 'pandas', 'matplotlib', 'arviz') if m in sys.modules]"
    assert run_python(f"import sys, pyro_bbits; print({heavy})") == "[]"
    late = "[m for m in ('arviz', 'matplotlib.pyplot', 'sklearn', 'datasets') if m in sys.modules]"
    assert run_python(f"import sys, pyro_bbits.analysis; pyro_bbits.quantize; print({late})") == "[]"


class MyNetwork(nn.Module):
    """A network that this package has never seen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.second, self.head = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        logits: Tensor = self.head((x + F.relu(self.second(x))).mean((2, 3)))
        return logits


def test_the_lines_of_the_readme(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 2
    images = torch.randn(96, 1, 6, 6, generator=generator) * 0.3 + labels[:, None, None, None]
    loader = list(zip(images.split(16), labels.split(16), strict=True))
    my_network = MyNetwork()

    net = bb.quantize(my_network, example_inputs=images[:64])
    prior = bb.GatePrior(net, mu=0.1, cost="bops")
    model = GatedModel(net, prior, num_data=len(images))
    guide = HardConcreteGuide(prior)

    history = fit(model, guide, loader, loader, epochs=3, progress=False, seed=0)
    elbo = TraceMeanField_ELBO()(model, guide)
    assert elbo(images, labels).item() > 0

    posterior = GatePosterior.from_guide(guide, net)
    table = posterior.table()
    figure = plot_gates(posterior)
    config = posterior.map_configuration()
    config.save(tmp_path / "bits.json")

    assert len(history) == 3 and history[-1].bits == tuple(config.bits().values())
    assert list(table.index) == ["first", "second", "head"] and isinstance(figure, Figure)
    assert not len(pyro.get_param_store()), "nothing global is trained"

    my_network.load_state_dict(net.net.state_dict())
    deployed = bb.BitConfiguration.load(tmp_path / "bits.json").apply(my_network)
    gated = net.eval()(images, gates=guide.hard_gates())
    torch.testing.assert_close(deployed(images), gated, rtol=1e-4, atol=1e-5)
