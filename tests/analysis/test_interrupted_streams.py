"""A signal to all processes of a terminal or a job ends the workers that read pictures, not what was trained."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_whole_group_leaves_a_usable_folder(tmp_path: Path, kind: signal.Signals, code: int) -> None:
    for label in ("dark", "light"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for number in range(60):
            shade = number + (120 if label == "light" else 0)
            Image.new("RGB", (40, 40), (shade, shade, shade)).save(tmp_path / "pictures" / label / f"{number}.png")
    run = tmp_path / "run"
    command = [sys.executable, "-m", "pyro_bbits", "train", "--data", str(tmp_path / "pictures"), "--output", str(run)]
    command += ["--network", "resnet20", "--image-size", "32", "--epochs", "200", "--no-baseline", "--quiet"]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 200
        while not any(run.glob("checkpoints/*/epoch-*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, kind)
        _, err = process.communicate(timeout=100)
    assert process.returncode == code, err
    assert "holds what was trained so far" in err
    assert {"weights.safetensors", "posterior.safetensors", "bits.json"} <= {path.name for path in run.iterdir()}
