"""DLQATModel: puts adapter layers into a model, and checks what is put in and what is loaded."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import ParametrizationList
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .adapter_file import check_loaded, check_state, tensor_key, warn_of_other_base, with_current_names
from .config import DEFAULT_GROUP_SIZE, DLQATConfig
from .console import progress_bar, say
from .frozen import check_float_weight
from .layer import NUMBERS, PREFIX, DLQATLayer, DLQATLinear, adapter_layers, is_calibrated
from .layer_spec import LayerSpec, setting, stored_as
from .module_names import folded
from .placement import at_hand, check_here, full_shape
from .quant.fixed_point import STORAGES
from .quant.grid import Grid, fitting_group
from .quant.super_blocks import check_k_quant
from .record import Record, weight_checksum
from .regexes import LONGEST
from .summary import summarize

# Modules whose weights nobody expects "all-linear" to adapt, or that it does.
_KNOWN_WEIGHTS = (nn.Linear, Conv1D, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag, ParametrizationList)
# A group size that the user did not choose may cost so many bits a weight more than the one asked for.
_MOST_BITS_MORE = 0.5
# Names of the heads that PEFT trains in full for these tasks.
_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


class DLQATModel(BaseTuner):
    """A model with DL-QAT adapter layers in the place of its linear layers.

    Args:
        model: the model to adapt.
        config: a [`DLQATConfig`].
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the adapter on the meta device, to be filled by loading.

    Raises:
        ValueError: if a target is no linear layer, its weight holds NaN or infinity, a group is larger than its
            in_features, or `scale_dtype="k_quant"` does not fit it. All targets are checked before any is replaced.
        TypeError: if a target's weight is quantized already.
    """

    prefix: str = PREFIX
    tuner_layer_cls = DLQATLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._bar: Any = None
        self._warned: set[str] = set()
        self._unchecked: set[str] = set()
        self._before_loading: dict[str, dict[str, nn.Parameter]] = {}
        self._training_was_seen = False
        super().__init__(*args, **kwargs)
        # Not `forward`: PEFT calls the model itself where there is no task type, and transformers' add_adapter always.
        self._hook = self.model.register_forward_pre_hook(self._before_forward)

    def _prepare_model(self, peft_config: DLQATConfig, model: nn.Module) -> None:
        """Resolve "all-linear", then check every target."""
        if isinstance(model, PeftModel):
            raise ValueError(
                f"the model is a {type(model).__name__} already; add a further adapter by model.add_adapter(name, "
                "config), or begin again with model.unload()."
            )
        self._places = _places(model)
        if peft_config.target_modules == "all-linear" or peft_config.target_modules is peft_config.all_linear:
            peft_config.target_modules = "all-linear"
            _maybe_include_all_linear_layers(peft_config, model)
            if not peft_config.target_modules:
                raise ValueError(
                    f'target_modules="all-linear" finds no linear layer in {type(model).__name__}; only '
                    "torch.nn.Linear and transformers' Conv1D can be adapted."
                )
            _leave_out_special_layers(peft_config, model)
            if peft_config.layers_to_transform is not None:
                # PEFT does not look at the layer of a module that is named in full, and finds none in "layers.1.proj".
                peft_config.target_modules = {  # type: ignore[assignment]
                    name
                    for name in peft_config.target_modules
                    if _is_target(replace(peft_config, target_modules=[name.rpartition(".")[2]]), f"model.{name}")
                }
                if not peft_config.target_modules:
                    raise ValueError(
                        f"layers_to_transform={peft_config.layers_to_transform!r} matches no layer with a linear "
                        "module; layers are counted from 0."
                    )
            _say_what_is_no_text(peft_config, model)
            _match_no_others(peft_config, model)
        self._check_targets(peft_config, model)

    def _check_targets(self, config: DLQATConfig, model: nn.Module) -> None:
        """Refuse impossible targets before any is replaced, and warn once about groups that had to shrink."""
        inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, DLQATLayer))
        targets = {
            name: module
            for name, module in model.named_modules()
            if name and not name.startswith(inside) and _is_target(config, name)
        }
        self._bar.total = len(targets)
        smaller: dict[str, list[str]] = {}
        _check_that_all_match(config, model, targets)
        _check_untied(config, model, targets)
        for name, module in targets.items():
            check_target(name, module)
            in_features, bits = _out_in(module)[1], setting(config, "bits", name)
            asked = setting(config, "group_size", name)
            if config.scale_dtype == "k_quant":
                check_k_quant(bits, config.zero_point, asked, name, in_features)
            if (r := setting(config, "r", name)) > max(_out_in(module)):
                sides = _out_in(module)
                raise ValueError(
                    f"r={r} is larger than both sides of {name}, {list(sides)}, whose updates have no such rank; use "
                    f"at most {min(sides)} (rank_pattern sets it for some modules only)."
                )
            if asked > in_features and asked != DEFAULT_GROUP_SIZE:
                raise ValueError(
                    f"group_size={asked} is larger than in_features={in_features} of {name}; use at most "
                    f"{in_features}, or -1 for one scale a row (group_size_pattern sets it for some modules only)."
                )
            used = fitting_group(in_features, asked)
            if problem := STORAGES[config.storage].problem(bits, in_features):
                raise ValueError(f"{name}: storage={config.storage!r} {problem}.")
            spec = LayerSpec.from_config(config, name, in_features)
            _check_shrunk(name, spec.grid, asked, in_features)
            _check_packed_alike(name, module, spec.grid, config.storage)
            config.check_export([spec.grid], f"{name}: ", _out_in(module), isinstance(module, Conv1D))
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

    def _create_and_replace(
        self,
        peft_config: DLQATConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        in_features = _out_in(target)[1]
        kwargs = {
            "spec": LayerSpec.from_config(peft_config, current_key, in_features),
            "init": self._first_init,
            "init_weights": peft_config.init_weights,
            "inference_mode": peft_config.inference_mode,
        }
        self._bar.update()
        if isinstance(target, DLQATLayer):
            target.update_layer(adapter_name, **kwargs)
            return
        with at_hand(target):  # PEFT moves the adapter to where the weight is
            new_module = DLQATLinear(target, adapter_name, fan_in_fan_out=isinstance(target, Conv1D), **kwargs)
            if adapter_name not in self.active_adapters:
                new_module.requires_grad_(False)
            self._replace_module(parent, target_name, new_module, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a module into the place of another, wherever that one is used."""
        places = self._places.get(id(child), [(parent._modules, child_name)])
        for container, key in places:
            container[key] = new_module
        self._places[id(new_module)] = places

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; an adapter that is about to be loaded needs no search for scales and zeros."""
        config = self.peft_config[adapter_name]
        config.check_matching_ends([name for name, _ in model.named_modules()])
        # PEFT adds these, but only after the injection: too late for "all-linear".
        if config.modules_to_save is None and config.task_type in _HEADS:
            config.modules_to_save = list(_HEADS[config.task_type])
        self._first_init = "minmax" if config.inference_mode else config.init
        if not config.inference_mode:
            _warn_of_an_unsaved_head(config, model)
        if config.was_saved:
            self._unchecked.add(adapter_name)
        targets, layers = config.target_modules, config.layers_to_transform
        with progress_bar(desc="finding first scales and zeros") as self._bar:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._bar = None  # it can be neither copied nor pickled, as models are
        if (targets == "all-linear" or targets is config.all_linear) and layers == config.layers_to_transform:
            config.all_linear = config.target_modules
        if config.was_saved and not kwargs.get("low_cpu_mem_usage"):
            self._before_loading[adapter_name] = _parameters(model)
        if len(self.peft_config) == 1 and not (config.was_saved or config.inference_mode or _is_on_meta(model)):
            say(str(summarize(model, adapter_name, config.export)))

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's; warns where several adapters become active."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            warnings.warn(
                f"adapters {list(adapter_name)} are active together: the weight is W0 plus their differences "
                "to it, which lies on no grid and cannot be exported; activate one of them for a quantized model.",
                stacklevel=2,
            )

    def _check_merge_allowed(self) -> None:
        """PEFT warns of merging a head that is tied to the embedding; here the embedding keeps its own weight."""

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's, but all layers or none."""
        self._check_mergeable(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """As PEFT's, but all layers or none, and a head that stays tied is not called untied."""
        if merge:
            self._check_mergeable(adapter_names, safe_merge)
        else:
            for layer in self.model.modules():
                if isinstance(layer, DLQATLayer):
                    layer.frozen.unpack()
        self._hook.remove()
        self._places = _places(self.model)
        config = getattr(self.model, "config", None)
        if not (merge and getattr(config, "tie_word_embeddings", False)):
            return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        # PEFT would compare the head with the encoder's embedding, where it is tied to the decoder's.
        config.tie_word_embeddings = False  # type: ignore[union-attr]
        try:
            model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        finally:
            config.tie_word_embeddings = _head_is_tied(self.model)  # type: ignore[union-attr]
        if not config.tie_word_embeddings:  # type: ignore[union-attr]
            warnings.warn(
                "the output head has a weight of its own after merging, and is no longer tied to the embedding: "
                "tie_word_embeddings is False in the model's config now.",
                stacklevel=3,
            )
        return model

    def _check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        for layer in self.model.modules():
            if isinstance(layer, DLQATLayer):
                layer.check_mergeable(safe_merge, adapter_names)

    def add_weighted_adapter(self, *_: Any, **__: Any) -> None:
        """Refuse what PEFT's other methods can.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "DL-QAT adapters cannot be added up into one: each has a grid of its own, on which the sum does not lie. "
            "set_adapter with a list of them runs their sum without a grid; for a quantized model train one adapter."
        )

    def _before_forward(self, model: nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling():
            return
        while self._unchecked:  # tensors that came by other ways than PEFT's loading, such as transformers'
            adapter_name = next(iter(self._unchecked))
            if isinstance(config := self.peft_config.get(adapter_name), DLQATConfig):
                if adapter_name in self._before_loading:
                    _check_replaced(model, adapter_name, config, self._before_loading[adapter_name])
                check_loaded(model, adapter_name, config.storage)
            self._checked(adapter_name)
        if model.training and torch.is_grad_enabled():
            self._warn_if_never_calibrated(model)
            if not self._training_was_seen:
                self._training_was_seen = True
                _warn_of_moving_statistics(model)

    def _checked(self, adapter_name: str) -> None:
        self._unchecked.discard(adapter_name)
        self._before_loading.pop(adapter_name, None)

    def _warn_if_never_calibrated(self, model: nn.Module) -> None:
        """Warn once if an adapter that was never calibrated is trained."""
        for name, config in self.peft_config.items():
            if name in self._warned or not isinstance(config, DLQATConfig) or not self._is_trained(name):
                continue
            self._warned.add(name)
            if is_calibrated(adapter_layers(model, name)[1].values(), name):
                continue
            warnings.warn(
                f"adapter {name!r} is being trained on its initial scales and zeros (init={config.init!r}), never "
                "calibrated; call `peft_dlqat.calibrate` first or add a `DLQATCallback` to the Trainer for better "
                "accuracy.",
                stacklevel=2,
            )

    def _is_trained(self, adapter_name: str) -> bool:
        return any(
            not layer.disable_adapters
            and any(
                adapter_name in getattr(layer, kind) and getattr(layer, kind)[adapter_name].requires_grad
                for kind in layer.adapter_layer_names
            )
            for layer in self.model.modules()
            if isinstance(layer, DLQATLayer)
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse `adapter_names`, which PEFT would silently ignore."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names= in forward is not supported: a batch shares one quantized weight; call set_adapter "
                "and run the samples of each adapter in a batch of their own."
            )
        yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: DLQATConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """As PEFT's, then checks the tensors before any of them reaches the model."""
        named = with_current_names(state_dict)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, named)
        checked = check_state(model, adapter_name, remapped, config.storage, biases=config.bias != "none")
        checked = _with_own_base(model, adapter_name, checked)
        for name, layer in adapter_layers(model, adapter_name)[1].items():
            kept = stored_as(checked[tensor_key(name, "dlqat_spec", adapter_name)])
            assert kept is not None
            layer.set_storage(adapter_name, kept)
        if isinstance(tuner := getattr(model, "base_model", None), cls):
            tuner._checked(adapter_name)
        return checked


def _is_on_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def _check_replaced(model: nn.Module, adapter_name: str, config: DLQATConfig, before: dict[str, nn.Parameter]) -> None:
    """Refuse what transformers' own `load_adapter` has loaded, which asks nobody, as PEFT's loading is refused.

    It puts new Parameters into the places of those that were made, and of the base model's where the file has some.

    Args:
        model: the model.
        adapter_name: the adapter.
        config: its config.
        before: the model's Parameters when the adapter was put into it.

    Raises:
        ValueError: as `check_state`.
    """
    replaced = {key: value.detach() for key, value in _parameters(model).items() if value is not before.get(key)}
    of_others = re.compile(rf"\.{PREFIX}\w+\.(?!{re.escape(adapter_name)}(\.|$))")
    replaced = {key: value for key, value in replaced.items() if not of_others.search(key)}
    if not any(f".{PREFIX}" in key for key in replaced):
        return
    numbers = re.compile(rf"\.({'|'.join(NUMBERS)})\.{re.escape(adapter_name)}$")
    own = re.compile(rf"{numbers.pattern}|\.modules_to_save\.{re.escape(adapter_name)}\.")
    beside = {key: value for key, value in model.state_dict().items() if own.search(key)}
    in_full = {key: value for key, value in replaced.items() if ".modules_to_save." not in key}
    check_state(model, adapter_name, in_full | beside, config.storage, biases=config.bias != "none")


def _places(model: nn.Module) -> dict[int, list[tuple[Any, Any]]]:
    """By id of a module: the containers that hold it, and its key in each. Some are used in several places.

    A container is a module's dict of children or of attributes, or a list or dict that it keeps beside and may call
    them from.
    """
    places: dict[int, list[tuple[Any, Any]]] = {}
    for module in model.modules():
        for container in (vars(module), *vars(module).values()):
            entries = enumerate(container) if isinstance(container, list) else ()
            for key, child in container.items() if isinstance(container, dict) else entries:
                if isinstance(child, nn.Module):
                    places.setdefault(id(child), []).append((container, key))
    return places


def _head_is_tied(model: Any) -> bool:
    """Whether another module uses the output head's weight; True too where the model names no head."""
    head = getattr(model.get_output_embeddings(), "weight", None) if isinstance(model, PreTrainedModel) else None
    return head is None or sum(weight is head for _, weight in model.named_parameters(remove_duplicate=False)) > 1


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
    config.target_modules = names - {name for found in left_out.values() for name in found}  # type: ignore[assignment]
    if left_out:
        listing = "; ".join(f"{len(found)} with {reason}, such as {found[0]}" for reason, found in left_out.items())
        warnings.warn(f'"all-linear" leaves out linear layers: {listing}. Name them in target_modules to adapt them.')


def _match_no_others(config: DLQATConfig, model: nn.Module) -> None:
    """Replace full names by a regex where PEFT, which looks for suffixes, would find further modules by them.

    "head" would match "tower.head", which was left out, or is no linear layer.
    """
    names, modules = set(config.target_modules or ()), [name for name, _ in model.named_modules() if name]
    if any(name not in names and _is_target(config, name) for name in modules):
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
        config.layers_to_transform = config.layers_pattern = None  # they are in the names, and go with no regex


def _say_what_is_no_text(config: DLQATConfig, model: nn.Module) -> None:
    """Say in one line which layers of "all-linear" are no part of a multimodal model's language model."""
    if not isinstance(model, PreTrainedModel) or model.config.get_text_config() is model.config:
        return
    decoder = model.get_decoder()
    inside = next((name for name, module in model.named_modules() if module is decoder), "")
    targets = (name for name in config.target_modules or () if _is_target(config, name))
    others = sorted(name for name in targets if not name.startswith(f"{inside}."))
    if inside and others:
        warnings.warn(
            f'"all-linear" takes in {len(others)} linear layers beside the language model, such as {others[0]}; '
            "exclude_modules leaves them in full precision."
        )


def _check_that_all_match(config: DLQATConfig, model: nn.Module, targets: dict[str, nn.Module]) -> None:
    """Refuse settings that speak of modules or layers which are not there."""
    names = [name for name, _ in model.named_modules()]
    heads = {head for of_task in (*_HEADS.values(), ("classifier", "score")) for head in of_task}  # PEFT's own
    for saved in set(config.modules_to_save or ()) - heads:
        if not any(name == saved or name.endswith(f".{saved}") for name in names):
            raise ValueError(f"modules_to_save={config.modules_to_save!r}: {saved!r} is no module of the model.")
    asked = config.layers_to_transform
    for index in [asked] if isinstance(asked, int) else asked or ():
        if not any(f".{index}." in f".{name}" for name in targets):
            raise ValueError(
                f"layers_to_transform={asked!r}: there is no layer {index} with a target; layers are counted from 0."
            )


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
    return "a single output" if _out_in(layer)[0] == 1 else ""


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


def _is_target(config: DLQATConfig, name: str) -> bool:
    """Whether PEFT's matching selects the module; it answers with True, a match, or a mark for exclusion."""
    found = check_target_module_exists(config, name)
    return found is True or isinstance(found, re.Match)


def check_target(name: str, module: nn.Module) -> None:
    """Refuse a module that is no linear layer, holds a quantized weight, or one that is not finite."""
    if isinstance(module, DLQATLayer) and module.frozen.packed:
        return  # it was looked at when its first adapter came
    layer = module.get_base_layer() if isinstance(module, DLQATLayer) else module
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
    """Refuse to pack a weight that another module uses as it is."""
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
                f"storage={config.storage!r} packs the weight of {name}, but {others[0]} is the same tensor; use "
                "exclude_modules, or storage='full'."
            )


def _warn_of_an_unsaved_head(config: DLQATConfig, model: nn.Module) -> None:
    """Warn of a task's head: transformers makes it anew for each base model that has none, and no adapter holds it."""
    names = {head for heads in _HEADS.values() for head in heads}
    heads = {name for name, _ in model.named_children() if name in names} - set(config.modules_to_save or ())
    if heads and isinstance(model, PreTrainedModel):
        warnings.warn(
            f"{', '.join(sorted(heads))} of {type(model).__name__} is not saved with the adapter, and is another one "
            "each time a base model without it is loaded; give the config its task_type, or "
            f"modules_to_save={sorted(heads)}.",
            stacklevel=2,
        )


def _warn_of_moving_statistics(model: nn.Module) -> None:
    """Warn of batch norms that move as they train: what they become is in no adapter file."""
    moving = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.training and module.running_mean is not None
    ]
    moving = [name for name in moving if ".modules_to_save." not in name and ".original_module" not in name]
    if moving:
        warnings.warn(
            f"{moving[0]} and {len(moving) - 1} more batch norms move their statistics in training mode, which are "
            "not saved with the adapter: reloaded it is another model. Put them into eval mode, or name them in "
            "modules_to_save.",
            stacklevel=2,
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
    linear = sum(out * inputs for out, inputs in map(_out_in, targets.values()))
    if size > linear / 10:
        largest = max(others, key=lambda name: others[name].numel())
        warnings.warn(
            f"{size / (size + linear):.0%} of the weights are in no linear layer (experts, attention's own weights, "
            f"recurrent cells) and stay in full precision, {len(others)} tensors such as {largest}. Only the rest of "
            "the model is quantized and trained.",
            stacklevel=2,
        )


def _with_own_base(
    model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors to load; W0 of an adapted head among them only if it is the one that the adapter was trained on.

    PEFT saves an adapted head's base weight beside the adapter: W0, but w_hat of a merged one, and codes of a packed
    one. Warns of other base weights than those that the adapter was trained on.
    """
    layers, loaded = adapter_layers(model, adapter_name)[1], dict(state_dict)
    recorded = {name: Record.decode(state_dict[tensor_key(name, "dlqat_record", adapter_name)]) for name in layers}
    known = dict(recorded)
    for name in layers:
        weight = loaded.pop(key := f"{name}.base_layer.weight", None)
        if weight is not None and weight.is_floating_point() and weight_checksum(weight) == recorded[name].checksum:
            loaded[key] = weight
            del known[name]
    warn_of_other_base(adapter_name, layers, known)
    return loaded


def _out_in(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer, a Conv1D or an adapter layer."""
    if isinstance(module, Conv1D):
        in_features, out_features = full_shape(module.weight)
        return out_features, in_features
    return module.out_features, module.in_features  # type: ignore[return-value]
