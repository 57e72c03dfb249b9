"""Quantization-aware fine-tuning for Hugging Face PEFT: low-rank adapters trained inside a low-bit quantizer.

Importing the package registers the method "DLQAT" with PEFT.
"""

from .calibration import (
    BlockError,
    Calibration,
    NoDecoderLayers,
    calibrate,
    calibrate_blocks,
    calibrate_blocks_from_disk,
)
from .callback import DLQATCallback
from .config import DLQATConfig
from .distillation import (
    DistillationLoss,
    TeacherCache,
    TopTokens,
    adapters_disabled,
    distillation_loss,
    teacher_logits,
)
from .evaluation import TASK_SETS, Evaluation, evaluate_model, evaluate_tasks
from .export import (
    EngineFigures,
    FormatRow,
    FormatTable,
    LogitDifference,
    Verification,
    export_formats,
    export_model,
    verify_export,
)
from .generate import generate_dataset
from .grid import Grid
from .layer import DLQATLayer, DLQATLinear
from .loading import load_packed
from .memory import MemoryEstimate, estimate_memory
from .model import DLQATModel
from .ops import compile_on_cpu
from .optimizer import create_dlqat_optimizer
from .packing import pack_weights
from .push import keep_section_on_push
from .qweight import QuantizedWeight
from .recipe import RECIPE, Recipe
from .register import extend_peft_type, register
from .report import GridReport, LayerReport, grid_report

__version__ = "0.1.0"

extend_peft_type()
register(DLQATConfig, DLQATModel)
keep_section_on_push()

__all__ = [
    "RECIPE",
    "TASK_SETS",
    "BlockError",
    "Calibration",
    "DLQATCallback",
    "DLQATConfig",
    "DLQATLayer",
    "DLQATLinear",
    "DLQATModel",
    "DistillationLoss",
    "EngineFigures",
    "Evaluation",
    "FormatRow",
    "FormatTable",
    "Grid",
    "GridReport",
    "LayerReport",
    "LogitDifference",
    "MemoryEstimate",
    "NoDecoderLayers",
    "QuantizedWeight",
    "Recipe",
    "TeacherCache",
    "TopTokens",
    "Verification",
    "adapters_disabled",
    "calibrate",
    "calibrate_blocks",
    "calibrate_blocks_from_disk",
    "compile_on_cpu",
    "create_dlqat_optimizer",
    "distillation_loss",
    "estimate_memory",
    "evaluate_model",
    "evaluate_tasks",
    "export_formats",
    "export_model",
    "generate_dataset",
    "grid_report",
    "load_packed",
    "pack_weights",
    "teacher_logits",
    "verify_export",
]
