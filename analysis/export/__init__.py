"""Frozen networks as files for other programs, each verified by running it; the extra `deploy`."""

from pyro_bbits.analysis.export.aimet_file import export_aimet
from pyro_bbits.analysis.export.bench import BenchRow, bench_deployment, check_bench, print_bench, save_rows
from pyro_bbits.analysis.export.deployment import Deployment
from pyro_bbits.analysis.export.onnx_file import export_onnx
from pyro_bbits.analysis.export.place import check_place
from pyro_bbits.analysis.export.qonnx_file import export_qonnx
from pyro_bbits.analysis.export.report import ExportReport
from pyro_bbits.analysis.export.run_export import FORMATS, export_run
from pyro_bbits.analysis.export.verification import HeldOut

__all__ = [
    "FORMATS",
    "BenchRow",
    "Deployment",
    "ExportReport",
    "HeldOut",
    "bench_deployment",
    "check_bench",
    "check_place",
    "export_aimet",
    "export_onnx",
    "export_qonnx",
    "export_run",
    "print_bench",
    "save_rows",
]
