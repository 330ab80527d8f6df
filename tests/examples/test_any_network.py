"""Each kind of network is quantized, trained, saved, loaded and applied, and computes the same."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "any_network.py"


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("any_network", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["any_network"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "chance"),
    [
        ("u-net", 55.0),
        ("waves", 25.0),
        ("resnet", 10.0),
        pytest.param("mobilenet", 0.0, marks=pytest.mark.slow),  # two epochs teach it nothing yet
        ("vit", 10.0),
    ],
)
def test_the_applied_configuration_computes_what_was_trained(name: str, chance: float, tmp_path: Path) -> None:
    example = load_example()
    accuracy, difference = example.run(example.CASES[name], 2, 0.01, 0, tmp_path, progress=False)
    assert difference == 0
    assert accuracy > chance


def test_unknown_networks_are_named() -> None:
    done = subprocess.run([sys.executable, str(EXAMPLE), "lstm"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no network 'lstm'; choose from u-net, waves, resnet, mobilenet, vit" in done.stderr
