"""The frozen weight W0 of an adapted layer: in full or packed in few bits, and set aside while another is merged."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .layer_spec import STORED_BITS
from .placement import at_hand, check_here
from .quant.fixed_point import as_rows
from .quant.grid import Grid
from .quant.quantizer import Quantizer, decode_weight, store


class FrozenWeight(BaseTunerLayer):
    """What an adapter layer does with the weight of its base layer.

    `fan_in_fan_out` says that the base layer has it as [in, out].
    """

    fan_in_fan_out: bool
    dlqat_grid: dict[str, Grid]
    dlqat_stored_bits: dict[str, int]
    _unmerged_weight: torch.Tensor | None = None

    def quantizer(self, adapter_name: str) -> Quantizer:
        """Of an adapter, whose grid a packed weight counts on."""
        raise NotImplementedError

    def frozen_weight(self) -> torch.Tensor:
        """W0 [out, in] as it is kept: in full (a view where the base layer has it transposed), or packed in uint8."""
        base_layer = self.get_base_layer()
        with at_hand(base_layer):
            weight = base_layer.weight.data
            if self._unmerged_weight is not None:
                weight = self._unmerged_weight.to(weight.device)  # the model may have moved meanwhile
            return as_rows(weight, self.fan_in_fan_out)

    def original_weight(self) -> torch.Tensor:
        """W0 [out, in], merged or not; of a packed one what is left of it."""
        weight = self.frozen_weight()
        if not self.packed:
            return weight
        name = next(iter(self.dlqat_grid))
        return decode_weight(weight, self.quantizer(name), self.dlqat_grid[name]).to(self.weight_dtype)

    @property
    def packed(self) -> bool:
        """Whether W0 is kept in few bits."""
        if not hasattr(self, "_dtype_of_packed"):  # others have integers for weights too
            return False
        weight = self.get_base_layer().weight if self._unmerged_weight is None else self._unmerged_weight
        return not weight.is_floating_point()

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of W0: the one that the layer computes in. A packed weight's follows the model's."""
        weight = self.get_base_layer().weight
        return weight.dtype if weight.is_floating_point() else self._dtype_of_packed.dtype

    @torch.no_grad()
    def pack(self, adapter_name: str, stored_bits: int) -> None:
        """Keep W0 in `stored_bits` bits a weight, in units of the adapter's grid, which must not move any more.

        The full-precision weight is gone afterwards. Codes of an untrained adapter stay as they are, see `storage`.
        Nothing happens the second time.

        Args:
            adapter_name: the only adapter.
            stored_bits: 2, 4 or 8, and not below the grid's bits.

        Raises:
            ValueError: what `check_packable` raises.
        """
        self.check_packable(adapter_name, stored_bits)
        if self.packed:
            return
        dtype, weight = self.weight_dtype, self.get_base_layer().weight
        grid = self.dlqat_grid[adapter_name]
        packed = store(self.original_weight(), self.quantizer(adapter_name), grid, stored_bits)
        # Not in the state dict: it only follows the model's dtype.
        self.register_buffer(  # type: ignore[attr-defined]
            "_dtype_of_packed", torch.empty(0, dtype=dtype, device=weight.device), persistent=False
        )
        weight.requires_grad_(False)
        weight.data = packed
        self.stored_in(adapter_name, stored_bits)

    def check_packable(self, adapter_name: str, stored_bits: int) -> None:
        """Raise what `pack` would raise; changes nothing.

        Raises:
            ValueError: if there are other adapters, or a merged one, or W0 is packed in other bits already, or the
                adapter was trained on a W0 that was.
        """
        if self.merged or list(self.dlqat_grid) != [adapter_name]:
            what = "it is merged" if self.merged else f"there are {sorted(self.dlqat_grid)}"
            raise ValueError(
                f"the frozen weight can be packed for one adapter, unmerged, but {what}; unmerge it, and delete the "
                "others."
            )
        known = self.dlqat_stored_bits[adapter_name]
        if known not in (0, stored_bits):
            if self.packed:
                raise ValueError(
                    f"the frozen weight is packed in {known} bits already, not in {stored_bits}; load the base model "
                    "again."
                )
            raise ValueError(
                f"adapter {adapter_name!r} was trained on a frozen weight in {known} bits, and another one in "
                f"{stored_bits} would change what it computes; use the storage that its own adapter_config.json names."
            )
        if not self.packed:
            check_here(self.get_base_layer(), "pack")

    def stored_in(self, adapter_name: str, stored_bits: int) -> None:
        """Say that the adapter belongs to W0 as `stored_bits` bits tell it; 0 for W0 itself."""
        self.dlqat_stored_bits[adapter_name] = stored_bits
        self.dlqat_spec[adapter_name][STORED_BITS] = stored_bits

    @torch.no_grad()
    def unpack(self) -> None:
        """Put what is left of W0 back in the place of a packed one, in its dtype; nothing where it is not packed."""
        if not self.packed:
            return
        weight = self._as_stored(self.original_weight())
        if self._unmerged_weight is not None:
            self._unmerged_weight = weight
        else:
            self.get_base_layer().weight.data = weight

    def check_same_storage(self, weight: torch.Tensor | None) -> None:
        """Refuse a weight from a state dict that is packed where the base layer's is not, or the other way round.

        It would be copied: codes as if they were weights, or weights cut to bytes.

        Raises:
            ValueError: in that case.
        """
        in_full = self.get_base_layer().weight.is_floating_point()  # merged, a packed one is, too
        if weight is not None and weight.is_floating_point() != in_full:
            held, given = ("in full", "packed") if in_full else ("packed", "not")
            raise ValueError(
                f"the frozen weights of the model are {held}, and those of the state dict are {given}; call "
                "pack_weights() before loading a state dict of packed weights, or load the adapter alone."
            )

    def check_float(self) -> None:
        """Refuse to put a weight into a base layer that somebody else has quantized, see `check_float_weight`."""
        if not self.packed:
            check_float_weight(self.get_base_layer(), "merge into")

    def set_aside(self, replacement: torch.Tensor) -> None:
        """Put another weight [out, in] into the base layer, and keep W0 for `put_back`."""
        weight = self.get_base_layer().weight
        if self._unmerged_weight is None:
            self._unmerged_weight = weight.data
        weight.data = self._as_stored(replacement)

    def put_back(self) -> None:
        """Put the very tensor back that `set_aside` replaced."""
        weight, original = self.get_base_layer().weight, self._unmerged_weight
        assert original is not None
        # The model may have moved meanwhile.
        weight.data = original.to(weight) if original.is_floating_point() else original.to(weight.device)
        self._unmerged_weight = None

    def _as_stored(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.t().contiguous() if self.fan_in_fan_out else weight


def check_float_weight(layer: nn.Module, action: str) -> None:
    """Refuse layers whose weight is quantized already: w_hat would be rounded again, onto another grid.

    Raises:
        TypeError: if the weight is not a plain floating-point tensor (bitsandbytes, HQQ, GPTQ, AWQ, torchao, ...).
    """
    weight = getattr(layer, "weight", None)
    # bitsandbytes keeps packed codes in a Parameter of its own, in a dtype of the user's choice (quant_storage).
    packed = any(hasattr(weight, name) for name in ("quant_state", "SCB"))
    plain = isinstance(weight, torch.Tensor) and type(weight.data).__name__ in ("Tensor", "DTensor") and not packed
    if not plain or not weight.is_floating_point() or weight.element_size() < 2:  # type: ignore[union-attr]
        found = "none" if weight is None else f"{type(weight).__name__} of {getattr(weight, 'dtype', None)}"
        raise TypeError(
            f"cannot {action} {type(layer).__name__} (weight: {found}): its weight is quantized already, and rounding "
            "onto a second grid would change it; load the base model in bfloat16, float16 or float32."
        )
