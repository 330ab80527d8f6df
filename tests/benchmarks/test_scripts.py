"""Every script runs on a CPU, appends what it prints, and its ratios are those of its own figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed import end_to_end, memory, op, profile, scaling, several, step
from benchmarks.speed.results import Row, read_rows
from benchmarks.speed.training import CASES, Cost, summary


def rows_of(script: Any, arguments: Sequence[str], folder: Path) -> list[Row]:
    output = folder / "results.jsonl"
    script.main([*arguments, "--quick", "--device", "cpu", "--threads", "1", "--output", str(output)])
    return read_rows(output)


def by_variant(rows: Sequence[Row]) -> dict[str, Row]:
    return {row.variant: row for row in rows}


def test_op_compares_within_each_tensor_and_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(op, ["--dtypes", "float32"], tmp_path)
    passes = [
        (shape, what) for shape in ("2x3x4x4 activation", "3x2x3x3 weight") for what in (", forward", " backward")
    ]
    assert len({row.case for row in rows}) == len(passes)
    for shape, what in passes:
        found = by_variant([row for row in rows if row.case.startswith(shape) and row.case.endswith(what)])
        assert found.keys() == ({"published", "plain", "eager"} if "activation" in shape else {"published", "eager"})
        eager, published = found["eager"], found["published"]
        assert eager.speedup == pytest.approx(published.ms / eager.ms)
        if "plain" in found:
            assert eager.ratio_to_plain == pytest.approx(eager.ms / found["plain"].ms)
        assert eager.ratio_to_floor is not None and published.ratio_to_floor is not None
        assert eager.ratio_to_floor / published.ratio_to_floor == pytest.approx(eager.ms / published.ms)
    printed = capsys.readouterr().out
    assert all(row.case in printed for row in rows) and "--quick --device cpu" in rows[0].command


def test_step_compares_plain_gated_and_published(tmp_path: Path) -> None:
    rows = rows_of(step, ["--cases", "lenet5", "--split"], tmp_path)
    found = by_variant(rows)
    assert found.keys() == {"plain, auto", "gated, auto", "published, eager"}
    plain, gated = found["plain, auto"], found["gated, auto"]
    assert (plain.ratio_to_plain, plain.batch, plain.dtype) == (1.0, 4, "float32")
    assert gated.ratio_to_plain == pytest.approx(gated.ms / plain.ms)
    assert gated.speedup == pytest.approx(found["published, eager"].ms / gated.ms)
    assert {"first epoch s", "ms of the step alone"} < gated.details.keys()
    assert gated.hardware.endswith(", 1 threads") and gated.versions["torch"] == torch.__version__


def test_rows_tell_whether_cudnn_has_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    arguments = ["--cases", "lenet5", "--variants", "plain"]
    (row,) = rows_of(step, [*arguments, "--cudnn-benchmark"], tmp_path)
    assert torch.backends.cudnn.benchmark and row.variant == "plain, auto, cuDNN tries"
    (_, row) = rows_of(step, arguments, tmp_path)
    assert not torch.backends.cudnn.benchmark and row.variant == "plain, auto"


def test_two_lengths_of_an_epoch_tell_the_step_alone() -> None:
    # 3 ms a step and 40 ms an epoch, in epochs of 20 and 5 steps
    whole, short = Cost([(3 * 20 + 40) / 20], None, 0.0), Cost([(3 * 5 + 40) / 5], None, 0.0)
    assert step._split(whole, [short], 20, 5) == pytest.approx({"ms of the step alone": 3, "ms once an epoch": 40})
    assert step._split(whole, [], 20, 5) == {}


def test_bytes_of_quantizers_are_counted_by_hand() -> None:
    batch, weights = 4, 32 * 25 + 64 * 32 * 25 + 1024 * 512 + 512 * 10
    activations = batch * (32 * 12 * 12 + 1024 + 512)  # what the second to fourth layer read
    count = step.quantizer_bytes(CASES["lenet5"], batch, "float32", torch.device("cpu"))
    assert count == 5 * 4 * (weights + activations)
    halved = step.quantizer_bytes(CASES["lenet5"], batch, "bf16", torch.device("cpu"))
    assert halved == (3 * 4 + 2 * 2) * weights + 5 * 2 * activations


def test_rounds_are_joined() -> None:
    assert summary([Cost([1.0, 2.0], None, 3.0), Cost([4.0], 7.0, 5.0)]) == Cost([1.0, 2.0, 4.0], 7.0, 4.0)


def test_scaling_names_tensors_and_channels(tmp_path: Path) -> None:
    rows = rows_of(scaling, [], tmp_path)
    assert [row.case for row in rows] == ["gates: 4 tensors, 100 channels", "chain: 4 tensors, 128 channels"]
    for row in rows:
        assert row.ms == pytest.approx(row.details["plain ms"] + row.details["added ms"])


def test_whole_runs_tell_seconds_accuracy_and_bops(tmp_path: Path) -> None:
    plain, gated = rows_of(end_to_end, ["mnist", "--variants", "plain", "gated"], tmp_path)
    assert gated.details.keys() == {"seconds", "accuracy %", "BOPs %"} and "BOPs %" not in plain.details
    assert gated.details["BOPs %"] == pytest.approx(6.25, abs=0.2)  # all gates open at 8 bits
    assert gated.ms == pytest.approx(1e3 * gated.details["seconds"])
    assert gated.case == "mnist (made data), 1 epochs"


def test_images_of_an_own_file_are_trained_on_whole(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    x, y = numpy.random.default_rng(0).random((30, 1, 28, 28), dtype="float32"), numpy.arange(30) % 10
    path = tmp_path / "images.npz"
    numpy.savez(path, x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
    arguments = type("Arguments", (), {"synthetic": False, "data_path": path})
    data = end_to_end.load("mnist", arguments)
    assert (len(data.train), len(data.test), data.augment) == (30, 10, False)


def test_profile_tells_kinds_apart(tmp_path: Path) -> None:
    page = tmp_path / "profile.md"
    profile.main(["lenet5", "--quick", "--device", "cpu", "--page", str(page)])
    lines = page.read_text().splitlines()
    assert lines[0].startswith("lenet5, gated, batch 4, float32, auto;")
    shares = [float(line.split("|")[3].strip(" %")) for line in lines[4 : lines.index("", 2)]]
    assert sum(shares) == pytest.approx(100, abs=1) and shares == sorted(shares, reverse=True)
    assert any("| products |" in line and "convolution" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("flat_backward", "quantizers"),
        ("channels_forward", "quantizers"),
        ("void at::native::batch_norm_backward_elemt_channels_last_kernel", "norm"),
        ("sm90_xmma_fprop_implicit_gemm_tf32f32_nhwckrsc_nhwc", "products"),
        ("multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("triton_poi_fused_sigmoid_log_0", "gates"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::max_pool_backward_nhwc", "pooling"),
        ("something new", "other"),
    ],
)
def test_kernels_are_sorted_by_name(name: str, kind: str) -> None:
    assert profile.kind_of(name) == kind


def test_several_processes_are_compared_by_rank_0(tmp_path: Path) -> None:
    found = by_variant(rows_of(several, ["--cases", "lenet5"], tmp_path))
    plain, gated = found["plain, auto, 1 processes"], found["gated, auto, 1 processes"]
    assert gated.ratio_to_plain == pytest.approx(gated.ms / plain.ms)
    assert gated.details["samples per second"] == pytest.approx(1e3 * 4 / gated.ms)
    assert " torchrun --nproc-per-node 1 -m benchmarks.speed.several" in f" {gated.command}"


def test_what_lives_at_the_peak_is_replayed_by_hand() -> None:
    def frame(name: str, filename: str = "", line: int = 0) -> dict[str, Any]:
        return {"name": name, "filename": filename, "line": line}

    product = [frame("at::_ops::conv2d::call(...)"), frame("predict", "/x/pyro_bbits/models/program.py", 7)]
    backward = [frame("c10::malloc"), frame("ReluBackward0::apply")]
    trace = [
        {"action": "free_completed", "addr": 9, "size": 50},  # was there before
        {"action": "alloc", "addr": 1, "size": 10_000_000, "frames": product},
        {"action": "alloc", "addr": 2, "size": 20_000_000, "frames": backward},
        {"action": "free_requested", "addr": 1, "size": 10_000_000},
        {"action": "free_completed", "addr": 1, "size": 10_000_000},
        {"action": "alloc", "addr": 1, "size": 5_000_000, "frames": product},
        {"action": "alloc", "addr": 3, "size": 7_000_000, "frames": product},
        {"action": "free_completed", "addr": 2, "size": 20_000_000},
        {"action": "alloc", "addr": 2, "size": 19_000_000},
    ]
    peak = memory.at_the_peak(trace)
    assert [event["size"] for event in peak] == [20_000_000, 5_000_000, 7_000_000]
    lines = memory.report("step", peak).splitlines()
    assert lines[0] == "step: 32.0 MB in 3 pieces"
    assert lines[4:] == ["| 20.0 | 1 | ReluBackward0 |  |", "| 12.0 | 2 | conv2d | pyro_bbits/models/program.py:7 |"]


def test_memory_is_recorded_on_a_gpu_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        memory.main(["vgg7", "--device", "cpu"])
    assert "on a GPU only" in capsys.readouterr().err
