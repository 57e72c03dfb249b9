"""The frozen weight W0 of an adapted layer: in full or packed in few bits, and set aside while another is merged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from .file_layers import FileLinear
from .placement import at_hand, check_here
from .quant.fixed_point import as_rows
from .quant.in_file import FileStorage
from .quant.quantizer import decode_stored, store

if TYPE_CHECKING:
    from .layer import DLQATLayer


class FrozenWeight:
    """W0 of one adapter layer.

    Args:
        layer: the adapter layer. Its base layer holds W0 or, while an adapter is merged, what stands in its place; the
            layer's `_set_aside` holds W0's Parameter then.
    """

    __slots__ = ("_layer",)

    def __init__(self, layer: DLQATLayer) -> None:
        self._layer = layer

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base layer has it as [in, out]."""
        return self._layer.fan_in_fan_out

    @property
    def _parameter(self) -> nn.Parameter:
        """What the base layer computes with."""
        return self._layer.get_base_layer().weight

    @_parameter.setter
    def _parameter(self, parameter: nn.Parameter) -> None:
        self._layer.get_base_layer().weight = parameter

    @property
    def _kept(self) -> nn.Parameter:
        """W0's own Parameter, wherever it is."""
        return self._layer._set_aside[0] if self._layer._set_aside else self._parameter

    @property
    def packed(self) -> bool:
        """Whether W0 is kept in few bits by this package; others have integers for weights too."""
        known = hasattr(self._layer, "_dtype_of_packed") or self._file_layer is not None
        return known and not self._kept.is_floating_point()

    @property
    def _file_layer(self) -> FileLinear | None:
        base_layer = self._layer.get_base_layer()
        return base_layer if isinstance(base_layer, FileLinear) else None

    @property
    def in_file(self) -> FileStorage | None:
        """The type of tensor of a file in which W0 is kept, if it is."""
        layer = self._file_layer
        return layer.in_file if layer is not None and self.packed else None

    @property
    def dtype(self) -> torch.dtype:
        """Of W0: the one that the layer computes in. A packed weight's follows the model's."""
        weight, of_file = self._parameter, self._file_layer
        if weight.is_floating_point():
            return weight.dtype
        return self._layer._dtype_of_packed.dtype if of_file is None else of_file.dtype

    def as_kept(self) -> torch.Tensor:
        """W0 [out, in] as it is kept: in full (a view where the base layer has it transposed), or packed in uint8."""
        base_layer = self._layer.get_base_layer()
        with at_hand(base_layer):
            # The model may have moved since W0 was set aside.
            return as_rows(self._kept.data.to(base_layer.weight.device), self.fan_in_fan_out)

    def original(self) -> torch.Tensor:
        """W0 [out, in], merged or not; of a packed one what is left of it."""
        weight, of_file = self.as_kept(), self._file_layer
        if not self.packed:
            return weight
        if of_file is not None:
            return of_file.decoded(weight).to(self.dtype)
        return decode_stored(weight, self._layer.quantizer(next(iter(self._layer.specs)))).to(self.dtype)

    @torch.no_grad()
    def pack(self, adapter_name: str, storage: str) -> None:
        """Keep W0 as `storage` says, in units of the adapter's scales and zeros, which must not move any more.

        The full-precision weight is gone afterwards. Codes of an untrained adapter stay as they are, see
        `quant.fixed_point`. Nothing happens the second time.

        Args:
            adapter_name: the adapter; others must have the same scales and zeros.
            storage: a key of `STORAGES`, of no fewer bits than the grid.

        Raises:
            ValueError: what `check_packable` raises.
        """
        self.check_packable(adapter_name, storage)
        if self.packed:
            return
        dtype, weight = self.dtype, self._parameter
        packed = store(self.original(), replace(self._layer.quantizer(adapter_name), storage=storage))
        # Not in the state dict: it only follows the model's dtype.
        self._layer.register_buffer(  # type: ignore[operator]
            "_dtype_of_packed", torch.empty(0, dtype=dtype, device=weight.device), persistent=False
        )
        weight.requires_grad_(False)
        weight.data = packed
        self._layer._kept_weight.clear()
        for name in self._layer.specs:
            self._layer.set_storage(name, storage)

    def check_packable(self, adapter_name: str, storage: str) -> None:
        """Raise what `pack` would raise; changes nothing.

        Raises:
            ValueError: if there are adapters of other scales, or a merged one, or W0 is kept in another storage
                already, or the adapter was trained on a W0 that was.
        """
        layer = self._layer
        if self.packed and layer.specs[adapter_name].storage == storage:
            return
        others = sorted(name for name in layer.specs if not layer.same_scales(name, adapter_name))
        if layer.merged or others:
            what = "it is merged" if layer.merged else f"{others} have scales and zeros of their own"
            raise ValueError(
                f"the frozen weight can be packed by the scales and zeros of one adapter, unmerged, but {what}; "
                "unmerge it, and delete the others."
            )
        known = layer.specs[adapter_name].storage
        if known not in ("full", storage):
            if self.packed:
                raise ValueError(
                    f"the frozen weight is packed as {known!r} already, not as {storage!r}; load the base model again."
                )
            raise ValueError(
                f"adapter {adapter_name!r} was trained on a frozen weight kept as {known!r}, and one kept as "
                f"{storage!r} would change what it computes; use the storage that its own adapter_config.json names."
            )
        if not self.packed:
            check_here(layer.get_base_layer(), "pack")

    @torch.no_grad()
    def unpack(self) -> None:
        """Put what is left of W0 back in the place of a packed one, in its dtype; nothing where it is not packed."""
        if not self.packed:
            return
        self._kept.data = self.as_base_layer_has_it(self.original())

    def check_same_kind(self, weight: torch.Tensor | None) -> None:
        """Refuse a weight from a state dict that is packed where the base layer's is not, or the other way round.

        It would be copied: codes as if they were weights, or weights cut to bytes.

        Raises:
            ValueError: in that case.
        """
        in_full = self._parameter.is_floating_point()  # merged, a packed one is, too
        if weight is not None and weight.is_floating_point() != in_full:
            held, given = ("in full", "packed") if in_full else ("packed", "not")
            raise ValueError(
                f"the frozen weights of the model are {held}, and those of the state dict are {given}; call "
                "pack_weights() before loading a state dict of packed weights, or load the adapter alone."
            )

    def check_float(self) -> None:
        """Refuse to put a weight into a base layer that somebody else has quantized, see `check_float_weight`."""
        if not self.packed:
            check_float_weight(self._layer.get_base_layer(), "merge into")

    def replace(self, replacement: torch.Tensor) -> None:
        """Put another weight [out, in] into the base layer, and set W0 aside for `restore`.

        It is a Parameter of its own: another module may share W0's, a tied embedding for one, and keeps that.
        """
        self._layer._kept_weight.clear()
        weight = self.as_base_layer_has_it(replacement)
        if self._layer._set_aside:
            self._parameter.data = weight
            return
        self._layer._set_aside.append(self._parameter)
        self._parameter = nn.Parameter(weight, requires_grad=self._kept.requires_grad)

    def restore(self) -> None:
        """Put the very Parameter back that `replace` replaced; nothing where none was."""
        if not self._layer._set_aside:
            return
        replacement, original = self._parameter, self._layer._set_aside.pop()
        # The model may have moved or changed its dtype meanwhile.
        dtype = replacement.dtype if original.is_floating_point() else original.dtype
        original.data = original.data.to(replacement.device, dtype)
        self._parameter = original

    @contextmanager
    def in_its_place(self) -> Iterator[None]:
        """Inside the block W0 stands in the base layer again, and after it the very Parameter that replaced it."""
        replacement = self._parameter
        self.restore()
        try:
            yield
        finally:
            self._layer._set_aside.append(self._parameter)
            self._parameter = replacement

    def as_base_layer_has_it(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight [out, in], transposed where the base layer has its own so."""
        return weight.t().contiguous() if self.fan_in_fan_out else weight


def check_float_weight(layer: nn.Module, action: str) -> None:
    """Refuse layers whose weight is quantized already: w_hat would be rounded again, onto another grid.

    Raises:
        TypeError: if the weight is not a plain floating-point tensor (bitsandbytes, HQQ, GPTQ, AWQ, torchao, ...).
    """
    weight = getattr(layer, "weight", None)
    # bitsandbytes keeps packed codes in a Parameter of its own, in a dtype of the user's choice (quant_storage).
    packed = any(hasattr(weight, name) for name in ("quant_state", "SCB"))  # as a QLoRA script has it
    plain = isinstance(weight, torch.Tensor) and type(weight.data).__name__ in ("Tensor", "DTensor") and not packed
    if not plain or not weight.is_floating_point() or weight.element_size() < 2:  # type: ignore[union-attr]
        found = "none" if weight is None else f"{type(weight).__name__} of {getattr(weight, 'dtype', None)}"
        instead = (
            "in the place of BitsAndBytesConfig, prepare_model_for_kbit_training and get_peft_model write\n"
            "    config = DLQATConfig(bits=4, storage='int4', task_type='CAUSAL_LM')\n"
            "    model = peft_dlqat.load_packed(model_id, config, device='cuda')"
            if packed and action.startswith("adapt")
            else "load the base model in bfloat16, float16 or float32"
        )
        if action.startswith("adapt") and not packed:
            instead += ", or open files of GPTQ, AWQ, compressed-tensors, MLX or GGUF by peft_dlqat.load_quantized"
        raise TypeError(
            f"cannot {action} {type(layer).__name__} (weight: {found}): its weight is quantized already, and rounding "
            f"onto a second grid would change it; {instead}."
        )
