"""Whether Triton's kernels run on a GPU: found out once for each, by running them on a few numbers.

Triton needs more than its package: a C compiler, a driver and a chip that it knows. A training run shall not end for
want of these.
"""

import warnings
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from pyro_bbits.kernels import eager
from pyro_bbits.ladder import BitLadder

__all__ = ["HAS_TRITON", "triton_runs"]

HAS_TRITON = find_spec("triton") is not None

TRIAL = 3 * 1367
"""Numbers of the trial: several blocks of a kernel, and a tail; also as three channels."""

_found: dict[str, bool] = {}


def triton_runs(device: torch.device) -> bool:
    """Whether the kernels give what PyTorch gives on a device; a warning says why not.

    Without Triton installed there is no warning. While a compiler or a graph watches, nothing can be tried: then they
    are taken to run.

    Arguments:
        device: A GPU.
    """
    if not HAS_TRITON:
        return False
    if torch.compiler.is_compiling() or str(device) in _found:
        return _found.get(str(device), True)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return True
    _found[str(device)] = _problem(device) is None
    return _found[str(device)]


def _problem(device: torch.device) -> str | None:
    try:
        with torch.enable_grad():
            problem = None if _agrees(device) else "their results are wrong"
    except Exception as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if problem is not None:
        warnings.warn(
            f"the Triton kernels do not run on {device} ({problem}); PyTorch's own operations take their place, with "
            "the same results and more slowly.",
            stacklevel=2,
        )
    return problem


def _agrees(device: torch.device) -> bool:
    from pyro_bbits.kernels import triton_body  # imports Triton, which need not be installed

    x = torch.linspace(-1.3, 1.3, TRIAL, device=device)
    row = torch.tensor([1.0, 0.9, 0.5], device=device)
    weight, gates = x.reshape(3, -1), torch.tensor([0.1, 0.0, 1.0], device=device)
    flat = [_results(body.quantize_row, x, row, None) for body in (triton_body, eager)]
    channels = [_results(body.quantize_row, weight, row, gates) for body in (triton_body, eager)]
    pairs = (*zip(*flat, strict=True), *zip(*channels, strict=True))
    return all(torch.allclose(a, b, rtol=1e-2, atol=1e-2 * float(b.abs().max())) for a, b in pairs)


def _results(quantize: Callable[..., Tensor], x: Tensor, row: Tensor, gates: Tensor | None) -> list[Tensor]:
    """Value and gradients."""
    given = [t.detach().clone().requires_grad_() for t in (x, row, gates) if t is not None]
    out = quantize(*given, signed=True, ladder=BitLadder((2, 4, 8)))
    return [out.detach(), *torch.autograd.grad((out * out).sum(), given)]
