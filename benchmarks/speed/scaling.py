"""How the cost of gates and quantizers grows: with the number of tensors, and with the number of channel gates.

    python -m benchmarks.speed.scaling
    python -m benchmarks.speed.scaling --curves chain --threads 1

`gates` trains the gates alone: prior, guide, ELBO and optimizers around a linear layer that hands every gate a
gradient, against the linear layer without gates. `chain` trains chains of linear layers of 64 features, each with its
quantizers, against the same chain in float. Both go through `fit`, as `step` does.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.command import Session, make_parser, start
from benchmarks.speed.training import MODES, Cost, gated, plain, summary, timed_fit
from pyro_bbits import BitLadder, GateLayout, GatePrior, GateValues
from pyro_bbits.data import TensorLoader
from pyro_bbits.gates import ChannelGroup
from pyro_bbits.inference import HardConcreteGuide
from pyro_bbits.models import AbstractModel, GatedModel
from pyro_bbits.quantizer import Quantizers

FEATURES = 64
SIZES: tuple[tuple[int, int], ...] = ((8, 1_000), (32, 1_000), (128, 1_000), (500, 1_000), (32, 10_000), (32, 100_000))
CHAINS: tuple[int, ...] = (8, 32, 128, 500)
QUICK, QUICK_CHAINS = ((4, 100),), (4,)


class GatesAlone(nn.Module):
    """What has the gates of a network and multiplies nothing with them: a linear layer and the sum of the gates.

    Arguments:
        tensors: Number of quantized tensors; every second one is a weight whose channels have gates.
        channels: Number of channel gates.
    """

    def __init__(self, tensors: int, channels: int) -> None:
        super().__init__()
        weights = range(0, tensors, 2)
        shares = [channels // len(weights) + (i < channels % len(weights)) for i in range(len(weights))]
        groups = tuple(ChannelGroup(f"layer{w}", w, share) for w, share in zip(weights, shares, strict=True))
        self.layout = GateLayout(BitLadder(), tuple(f"tensor{i}" for i in range(tensors)), groups)
        self.quantizers = Quantizers([1.0] * tensors, [True] * tensors)
        self.layers = self.float_layers = ()
        self.linear = nn.Linear(FEATURES, 10)

    def forward(self, x: Tensor, gates: GateValues) -> Tensor:
        logits: Tensor = self.linear(x)
        return logits + 1e-3 * (gates.channels.mean() + gates.tensors.mean() + self.quantizers.ranges.mean())

    def open_gates(self) -> GateValues:
        """All gates open."""
        like, shape = self.quantizers.log_range, (len(self.layout.tensors), len(self.layout.ladder.residuals))
        return GateValues(like.new_ones(self.layout.num_channels), like.new_ones(shape))


def gates_alone(tensors: int, channels: int, train: TensorLoader) -> tuple[AbstractModel, nn.Module]:
    """Model and guide of so many gates."""
    net: Any = GatesAlone(tensors, channels).to(train.inputs.device)
    prior = GatePrior(net, mu=0.01, cost="constant")
    return GatedModel(net, prior, num_data=train.num_data), HardConcreteGuide(prior)


def chain(tensors: int, device: torch.device) -> nn.Sequential:
    """Linear layers with so many quantized tensors: each has a weight, and all but the first an input."""
    layers = [nn.Linear(FEATURES, FEATURES) for _ in range(tensors // 2 + 1)]
    return nn.Sequential(*(m for layer in layers for m in (layer, nn.ReLU()))).to(device)


def measure(session: Session, curve: str, tensors: int, channels: int, train: TensorLoader, arguments: Any) -> None:
    """One point of a curve: with gates and without, in turn."""
    options, device = MODES[arguments.mode] | {"precision": arguments.precision}, session.device
    costs: dict[str, list[Cost]] = {"plain": [], "gated": []}
    found = channels
    for _ in range(arguments.rounds):
        for variant, parts in costs.items():
            torch.manual_seed(0)
            net = nn.Linear(FEATURES, 10).to(device) if curve == "gates" else chain(tensors, device)
            if variant == "plain":
                model, guide = plain(net, train.inputs)
            elif curve == "gates":
                model, guide = gates_alone(tensors, channels, train)
            else:
                model, guide = gated(net, train.inputs)
            found = len(guide.channel_logits) if isinstance(guide, HardConcreteGuide) else found
            parts.append(timed_fit(model, guide, train, epochs=arguments.epochs, options=options))
    reference, total = (summary(costs[variant]).timing for variant in ("plain", "gated"))
    session.add(
        "scaling",
        f"{curve}: {tensors} tensors, {found} channels",
        f"gated, {arguments.mode}",
        batch=train.plan.batch_size,
        dtype=arguments.precision,
        ms=total.ms,
        ms_low=total.low,
        ms_high=total.high,
        ratio_to_plain=total.ms / reference.ms,
        details={"plain ms": reference.ms, "added ms": total.ms - reference.ms},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the curves."""
    parser = make_parser(__doc__)
    parser.add_argument("--curves", nargs="+", choices=("gates", "chain"), default=["gates", "chain"])
    parser.add_argument("--mode", choices=tuple(MODES), default="auto")
    parser.add_argument("--precision", choices=("float32", "tf32", "bf16"), default="float32")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=5, help="per round; the first does not count")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50, help="steps of an epoch (default: %(default)s)")
    session, arguments = start("benchmarks.speed.scaling", parser, argv)
    sizes, chains = (QUICK, QUICK_CHAINS) if arguments.quick else (SIZES, CHAINS)
    if arguments.quick:
        arguments.batch, arguments.epochs, arguments.rounds, arguments.steps = 4, 2, 1, 2
    torch.manual_seed(0)
    samples = arguments.batch * arguments.steps
    x, y = torch.randn(samples, FEATURES), torch.randint(10, (samples,))
    train = TensorLoader(x, y, arguments.batch, shuffle=True, device=session.device)
    for tensors, channels in sizes if "gates" in arguments.curves else ():
        measure(session, "gates", tensors, channels, train, arguments)
    for tensors in chains if "chain" in arguments.curves else ():
        measure(session, "chain", tensors, 0, train, arguments)
    session.print_table()


if __name__ == "__main__":
    main()
