from .blocks import BlockError, calibrate_blocks
from .decoder import NoDecoderLayers
from .losses import OBJECTIVES, Objective
from .record import By, Calibration
from .stages import calibrate
from .streaming import calibrate_blocks_from_disk

__all__ = [
    "OBJECTIVES",
    "BlockError",
    "By",
    "Calibration",
    "NoDecoderLayers",
    "Objective",
    "calibrate",
    "calibrate_blocks",
    "calibrate_blocks_from_disk",
]
