"""A model out of a GGUF file: its weights as they are, config and tokenizer as transformers or a folder has them.

Names and the order of rows are those of transformers' own GGUF reading: it is asked what it would do with a weight's
row numbers, so that blocks can be put in the same order without decoding them.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel

from ..file_layers import can_keep, keep_in_file
from ..formats.gguf_checks import check_basics, check_metadata
from ..formats.gguf_file import FileTensor, GGUFFile, GGUFOrigin
from ..formats.gguf_metadata import ARCHITECTURES
from ..module_names import folded
from ..quant.ggml import GGML_TYPES
from ..record import weight_checksum
from .checkpoint import replace_tensor
from .quantized_file import QuantizedFile

_FLOATS = ("F32", "F16", "BF16", "F64")


class GGUFModel(QuantizedFile):
    """A GGUF file.

    Args:
        path: the file.
        base: folder or hub id of the base model's config and tokenizer; None for those of the file itself.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for what is no whole GGUF file.
    """

    format = "gguf"

    def __init__(self, path: str | Path, base: str | Path | None = None) -> None:
        self.file, self.base = GGUFFile.open(path), base
        self.path = self.file.path

    @property
    def frozen_types(self) -> dict[str, int]:
        """Those that GGML rounds to by tables."""
        return {name: count for name, count in self.file.types.items() if name not in (*GGML_TYPES, *_FLOATS)}

    def read_config(self) -> PretrainedConfig:
        """From the base, or as transformers reads it from the file."""
        return read_config(self.file, self.base)

    def read_tokenizer(self) -> Any:
        """From the base, or as transformers reads it from the file."""
        return read_tokenizer(self.file, self.base)

    def sha256(self) -> str:
        """Of the file."""
        return self.file.sha256()

    def fill(self, sha256: str, model: PreTrainedModel, dtype: torch.dtype, device: torch.device | str) -> GGUFOrigin:
        """Tensor by tensor, in the file's order."""
        placing = _Placing(self.file, sha256, model, dtype)
        placing.check()
        for name in sorted(self.file.tensors, key=lambda name: self.file.tensors[name].start):
            placing.place(name, device)
        model.tie_weights()
        return placing.origin


def read_config(file: GGUFFile, base: str | Path | None) -> PretrainedConfig:
    """The model's config, from a folder or hub id, or as transformers reads it from the file.

    Transformers leaves out what many files say of RoPE, windows and the size of heads. So the config is compared
    with the metadata, in the architectures that this package can write itself.

    Raises:
        ValueError: for an architecture whose rows or config are not known, and a config that is not the file's.
    """
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES, TENSOR_PROCESSORS

    own = {arch.name for arch in ARCHITECTURES.values()}
    theirs = {*GGUF_SUPPORTED_ARCHITECTURES, *TENSOR_PROCESSORS} - {*GGUF_CONFIG_ARCHS}
    if file.architecture not in theirs | own:
        raise ValueError(
            f"{file.path} is of architecture {file.architecture!r}, for which it is not known here how its tensors "
            "are ordered; use a file of another model."
        )
    config = _config(file, base)
    known = config.model_type in ARCHITECTURES
    if not known and base is None:
        raise ValueError(
            f"what transformers reads of a {file.architecture!r} cannot be checked against {file.path}; give the "
            "folder or hub id of the base model's config by base=..."
        )
    try:
        if known:
            factors = file.decode("rope_freqs.weight") if "rope_freqs.weight" in file.tensors else None
            check_metadata(file.metadata, factors, config)
        else:
            check_basics(file, config)
    except ValueError as error:
        where = "the config that transformers reads from it" if base is None else f"the config of base={str(base)!r}"
        remedy = "give the folder or hub id of its base model's config by base=..."
        raise ValueError(f"{file.path} is another model than {where}: {error}; {remedy}") from error
    return config


def _config(file: GGUFFile, base: str | Path | None) -> PretrainedConfig:
    if base is not None:
        return AutoConfig.from_pretrained(base)
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    if file.architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        raise ValueError(
            f"{file.path} is of architecture {file.architecture!r}, whose config transformers does not read from "
            "GGUF; give the folder or hub id of the base model's config by base=..."
        )
    return AutoConfig.from_pretrained(file.path.parent, gguf_file=file.path.name)


def read_tokenizer(file: GGUFFile, base: str | Path | None) -> Any:
    """The tokenizer, from a folder or hub id, or as transformers reads it from the file; None where neither has one.

    Raises:
        ValueError: if the base's tokenizer has other tokens than the file.
    """
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    tokenizer = None
    if base is not None:
        with suppress(OSError, ValueError):  # a folder of a config alone
            tokenizer = AutoTokenizer.from_pretrained(base)
    if tokenizer is None:
        return AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name) if tokens else None
    kinds = file.metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if tokens and len(tokenizer) > len(tokens):
        raise ValueError(
            f"the tokenizer of base={str(base)!r} has {len(tokenizer):,} tokens, and {file.path} {len(tokens):,}; "
            "give the base model that the file was made of."
        )
    own = tokenizer.convert_ids_to_tokens(range(min(len(tokens), len(tokenizer))))
    for index, (token, theirs, kind) in enumerate(zip(tokens, own, kinds, strict=False)):
        if kind == 1 and token != theirs:  # an ordinary one; others may have been renamed
            raise ValueError(
                f"the tokenizer of base={str(base)!r} is another one than the file's: token {index} is {theirs!r} "
                f"there, and {token!r} in {file.path}; give the base model that the file was made of."
            )
    return tokenizer


class _Placing:
    """Puts a file's tensors into an empty model."""

    def __init__(self, file: GGUFFile, sha256: str, model: PreTrainedModel, dtype: torch.dtype) -> None:
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        self.file, self.model, self.dtype = file, model, dtype
        own = ARCHITECTURES.get(model.config.model_type)
        make = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)
        if make is TensorProcessor and own is not None and own.norm_offset:
            make = _processor_of_norms(own.norm_offset)
        self.processor = make(config=model.config.get_text_config().to_dict())
        self.state = model.state_dict(keep_vars=True)
        self.names: dict[str, str] = get_gguf_hf_weights_map(_Root(model), self.processor, file.architecture)
        if not all(self._known(name) or _is_constant(name) for name in file.tensors):
            # Looks at each module by itself, which is slow.
            self.names = get_gguf_hf_weights_map(model, self.processor, file.architecture)
        # What was decoded into full precision, by the model's names: of some a file has two halves.
        self.parsed: dict[str, dict[str, Any]] = {"tensors": {}}
        self.origin = GGUFOrigin(file.path, sha256, file=file)

    def _known(self, name: str) -> str:
        """The model's name of one of the file's tensors, which for stacked experts is no "weight"; "" for none."""
        return self.names.get(name) or self.names.get(name.removesuffix(".weight"), "")

    def _in_file(self, name: str) -> bool:
        return name in self.file.tensors or f"{name}.weight" in self.file.tensors

    def check(self) -> None:
        """Refuse a file and a config that do not go together, by names and sizes.

        Raises:
            ValueError: naming the tensors.
        """
        strange = [name for name in self.file.tensors if not self._known(name) and not _is_constant(name)]
        if strange:
            raise ValueError(
                f"{self.file.path} has {len(strange)} tensors that {type(self.model).__name__} has no place for: "
                f"{folded(strange)}; give the config of its own model by base=..."
            )
        parts = Counter(self.names.values())  # of stacked experts two: gate and up
        halves = [name for name, known in self.names.items() if parts[known] > 1 and not self._in_file(name)]
        if halves:
            raise ValueError(f"{self.file.path} lacks {folded(halves)}; it is not whole: copy or download it again.")
        covered: dict[int, str] = {}
        for name, tensor in self.file.tensors.items():
            known = self._known(name)
            if (own := self.state.get(known)) is None:
                continue
            if own.dim() == len(tensor.shape) == 2 and sorted(own.shape) != sorted(tensor.shape):
                raise ValueError(
                    f"{self.file.path} has {name} of {list(tensor.shape)}, and the config makes it {list(own.shape)}: "
                    "it is another model's; give the config of the file's own model by base=..."
                )
            if (first := covered.setdefault(id(own), known)) != known:
                raise ValueError(
                    f"{self.file.path} has {name} beside the tensor of {first}, but the config ties the two; give the "
                    "config of the file's own model by base=..."
                )
        missing = [
            name
            for name, found in self.state.items()
            if id(found) not in covered and found.is_meta  # buffers that are no weights are there already
        ]
        if missing:
            raise ValueError(
                f"{self.file.path} lacks {len(missing)} tensors of {type(self.model).__name__}: {folded(missing)}; "
                "give the config of the file's own model by base=..."
            )

    def place(self, name: str, device: torch.device | str) -> None:
        """Read one of the file's tensors into the model."""
        tensor, known = self.file.tensors[name], self._known(name)
        if not known:
            return
        module = self.model.get_submodule(known.rpartition(".")[0])
        kind = GGML_TYPES.get(tensor.type)
        order = self.order(tensor) if kind is not None and known.endswith(".weight") else None
        if kind is not None and order is not None and can_keep(module, tensor.shape):
            on_meta = torch.device(device).type == "meta"  # nobody wants more than sizes
            packed = self.file.empty(name) if on_meta else self.file.read(name)
            if not on_meta and not kind.is_finite(packed):
                raise ValueError(f"{self.file.path}: {name} holds NaN or infinity; the file is broken.")
            packed = packed if _is_identity(order) else packed[order]
            keep_in_file(self.model, module, packed.to(device), kind.name, kind.grid, self.dtype)
            self.origin.names[known], self.origin.orders[known] = name, order
            return
        self._decode(tensor, known, device)

    def order(self, tensor: FileTensor) -> torch.Tensor | None:
        """Which of the file's rows stands where in the model; None where it does more than order them."""
        rows = np.arange(tensor.shape[0], dtype=np.float32 if tensor.shape[0] < 2**24 else np.float64)[:, None]
        try:
            found = self.processor.process(weights=rows.copy(), name=tensor.name).weights
        except (ValueError, IndexError, TypeError):
            return None
        if found.shape != rows.shape or not np.array_equal(np.sort(found, 0), rows):
            return None
        return torch.from_numpy(found[:, 0]).long()

    def _decode(self, tensor: FileTensor, known: str, device: torch.device | str) -> None:
        if torch.device(device).type == "meta":
            return
        result = self.processor.process(
            weights=self.file.decode(tensor.name),
            name=tensor.name,
            tensor_key_mapping=self.names,
            parsed_parameters=self.parsed,
        )
        if result.name is not None:
            self.parsed["tensors"][known] = torch.from_numpy(np.copy(result.weights))
        exact = self.parsed["tensors"][known]
        self.parsed["tensors"][known] = value = exact.to(device, self.dtype)
        if value.dim() == 1 and not torch.equal(value.cpu().float(), exact.cpu().float()):
            self.origin.dense[known] = exact
        if value.shape != self.state[known].shape:
            raise ValueError(
                f"{self.file.path} has {tensor.name} of {list(value.shape)}, and the config makes {known} "
                f"{list(self.state[known].shape)}; give the config of the file's own model by base=..."
            )
        _put(self.model, known, value)
        self.origin.checksums[known] = weight_checksum(value)


def _processor_of_norms(offset: float) -> Any:
    """What transformers lacks: an architecture whose norms are stored with an offset."""
    from transformers.modeling_gguf_pytorch_utils import GGUFTensor, TensorProcessor

    class Processor(TensorProcessor):
        def process(self, weights: Any, name: str, **_: Any) -> Any:
            return GGUFTensor(weights - offset if name.endswith("norm.weight") else weights, name, {})

    return Processor


class _Root:
    """A model to whoever looks at its own tensors only."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config, self.state_dict = model.config, model.state_dict

    def named_children(self) -> list[Any]:
        return []


def _put(model: nn.Module, name: str, value: torch.Tensor) -> None:
    replace_tensor(model, name, lambda _: value)


def _is_constant(name: str) -> bool:
    """Whether a tensor is none of the model's weights: factors of RoPE that its config names."""
    return name.startswith(("rope_freqs.", "rope_factors_"))


def _is_identity(order: torch.Tensor) -> bool:
    return bool((order == torch.arange(len(order))).all())
