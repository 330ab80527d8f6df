"""The fused draw of all gates agrees with PyTorch's own operations: values, KL, and gradients in every logit."""

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_bbits.distributions import AbstractRelaxedGate, HardConcrete, StraightThroughConcrete
from pyro_bbits.distributions.joint import GateBank, GateDraw, draw_gates, draw_gates_fused, draw_gates_plain
from pyro_bbits.kernels import use_body

pytestmark = pytest.mark.usefixtures("triton_runs")

posteriors = pytest.mark.parametrize("posterior", [HardConcrete, StraightThroughConcrete])

LAYOUTS: dict[str, tuple[tuple[int, ...], int]] = {
    "mixed": ((3, 0, 5, 1), 4),
    "no channel gates": ((0, 0), 2),
    "no residual gates": ((4, 2), 0),
    "several blocks": ((1300, 1, 0), 3),
}


def bank(
    device: str,
    layout: str = "mixed",
    *,
    posterior: type[AbstractRelaxedGate] = HardConcrete,
    simplified: bool = False,
    scattered: bool = False,
    temperature: float = 2 / 3,
) -> GateBank:
    """Random logits and prices, some pinned; `scattered` mixes the channels of all tensors."""
    sizes, rungs = LAYOUTS[layout]
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    owner = owner[torch.randperm(len(owner))] if scattered else owner
    channel_strength, strength = torch.rand(len(owner)), torch.rand(len(sizes), rungs)
    channel_strength[:2] = torch.tensor([0.0, math.inf])[: len(owner)]
    strength[0, :1], strength[-1, 1:] = 0.0, math.inf
    size = torch.tensor(sizes, dtype=torch.float32)
    logits = torch.randn(len(owner)), torch.randn(len(sizes), rungs)
    order = owner.argsort(stable=True).int()
    tables = (channel_strength, strength, owner, size > 0, size.clamp(min=1), order, size.cumsum(0).int())
    make: Any = GateBank
    built: GateBank = make(
        *(t.to(device).requires_grad_() for t in logits),
        *(t.to(device) for t in tables),
        posterior=posterior,
        temperature=temperature,
        simplified=simplified,
    )
    return built


def gradients(bank: GateBank, draw: GateDraw, which: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Of a sum of the outputs with weights that differ from gate to gate."""
    outputs = [t for i, t in enumerate(draw) if t is not None and t.numel() and i in which]
    weighted = sum((t * torch.linspace(-1, 2, t.numel(), device=t.device).view(t.shape)).sum() for t in outputs)
    leaves = [t for t in (bank.channel_logits, bank.tensor_logits) if t.numel()]
    found = torch.autograd.grad(weighted, leaves, allow_unused=True)  # type: ignore[arg-type]
    return tuple(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True))


def assert_same(bank: GateBank, num_data: int | None, which: tuple[int, ...] = (0, 1, 2)) -> None:
    """Sums of a hundred float32 terms in another order, and logarithms by another series: 1e-5."""
    noise = torch.rand(bank.size, device=bank.owner.device)
    plain, fused = draw_gates_plain(bank, noise, num_data), draw_gates_fused(bank, noise, num_data)
    for a, b in zip(plain, fused, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    expected = gradients(bank, plain, which)
    for a, b in zip(expected, gradients(bank, fused, which), strict=True):
        torch.testing.assert_close(b, a, rtol=2e-5, atol=1e-5)
    assert any(g.abs().sum() > 0 for g in expected)


@pytest.mark.parametrize(("posterior", "simplified"), [(HardConcrete, False), (StraightThroughConcrete, True)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_draw_is_the_plain_one(
    device: str, layout: str, simplified: bool, posterior: type[AbstractRelaxedGate]
) -> None:
    assert_same(bank(device, layout, posterior=posterior, simplified=simplified), 24)


@posteriors
def test_draw_without_a_kl_is_the_plain_one(device: str, posterior: type[AbstractRelaxedGate]) -> None:
    assert_same(bank(device, posterior=posterior, temperature=0.4), None)


@pytest.mark.parametrize("simplified", [False, True])
def test_channels_of_a_tensor_need_not_stand_together(device: str, simplified: bool) -> None:
    assert_same(bank(device, scattered=True, simplified=simplified), 24)


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1)])
def test_gradients_that_do_not_arrive_count_as_zero(device: str, which: tuple[int, ...]) -> None:
    assert_same(bank(device), 24, which)


def extreme(device: str, costs: list[float], logits: list[float]) -> GateBank:
    """A tensor with one channel and one residual gate for each pair of cost and logit."""
    pairs = torch.cartesian_prod(torch.tensor(costs), torch.tensor(logits)).to(device)
    count, ends = len(pairs), torch.arange(1, len(pairs) + 1, device=device)
    ones = torch.ones(count, device=device)
    return GateBank(
        pairs[:, 1].clone().requires_grad_(),
        pairs[:, 1:].clone().requires_grad_(),
        pairs[:, 0].clone(),
        pairs[:, :1].clone(),
        ends - 1,
        ones.bool(),
        ones,
        (ends - 1).int(),
        ends.int(),
    )


def test_extreme_prices_and_logits_keep_their_digits(device: str) -> None:
    """Against float64, over 9 orders of magnitude; relative to the larger of the KL and an entropy."""
    costs, logits = [1e-6, 0.3, 6000.0], [-1e4, -7.0, -1.5986, 40.0]
    single = extreme(device, costs, logits)
    noise = torch.full((single.size,), 0.3, device=device)
    make: Any = GateBank
    double: GateBank = make(
        *(t.detach().double().requires_grad_() for t in (single.channel_logits, single.tensor_logits)),
        single.channel_strength.double(),
        single.strength.double(),
        *(single.owner, single.prunable, single.group_size.double(), single.order, single.ends),
    )
    found, exact = draw_gates_fused(single, noise, 1), draw_gates_plain(double, noise.double(), 1)
    assert found.kl is not None and exact.kl is not None
    torch.testing.assert_close(found.kl.double(), exact.kl, rtol=2e-6, atol=1e-6)
    for a, b in zip(gradients(single, found, (2,)), gradients(double, exact, (2,)), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_nan_logits_stay_visible(device: str) -> None:
    """In the values and in the KL: training has to notice."""
    broken = bank(device)
    with torch.no_grad():
        broken.channel_logits[3], broken.tensor_logits[2, 1] = math.nan, math.nan
    draw = draw_gates_fused(broken, torch.rand(broken.size, device=device), 24)
    assert draw.kl is not None
    assert draw.channels[3].isnan() and draw.kl[2].isnan() and draw.kl[0].isfinite()


@posteriors
def test_noise_at_its_end_unpins_no_gate(device: str, posterior: type[AbstractRelaxedGate]) -> None:
    pinned = bank(device, posterior=posterior)
    for end in (0.0, 1.0):
        draw = draw_gates_fused(pinned, torch.full((pinned.size,), end, device=device), 24)
        assert draw.channels[:2].tolist() == [1, 0] and draw.tensors.isfinite().all()


def test_a_forced_body_decides_the_way(device: str) -> None:
    """A plain draw is differentiated operation by operation."""
    gates = bank(device)
    noise = torch.rand(gates.size, device=device)
    names = {}
    for body in ("triton", "eager"):
        with use_body(body):
            names[body] = type(draw_gates(gates, noise, 24).channels.grad_fn).__name__
    assert names["triton"] == "_DrawBackward" and names["eager"] != "_DrawBackward"


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pyro_bbits.kernels.triton_gates import draw_backward, draw_forward

def build(kernel, types, constants):
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr" if name in constants else "*fp32") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    warps = constants["BLOCK"] // 32 if kernel is draw_forward else 4
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["cubin"]

integers = {"order": "*i32", "ends": "*i32", "num_data": "fp32", "channels": "i32"}
for rungs, lanes, straight, simplified, priced in ((4, 4, 0, 0, 1), (0, 1, 1, 1, 1)):
    options = dict(STRAIGHT=bool(straight), SIMPLIFIED=bool(simplified), PRICED=bool(priced), TEMPERATURE=2 / 3)
    build(draw_forward, integers, dict(options, RUNGS=rungs, LANES=lanes, SHIFT=1.6, BLOCK=512))
backward = {"owner": "*i64", "channels": "i32", "size": "i32", "kl_stride": "i32"}
build(draw_backward, backward, dict(RUNGS=4, Z2=True, Z=True, PRICED=True, BLOCK=512))
print("compiled")
"""


def test_kernels_compile_for_hopper() -> None:
    """Without a GPU, in a process of its own: the interpreter has taken the place of the compiler in this one."""
    environment: dict[str, Any] = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "compiled\n", done.stderr
