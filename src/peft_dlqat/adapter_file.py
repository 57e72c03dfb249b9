"""Checks a saved adapter's tensors against the model before they are loaded, so that a bad file changes nothing."""

from __future__ import annotations

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .layer import DLQATLayer
from .layer_spec import STORED_BITS, encode_spec, spec_differences
from .quant.fixed_point import STORAGES

_NAMED = (*DLQATLayer.adapter_layer_names, "dlqat_scale", "dlqat_zero_point", "dlqat_offset", "dlqat_spec")


def check_state(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor], storage: str) -> None:
    """Refuse tensors that do not belong to this adapter.

    Args:
        model: the model, with the adapter injected.
        adapter_name: the adapter to be loaded into.
        state_dict: tensors by the model's own keys.
        storage: of the adapter's config.

    Raises:
        ValueError: for missing or extra tensors, shapes of another base or config, values that are not finite, a scale
            that is 0 (or negative, where the grid has a zero), a zero point that is no code, or a grid that is not
            the config's.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, DLQATLayer) and adapter_name in layer.dlqat_grid
    }
    expected = {
        f"{name}.{kind}.{adapter_name}": getattr(layer, kind)[adapter_name]
        for name, layer in layers.items()
        for kind in _NAMED
        if adapter_name in getattr(layer, kind)
    }
    allowed = model.state_dict().keys() - {f"{name}.base_layer.weight" for name in layers}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):  # modules_to_save
            allowed |= {f"{name}.{key}" for key in module.adapter_state_dict_load_map(adapter_name)}
    found = {key: value for key, value in state_dict.items() if any(f".{kind}" in key for kind in _NAMED)}
    # Beside the adapter's own tensors, a file may hold biases, modules_to_save and resized embeddings; never W0.
    strangers = {key for key in state_dict.keys() - found.keys() if not _known(key, allowed)}
    missing, extra = sorted(expected.keys() - found.keys()), sorted((found.keys() - expected.keys()) | strangers)
    if missing or extra:
        raise ValueError(
            f"the saved adapter does not fit this model and config: {len(missing)} tensors are missing "
            f"{missing[:3]}, {len(extra)} are unexpected {extra[:3]}; load it with its own adapter_config.json on the "
            "base model that it was trained on."
        )
    wrong = [
        f"{key} is {list(found[key].shape)}, not {list(tensor.shape)}"
        for key, tensor in expected.items()
        if found[key].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(
            f"the saved adapter has {len(wrong)} tensors of other shapes than this model and config ({wrong[0]}); "
            "load it with its own adapter_config.json on the base model that it was trained on."
        )
    for key in expected:
        if not found[key].is_floating_point():
            raise ValueError(
                f"{key} of the saved adapter is {str(found[key].dtype).removeprefix('torch.')}, but must be floating "
                "point: the file is broken."
            )
    for name, layer in layers.items():
        own = {kind: found.get(f"{name}.{kind}.{adapter_name}") for kind in _NAMED}
        _check_layer(name, layer, adapter_name, own, storage)


def _check_layer(
    name: str, layer: DLQATLayer, adapter_name: str, state: dict[str, torch.Tensor | None], storage: str
) -> None:
    grid = layer.dlqat_grid[adapter_name]
    for kind, tensor in state.items():
        if tensor is not None and not torch.isfinite(tensor).all():
            raise ValueError(f"{name}.{kind} of the saved adapter holds NaN or infinity: the file is broken.")
    spec = state["dlqat_spec"]
    assert spec is not None
    # The one buffer that is compared rather than loaded into: it must say what the config says.
    stored_bits = int(spec[STORED_BITS])
    if layer.packed and stored_bits != layer.dlqat_stored_bits[adapter_name]:
        raise ValueError(
            f"{name}: the saved adapter belongs to a frozen weight in {stored_bits or 'all'} bits, but here it is "
            f"packed in {layer.dlqat_stored_bits[adapter_name]}; load the base model again."
        )
    if stored_bits not in (0, *STORAGES.values()) or 0 < stored_bits < grid.bits:
        raise ValueError(f"{name}.dlqat_spec of the saved adapter says {stored_bits} stored bits: the file is broken.")
    if stored_bits and STORAGES[storage] not in (0, stored_bits):
        raise ValueError(
            f"{name}: the saved adapter was trained on a frozen weight in {stored_bits} bits, and storage={storage!r} "
            "would make another weight of it; use the adapter_config.json beside it, or storage='full'."
        )
    own = encode_spec(grid, layer.dlqat_scaling[adapter_name], layer.dlqat_method[adapter_name], stored_bits)
    if differences := spec_differences(spec, own):
        raise ValueError(
            f"{name}: the saved adapter was made with another config ({'; '.join(differences)}); use the "
            "adapter_config.json beside it, or start a new run in an empty folder."
        )
    scale, zero_point = state["dlqat_scale"], state["dlqat_zero_point"]
    assert scale is not None
    if layer.packed and not _same_grid(layer, adapter_name, state):
        raise ValueError(
            f"{name}: the frozen weight is packed on another grid than the saved adapter's; load the base model again."
        )
    bad_scale = scale == 0 if grid.zero_point == "none" else scale <= 0
    if bad_scale.any():
        rule = "non-zero" if grid.zero_point == "none" else "positive"
        raise ValueError(
            f"{name}.dlqat_scale of the saved adapter must be {rule}, but holds {scale[bad_scale][0].item()}: the "
            "file is broken."
        )
    if zero_point is not None:
        codes = (zero_point == zero_point.round()) & (zero_point >= grid.qmin) & (zero_point <= grid.qmax)
        if not codes.all():
            bad = zero_point[~codes].flatten()[0].item()
            raise ValueError(
                f"{name}.dlqat_zero_point of the saved adapter holds {bad}, but zero points are integers from "
                f"{grid.qmin} to {grid.qmax}: the file is broken, or was saved while calibrating."
            )


def _same_grid(layer: DLQATLayer, adapter_name: str, state: dict[str, torch.Tensor | None]) -> bool:
    """Whether the step and zero that W0 is packed by are those of the file."""
    own = {kind: getattr(layer, kind) for kind in ("dlqat_scale", "dlqat_zero_point", "dlqat_offset")}
    return all(
        torch.equal(entries[adapter_name].cpu(), tensor.float().cpu())
        for kind, entries in own.items()
        if adapter_name in entries and (tensor := state[kind]) is not None
    )


def _known(key: str, allowed: set[str]) -> bool:
    """Whether the model has such a tensor; keys of a file have PEFT's prefix, those of an injected model don't.

    With bias="all" PEFT saves the biases of modules_to_save twice, once by a name that it does not load.
    """
    return ".modules_to_save." in key or key in allowed or key.removeprefix("base_model.model.") in allowed
