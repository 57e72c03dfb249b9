from .cache import TeacherCache
from .divergence import TopTokens
from .running import adapters_disabled, evaluating, forward
from .teacher import counted_positions, distillation_loss, teacher_logits
from .trainer import DistillationLoss

__all__ = [
    "DistillationLoss",
    "TeacherCache",
    "TopTokens",
    "adapters_disabled",
    "counted_positions",
    "distillation_loss",
    "evaluating",
    "forward",
    "teacher_logits",
]
