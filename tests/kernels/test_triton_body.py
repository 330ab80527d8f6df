"""The kernels compile for a GPU ahead of time as they are launched, and run behind an operator under the compiler."""

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pyro_bbits import GateValues, quantize
from pyro_bbits.kernels import quantize_row, use_body
from pyro_bbits.ladder import BitLadder

pytest.importorskip("triton")

slow_types = [
    pytest.param(given, written, marks=pytest.mark.slow)
    for given, written in [("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "float32")]
]


@pytest.mark.parametrize(("given", "written"), [("float32", "bfloat16"), *slow_types])
@pytest.mark.parametrize("channel", [1001, pytest.param(524_288, marks=pytest.mark.slow)])
@pytest.mark.parametrize("bits", ["2,4,8,16,32", pytest.param("3,6,12", marks=pytest.mark.slow)])
def test_kernels_compile_for_a_gpu(given: str, written: str, channel: int, bits: str, tmp_path: Path) -> None:
    """The recipe of each: IEEE division, no sum in an order of chance, and 16-byte accesses whatever the size.

    In a process of its own, since the interpreter leaves its marks on Triton.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    built = subprocess.run(
        [sys.executable, Path(__file__).with_name("ahead_of_time.py"), given, written, str(channel), bits],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assemblies = json.loads(built.stdout)
    large = 2 * channel > 8 * 4096  # more than two blocks for each program of what stands in for a device
    names = {f"{kind}_{way}" for kind in ("flat", "channels") for way in ("forward", "backward")}
    assert assemblies.keys() == names | {"round_flat"} | ({"flat_finish"} if large else set())
    for name, assembly in assemblies.items():
        assert re.search(r"div\.rn(\.ftz)?\.f32", assembly)
        assert not re.search(r"\b(red|div\.full|div\.approx|rcp\.approx)\b", assembly)
        counted = re.findall(r"\batom\.\S+", assembly)  # of the programs that are done, and of nothing else
        counts = name == "channels_backward" or (name == "flat_backward" and not large)
        assert counted == ["atom.global.gpu.acq_rel.add.u32"] * counts
        if name in ("flat_forward", "flat_backward"):
            assert re.search(r"ld\.global\.v[48]\.b32", assembly)


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.filterwarnings(r"ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("pruned", "written"), [(False, torch.float32), (True, torch.bfloat16)])
def test_operator_under_the_compiler_equals_the_function(pruned: bool, written: torch.dtype, device: str) -> None:
    """The same kernels, so the same numbers bit for bit; without code generation for what is around them."""

    def quantize(x: Tensor, row: Tensor, z2: Tensor | None = None) -> Tensor:
        with use_body("triton"):
            return quantize_row(x * 2, row, z2, signed=True, ladder=BitLadder(), dtype=written)

    x = torch.randn(3, 8, 5, 5, device=device).contiguous(memory_format=torch.channels_last)
    leaves = [x, torch.rand(5, device=device), *([torch.rand(3, device=device)] if pruned else [])]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    g = torch.randn_like(x).to(written)
    torch.compiler.reset()
    results = []
    for function in (quantize, torch.compile(quantize, backend="aot_eager", fullgraph=True)):
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, g)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled) and eager.stride() == compiled.stride()
        assert compiled.count_nonzero() > 0


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize("pruned", [True, False], ids=["z2", "no-z2"])
def test_operator_keeps_the_rules_of_operators(pruned: bool, device: str) -> None:
    """PyTorch's own checks: schema, no aliasing, shapes and strides without data, derivative, dynamic shapes."""
    x = torch.randn(3, 8, 5, device=device).transpose(1, 2).requires_grad_()
    row, z2 = torch.rand(5, device=device, requires_grad=True), torch.rand(3, device=device, requires_grad=True)
    operator = import_module("pyro_bbits.kernels.triton_body")._quantize_op
    arguments = (x, row, z2 if pruned else None, True, [2, 4, 8, 16, 32], torch.bfloat16)
    assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize("pruned", [True, False], ids=["z2", "no-z2"])
@pytest.mark.parametrize("ordered", [True, False])
def test_a_gradient_that_nobody_else_reads_gives_its_memory(pruned: bool, ordered: bool, device: str) -> None:
    """The numbers are the same; a gradient in another order is copied anyway, and is left alone."""
    x = torch.randn(6, 7, 5, device=device, requires_grad=True)
    leaves = [x, torch.rand(5, device=device), *([torch.rand(6, device=device)] if pruned else [])]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    g = torch.randn(6, 5, 7, device=device).transpose(1, 2)
    g = g.contiguous() if ordered else g
    kept, results = g.clone(), []
    for spend in (False, True):
        with use_body("triton"):
            out = quantize_row(*leaves, signed=True, ladder=BitLadder(), spend_grad=spend)
        results.append(torch.autograd.grad(out, leaves, g))
        spent = results[-1][0].data_ptr() == g.data_ptr()
        assert spent == (spend and ordered) and torch.equal(g, kept) != spent
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("triton_runs")
def test_partials_are_summed_the_same_by_the_last_program_and_by_a_kernel(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """A block for each program, then five; both twice, as the counter has to be 0 again."""
    body = import_module("pyro_bbits.kernels.triton_body")
    x, row = torch.randn(4997, device=device), torch.rand(5, device=device)
    grad = torch.randn_like(x)
    results = {}
    for wave in (8, 1):
        monkeypatch.setattr(body, "_multiprocessors", lambda device: 1)
        monkeypatch.setattr(body, "WAVE", wave)
        leaves = [x.requires_grad_(), row.requires_grad_()]
        with use_body("triton"):
            out = quantize_row(*leaves, signed=True, ladder=BitLadder())
        results[wave] = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        assert all(map(torch.equal, results[wave], torch.autograd.grad(out, leaves, grad)))
    assert torch.equal(results[8][0], results[1][0])
    torch.testing.assert_close(results[8][1], results[1][1], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize("at_a_time", [64, 32, 16])
def test_channels_are_summed_the_same_in_one_turn_in_two_and_by_a_kernel(
    monkeypatch: pytest.MonkeyPatch, at_a_time: int, device: str
) -> None:
    monkeypatch.setattr(import_module("pyro_bbits.kernels.triton_body"), "CHANNELS_SUM", at_a_time)
    tensors = torch.randn(40, 3), torch.rand(5), torch.rand(40)
    grad = torch.randn(40, 3)
    results = {}
    for body, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [t.to(device, dtype).requires_grad_() for t in tensors]
        with use_body(body):  # type: ignore[arg-type]
            out = quantize_row(*leaves, signed=True, ladder=BitLadder())
        results[body] = torch.autograd.grad(out, leaves, grad.to(device, dtype))
    for ours, exact in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


class Reused(nn.Module):
    """A layer that is called twice, one whose weight is the transposed one of another, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.conv = nn.Embedding(6, 8), nn.Linear(8, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.outer = nn.Linear(8, 6)
        self.outer.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(self.words(x)).relu()
        y = self.inner(y).relu()
        return self.outer(self.conv(y.transpose(1, 2)).transpose(1, 2))  # type: ignore[no-any-return]


@pytest.mark.usefixtures("triton_runs")
def test_weights_that_are_read_more_than_once_get_all_of_their_gradients(device: str) -> None:
    torch.manual_seed(0)
    x = torch.randint(6, (4, 5), device=device)
    network = quantize(Reused().to(device), x).train()
    gates = GateValues(*(torch.rand_like(gate) for gate in network.open_gates()))
    grads: list[dict[str, Tensor]] = []
    for body in ("eager", "triton"):
        network.zero_grad()
        with use_body(body):
            network(x, gates=gates).square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 7
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()), msg=name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pruned", [True, False], ids=["z2", "no-z2"])
def test_replayed_graph_follows_its_inputs(pruned: bool) -> None:
    """Forward and backward captured once in a CUDA graph; replayed, they see new values."""
    x, g = torch.randn(2, 64, 300, device="cuda").unbind()
    leaves = [x, torch.rand(5, device="cuda"), *([torch.rand(64, device="cuda")] if pruned else [])]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def step() -> list[Tensor]:
        out = quantize_row(*leaves, signed=True, ladder=BitLadder())
        return [out.detach(), *torch.autograd.grad(out, leaves, g)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    for leaf in leaves:
        leaf.data.uniform_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))
