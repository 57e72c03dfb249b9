"""The arithmetic, on tensors."""

from . import ggml as ggml  # puts its types into FILE_STORAGES
