"""A saved adapter: whether its tensors fit the model they are loaded into."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Set
from contextlib import suppress
from typing import Any

import torch
from peft import load_peft_weights
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from .layer import NUMBERS, PREFIX, SAVED, DLQATLayer, adapter_layers, warn_of_inexact
from .layer_spec import stored_as
from .placement import is_partitioned
from .quant.fixed_point import ALL_STORAGES, FILE_STORAGES, STORAGES
from .record import OtherBaseWarning, Record

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor_key(layer: str, kind: str, adapter_name: str) -> str:
    """The model's own key of a tensor of an adapter: Parameters lie in a module of their own."""
    return f"{layer}.{kind}.{adapter_name}" + ("" if kind in NUMBERS else ".weight")


def with_current_names(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A file's tensors by the keys of today: Parameters had no ".weight" behind their names once."""
    numbers = "|".join(kind.removeprefix(PREFIX) for kind in NUMBERS)
    return {re.sub(rf"(\.{PREFIX}(?!{numbers})\w+)$", r"\1.weight", key): value for key, value in state_dict.items()}


def recorded_dtype(adapter: str) -> torch.dtype | None:
    """The dtype of the base model that an adapter was trained on, by folder or hub id; None where it is unknown."""
    dtypes = {
        Record.decode(value).dtype
        for key, value in load_peft_weights(adapter, device="cpu").items()
        if key.endswith(".dlqat_record")
    }
    return dtypes.pop() if len(dtypes) == 1 else None


def check_state(
    model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor], storage: str, biases: bool
) -> dict[str, torch.Tensor]:
    """Refuse tensors that do not belong to this adapter.

    Args:
        model: the model, with the adapter injected.
        adapter_name: the adapter to be loaded into.
        state_dict: tensors by the model's own keys.
        storage: of the adapter's config.
        biases: whether the config has biases trained.

    Returns:
        What is to be loaded: the same, with the settings added that were not there when the file was written.

    Raises:
        ValueError: for missing or extra tensors, shapes of another base or config, values that are not finite, a scale
            that is 0 (or negative, where the grid has a zero), a zero point that is no code, or settings that are not
            the config's.
    """
    layers = adapter_layers(model, adapter_name)[1]
    expected = {
        tensor_key(name, kind, adapter_name): entries[adapter_name]
        for name, layer in layers.items()
        for kind in (*layer.adapter_layer_names, *SAVED)
        if adapter_name in (entries := getattr(layer, kind))
    }
    state_dict = _records(layers, adapter_name, state_dict) | state_dict
    second_names = _second_names(model)
    state_dict = {key: value for key, value in state_dict.items() if not key.startswith(tuple(second_names))}
    found = {key: value for key, value in state_dict.items() if f".{PREFIX}" in key}
    _check_names(model, adapter_name, expected.keys(), found.keys(), state_dict.keys() - found.keys(), biases)
    own = model.state_dict()
    for key in sorted(state_dict.keys() - found.keys()):
        if key.endswith(".base_layer.weight"):
            continue  # of an adapted head: loaded where it is W0 to the bit, see `model._with_own_base`
        value = state_dict[key]
        _check_numbers(key, value, whole=own[key].dtype if key in own and not own[key].is_floating_point() else None)
        if key in own and value.shape != own[key].shape:
            raise ValueError(
                f"{key} of the saved adapter is {list(value.shape)}, not {list(own[key].shape)} as this model's; give "
                "the model the shape that it was trained with first, by resize_token_embeddings, say."
            )
    shapes = {key: tensor.shape for key, tensor in expected.items()}
    for name, layer in layers.items():
        key, spec = tensor_key(name, "dlqat_spec", adapter_name), layer.specs[adapter_name]
        if found[key].dim() == 1:
            found[key], shapes[key] = spec.completed(found[key]), torch.Size([spec.length])
            if len(found[key]) > spec.length:
                raise ValueError(
                    f"{key} of the saved adapter has {len(found[key])} settings, and this version knows "
                    f"{spec.length}; update peft-dlqat."
                )
    wrong = [
        f"{key} is {list(found[key].shape)}, not {list(shape)}"
        for key, shape in shapes.items()
        if found[key].shape != shape
    ]
    if wrong:
        raise ValueError(
            f"the saved adapter has {len(wrong)} tensors of other shapes than this model and config ({wrong[0]}); "
            "load it with its own adapter_config.json on the base model that it was trained on."
        )
    for key in expected:
        _check_numbers(key.removesuffix(".weight").removesuffix(f".{adapter_name}"), found[key])
        found[key] = found[key].float()  # low_cpu_mem_usage puts it in the place of ours
    for name, layer in layers.items():
        keys = {kind: tensor_key(name, kind, adapter_name) for kind in (*layer.adapter_layer_names, *SAVED)}
        own = {kind: found[key] for kind, key in keys.items() if key in found}
        layer.converted.pop(adapter_name, None)
        layer.convert(adapter_name, own)
        found.update({keys[kind]: tensor for kind, tensor in own.items()})
        _check_layer(name, layer, adapter_name, {kind: own.get(kind) for kind in SAVED}, storage)
        key = keys["dlqat_spec"]
        found[key] = found[key][: len(expected[key])]  # without what both leave out
    again = {
        second + key.removeprefix(first): value
        for second, first in second_names.items()
        for key, value in found.items()
        if key.startswith(first)
    }
    return {**state_dict, **found, **again}


def _records(
    layers: Mapping[str, DLQATLayer], adapter_name: str, state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Records for a file without any, of an older version or by another hand, which says nothing of its scales.

    What was trained on them keeps them, as calibrated ones are kept. Else a calibration is welcome.
    """
    trained = any(
        bool((value != value.flatten()[:1]).any())  # a fresh one is all the same, whatever its unit
        for name, layer in layers.items()
        for kind, (tensor, _) in layer.trained(adapter_name).items()
        if tensor.start is not None
        and (value := state_dict.get(tensor_key(name, f"{PREFIX}{kind}", adapter_name))) is not None
    )
    record = Record(calibrated=trained).encode()
    return {tensor_key(name, "dlqat_record", adapter_name): record.clone() for name in layers}


def _check_numbers(name: str, value: torch.Tensor, whole: torch.dtype | None = None) -> None:
    """Refuse what can't be loaded as it is: numbers of another kind (`whole` where integers belong), or no numbers."""
    if value.dtype not in (_FLOATS if whole is None else (whole,)):
        found, rule = str(value.dtype).removeprefix("torch."), f"{whole}".removeprefix("torch.")
        rule = "floating point, of 16 bits or more" if whole is None else rule
        raise ValueError(f"{name} of the saved adapter is {found}, but must be {rule}: the file is broken.")
    if not torch.isfinite(value).all():
        raise ValueError(f"{name} of the saved adapter holds NaN or infinity: the file is broken.")


def check_loaded(model: nn.Module, adapter_name: str, storage: str) -> None:
    """Refuse tensors that were put into an adapter's layers by others than PEFT's loading, which asks `check_state`.

    Args:
        model: the model.
        adapter_name: the adapter.
        storage: of its config.

    Raises:
        ValueError: for settings that are not the config's, and scales or zeros that no grid has.
    """
    layers, records, inexact = adapter_layers(model, adapter_name)[1], {}, 0
    for name, layer in layers.items():
        state = {kind: getattr(layer, kind).get(adapter_name) for kind in SAVED}
        scale = state["dlqat_scale"] if layer.frozen.in_file is None else state["dlqat_spec"]
        if scale is None or scale.is_meta or type(scale.data) is not torch.Tensor or is_partitioned(scale):
            continue  # not there, or a shard of it
        inexact += layer.convert_in_place(adapter_name)
        encoded = state["dlqat_spec"]
        assert encoded is not None
        _check_layer(name, layer, adapter_name, state, storage)
        kept = stored_as(encoded)
        if kept is not None and kept != layer.specs[adapter_name].storage:
            layer.set_storage(adapter_name, kept)
        if (record := layer.record(adapter_name)).calibrated:  # a new one is not
            records[name] = record
    warn_of_inexact(inexact)
    warn_of_other_base(adapter_name, layers, records)


def warn_of_other_base(adapter_name: str, layers: Mapping[str, DLQATLayer], records: Mapping[str, Record]) -> None:
    """Warn if adapted weights are not those that an adapter's records tell of: other codes would come of them.

    Raises:
        ValueError: where weights are as a quantized file has them: the scales and zeros are those of that file.
    """
    others, dtypes = [], set()
    for name, recorded in records.items():
        found = layers[name].base_record()
        if layers[name].frozen.in_file is not None and recorded.checksum != found.checksum:
            raise ValueError(
                f"adapter {adapter_name!r} belongs to another quantized file: {name} has other bytes there; open by "
                "load_quantized the very file that it was trained on."
            )
        if not recorded.fits(found):
            layers[name].on_other_base.add(adapter_name)
            others.append(name)
            dtypes.add(f"{_in_words(recorded.dtype)} there, {_in_words(found.dtype)} here")
    if others:
        warnings.warn(
            f"adapter {adapter_name!r} was trained on other base weights than these ({len(others)} of {len(layers)} "
            f"layers, such as {others[0]}; {'; '.join(sorted(dtypes))}); with these the codes are others, and so is "
            "the model: load the base model of its adapter_config.json, in the same dtype.",
            OtherBaseWarning,
            stacklevel=2,
        )


def _in_words(dtype: torch.dtype | None) -> str:
    return "another dtype" if dtype is None else str(dtype).removeprefix("torch.")


def _check_layer(
    name: str, layer: DLQATLayer, adapter_name: str, state: dict[str, torch.Tensor | None], storage: str
) -> None:
    """Refuse what is wrong with a layer's tensors beside those that train."""
    _check_settings(name, layer, adapter_name, state, storage)
    _check_scales_and_zeros(name, layer, adapter_name, state)
    assert state["dlqat_record"] is not None
    try:
        Record.decode(state["dlqat_record"])
    except ValueError as error:
        raise ValueError(f"{name}.dlqat_record of the saved adapter: {error}.") from None


def _embeddings(model: nn.Module) -> list[str]:
    """Names of the input and output embeddings; of an adapted one, of its base layer."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not isinstance(base, PreTrainedModel):
        return []
    embeddings = set()
    for get in (base.get_input_embeddings, base.get_output_embeddings):
        with suppress(NotImplementedError):  # transformers' word for a model of images or sound, which has none
            layer = get()
            embeddings.add(id(layer.get_base_layer() if isinstance(layer, DLQATLayer) else layer))
    return [name for name, module in model.named_modules(remove_duplicate=False) if id(module) in embeddings]


def _second_names(model: nn.Module) -> dict[str, str]:
    """Further names of a layer that several modules hold, each with its first one; both with a dot. Files have one."""
    first: dict[int, str] = {}
    return {
        f"{name}.": f"{known}."
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, DLQATLayer) and (known := first.setdefault(id(module), name)) != name
    }


def _check_names(
    model: nn.Module,
    adapter_name: str,
    expected: Set[str],
    found: Set[str],
    others: Set[str],
    biases: bool,
) -> None:
    """Refuse a file that lacks a tensor of the adapter, or has one that its config says nothing of."""
    allowed = {f"{name}.{key}weight" for name in _embeddings(model) for key in ("", "original_module.")}
    allowed |= {key for key in model.state_dict() if biases and key.endswith("bias")}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):  # modules_to_save
            allowed |= {f"{name}.{key}" for key in module.adapter_state_dict_load_map(adapter_name)}

    def known(key: str) -> bool:
        # Keys of a file have PEFT's prefix, those of an injected model don't. With bias="all" PEFT saves the biases of
        # modules_to_save twice, once by a name that it does not load.
        return ".modules_to_save." in key or key in allowed or key.removeprefix("base_model.model.") in allowed

    # Beside the adapter's own tensors, a file may hold biases, modules_to_save, and embeddings: PEFT saves these where
    # the vocabulary has changed or the head is adapted. Never another base weight.
    strangers = {key for key in others if not known(key)}
    missing, extra = sorted(expected - found), sorted((found - expected) | strangers)
    if missing or extra:
        raise ValueError(
            f"the saved adapter does not fit this model and config: {len(missing)} tensors are missing "
            f"{missing[:3]}, {len(extra)} are unexpected {extra[:3]}; load it with its own adapter_config.json on the "
            "base model that it was trained on."
        )


def _check_settings(
    name: str, layer: DLQATLayer, adapter_name: str, state: dict[str, torch.Tensor | None], storage: str
) -> None:
    """Refuse settings other than the config's, and another storage than that of the weight that is there."""
    spec, encoded = layer.specs[adapter_name], state["dlqat_spec"]
    assert encoded is not None
    kept = stored_as(encoded)
    if kept is None or ALL_STORAGES[kept].problem(spec.grid.bits, layer.in_features):
        raise ValueError(
            f"{name}.dlqat_spec of the saved adapter names storage {int(encoded[6])}, which is none of {[*STORAGES]} "
            f"or holds no {spec.grid.bits} bits: the file is broken, or another version's."
        )
    if layer.frozen.packed and kept != spec.storage:
        raise ValueError(
            f"{name}: the saved adapter belongs to a frozen weight kept as {kept!r}, but here it is packed as "
            f"{spec.storage!r}; load the base model again."
        )
    if (kept in FILE_STORAGES) != (layer.frozen.in_file is not None):
        raise ValueError(
            f"{name}: the saved adapter belongs to a frozen weight kept as {kept!r}, and this one is kept as "
            f"{spec.storage!r}; open the file that the adapter was trained on by load_quantized."
        )
    if kept != "full" and storage not in ("full", kept) and kept not in FILE_STORAGES:
        raise ValueError(
            f"{name}: the saved adapter was trained on a frozen weight kept as {kept!r}, and storage={storage!r} "
            "would make another weight of it; use the adapter_config.json beside it, or storage='full'."
        )
    if differences := spec.differences(encoded):
        raise ValueError(
            f"{name}: the saved adapter was made with another config ({'; '.join(differences)}); use the "
            "adapter_config.json beside it, or start a new run in an empty folder."
        )


def _check_scales_and_zeros(
    name: str, layer: DLQATLayer, adapter_name: str, state: dict[str, torch.Tensor | None]
) -> None:
    grid, scale, zero_point = layer.specs[adapter_name].grid, state["dlqat_scale"], state["dlqat_zero_point"]
    if layer.frozen.in_file is not None:
        return  # they are in the file
    assert scale is not None
    if layer.frozen.packed and not _same_scales_and_zeros(layer, adapter_name, state):
        raise ValueError(
            f"{name}: the frozen weight is packed by other scales or zeros than the saved adapter's; load the base "
            "model again."
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


def _same_scales_and_zeros(layer: DLQATLayer, adapter_name: str, state: dict[str, torch.Tensor | None]) -> bool:
    """Whether W0 is packed by those of the file."""
    own = {kind: getattr(layer, kind) for kind in ("dlqat_scale", "dlqat_zero_point", "dlqat_offset")}
    return all(
        torch.equal(entries[adapter_name].cpu(), tensor.float().cpu())
        for kind, entries in own.items()
        if adapter_name in entries and (tensor := state[kind]) is not None
    )
