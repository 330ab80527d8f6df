"""What a figure depends on besides the code: processor, versions, and the command that asked for it."""

import os
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = ["command_line", "hardware", "pick_device", "versions"]

ENVIRONMENT = ("OMP_NUM_THREADS", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "CUDA_VISIBLE_DEVICES")
"""Variables that change what is measured; those that are set become part of the command."""

PACKAGES = ("pyro-bbits", "torch", "triton", "pyro-ppl")


def command_line(module: str, argv: Sequence[str]) -> str:
    """The command that reproduces a run, with the variables that matter in front."""
    surroundings = [f"{name}={os.environ[name]}" for name in ENVIRONMENT if name in os.environ]
    return " ".join([*surroundings, shlex.join(["python", "-m", module, *argv])])


def hardware(device: torch.device) -> str:
    """Name of the processor, with the number of threads on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = torch.__version__ if name == "torch" else version(name)
        except PackageNotFoundError:
            continue
    return found


def pick_device(name: str) -> torch.device:
    """The device `cpu`, `cuda`, or with `auto` a GPU if there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("device 'cuda' was asked for, but PyTorch sees no GPU; use 'auto' or 'cpu'.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
