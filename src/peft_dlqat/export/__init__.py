"""Quantized weights in the formats that engines read, without rounding again."""

from .export import export_model
from .table import FormatRow, FormatTable, export_formats
from .verify import EngineFigures, LogitDifference, Verification, verify_export

__all__ = [
    "EngineFigures",
    "FormatRow",
    "FormatTable",
    "LogitDifference",
    "Verification",
    "export_formats",
    "export_model",
    "verify_export",
]
