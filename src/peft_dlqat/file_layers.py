"""Layers whose weight stays as a quantized file has it, and is decoded when they run."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from .deferred import DeferredWeight
from .quant.grid import Grid
from .quant.in_file import FileStorage, file_storage
from .quant.op import fake_quantize_linear
from .quant.quantizer import Quantizer, decode_stored


class _InFile:
    """A weight [rows, columns] as the bytes of a file's rows, uint8 [rows, row_bytes], frozen.

    Attributes:
        storage: a key of `FILE_STORAGES`.
        grid: of its codes.
        read_by_others: whether `weight` is read to compute with it, as TRL's loss reads an output head's: it is
            decoded then. Otherwise it is the bytes.
    """

    storage: str
    grid: Grid
    _dtype: torch.Tensor
    _parameters: dict[str, Any]
    read_by_others = False

    def _keep(self: Any, packed: torch.Tensor, storage: str, grid: Grid, dtype: torch.dtype) -> None:
        self.register_parameter("weight", nn.Parameter(packed, requires_grad=False))
        self.storage, self.grid = storage, grid
        self.register_buffer("_dtype", torch.empty(0, dtype=dtype), persistent=False)  # follows the model's

    @property
    def kept(self) -> torch.Tensor:
        """The bytes, or the plain weight."""
        return self._parameters["weight"]

    @property
    def weight(self) -> torch.Tensor:
        """The bytes, or, for others to compute with, what they stand for."""
        if "weight" not in self._parameters:  # while it is being made
            raise AttributeError("weight")
        kept = self.kept
        if not self.read_by_others or kept.is_floating_point():
            return kept
        return DeferredWeight(lambda: self.decoded(kept).to(self.dtype), self.shape, self.dtype, kept.device)

    @property
    def dtype(self) -> torch.dtype:
        """The one to compute in."""
        return self._dtype.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, columns]."""
        raise NotImplementedError

    @property
    def in_file(self) -> FileStorage:
        """The kind of the weight's tensor in the file."""
        found = file_storage(self.storage)
        assert found is not None
        return found

    def decoded(self, packed: torch.Tensor) -> torch.Tensor:
        """The weights of some of the rows, float32 [rows, columns]."""
        return decode_stored(packed, self.quantizer(packed))

    def quantizer(self, packed: torch.Tensor) -> Quantizer:
        """The way out of the file's grid, without an update, of some of the rows."""
        s, zero = self.in_file.scales_and_zeros(packed, self.grid)
        columns = s.shape[1] * self.grid.group_size
        A, B = s.new_zeros(0, columns), s.new_zeros(len(s), 0)
        step = self.in_file.step(s)
        return Quantizer(self.grid, 1.0, A, B, step, zero, s, zero, storage=self.storage)


class FileLinear(_InFile, nn.Linear):  # type: ignore[override]
    """y = x @ W.T + bias, with W [out, in] as the file has it.

    While an adapter is merged, and after `decode_weights`, `weight` is a plain one, [out, in].

    Args:
        linear: the layer whose place it takes.
        packed: uint8 [out, row_bytes].
        storage: a key of `FILE_STORAGES`.
        grid: of its codes.
        dtype: the one to compute in.
    """

    def __init__(self, linear: nn.Linear, packed: torch.Tensor, storage: str, grid: Grid, dtype: torch.dtype) -> None:
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, bias=False)
        self.bias = linear.bias
        self._keep(packed, storage, grid, dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self.out_features, self.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out], in the dtype of x."""
        if self.kept.is_floating_point():
            return F.linear(x, self.kept, self.bias)
        return fake_quantize_linear(x, self.bias, self.kept, self.quantizer(self.kept))


class FileEmbedding(_InFile, nn.Embedding):  # type: ignore[override]
    """A table of vectors as the file has it; only the rows that are asked for are decoded.

    After `decode_weights`, `weight` is a plain one.

    Args:
        embedding: the layer whose place it takes, see `is_lookup`.
        packed: uint8 [entries, row_bytes].
        storage: a key of `FILE_STORAGES`.
        grid: of its codes.
        dtype: of the vectors.
    """

    embed_scale: torch.Tensor | None

    def __init__(
        self, embedding: nn.Embedding, packed: torch.Tensor, storage: str, grid: Grid, dtype: torch.dtype
    ) -> None:
        with torch.device("meta"):
            super().__init__(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx)
        self._keep(packed, storage, grid, dtype)
        self.register_buffer("embed_scale", getattr(embedding, "embed_scale", None), persistent=False)

    @property
    def shape(self) -> tuple[int, int]:
        """[entries, columns]."""
        return self.num_embeddings, self.embedding_dim

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The vectors [..., columns] of ids [...]."""
        if self.kept.is_floating_point():
            found = F.embedding(input, self.kept, self.padding_idx)
        else:
            found = self.decoded(self.kept[input.flatten()]).to(self.dtype).unflatten(0, input.shape)
        return found if self.embed_scale is None else found * self.embed_scale.to(found.dtype)


def can_keep(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a module computes with its weight, of this shape, in a way that a decoded one can replace."""
    if isinstance(module, nn.Linear):
        plain = type(module).forward is nn.Linear.forward
        return plain and shape == (module.out_features, module.in_features)
    if not isinstance(module, nn.Embedding) or shape != (module.num_embeddings, module.embedding_dim):
        return False
    return is_lookup(module)


def keep_in_file(
    model: nn.Module, module: nn.Module, packed: torch.Tensor, storage: str, grid: Grid, dtype: torch.dtype
) -> None:
    """Put layers that keep a file's bytes into the places of a module and of all others that share its weight.

    Args:
        model: the model.
        module: one of its modules, see `can_keep`.
        packed: uint8 [rows, row_bytes].
        storage: a key of `FILE_STORAGES`.
        grid: of the codes.
        dtype: the one to compute in.
    """
    weight, shared = module.weight, None
    for name, other in list(model.named_modules()):
        if getattr(other, "weight", None) is not weight:
            continue
        make: Any = FileEmbedding if isinstance(other, nn.Embedding) else FileLinear
        new = make(other, packed, storage, grid, dtype).train(other.training)
        shared = new.kept if shared is None else shared
        new.weight = shared
        model.set_submodule(name, new)


def is_lookup(embedding: nn.Embedding) -> bool:
    """Whether an embedding does no more than look its vectors up, and multiply them by an `embed_scale` of its own.

    Tried with a small weight of random numbers.
    """
    scale = getattr(embedding, "embed_scale", None)
    if type(embedding) is nn.Embedding:
        return scale is None
    if not isinstance(scale, torch.Tensor) or scale.is_meta:
        return False
    weight = torch.rand((embedding.padding_idx or 0) + 2, embedding.embedding_dim)
    ids = torch.arange(len(weight))
    return torch.equal(functional_call(embedding, {"weight": weight}, (ids,)), weight * scale.to(weight.dtype))


def decode_weights(model: nn.Module, apart: type | tuple[type, ...] = ()) -> None:
    """Give layers of files their weights in full, in the dtype that they compute in; shared ones stay shared.

    Args:
        model: the model.
        apart: kinds of modules whose insides are left alone.
    """
    new: dict[int, nn.Parameter] = {}
    inside = {id(part) for module in model.modules() if isinstance(module, apart) for part in module.modules()}
    for module in model.modules():
        if in_file(module) and id(module) not in inside:
            old: Any = module.kept
            if id(old) not in new:
                new[id(old)] = nn.Parameter(module.decoded(old).to(module.dtype), requires_grad=False)  # type: ignore[operator]
            module.weight = new[id(old)]


def as_plain(model: nn.Module) -> None:
    """Make layers of files, whose weights are in full by now, ordinary ones; the model is of no file any more."""
    for module in model.modules():
        if isinstance(module, FileLinear) and module.kept.is_floating_point():
            module.__class__ = nn.Linear  # type: ignore[assignment]
    model.origin = None  # type: ignore[assignment]


def in_file(module: nn.Module) -> bool:
    """Whether a module's weight lies in memory as its file has it."""
    return isinstance(module, FileLinear | FileEmbedding) and not module.kept.is_floating_point()
