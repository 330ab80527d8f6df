"""Sessions of ONNX Runtime: exact, fused, and fused as it comes."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from pyro_bbits.analysis.export.graph import INPUT
from pyro_bbits.analysis.export.verification import BATCH

__all__ = ["MODES", "Mode", "open_session", "run_rows", "runtime_version"]

Mode = Literal["exact", "fused", "fast"]
Array = np.ndarray[Any, Any]

MODES: dict[Mode, dict[str, str]] = {
    # float operators between the quantizers, as the graph says
    "exact": {"session.disable_quant_qdq": "1"},
    # integer operators, whose sums are right on processors without VNNI too
    "fused": {"session.x64quantprecision": "1"},
    # integer operators as the runtime chooses them: without VNNI sums may saturate in 16 bits
    "fast": {},
}
QUIET = 3  # errors only


def open_session(
    model: str | Path | bytes, mode: Mode = "fused", threads: int | None = None
) -> onnxruntime.InferenceSession:
    """Load a model on the CPU.

    Arguments:
        model: The file, or its content.
        mode: `exact` computes in float between the quantizers; `fused` uses integer operators; `fast` also where they
            may saturate.
        threads: Threads of an operator; None takes as many as PyTorch.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads or torch.get_num_threads(), 1
    options.log_severity_level = QUIET
    for key, value in MODES[mode].items():
        options.add_session_config_entry(key, value)
    content = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run_rows(session: onnxruntime.InferenceSession, inputs: Tensor) -> list[Array]:
    """All outputs of a model for all rows, in batches of the size it takes."""
    size = session.get_inputs()[0].shape[0]
    fixed = isinstance(size, int)
    if fixed and len(inputs) % size:
        raise ValueError(f"the file takes {size} rows at a time; got {len(inputs)}, which is no multiple.")
    batches = [session.run(None, {INPUT: part.cpu().numpy()}) for part in inputs.split(size if fixed else BATCH)]
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


def runtime_version() -> str:
    """Name and version of the runtime."""
    return f"onnxruntime {onnxruntime.__version__}"
