"""The example runs from a shell, tells what it found, and draws its figure."""

import subprocess
import sys
from pathlib import Path

from matplotlib.image import imread

EXAMPLE = Path(__file__).parents[2] / "examples" / "exact_posterior.py"


def test_example_prints_the_table_and_draws(tmp_path: Path) -> None:
    figure = tmp_path / "new" / "figure.png"
    command = [sys.executable, "-W", "error", str(EXAMPLE), "--steps", "3", "--seed", "1", "--output", str(figure)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "64 configurations" in done.stdout
    for name in ("hard concrete, refined", "straight-through", "score function", "simplified penalty"):
        assert name in done.stdout
    assert min(imread(figure).shape[:2]) > 400
