from .exporting import export_model
from .verify import EngineFigures, Verification, verify_export

__all__ = ["EngineFigures", "Verification", "export_model", "verify_export"]
