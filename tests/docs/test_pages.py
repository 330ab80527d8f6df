"""The Python on the pages and in the README runs, and prints what the pages say it prints."""

import doctest
import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pyro_bbits import BitConfiguration, freeze, quantize
from pyro_bbits.analysis.export import export_onnx
from pyro_bbits.inference import History

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(
    r"(?P<fresh><!-- fresh process -->\n+)?(?P<served><!-- onnxruntime alone -->\n+)?"
    r"^```python\n(?P<code>.*?)^```\n(?:\n*```text\n(?P<output>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
MY_PACKAGE = """
from torch import nn
MyNetwork = lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
"""
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """A block of code, and what it prints where the page says so in a `text` block right after it."""

    code: str
    output: str | None
    fresh: bool
    served: bool

    def run(self, namespace: dict[str, Any], folder: Path) -> None:
        printed = self._in_fresh_process(folder) if self.fresh else self._here(namespace)
        if self.output is not None and not doctest.OutputChecker().check_output(self.output, printed, FLAGS):
            pytest.fail(f"this block\n\n{self.code}\nprints\n\n{printed}\nand the page says\n\n{self.output}")

    def _here(self, namespace: dict[str, Any]) -> str:
        with redirect_stdout(io.StringIO()) as printed:
            exec(compile(self.code, "<page>", "exec"), namespace)
        return printed.getvalue()

    def _in_fresh_process(self, folder: Path) -> str:
        done = subprocess.run([sys.executable, "-c", self.code], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout


def blocks(page: Path) -> list[Block]:
    matches = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Block(m["code"], m["output"], m["fresh"] is not None, m["served"] is not None) for m in matches]


@pytest.mark.filterwarnings("ignore:Encountered NaN")  # one page shows what happens then
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.stem))
def test_the_code_of_a_page_runs_and_prints_what_is_said(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        block.run(namespace, tmp_path)


def test_the_code_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a network and data under the names that the README takes for granted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_package.py").write_text(MY_PACKAGE)
    labels = torch.arange(96) % 2
    images = 0.3 * torch.randn(96, 8) + labels[:, None]
    loader = list(zip(images.split(16), labels.split(16), strict=True))
    namespace: dict[str, Any] = {"images": images, "train_loader": loader, "validation_loader": loader}
    for block in blocks(ROOT / "README.md"):
        if not block.served:
            block.run(namespace, tmp_path)
    assert isinstance(namespace["history"], History)


BLOCKED = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "pyro", "pyro_bbits"):
            raise ModuleNotFoundError(f"{name} is not to be imported")

sys.meta_path.insert(0, Absent())
"""


def test_a_deployed_network_is_served_by_onnxruntime_alone(tmp_path: Path) -> None:
    """As the README says, in a process that has neither torch nor this library."""
    torch.manual_seed(0)
    net, pixels = (
        nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)),
        255 * torch.rand(20, 3, 2, 2),
    )
    inputs = (pixels.floor() / 255 - 0.5) / 0.25
    network = quantize(net, inputs, bits=(2, 4, 8))
    configuration = BitConfiguration.from_gates(network, network.open_gates())
    frozen = freeze(nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)), configuration)
    names, wide = ["apple", "pear", "plum"], [[[0.5]], [[0.5]], [[0.5]]]
    about = {"classes": names, "mean": wide, "std": [[[0.25]], [[0.25]], [[0.25]]]}
    export_onnx(
        frozen, tmp_path / "deploy" / "network.onnx", inputs, about={k: json.dumps(v) for k, v in about.items()}
    )
    np.save(tmp_path / "pixels.npy", pixels.byte().numpy())
    (code,) = [block.code for block in blocks(ROOT / "README.md") if block.served]
    assert len([line for line in code.splitlines() if line and not line.startswith("import")]) <= 10
    done = subprocess.run([sys.executable, "-c", BLOCKED + code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = [names[k] for k in frozen(inputs).argmax(1)]
    assert re.findall(r"\w+", done.stdout) == expected


def test_every_fence_of_python_is_found() -> None:
    """Indented or otherwise odd ones would be left untested."""
    for page in [*PAGES, ROOT / "README.md"]:
        assert page.read_text(encoding="utf-8").count("```python") == len(blocks(page)), page.name


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("*.md")], ids=lambda page: str(page.stem))
def test_links_lead_to_files(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert not missing
