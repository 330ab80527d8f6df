"""Quantize five networks of different kinds, train them a little, and show what was pruned and why not.

    python examples/any_network.py                     # all five, about two minutes on two CPU cores
    python examples/any_network.py u-net --epochs 20

A U-Net with skip connections and transposed convolutions segments made pictures, a grouped one-dimensional network
tells made waves apart, and a ResNet, a MobileNetV2 and a vision transformer read scikit-learn's handwritten digits.
For each one the configuration is saved, loaded and applied to a fresh float network, and both are compared.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pyro_bbits as bb
from pyro_bbits.analysis import GatePosterior
from pyro_bbits.analysis.report import print_configuration
from pyro_bbits.data import TensorLoader, load_data
from pyro_bbits.inference import HardConcreteGuide, fine_tune, fit
from pyro_bbits.models import GatedModel, MobileNetV2, ResNet20, ViT

Data = tuple[Tensor, Tensor]


class UNet(nn.Module):
    """Two steps down, two up by transposed convolutions, a skip connection at each."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1, self.norm1 = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
        self.down2, self.norm2 = nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width)
        self.bottom, self.norm3 = nn.Conv2d(2 * width, 4 * width, 3, 2, 1), nn.BatchNorm2d(4 * width)
        self.up2, self.merge2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.Conv2d(4 * width, 2 * width, 3, 1, 1)
        self.up1, self.merge1 = nn.ConvTranspose2d(2 * width, width, 2, 2), nn.Conv2d(2 * width, width, 3, 1, 1)
        self.mask = nn.Conv2d(width, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        fine = F.relu(self.norm1(self.down1(image)))
        middle = F.relu(self.norm2(self.down2(fine)))
        x = F.relu(self.norm3(self.bottom(middle)))
        x = F.relu(self.merge2(torch.cat([F.relu(self.up2(x)), middle], 1)))
        x = F.relu(self.merge1(torch.cat([F.relu(self.up1(x)), fine], 1)))
        logits: Tensor = self.mask(x)
        return logits


class Waves(nn.Module):
    """Grouped and depthwise convolutions along time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv1d(1, 16, 5, padding=2), nn.BatchNorm1d(16)
        self.grouped, self.norm2 = nn.Conv1d(16, 32, 3, 2, 1, groups=4), nn.BatchNorm1d(32)
        self.depthwise, self.norm3 = nn.Conv1d(32, 32, 3, padding=1, groups=32), nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.stem(x)))
        x = F.relu(self.norm2(self.grouped(x)))
        logits: Tensor = self.head(F.relu(self.norm3(self.depthwise(x))).amax(2))
        return logits


def discs(count: int = 512) -> Data:
    """Noisy pictures of a bright disc, and which pixels belong to it."""
    generator = torch.Generator().manual_seed(0)
    centre, radius = 4 + 8 * torch.rand(count, 2, 1, 1, generator=generator), 2 + 3 * torch.rand(count, 1, 1)
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    inside = (rows - centre[:, 0]) ** 2 + (columns - centre[:, 1]) ** 2 < radius**2
    return (inside + 0.4 * torch.randn(count, 16, 16, generator=generator))[:, None], inside.long()


def waves(count: int = 512) -> Data:
    """Noisy waves of four frequencies."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    phase = 6.3 * torch.rand(count, 1, generator=generator)
    signals = torch.sin((1 + labels[:, None]) * torch.linspace(0, 6.3, 32) + phase)
    return (signals + 0.3 * torch.randn(count, 32, generator=generator))[:, None], labels


def digits() -> Data:
    """Handwritten digits of 8 x 8 pixels, training split."""
    split = load_data("digits").train
    return split.inputs, split.targets


@dataclass(frozen=True)
class Case:
    """A network and data for it."""

    make: Callable[[], nn.Module]
    data: Callable[[], Data]


CASES = {
    "u-net": Case(UNet, discs),
    "waves": Case(Waves, waves),
    "resnet": Case(lambda: ResNet20(1, 10, width=8), digits),
    "mobilenet": Case(lambda: MobileNetV2(1, 10, width=0.25, stem="small", dropout=0.0), digits),
    "vit": Case(lambda: ViT(1, 10, image_size=8, patch_size=2, width=48, depth=2, heads=2), digits),
}


def run(case: Case, epochs: int, mu: float, seed: int, folder: Path, progress: bool = True) -> tuple[float, float]:
    """Quantize, train, configure, save, load, apply.

    Returns:
        Held-out accuracy of the fine-tuned network in percent (of pixels, for a segmentation), and the largest
        difference between its outputs and those of the applied configuration.
    """
    torch.manual_seed(seed)
    x, y = case.data()
    split = 4 * len(x) // 5
    train = TensorLoader(x[:split], y[:split], batch_size=32, shuffle=True, seed=seed)
    held_out = TensorLoader(x[split:], y[split:], batch_size=256)

    network = bb.quantize(case.make(), x[:32])
    prior = bb.GatePrior(network, mu=mu)
    model, guide = GatedModel(network, prior, num_data=split), HardConcreteGuide(prior)
    fit(model, guide, train, held_out, epochs=epochs, seed=seed, progress=progress)
    posterior = GatePosterior.from_guide(guide, network)
    tuned = fine_tune(model, guide, train, held_out, epochs=max(1, epochs // 4), progress=progress)
    if progress:
        print_configuration(posterior)

    GatePosterior.from_guide(guide, network).map_configuration().save(folder / "bits.json")
    save_file(network.net.state_dict(), folder / "weights.safetensors")
    fresh = case.make()
    fresh.load_state_dict(load_file(folder / "weights.safetensors"))
    applied = bb.BitConfiguration.load(folder / "bits.json").apply(fresh)
    with torch.inference_mode():
        expected = network.eval()(x[split:], gates=guide.hard_gates())
        difference = (applied(x[split:]) - expected).abs().max()
    accuracy = tuned[-1].validation_accuracy
    assert accuracy is not None
    return accuracy, difference.item()


def main() -> None:
    """Run the networks that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"{', '.join(CASES)}; all if none is named")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the data (default: %(default)s)")
    parser.add_argument("--mu", type=float, default=0.03, help="strength of the prior (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if unknown := set(arguments.networks) - set(CASES):
        parser.error(f"there is no network {sorted(unknown)[0]!r}; choose from {', '.join(CASES)}")
    for name in arguments.networks or CASES:
        print(f"\n{name}")
        with TemporaryDirectory() as folder:
            accuracy, difference = run(CASES[name], arguments.epochs, arguments.mu, arguments.seed, Path(folder))
        print(f"held-out accuracy {accuracy:.2f} %; outputs of the applied configuration differ by {difference:.1e}")


if __name__ == "__main__":
    main()
