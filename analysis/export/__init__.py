"""Frozen networks as files for other programs, each verified by running it; the extra `deploy`."""

from pyro_bbits.analysis.export.aimet_file import export_aimet
from pyro_bbits.analysis.export.onnx_file import export_onnx
from pyro_bbits.analysis.export.qonnx_file import export_qonnx
from pyro_bbits.analysis.export.report import ExportReport
from pyro_bbits.analysis.export.verification import HeldOut

__all__ = ["ExportReport", "HeldOut", "export_aimet", "export_onnx", "export_qonnx"]
