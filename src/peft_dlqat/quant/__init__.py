"""The arithmetic, on tensors."""

from . import affine as affine  # these put their kinds into FILE_STORAGES
from . import ggml as ggml
