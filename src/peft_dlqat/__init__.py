"""Quantization-aware fine-tuning for Hugging Face PEFT: low-rank adapters trained inside a low-bit quantizer.

Importing the package registers the method "DLQAT" with PEFT.
"""

from .config import DLQATConfig
from .decoder import NoDecoderLayers
from .evaluate import TASK_SETS, Evaluation, evaluate_model, evaluate_tasks
from .export import export_formats, export_model, verify_export
from .hub import extend_peft_type, register
from .large.calibrate_from_disk import calibrate_blocks_from_disk
from .large.load_packed import load_packed
from .large.memory import MemoryEstimate, estimate_memory
from .layer import DLQATLayer, DLQATLinear
from .model import DLQATModel
from .packing import pack_weights
from .quant.grid import Grid
from .quant.quantizer import QuantizedWeight
from .running import adapters_disabled
from .train.blocks import BlockError, calibrate_blocks
from .train.calibrate import calibrate
from .train.calibration_record import Calibration
from .train.callback import DLQATCallback
from .train.distillation import distillation_loss, teacher_logits
from .train.distillation_loss import DistillationLoss
from .train.divergence import TopTokens
from .train.generate import generate_dataset
from .train.optimizer import create_dlqat_optimizer
from .train.recipe import RECIPE, Recipe
from .train.report import GridReport, LayerReport, grid_report
from .train.teacher_cache import TeacherCache

__version__ = "0.1.0"

extend_peft_type()
register(DLQATConfig, DLQATModel)

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
    "Evaluation",
    "Grid",
    "GridReport",
    "LayerReport",
    "MemoryEstimate",
    "NoDecoderLayers",
    "QuantizedWeight",
    "Recipe",
    "TeacherCache",
    "TopTokens",
    "adapters_disabled",
    "calibrate",
    "calibrate_blocks",
    "calibrate_blocks_from_disk",
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
