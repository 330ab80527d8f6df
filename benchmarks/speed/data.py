"""Training on pictures from disk: images per second, and whether the reading or the network is the limit.

    python -m benchmarks.speed.data                                   # 20,000 made JPEGs, ResNet-18 at 224 pixels
    python -m benchmarks.speed.data --workers 2 8 15 --precision bf16
    python -m benchmarks.speed.data --cache                           # pictures are decoded once
    python -m benchmarks.speed.data --folder imagenet/train           # one's own class folders

Three things are timed in one run: reading and batching alone (batches come to the device and are thrown away), the
training step alone (batches that already lie on the device), and both together through `fit`. The share of time that
the device was busy is the time of the step alone over that of both together. The first epoch, in which workers start,
graphs are captured and code is compiled, does not count.
"""

import statistics
import time
import warnings
from collections.abc import Iterable, Sequence
from itertools import islice, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.speed.command import Session, make_parser, start
from benchmarks.speed.timing import clock
from benchmarks.speed.training import MODES
from pyro_bbits import GatePrior, quantize
from pyro_bbits.data import ImageFolderLoader, PictureFiles, TensorLoader
from pyro_bbits.data.workers import default_workers
from pyro_bbits.inference import EmptyGuide, HardConcreteGuide, fit
from pyro_bbits.models import NETWORKS, GatedModel, PlainModel, build_network

CLASSES = 10
RESIDENT = 8  # batches of the step alone
QUALITY = 90


def texture(seed: int, width: int, height: int) -> Image.Image:
    """A random picture with detail of all sizes: noise on grids of 4 to 256 cells, and a little on each pixel."""
    generator = torch.Generator().manual_seed(seed)
    image = 128 + 10 * torch.randn(1, 1, height, width, generator=generator)
    image = image.repeat(1, 3, 1, 1)
    for octave in range(2, 9):
        cells = torch.randn(1, 3, 2**octave * height // width + 1, 2**octave, generator=generator)
        image += 45 / 1.6 ** (octave - 2) * nn.functional.interpolate(cells, (height, width), mode="bicubic")
    return Image.fromarray(image[0].movedim(0, -1).clamp(0, 255).byte().numpy())


def make_folder(root: Path, images: int, distinct: int, width: int, height: int) -> None:
    """Write class folders with JPEGs, each of the distinct ones many times."""
    for label in range(CLASSES):
        (root / f"class-{label}").mkdir(parents=True)
    for number in range(min(images, distinct)):
        first = root / f"class-{number % CLASSES}" / f"{number}.jpg"
        texture(number, width, height).save(first, quality=QUALITY)
        content = first.read_bytes()
        for copy in range(number + distinct, images, distinct):
            (root / f"class-{copy % CLASSES}" / f"{copy}.jpg").write_bytes(content)


def reading_alone(files: PictureFiles, batch: int, options: dict[str, Any]) -> float:
    """Images per second of the workers in their second pass; what they prepare before it is not counted."""
    loader = ImageFolderLoader(files, batch, shuffle=True, augment=True, **options)
    for _ in loader:  # files come into memory, and workers to their speed
        pass
    started = None
    count = 0
    for x, _ in loader:
        if started is None:
            started = time.perf_counter()
        else:
            count += len(x)
    if not count or started is None:
        raise ValueError(f"reading is timed over two batches at least; got {len(loader)} of {batch} pictures.")
    return count / (time.perf_counter() - started)


def model_of(variant: str, net: nn.Module, examples: Tensor, num_data: int) -> tuple[Any, nn.Module]:
    """Model and guide of a variant."""
    if variant == "plain":
        return PlainModel(net, num_data), EmptyGuide()
    network = quantize(net, examples)
    prior = GatePrior(network, 0.01)
    return GatedModel(network, prior, num_data), HardConcreteGuide(prior)


def step_ms(variant: str, train: Any, network: str, classes: int, options: dict[str, Any]) -> list[float]:
    """Milliseconds per step of each epoch of `fit` but the first."""
    examples = next(iter(train))[0][:64]
    device, shape = examples.device, tuple(examples.shape[1:])
    torch.manual_seed(0)
    model, guide = model_of(variant, build_network(network, shape, classes).to(device), examples, train.num_data)
    ends = [clock(device)]
    fit(model, guide, train, progress=False, on_epoch=lambda record: ends.append(clock(device)), **options)
    return [1e3 * (later - sooner) / len(train) for sooner, later in islice(pairwise(ends), 1, None)]


def resident(batches: Iterable[tuple[Tensor, Tensor]], batch: int) -> TensorLoader:
    """Some batches, held on the device."""
    x, y = (torch.cat(parts) for parts in zip(*islice(batches, RESIDENT), strict=True))
    return TensorLoader(x, y, batch, shuffle=True, memory_format=torch.channels_last)


def measure(session: Session, files: PictureFiles, workers: int, cache: Path | None, arguments: Any) -> None:
    """Reading, step and both, with so many workers."""
    batch, network, classes = arguments.batch, arguments.network, len(files.class_names)
    place = {"workers": workers, "device": session.device, "cache": cache}
    options: dict[str, Any] = {"image_size": arguments.image_size} | place
    cached = "" if cache is None else ", decoded once"
    fitting = MODES[arguments.mode] | {"precision": arguments.precision, "epochs": arguments.epochs}
    read = reading_alone(files, batch, options)
    for variant in arguments.variants:
        train = ImageFolderLoader(files, batch, shuffle=True, augment=True, **options)
        alone = statistics.median(step_ms(variant, resident(train, batch), network, classes, fitting))
        times = step_ms(variant, train, network, classes, fitting)
        both, size = statistics.median(times), len(files) / len(train)
        session.add(
            "data",
            "image-folder",
            f"{network}, {variant}, {arguments.mode}, {workers} workers{cached}",
            batch=batch,
            dtype=arguments.precision,
            ms=both,
            ms_low=min(times),
            ms_high=max(times),
            details={
                "images/s": 1e3 * size / both,
                "reading alone, images/s": read,
                "step alone, images/s": 1e3 * size / alone,
                "device busy %": 100 * min(1.0, alone / both),
            },
        )
        limit = "reading" if read < 1e3 * size / alone else "the step"
        print(f"{variant}, {workers} workers: {1e3 * size / both:.0f} images/s; the limit is {limit}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is asked for."""
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, help="class folders with pictures (default: made ones)")
    parser.add_argument("--images", type=int, default=20_000, help="made pictures")
    parser.add_argument("--distinct", type=int, default=300, help="how many of them differ")
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--network", choices=tuple(NETWORKS), default="resnet18")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", nargs="+", type=int, default=[default_workers()])
    parser.add_argument("--cache", action="store_true", help="keep decoded pictures, in the folder of temporary files")
    parser.add_argument("--variants", nargs="+", choices=("plain", "gated"), default=["plain", "gated"])
    parser.add_argument("--mode", choices=tuple(MODES), default="auto")
    parser.add_argument("--precision", choices=("float32", "tf32", "bf16"), default="tf32")
    session, arguments = start("benchmarks.speed.data", parser, argv)
    if session.device.type == "cpu":
        arguments.precision = "float32"
    if arguments.quick:
        sizes = {"images": 20, "distinct": 10, "width": 60, "height": 45, "image_size": 8, "batch": 10, "epochs": 2}
        vars(arguments).update(sizes, network="digits-net", workers=[0])
    with TemporaryDirectory() as made, TemporaryDirectory() as kept, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of undecided gates, and of ranges that random data leave
        if arguments.folder is None:
            make_folder(Path(made), *(getattr(arguments, k) for k in ("images", "distinct", "width", "height")))
        files = PictureFiles.of(arguments.folder or made)
        for workers in arguments.workers:
            measure(session, files, workers, Path(kept, "cache") if arguments.cache else None, arguments)
    session.print_table()


if __name__ == "__main__":
    main()
