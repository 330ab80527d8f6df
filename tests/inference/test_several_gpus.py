"""Two GPUs train as one; run as a script, this file is one of their processes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyro_bbits import GatePrior, quantize
from pyro_bbits.data import TensorLoader
from pyro_bbits.inference import HardConcreteGuide, Recipe, fit
from pyro_bbits.models import GatedModel

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.filterwarnings(
        "ignore:(every channel of|channel gates are undecided|the held-out accuracy with):UserWarning"
    ),
]


def images(count: int = 512) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, (x[:, 0].mean((1, 2)) > x[:, 1].mean((1, 2))).long()


def train(capture: bool, rank: int, size: int) -> dict[str, Tensor]:
    """State at the end, and the losses of the epochs."""
    device = torch.device("cuda", rank)
    torch.manual_seed(5)
    x, y = images()
    layers = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Flatten()
    network = quantize(nn.Sequential(*layers, nn.Linear(24 * 36, 2)), x[:64], bits=(2, 4, 8)).to(device)
    model = GatedModel(network, GatePrior(network, 0.02), len(x))
    guide = HardConcreteGuide(model.prior, init=2.0)
    loader = TensorLoader(x, y, 64, shuffle=True, seed=3, device=device, rank=rank, world_size=size)
    options: dict[str, Any] = {"recipe": Recipe(gate_lr=0.02), "seed": 2, "progress": False, "capture": capture}
    history = fit(model, guide, loader, [(x, y)], epochs=5, precision="float32", compile=False, **options)
    state = nn.ModuleList([model, guide]).state_dict()
    found = {name: value.cpu().contiguous().clone() for name, value in state.items()}
    return found | {"losses": torch.tensor([record.loss for record in history])}


def main(capture: bool, rank: int, folder: Path) -> None:
    """Train as one of two processes, and write the end."""
    torch.cuda.set_device(rank)
    store = f"file://{folder}/store"
    dist.init_process_group("cuda:nccl,cpu:gloo", init_method=store, rank=rank, world_size=2)
    save_file(train(capture, rank, 2), folder / f"{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("capture", [False, True])
def test_two_gpus_train_as_one(tmp_path: Path, capture: bool) -> None:
    """The processes agree to the last bit; with one GPU up to the order of sums, which training amplifies."""
    expected = train(False, 0, 1)["losses"]
    command = [sys.executable, "-W", "ignore::FutureWarning", __file__, "captured" if capture else "one by one"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    try:
        for process in processes:
            _, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
    finally:
        for process in processes:
            process.kill()
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.testing.assert_close(first["losses"], expected, rtol=0.02, atol=0)


if __name__ == "__main__":
    main(sys.argv[1] == "captured", int(sys.argv[2]), Path(sys.argv[3]))
