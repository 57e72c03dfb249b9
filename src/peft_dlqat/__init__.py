"""Quantization-aware fine-tuning for Hugging Face PEFT: low-rank adapters trained inside a low-bit quantizer.

Importing the package registers the method "DLQAT" with PEFT.
"""

from .config import DLQATConfig
from .evaluate import evaluate_model, evaluate_tasks
from .export import export_formats, export_model, verify_export
from .hub import extend_peft_type, register
from .large.calibrate_from_disk import calibrate_from_disk
from .large.load_packed import load_packed
from .large.load_quantized import load_quantized
from .large.memory import estimate_memory
from .layer import DLQATLayer
from .model import DLQATModel
from .packing import pack_weights
from .record import OtherBaseWarning
from .running import adapters_disabled
from .summary import summarize
from .train.assign_bits import assign_bits
from .train.calibrate import calibrate
from .train.callback import DLQATCallback
from .train.distillation import DistillationLoss, distillation_loss
from .train.generate import generate_dataset
from .train.report import grid_report
from .train.teacher_cache import TeacherCache

__version__ = "0.1.0"

extend_peft_type()
register(DLQATConfig, DLQATModel)

__all__ = [
    "DLQATCallback",
    "DLQATConfig",
    "DLQATLayer",
    "DLQATModel",
    "DistillationLoss",
    "OtherBaseWarning",
    "TeacherCache",
    "adapters_disabled",
    "assign_bits",
    "calibrate",
    "calibrate_from_disk",
    "distillation_loss",
    "estimate_memory",
    "evaluate_model",
    "evaluate_tasks",
    "export_formats",
    "export_model",
    "generate_dataset",
    "grid_report",
    "load_packed",
    "load_quantized",
    "pack_weights",
    "summarize",
    "verify_export",
]
