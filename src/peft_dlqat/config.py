"""DLQATConfig: what a user writes. Strings and numbers in, everything JSON; resolved to values once, at injection."""

from __future__ import annotations

import functools
import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download
from peft import LoraConfig
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftType
from safetensors import SafetensorError, safe_open

from .files import allow
from .formats import FORMATS, find_preset
from .hub import write_section
from .layer_spec import layer_setting, pattern_of
from .lora_arguments import check_mergeable, translated
from .messages import cut, shown
from .methods import MAGNITUDES, METHODS, Method
from .quant.fit import INITIALISATIONS
from .quant.fixed_point import IN_FILE, STORAGES
from .quant.grid import SCALE_DTYPES, ZERO_POINTS, Grid
from .quant.op import GRADIENTS
from .quant.super_blocks import K_QUANTS, check_k_quant
from .regexes import LONGEST, check_matching_ends, check_regex

Check = Callable[[str, Any], None]  # of a name and a value; raises a ValueError

DEFAULT_GROUP_SIZE = 128
_LORA_BESIDE = "lora"  # folder, in an adapter's own, with the LoRA adapter that it continues from
_BIAS = ("none", "all", "dlqat_only")


# A config may come from anybody: what would take minutes or gigabytes only to be looked at is no setting.
_MOST_NAMES = 100_000
_LARGEST_FILE = 2**25
_LARGEST_INT = 2**31
_DEEPEST = 20


def _check_int(name: str, value: Any, low: int, high: int, remedy: str) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not low <= value <= high:
        limits = f"from {low} to {high}" if high < _LARGEST_INT else f"of at least {low}, and below 2**31"
        raise ValueError(f"{name}={shown(value)} must be an integer {limits}; {remedy}.")


def _check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={shown(value)} must be one of {', '.join(map(repr, choices))}.")


def _one_of(choices: Iterable[str]) -> Check:
    return lambda name, value: _check_choice(name, value, choices)


def _storage(name: str, value: Any) -> None:
    _check_choice(name, value, (*STORAGES, IN_FILE))


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)} must be True or False.")


def _check_bits(name: str, value: Any) -> None:
    _check_int(name, value, 2, 8, "use 4 for little loss, 3 or 2 for the smallest model")


def _check_group_size(name: str, value: Any) -> None:
    if not isinstance(value, int) or value != -1:
        remedy = f"use {DEFAULT_GROUP_SIZE}, 64 or 32, or -1 for one scale a row"
        _check_int(name, value, 1, _LARGEST_INT, remedy)


def _check_rank(name: str, value: Any) -> None:
    _check_int(name, value, 1, _LARGEST_INT, "use 8 to 64")


def _check_alpha(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # Beyond these, lora_alpha / r is no float32.
    if not number or not 1e-30 <= value <= 1e30:
        raise ValueError(f"{name}={shown(value)} must be a positive number, at most 1e30; use r, or twice r.")


def _check_text(name: str, value: Any) -> None:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if text is not None and (not isinstance(text, str) or len(text) > LONGEST):
        raise ValueError(f"{name}={shown(value)} must be a string of at most {LONGEST:,} characters, or None.")


def _check_names(name: str, value: Any, what: str = "a list of module names, or a regex") -> None:
    if isinstance(value, str):
        check_regex(name, value, name)
    elif value is not None:
        if not isinstance(value, list | tuple | set) or not all(isinstance(entry, str) and entry for entry in value):
            raise ValueError(f"{name}={shown(value)} must be {what}.")
        if len(value) > _MOST_NAMES:
            raise ValueError(f"{name} has {len(value):,} entries, but may have {_MOST_NAMES:,}; use a regex.")
        for entry in value:
            _check_text(f"an entry of {name}", entry)


def _check_regexes(name: str, value: Any) -> None:
    """Of fields whose entries PEFT takes for regexes."""
    _check_names(name, [value] if isinstance(value, str) else value, "a list of module names")
    for entry in [value] if isinstance(value, str) else value or ():
        check_regex(f"an entry of {name}", entry, name)


def _check_modules_to_save(name: str, value: Any) -> None:
    if isinstance(value, str):
        raise ValueError(f"{name}={shown(value)} must be a list of module names, such as ['lm_head'].")
    _check_regexes(name, value)


def _check_indices(name: str, value: Any) -> None:
    for index in value if isinstance(value, list | tuple | set) else [] if value is None else [value]:
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < _LARGEST_INT:
            raise ValueError(f"{name}={shown(value)} must be an index or a list of indices, from 0.")


def _check_export(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, list | tuple | set):
        raise ValueError(f"{name}={shown(value)} must be a list of formats, such as ['gguf'].")
    for entry in value:
        _check_choice(name, entry, FORMATS)


def _check_embeddings(name: str, value: Any) -> None:
    if value is not None:
        _check_choice(name, value, ("q8_0",))


def _check_pattern(name: str, value: Any, check: Check) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{name}={shown(value)} must be a dict from module names to values.")
    for key, own in value.items():
        check_regex(f"a key of {name}", key, name)
        check(f"{name}[{key!r}]", own)


def _depth(value: Any) -> int:
    """Levels of dicts and lists inside each other; what copies or saves them goes one call deeper for each."""
    depth, level = 0, [value]
    while level := [
        inner
        for outer in level
        if isinstance(outer, dict | list)
        for inner in (outer.values() if isinstance(outer, dict) else outer)
    ]:
        depth += 1
    return depth


def _check_mapping(name: str, value: Any) -> None:
    if not isinstance(value, dict | None):
        raise ValueError(f"{name}={shown(value)} must be a dict, or None.")


# Fields that PEFT has in all configs, and does not look at.
_OF_PEFT: dict[str, Check] = {
    "base_model_name_or_path": _check_text,
    "revision": _check_text,
    "peft_version": _check_text,
    "task_type": _check_text,
    "inference_mode": _check_flag,
    "auto_mapping": _check_mapping,
}


def _setting(default: Any, help: str, check: Check | None = None) -> Any:
    metadata: dict[str, Any] = {"help": help, **({"check": check} if check is not None else {})}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DLQATConfig(PeftConfig):
    """Configuration of a [`DLQATModel`]: quantization-aware training of low-rank adapters (arXiv 2504.09223).

    Args:
        bits: width of a weight, 2 to 8.
        method: "dlqat", or another row of the formula: "lrqat", "l4q", "peqa", "qalora" (see `peft_dlqat.methods`).
        magnitude: True for the method's own (of DL-QAT one a group), "row" for one a row, False for none; only "dlqat"
            leaves the choice.
        group_size: input channels that share a scale; -1 for one scale a row. Where it does not divide a layer's
            in_features, a smaller one of 64 and 32 is used, or else the row, with one warning; it is refused where
            that takes over half a bit a weight more. A size above a layer's in_features
            is refused, but for the default, which adapts to any layer.
        zero_point: "none" (symmetric, signed scale; the kind that every format holds and every engine has kernels
            for), "integer" or "float" (any real offset: the lowest loss at 2 bits; GGUF Q4_1 and MLX hold it).
        scale_dtype: how scales ship and, rounded straight-through, train: "bfloat16", "float16", "float32", or
            "k_quant" for the grids of GGUF's K-quants: Q3_K and Q6_K have bits=3 or 6, zero_point="none",
            group_size=16; Q2_K bits=2, zero_point="float", group_size=16; Q4_K and Q5_K bits=4 or 5,
            zero_point="float", group_size=32. It needs in_features that are multiples of 256.
        r: rank of the low-rank update.
        lora_alpha: the update is scaled by lora_alpha / r.
        use_rslora: scale by lora_alpha / sqrt(r) instead.
        target_modules: names (suffixes), a regex, or "all-linear": every linear layer but the output head.
        exclude_modules: names or a regex of modules to leave alone.
        modules_to_save: modules to train in full precision and save beside the adapter.
        layers_to_transform: index or indices of the layers to adapt; all by default.
        layers_pattern: name of the list of layers, where it is not a usual one.
        rank_pattern: r by module name (suffix or regex), overriding `r`.
        alpha_pattern: lora_alpha by module name, overriding `lora_alpha`.
        bits_pattern: bits by module name, overriding `bits`.
        group_size_pattern: group_size by module name, overriding `group_size`.
        bias: which biases train: "none", "all" or "dlqat_only".
        storage: how the frozen weight is kept after calibration: "full", as it is; "int8", "int4" or "int2":
            that many bits a weight, in units of the grid (`peft_dlqat.quant.fixed_point`), and the full one is let go.
            "file" is what [`load_quantized`] sets: as the quantized file has it, whose types say bits, group sizes,
            zeros and scales.
        gradient: "exact"; "bf16", whose one product that only feeds sums is in bfloat16; or "lowrank": at LoRA's own
            cost, without the clip's mask, for magnitude="row" or False (see `peft_dlqat.quant.lowrank`).
        init: how the first scales and zeros are found: "mse" (least squared error over clipped ranges; those that the
            weights lie on, where they do, as after quantization-aware training) or "minmax".
        export: formats that the model is to be exported to ("gguf", "compressed-tensors", "mlx", "gptq", "awq",
            "dense"): a grid that one of them cannot hold exactly is refused now rather than after training.
        file_sha256: checksum of the quantized file that the adapter belongs to; set by [`load_quantized`].
        init_weights: True starts B at zero, so that a fresh adapter is exactly round-to-nearest; False starts it
            at random, for tests.
        lora: folder or hub id of a trained LoRA adapter to continue from: it is merged into the frozen weights, here
            and wherever the adapter is loaded. See `from_lora`.
        embeddings: "q8_0" rounds the token embedding and the output head to what GGUF's Q8_0 holds when the adapter
            is put into a model, so that it trains with what ships; None leaves them.

    Raises:
        ValueError: for a value that no layer could take; says the value, the rule and a remedy.

    Example:
        ```py
        >>> from peft import get_peft_model
        >>> from peft_dlqat import DLQATConfig
        >>> model = get_peft_model(model, DLQATConfig(bits=3, task_type="CAUSAL_LM"))
        ```
    """

    bits: int = _setting(4, "Width of a weight, 2 to 8.", _check_bits)
    method: str = _setting("dlqat", "Row of the formula; 'dlqat' by default.", _one_of(METHODS))
    magnitude: bool | str = _setting(True, "True for the method's own, 'row' for one a row, False for none.")
    group_size: int = _setting(
        DEFAULT_GROUP_SIZE, "Input channels that share a scale; -1 for one scale a row.", _check_group_size
    )
    zero_point: Literal["none", "integer", "float"] = _setting(
        "none", "Kind of zero: 'none' (symmetric), 'integer' or 'float'.", _one_of(ZERO_POINTS)
    )
    scale_dtype: Literal["bfloat16", "float16", "float32", "k_quant"] = _setting(
        "bfloat16", "How scales ship: a dtype, or 'k_quant' for GGUF's K-quants.", _one_of(SCALE_DTYPES)
    )
    r: int = _setting(8, "Rank of the low-rank update.", _check_rank)
    lora_alpha: float = _setting(8, "The update is scaled by lora_alpha / r.", _check_alpha)
    use_rslora: bool = _setting(False, "Scale by lora_alpha / sqrt(r) instead.", _check_flag)
    target_modules: list[str] | str | None = _setting("all-linear", "Names, a regex, or 'all-linear'.", _check_names)
    exclude_modules: list[str] | str | None = _setting(
        None, "Names or a regex of modules to leave alone.", _check_names
    )
    modules_to_save: list[str] | None = _setting(
        None, "Modules to train in full precision and save beside the adapter.", _check_modules_to_save
    )
    layers_to_transform: list[int] | int | None = _setting(
        None, "Index or indices of the layers to adapt.", _check_indices
    )
    layers_pattern: list[str] | str | None = _setting(None, "Name of the list of layers.", _check_regexes)
    rank_pattern: dict[str, int] = _setting({}, "r by module name.")
    alpha_pattern: dict[str, float] = _setting({}, "lora_alpha by module name.")
    bits_pattern: dict[str, int] = _setting({}, "bits by module name.")
    group_size_pattern: dict[str, int] = _setting({}, "group_size by module name.")
    bias: Literal["none", "all", "dlqat_only"] = _setting("none", "Which biases train.", _one_of(_BIAS))
    storage: Literal["full", "int8", "int4", "int2", "file"] = _setting(
        "full", "How the frozen weight is kept once scales and zeros are frozen.", _storage
    )
    gradient: Literal["exact", "bf16", "lowrank"] = _setting(
        "exact", "'exact', 'bf16', or 'lowrank' at LoRA's own cost.", _one_of(GRADIENTS)
    )
    init: Literal["mse", "minmax"] = _setting("mse", "First scales and zeros of a layer.", _one_of(INITIALISATIONS))
    export: list[str] | None = _setting(None, "Formats that must be able to hold the grid exactly.", _check_export)
    file_sha256: str | None = _setting(None, "Checksum of the quantized file it belongs to.", _check_text)
    init_weights: bool = _setting(True, "Start B at zero; False starts it at random.", _check_flag)

    lora: str | None = _setting(None, "Trained LoRA adapter to continue from: folder or hub id.", _check_text)
    embeddings: str | None = layer_setting(
        None, "'q8_0' rounds embedding and output head at injection.", _check_embeddings, lambda value: 8 * bool(value)
    )

    def __post_init__(self) -> None:
        """Refuse what no layer could take."""
        for name, check in _OF_PEFT.items():
            check(name, getattr(self, name, None))
        # PEFT fills its version in, so that only a saved config has one yet. No field: it is not saved.
        self.was_saved = getattr(self, "peft_version", None) is not None
        super().__post_init__()
        self.peft_type = PeftType.DLQAT  # type: ignore[attr-defined]
        # What "all-linear" stood for in the last model; the next may be another one. No field: it is not saved.
        self.all_linear: list[str] | set[str] | str | None = None
        if isinstance(self.lora, os.PathLike) or (isinstance(self.lora, str) and not self.was_saved):
            self.lora = os.path.abspath(self.lora) if os.path.isdir(self.lora) else os.fspath(self.lora)
        checks = {entry.name: entry.metadata["check"] for entry in fields(self) if "check" in entry.metadata}
        for name, check in checks.items():
            check(name, getattr(self, name))
        for pattern, name in self.patterns().items():
            if getattr(self, pattern) is None:
                setattr(self, pattern, {})
            _check_pattern(pattern, getattr(self, pattern), checks[name])
        if self.scale_dtype == "k_quant":
            check_k_quant(self.bits, self.zero_point, self.group_size)
        self._check_method()
        self._check_storage()
        if self.target_modules is None or str(self.target_modules).lower() == "all-linear":  # as PEFT reads it
            self.target_modules = "all-linear"
        self.target_modules = self._as_set(self.target_modules)
        self.exclude_modules = self._as_set(self.exclude_modules)
        if self._is_regex() and self.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform!r} has no meaning beside the regex "
                f"target_modules={self.target_modules!r}; name the layers in the regex, or the modules in a list."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} needs layers_to_transform; say which layers to adapt."
            )
        if self.storage != IN_FILE:
            self.check_export(self.grids())
        elif changing := [name for name in ("lora", "embeddings") if getattr(self, name) is not None]:
            raise ValueError(f"{changing[0]} changes weights that a quantized file keeps; leave {changing[0]} out.")

    @classmethod
    def from_lora(cls, lora: LoraConfig | str | os.PathLike[str], /, **settings: Any) -> DLQATConfig:
        """The config of a LoRA script, for DL-QAT; or of a trained LoRA adapter, to continue from.

        Rank, alpha, modules and patterns are taken as they are. Where LoRA chooses modules by the model's type, every
        linear layer is adapted, as only adapted layers are quantized. A warning says what is left out.

        A trained adapter becomes a part of the model that is quantized: the frozen weight is W0 + scaling * BA in its
        dtype, and DL-QAT's own B starts at zero beside it. So scales are fitted to that weight, and the model with its
        adapters disabled, the teacher of calibration and distillation, is the LoRA model.

        Args:
            lora: the script's config; or the folder or hub id of a trained adapter.
            settings: DL-QAT's own, such as `bits=3`; they come before LoRA's of the same name.

        Raises:
            ValueError: for an adapter that is more than A and B: DoRA, trained biases, modules_to_save and the like.

        Example:
            ```py
            >>> config = DLQATConfig.from_lora("my-lora", bits=3, target_modules="all-linear")
            >>> model = get_peft_model(base_model, config)
            ```
        """
        if not isinstance(lora, LoraConfig):
            path = os.path.abspath(lora) if os.path.isdir(lora) else os.fspath(lora)
            check_mergeable(trained := PeftConfig.from_pretrained(path), path)
            return cls.from_lora(trained, **{"lora": path, **settings})
        own = {"peft_type", "peft_version", "auto_mapping", "inference_mode"}  # of LoRA, and of a trained adapter
        arguments = {entry.name: getattr(lora, entry.name) for entry in fields(lora)}
        arguments = {name: value for name, value in arguments.items() if name not in own}
        taken, left_out = translated(arguments, {entry.name for entry in fields(cls)})
        if left_out:
            warnings.warn(f"left out of the LoRA config: {'; '.join(left_out.values())}.", stacklevel=2)
        return cls(**{**taken, **settings})

    @classmethod
    def for_engine(cls, engine: str, type: str | None = None, bits: int | None = None, **settings: Any) -> DLQATConfig:
        """The config for what a model is to be served with: a grid for which the engine has fast kernels.

        It names the format in `export`, so that each layer is checked when the adapter is made.

        Args:
            engine: "llama.cpp", "vllm", "mlx", "transformers" or "gptqmodel".
            type: the engine's own name for the grid, such as "Q3_K"; of llama.cpp only.
            bits: width of a weight; 4 by default, or the type's.
            settings: further ones, such as `r=16`. They come before the preset's.

        Raises:
            ValueError: for an engine, a type or bits that there are not; says which there are.

        Example:
            ```py
            >>> DLQATConfig.for_engine("llama.cpp", "Q3_K", r=16, task_type="CAUSAL_LM")
            >>> DLQATConfig.for_engine("vllm", bits=4)
            ```
        """
        format, preset = find_preset(FORMATS.values(), engine, type, bits)
        return cls(**{**preset.settings, "export": [format], **settings})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """As PEFT's; refuses a truncated weights file beside the config before a model is touched.

        Raises:
            ValueError: if the folder's adapter_model.safetensors cannot be read, or adapter_config.json cannot, or
                holds a value that no config could have.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        file = folder / SAFETENSORS_WEIGHTS_NAME
        if file.is_file():
            try:
                safe_open(file, framework="pt").keys()
            except SafetensorError as error:
                raise ValueError(
                    f"{file} cannot be read ({str(error)[:300]}): the file is truncated or broken; copy or "
                    "download it again."
                ) from error
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except (ValueError, TypeError) as error:
            if CONFIG_NAME in str(error):
                raise
            raise ValueError(f"{folder / CONFIG_NAME}: {str(error)[:1000]}") from error  # PEFT may show a whole value
        if isinstance(config, DLQATConfig) and config.lora is not None and os.path.isabs(config.lora):
            beside = _lora_beside(str(pretrained_model_name_or_path), subfolder, kwargs)
            config.lora = str(beside) if beside.is_dir() else config.lora
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """As PEFT's; refuses what is no config by its shape.

        Raises:
            ValueError: for a file that is too large or no JSON object, or names a method that PEFT does not know.
        """
        remedy = "the file is broken; copy or download it again"
        if (size := os.path.getsize(path_json_file)) > _LARGEST_FILE:
            raise ValueError(f"{path_json_file} has {size:,} bytes, and a config at most {_LARGEST_FILE:,}: {remedy}.")
        try:
            content = super().from_json_file(path_json_file, **kwargs)
        except (ValueError, TypeError, RecursionError) as error:  # no text, no JSON, no object, or far too deep
            raise ValueError(f"{path_json_file} cannot be read ({cut(error)}): {remedy}.") from error
        if (depth := _depth(content)) > _DEEPEST:
            raise ValueError(f"{path_json_file} is {depth} levels deep, and a config at most {_DEEPEST}: {remedy}.")
        known = [str(member.value) for member in PEFT_TYPE_TO_CONFIG_MAPPING]
        if not isinstance(content, dict) or content.get("peft_type", known[0]) not in known:
            found = content.get("peft_type") if isinstance(content, dict) else content
            raise ValueError(f"{path_json_file} names no method that PEFT knows, but {shown(found)}: {remedy}.")
        return content

    def _check_method(self) -> None:
        method = METHODS[self.method]
        if not isinstance(self.magnitude, bool):
            _check_choice("magnitude", self.magnitude, MAGNITUDES)
        if self.resolve_method().magnitude not in method.magnitudes:
            raise ValueError(
                f"magnitude={self.magnitude!r} does not go with method={self.method!r}, whose trained tensors are its "
                "own; leave it at True, or use method='dlqat'."
            )
        if self.zero_point not in method.zero_points:
            raise ValueError(
                f"zero_point={self.zero_point!r} does not go with method={self.method!r}; use "
                f"{' or '.join(map(repr, method.zero_points))}."
            )

        if self.gradient == "lowrank" and (not method.lowrank or self.resolve_method().magnitude == "group"):
            raise ValueError(
                f"gradient='lowrank' needs one magnitude a row or none, but method={self.method!r} has magnitude="
                f"{self.magnitude!r}; use method='dlqat' with magnitude='row' or False."
            )

    def _check_storage(self) -> None:
        if self.storage == "full":
            return
        if METHODS[self.method].trains_step:
            raise ValueError(
                f"storage={self.storage!r} keeps the weight in units of the frozen step, but method={self.method!r} "
                "trains the step; use storage='full', or another method."
            )
        if self.storage == IN_FILE:
            self._check_in_file()
            return
        if problem := STORAGES[self.storage].problem(max(self.bits, *self.bits_pattern.values(), 0), 8):
            raise ValueError(f"storage={self.storage!r} {problem}.")

    def _check_in_file(self) -> None:
        """Refuse settings that a quantized file has of its own, and what is of no use beside it."""
        defaults = {entry.name: entry.default for entry in fields(self)}
        for name in ("bits", "group_size", "zero_point", "scale_dtype", "init"):
            if (value := getattr(self, name)) != defaults[name]:
                raise ValueError(
                    f"{name}={value!r} has no meaning with storage={IN_FILE!r}: the grid, scales and zeros are the "
                    f"quantized file's own; leave {name} out."
                )
        for name in ("bits_pattern", "group_size_pattern"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} has no meaning with storage={IN_FILE!r}: the grid is the file's; leave {name} out."
                )
        if self.modules_to_save or self.bias != "none":
            raise ValueError(
                f"modules_to_save and bias train what a quantized file (storage={IN_FILE!r}) keeps as it is; leave "
                "them out."
            )
        if self.gradient == "lowrank":
            raise ValueError(
                f"gradient='lowrank' divides by scales, and those of a file (storage={IN_FILE!r}) may be 0; use "
                "gradient='exact'."
            )

    def patterns(self) -> dict[str, str]:
        """Fields that set another module by module, and the names of those, which have a check."""
        names = {entry.name for entry in fields(self)}
        known = {pattern_of(entry.name): entry.name for entry in fields(self) if "check" in entry.metadata}
        return {pattern: name for pattern, name in known.items() if pattern in names}

    def resolve_method(self) -> Method:
        """The method, with its magnitude."""
        method = METHODS[self.method]
        if self.magnitude is True:
            return method(magnitude=method.magnitudes[0])
        return method(magnitude="none" if self.magnitude is False else self.magnitude)  # type: ignore[arg-type]

    @staticmethod
    def _as_set(names: Any) -> Any:
        return set(names) if isinstance(names, list | tuple) else names

    def grids(self) -> list[Grid]:
        """Every grid that a layer may get by settings and patterns; group_size -1 stands for a row of any length."""
        widths = dict.fromkeys([self.bits, *self.bits_pattern.values()])
        sizes = dict.fromkeys([self.group_size, *self.group_size_pattern.values()])
        dtype, k_quant = SCALE_DTYPES[self.scale_dtype], self.scale_dtype == "k_quant"
        grids = [Grid(bits, size, self.zero_point, dtype, k_quant) for bits, size in product(widths, sizes)]
        # Of patterns' combinations, a layer can only get those that are K-quants.
        return [grid for grid in grids if not k_quant or (grid.bits, grid.zero_point) in K_QUANTS]

    def check_export(
        self, grids: Iterable[Grid], where: str = "", shape: tuple[int, int] | None = None, conv1d: bool = False
    ) -> None:
        """Refuse grids that a format named in `export` cannot hold exactly.

        Raises:
            ValueError: naming the format, the grid and what to change.
        """
        if self.export is None:
            return
        for name, grid in product(self.export, grids):
            if problem := FORMATS[name].problem(grid, shape, conv1d):
                raise ValueError(f"export={self.export!r}: {where}{problem}.")

    def check_matching_ends(self, names: Iterable[str]) -> None:
        """Refuse regexes that take very long to match the names of a model's modules.

        Raises:
            ValueError: naming the field and the regex.
        """
        check_matching_ends({entry.name: getattr(self, entry.name) for entry in fields(self)}, names)

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's; a regex that "all-linear" has become in a model names the layers, and goes with no others."""
        settings = super().to_dict()
        if self._is_regex():
            settings |= {"layers_to_transform": None, "layers_pattern": None}
        return settings

    def _is_regex(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules != "all-linear"

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save adapter_config.json and put this adapter's section into the model card beside it.

        Every path that saves an adapter (PEFT's, the Trainer's, transformers' own) saves its config after the card.
        """
        super().save_pretrained(str(save_directory), **kwargs)
        write_section(save_directory, self)
        if self.lora is not None:
            _copy_lora(Path(self.lora), Path(save_directory, _LORA_BESIDE))
        weights = Path(save_directory, SAFETENSORS_WEIGHTS_NAME)
        if weights.is_file():
            allow(weights, Path(save_directory, CONFIG_NAME).stat().st_mode)


def _copy_lora(lora: Path, beside: Path) -> None:
    """Put the LoRA adapter of a folder beside an adapter that continues from it; one of the hub stays there."""
    if not lora.is_dir() or beside.resolve() == lora.resolve():
        return
    beside.mkdir(exist_ok=True)
    for file in lora.iterdir():
        if file.name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
            shutil.copyfile(file, beside / file.name)


def _lora_beside(adapter: str, subfolder: str | None, kwargs: dict[str, Any]) -> Path:
    """Where `_copy_lora` has put it, of an adapter's folder or hub id."""
    inside = Path(subfolder or "", _LORA_BESIDE)
    if os.path.isdir(adapter):
        return Path(adapter, inside)
    known = {name: value for name, value in kwargs.items() if name in ("revision", "token", "cache_dir")}
    return Path(snapshot_download(adapter, allow_patterns=[f"{inside.as_posix()}/*"], **known), inside)


def _takes_loras_arguments(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that takes what a LoRA script passes to `LoraConfig`, or explains why not."""

    @functools.wraps(init)
    def constructor(self: DLQATConfig, *args: Any, **kwargs: Any) -> None:
        settings, left_out = translated(kwargs, {entry.name for entry in fields(self)})
        if dropout := left_out.pop("lora_dropout", None):
            warnings.warn(f"{dropout}.", stacklevel=2)
        if left_out:
            raise ValueError(f"{'; '.join(left_out.values())}.")
        init(self, *args, **settings)

    return constructor


DLQATConfig.__init__ = _takes_loras_arguments(DLQATConfig.__init__)  # type: ignore[method-assign]
