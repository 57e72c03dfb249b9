"""The formats that a trained model can be exported in, each one object that says all there is to know of it.

A format of your own is one object in `FORMATS`: the config's check, the table of formats, the export, its card and its
verification then know it.
"""

from .awq import AWQ
from .base import Format, Outline, TensorInfo, describe
from .compressed_tensors import CompressedTensors
from .copied import writer_of
from .dense import Dense
from .engines import Engine
from .expected import ExpectedFile, expected_file
from .gguf import GGUF
from .gptq import GPTQ
from .mlx import MLX
from .presets import find_preset

FORMATS: dict[str, Format] = {
    format.name: format for format in (CompressedTensors(), GGUF(), MLX(), GPTQ(), AWQ(), Dense())
}

__all__ = [
    "FORMATS",
    "Engine",
    "ExpectedFile",
    "Format",
    "Outline",
    "TensorInfo",
    "describe",
    "expected_file",
    "find_preset",
    "writer_of",
]
