from .bit_stream import bit_stream
from .gguf_types import BLOCK_TYPES, BlockType, block_type
from .rules import RULES, Rule, describe, mlx_group

__all__ = ["BLOCK_TYPES", "RULES", "BlockType", "Rule", "bit_stream", "block_type", "describe", "mlx_group"]
