"""Quantized weights in the formats that engines read, without rounding again."""

from .compatibility import export_formats
from .export import export_model
from .verify import verify_export

__all__ = ["export_formats", "export_model", "verify_export"]
