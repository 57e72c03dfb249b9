"""What a quantized file is to whoever opens a model from it: GGUF's, and folders of safetensors files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..formats.origin import Origin


class QuantizedFile(ABC):
    """A file or folder whose header was read, and found to be whole.

    Attributes:
        path: where it is.
        format: name of the format that it is written again in.
    """

    path: Path
    format: str

    @property
    @abstractmethod
    def frozen_types(self) -> dict[str, int]:
        """Quantized types that cannot be trained, and how many tensors have each."""

    @abstractmethod
    def read_config(self) -> PretrainedConfig:
        """The model's config.

        Raises:
            ValueError: for a config that is another model's.
        """

    @abstractmethod
    def read_tokenizer(self) -> Any:
        """The model's tokenizer; None where there is none.

        Raises:
            ValueError: for one that is another model's.
        """

    @abstractmethod
    def sha256(self) -> str:
        """The checksum that adapters keep, in hexadecimal digits."""

    @abstractmethod
    def fill(self, sha256: str, model: PreTrainedModel, dtype: torch.dtype, device: torch.device | str) -> Origin:
        """Read the tensors into an empty model: as they are where they have a grid, else decoded.

        Args:
            sha256: the checksum.
            model: the model, on the meta device.
            dtype: of what is decoded.
            device: where the weights go; on the meta device nothing is read.

        Returns:
            Where the model's weights come from.

        Raises:
            ValueError: for a file and a model that do not go together; before any weight is read.
        """
