"""The targets of an adapter: what "all-linear" stands for in a model, and whether each of them can be adapted."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .config import DEFAULT_GROUP_SIZE, DLQATConfig
from .file_layers import FileLinear, in_file
from .frozen import check_float_weight
from .layer import PREFIX, DLQATLayer
from .layer_spec import LayerSpec, setting
from .module_names import depths, folded
from .placement import at_hand, check_here, full_shape
from .places import elsewhere
from .quant.fixed_point import FILE_STORAGES, IN_FILE, STORAGES
from .quant.grid import Grid, fitting_group
from .quant.super_blocks import check_k_quant
from .regexes import LONGEST
from .summary import language_model

# Modules whose weights nobody expects "all-linear" to adapt, or that it does.
_KNOWN_WEIGHTS = (nn.Linear, Conv1D, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag, ParametrizationList)
# A group size that the user did not choose may cost so many bits a weight more than the one asked for.
_MOST_BITS_MORE = 0.5
# Names of the heads that PEFT trains in full for these tasks.
HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def resolve_all_linear(config: DLQATConfig, model: nn.Module) -> None:
    """Put the names of the layers that "all-linear" stands for into its place; for the next model it is that again."""
    if not is_all_linear(config):
        return
    config.target_modules = "all-linear"
    try:
        _maybe_include_all_linear_layers(config, model)
        if not config.target_modules:
            raise ValueError(
                f'target_modules="all-linear" finds no linear layer in {type(model).__name__}; only '
                "torch.nn.Linear and transformers' Conv1D can be adapted."
            )
        _leave_out_special_layers(config, model)
        if config.layers_to_transform is not None:
            _leave_out_other_layers(config)
        _say_what_is_no_text(config, model)
        _match_no_others(config, model)
    finally:
        config.all_linear = config.target_modules


def is_all_linear(config: DLQATConfig) -> bool:
    """Whether the targets are "all-linear", or what it stood for in the last model."""
    return config.target_modules == "all-linear" or config.target_modules is config.all_linear


def _leave_out_other_layers(config: DLQATConfig) -> None:
    """Keep the names of layers_to_transform.

    PEFT does not look at the layer of a module that is named in full, and finds none in "layers.1.proj".
    """
    config.target_modules = {  # type: ignore[assignment]
        name
        for name in config.target_modules or ()
        if is_target(replace(config, target_modules=[name.rpartition(".")[2]]), f"model.{name}")
    }
    if not config.target_modules:
        raise ValueError(
            f"layers_to_transform={config.layers_to_transform!r} matches no layer with a linear module; layers are "
            "counted from 0."
        )


def _leave_out_special_layers(config: DLQATConfig, model: nn.Module) -> None:
    """Take layers that are no ordinary linear ones out of "all-linear", and say so in one line."""
    # PEFT trains in full what ends in such a name: "pre_classifier" too, where "classifier" is meant.
    in_full = tuple(config.modules_to_save or ())
    names = {name for name in config.target_modules or () if not name.endswith(in_full)}
    left_out: dict[str, list[str]] = {}
    for name in sorted(names):
        module = model.get_submodule(name)
        layer = module.get_base_layer() if isinstance(module, DLQATLayer) else module
        if reason := "the name of an output head" if name.endswith("lm_head") else _special(layer):
            left_out.setdefault(reason, []).append(name)
    names -= {name for found in left_out.values() for name in found}
    if config.storage == IN_FILE:
        names -= set(_leave_out_other_types(model, names))
    config.target_modules = names  # type: ignore[assignment]
    if left_out:
        listing = "; ".join(f"{len(found)} with {reason}, such as {found[0]}" for reason, found in left_out.items())
        warnings.warn(f'"all-linear" leaves out linear layers: {listing}. Name them in target_modules to adapt them.')


def _leave_out_other_types(model: nn.Module, names: set[str]) -> list[str]:
    """Layers whose weight a quantized file has in a type that is not trained; says so in one line."""
    others = [
        name
        for name in sorted(names)
        for layer in [model.get_submodule(name)]
        if not isinstance(layer.get_base_layer() if isinstance(layer, DLQATLayer) else layer, FileLinear)
    ]
    if len(others) == len(names):
        raise ValueError(
            f"none of the {len(names)} linear layers has its weight in a type of tensor that can be trained "
            f"({', '.join(FILE_STORAGES)}); use another file of the model."
        )
    if others:
        warnings.warn(
            f"{len(others)} linear layers are decoded and stay frozen, since the file has them in types without a "
            f"grid: {folded(others)}."
        )
    return others


def _special(layer: Any) -> str:
    """What sets a linear layer apart from others, in words; empty for an ordinary one."""
    if not isinstance(layer, nn.Linear | Conv1D):
        return ""
    if "weight" not in layer._parameters:
        return "a parametrized weight"
    try:
        check_float_weight(layer, "adapt")
    except TypeError:  # said by `check_target`, with the layer's name
        return ""
    if type(layer).forward not in (nn.Linear.forward, Conv1D.forward) and not _is_linear(layer):
        return f"a forward of their own ({type(layer).__name__})"
    return "a single output" if out_in(layer)[0] == 1 else ""


@torch.no_grad()
def _is_linear(layer: Any) -> bool:
    """Whether a layer with a forward of its own gives x @ W.T + bias all the same, as Falcon's do; by one input."""
    with at_hand(layer), torch.random.fork_rng(devices=[]):
        weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
        x = torch.randn(2, weight.shape[1]).to(weight)
        try:
            y = layer(x)
        except Exception:  # whatever a forward may want beside x
            return False
        expected = nn.functional.linear(x, weight, layer.bias)
        same_kind = isinstance(y, torch.Tensor) and y.shape == expected.shape
        return same_kind and (weight.is_meta or torch.allclose(y, expected, rtol=1e-2, atol=1e-3))


def _match_no_others(config: DLQATConfig, model: nn.Module) -> None:
    """Replace full names by a regex where PEFT, which looks for suffixes, would find further modules by them.

    "head" would match "tower.head", which was left out, or is no linear layer.
    """
    names, modules = set(config.target_modules or ()), [name for name, _ in model.named_modules() if name]
    if any(name not in names and is_target(config, name) for name in modules):
        in_full = {re.escape(name) for name in names}
        any_layer = {re.sub(r"(?<=\.)\d+(?=\\?\.|$)", r"\\d+", name) for name in in_full}
        short, regex = ("|".join(sorted(each)) for each in (any_layer, in_full))
        if {name for name in modules if re.fullmatch(short, name)} == names:
            regex = short
        if len(regex) > LONGEST:
            raise ValueError(
                f'"all-linear" finds {len(names)} layers whose names end those of other modules too; a regex '
                f"for them would have {len(regex):,} characters, more than {LONGEST:,}; name target_modules yourself."
            )
        config.target_modules = regex


def _say_what_is_no_text(config: DLQATConfig, model: nn.Module) -> None:
    """Say in one line which layers of "all-linear" are no part of a multimodal model's language model."""
    if not (inside := language_model(model)):
        return
    targets = (name for name in config.target_modules or () if is_target(config, name))
    others = sorted(name for name in targets if not name.startswith(inside))
    if others:
        warnings.warn(
            f'"all-linear" takes in {len(others)} linear layers beside the language model, such as {others[0]}; '
            "exclude_modules leaves them in full precision."
        )


def check_targets(config: DLQATConfig, model: nn.Module) -> dict[str, int]:
    """Refuse impossible targets before any is replaced, and warn once about groups that had to shrink.

    Returns:
        The names of the targets, each with the number of layers in which there are some, see `depths`.
    """
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, DLQATLayer))
    targets = {
        name: module
        for name, module in model.named_modules()
        if name and not name.startswith(inside) and is_target(config, name)
    }
    smaller: dict[str, list[str]] = {}
    in_layers = depths(targets)
    _check_that_all_match(config, model, targets)
    _check_untied(config, model, targets)
    _check_replaceable(model, targets)
    for name, module in targets.items():
        check_target(name, module)
        if (r := setting(config, "r", name)) > max(out_in(module)):
            sides = out_in(module)
            raise ValueError(
                f"r={r} is larger than both sides of {name}, {list(sides)}, whose updates have no such rank; use "
                f"at most {min(sides)} (rank_pattern sets it for some modules only)."
            )
        if _is_in_file(name, module, config):
            continue
        in_features, bits = out_in(module)[1], setting(config, "bits", name)
        asked = setting(config, "group_size", name)
        if config.scale_dtype == "k_quant":
            check_k_quant(bits, config.zero_point, asked, name, in_features)
        if asked > in_features and asked != DEFAULT_GROUP_SIZE:
            raise ValueError(
                f"group_size={asked} is larger than in_features={in_features} of {name}; use at most "
                f"{in_features}, or -1 for one scale a row (group_size_pattern sets it for some modules only)."
            )
        used = fitting_group(in_features, asked)
        if problem := STORAGES[config.storage].problem(bits, in_features):
            raise ValueError(f"{name}: storage={config.storage!r} {problem}.")
        spec = LayerSpec.from_config(config, name, in_features, in_layers[name])
        _check_shrunk(name, spec.grid, asked, in_features)
        _check_packed_alike(name, module, spec.grid, config.storage)
        config.check_export([spec.grid], f"{name}: ", out_in(module), isinstance(module, Conv1D))
        if asked not in (-1, used):
            smaller.setdefault(f"{asked} -> {used}", []).append(name)
    for field in config.patterns():
        if field in ("rank_pattern", "alpha_pattern"):
            continue  # PEFT itself says so of these
        unused = [
            key for key in getattr(config, field) if all(get_pattern_key([key], name) != key for name in targets)
        ]
        if unused:
            warnings.warn(f"The following {field} keys did not match any targeted module: {unused}.", stacklevel=2)
    _warn_of_other_weights(model, targets)
    if smaller:
        listing = "; ".join(f"{change} in {folded(names)}" for change, names in smaller.items())
        warnings.warn(
            f"group_size does not divide the inputs of every layer, and is another one there: {listing}.",
            stacklevel=2,
        )
    return in_layers


def _is_in_file(name: str, module: nn.Module, config: DLQATConfig) -> bool:
    """Whether a module's weight is as its file has it, whose type says the grid. Refuse what does not go with that."""
    layer: Any = module.get_base_layer() if isinstance(module, DLQATLayer) else module
    if not in_file(layer):
        if config.storage == IN_FILE:
            raise ValueError(
                f"storage={IN_FILE!r} keeps weights as a quantized file has them, but {name} is none of a file; open "
                "the file by load_quantized, or exclude_modules."
            )
        return False
    if config.storage != IN_FILE:
        raise ValueError(
            f"{name} has its weight from a quantized file, whose grid is fixed; use storage={IN_FILE!r}, and leave "
            "bits, group_size, zero_point and scale_dtype out."
        )
    grid = layer.grid
    if grid.zero_point not in config.resolve_method().zero_points:
        raise ValueError(
            f"method={config.method!r} needs zero_point={' or '.join(config.resolve_method().zero_points)}, but "
            f"{name} is of type {layer.storage} in its file; use method='dlqat', or exclude_modules."
        )
    config.check_export([grid], f"{name}: ", out_in(layer))
    return True


def check_target(name: str, module: nn.Module) -> None:
    """Refuse a module that is no linear layer, holds a quantized weight, or one that is not finite."""
    if isinstance(module, DLQATLayer) and module.frozen.packed:
        return  # it was looked at when its first adapter came
    layer = module.get_base_layer() if isinstance(module, DLQATLayer) else module
    if in_file(layer) and isinstance(layer, FileLinear):
        return  # it was looked at when it was read
    if isinstance(layer, nn.Linear | Conv1D) and "weight" not in layer._parameters:
        raise ValueError(
            f"the weight of {name} is computed in each forward (weight norm, spectral norm, pruning, another "
            "parametrization), so that nothing stays to be quantized; remove the parametrization, or leave the module "
            "out by exclude_modules."
        )
    quantized = any(hasattr(layer, attribute) for attribute in ("qweight", "W_q"))  # GPTQ and AWQ; HQQ
    if isinstance(layer, nn.Linear | Conv1D) or quantized:
        check_float_weight(layer, f"adapt {name},")
    else:
        raise ValueError(
            f"target module {name} is a {type(layer).__module__}.{type(layer).__name__}, no linear layer; only "
            "torch.nn.Linear and transformers' Conv1D can be adapted: narrow target_modules or use exclude_modules."
        )
    with at_hand(layer):
        weight: Any = module.frozen.original() if isinstance(module, DLQATLayer) else layer.weight
        if not weight.is_meta and not torch.isfinite(weight).all():
            raise ValueError(
                f"the weight of {name} holds NaN or infinity, which no grid can hold; repair the base model "
                "or leave the module out by exclude_modules."
            )


def _check_that_all_match(config: DLQATConfig, model: nn.Module, targets: dict[str, nn.Module]) -> None:
    """Refuse settings that speak of modules or layers which are not there."""
    names = [name for name, _ in model.named_modules()]
    heads = {head for of_task in (*HEADS.values(), ("classifier", "score")) for head in of_task}  # PEFT's own
    for saved in set(config.modules_to_save or ()) - heads:
        if not any(name == saved or name.endswith(f".{saved}") for name in names):
            raise ValueError(f"modules_to_save={config.modules_to_save!r}: {saved!r} is no module of the model.")
    asked = config.layers_to_transform
    for index in [asked] if isinstance(asked, int) else asked or ():
        if not any(f".{index}." in f".{name}" for name in targets):
            raise ValueError(
                f"layers_to_transform={asked!r}: there is no layer {index} with a target; layers are counted from 0."
            )


def _check_shrunk(name: str, grid: Grid, asked: int, in_features: int) -> None:
    """Refuse groups that were made smaller than asked, and cost much more; nothing is coarser than a row."""
    if asked in (-1, grid.group_size) or grid.group_size == in_features:
        return
    more = grid.bits_per_weight() - replace(grid, group_size=asked).bits_per_weight()
    if more > _MOST_BITS_MORE:
        raise ValueError(
            f"group_size={asked} does not divide in_features={in_features} of {name}, and {grid.group_size}, which "
            f"does, takes {more:.2f} bits a weight more; choose by group_size_pattern={{{name.rpartition('.')[2]!r}: "
            f"{grid.group_size}}}, or -1 for one scale a row."
        )


def _check_packed_alike(name: str, module: nn.Module, grid: Grid, storage: str) -> None:
    """Refuse a further adapter on a weight that is packed in units of other scales: it can only share these."""
    if not isinstance(module, DLQATLayer) or not module.frozen.packed:
        return
    owner, own = next(iter(module.specs.items()))
    if (grid, storage) != (own.grid, own.storage):
        raise ValueError(
            f"the frozen weight of {name} is packed as {own.storage!r} by the scales of adapter {owner!r}, on "
            f"{own.grid}; a further adapter can only share them, and this one has storage={storage!r} and {grid}: "
            f"give it the config of {owner!r}, or load the base model again."
        )


def _check_untied(config: DLQATConfig, model: nn.Module, targets: dict[str, nn.Module]) -> None:
    """Refuse to pack a weight, or to train it in its file, that another module uses as it is."""
    if config.storage == "full":
        return
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for name, module in targets.items():
        layer: Any = module.get_base_layer() if isinstance(module, DLQATLayer) else module
        weight = layer.weight
        check_here(layer, "pack")
        others = [user for user in users.get(id(weight), []) if not user.startswith(f"{name}.")]
        if others:
            raise ValueError(
                f"storage={config.storage!r} keeps one weight of {name} and {others[0]}, which are the same tensor; "
                + ("use exclude_modules." if config.storage == IN_FILE else "use exclude_modules, or storage='full'.")
            )


def _check_replaceable(model: nn.Module, targets: dict[str, nn.Module]) -> None:
    """Refuse a layer that somebody holds who would go on calling it, past the adapter that is put into its place."""
    held = elsewhere(model)
    for name, module in targets.items():
        if id(module) in held and not isinstance(module, DLQATLayer):
            raise ValueError(
                f"{name} is kept in {held[id(module)]} too, where no adapter can take its place (a set, an object, a "
                "method, a closure), and may be called from there; keep it as an attribute, or in a list, tuple or "
                "dict, or leave it out by exclude_modules."
            )


def _warn_of_other_weights(model: nn.Module, targets: dict[str, nn.Module]) -> None:
    """Warn if much of the weights is in no linear layer: experts [experts, out, in], in_proj_weight, LSTMs.

    A positional embedding of one entry, [1, length, width], is no such weight.
    """
    others = {
        f"{prefix}.{name}": parameter
        for prefix, module in model.named_modules()
        if not isinstance(module, _KNOWN_WEIGHTS) and f".{PREFIX}" not in prefix
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() in (2, 3) and min(parameter.shape) > 1
    }
    size = sum(parameter.numel() for parameter in others.values())
    linear = sum(out * inputs for out, inputs in map(out_in, targets.values()))
    if size > linear / 10:
        largest = max(others, key=lambda name: others[name].numel())
        warnings.warn(
            f"{size / (size + linear):.0%} of the weights are in no linear layer (experts, attention's own weights, "
            f"recurrent cells) and stay in full precision, {len(others)} tensors such as {largest}. Only the rest of "
            "the model is quantized and trained.",
            stacklevel=2,
        )


def warn_of_an_unsaved_head(config: DLQATConfig, model: nn.Module) -> None:
    """Warn of a task's head: transformers makes it anew for each base model that has none, and no adapter holds it."""
    names = {head for heads in HEADS.values() for head in heads}
    heads = {name for name, _ in model.named_children() if name in names} - set(config.modules_to_save or ())
    if heads and isinstance(model, PreTrainedModel):
        warnings.warn(
            f"{', '.join(sorted(heads))} of {type(model).__name__} is not saved with the adapter, and is another one "
            "each time a base model without it is loaded; give the config its task_type, or "
            f"modules_to_save={sorted(heads)}.",
            stacklevel=2,
        )


def is_target(config: DLQATConfig, name: str) -> bool:
    """Whether PEFT's matching selects the module; it answers with True, a match, or a mark for exclusion."""
    found = check_target_module_exists(config, name)
    return found is True or isinstance(found, re.Match)


def out_in(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer, a Conv1D or an adapter layer."""
    if isinstance(module, Conv1D):
        in_features, out_features = full_shape(module.weight)
        return out_features, in_features
    return module.out_features, module.in_features  # type: ignore[return-value]
