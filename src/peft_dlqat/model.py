"""DLQATModel: puts adapter layers into a model, and checks what is put in and what is loaded."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .adapter_file import check_loaded, check_state, tensor_key, warn_of_other_base, with_current_names
from .base_weights import BaseChanges
from .config import DLQATConfig
from .console import progress_bar, say
from .file_layers import as_plain, decode_weights, in_file
from .layer import NUMBERS, PREFIX, DLQATLayer, DLQATLinear, adapter_layers, is_calibrated, warn_of_inexact
from .layer_spec import LayerSpec, stored_as
from .placement import at_hand
from .places import places
from .quant.fixed_point import IN_FILE
from .record import Record, weight_checksum
from .summary import summarize
from .targets import HEADS, check_targets, is_all_linear, out_in, resolve_all_linear, warn_of_an_unsaved_head


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
        self._places: dict[int, Any] = {}
        self._warned: set[str] = set()
        self._unchecked: set[str] = set()
        self._before_loading: dict[str, dict[str, nn.Parameter]] = {}
        self._training_was_seen = False
        super().__init__(*args, **kwargs)
        # Not `forward`: PEFT calls the model itself where there is no task type, and transformers' add_adapter always.
        self._hook = self.model.register_forward_pre_hook(self._before_forward)

    def _prepare_model(self, peft_config: DLQATConfig, model: nn.Module) -> None:
        """Resolve "all-linear", check every target, then change base weights as the config says."""
        self._places = places(model)
        _check_file(peft_config, model)
        resolve_all_linear(peft_config, model)
        self._depths = check_targets(peft_config, model)
        BaseChanges(peft_config, model).apply()
        self._bar.total = len(self._depths)

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
        in_features, layer = out_in(target)[1], target.get_base_layer() if isinstance(target, DLQATLayer) else target
        own: Any = (layer.storage, layer.grid) if in_file(layer) else None
        kwargs = {
            "spec": LayerSpec.from_config(peft_config, current_key, in_features, self._depths[current_key], own),
            "init": "minmax" if _is_emptied() else self._first_init,
            "init_weights": peft_config.init_weights,
            "inference_mode": peft_config.inference_mode,
        }
        if self._bar is not None:  # none where layers are made anew, one by one
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
        kept = self._places.get(id(child), [(parent._modules, child_name)])
        for container, key in kept:
            container[key] = new_module
        self._places[id(new_module)] = kept

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; an adapter that is about to be loaded needs no search for scales and zeros."""
        config = self.peft_config[adapter_name]
        if isinstance(model, PeftModel):
            raise ValueError(
                f"the model is a {type(model).__name__} already; add a further adapter by model.add_adapter(name, "
                "config), or begin again with model.unload()."
            )
        if any(isinstance(layer, DLQATLayer) and adapter_name in layer.specs for layer in model.modules()):
            raise ValueError(
                f"the model has an adapter {adapter_name!r} already, whose tensors a new one would overwrite; give "
                "this one another name, delete that one by delete_adapter, or begin again with unload()."
            )
        config.check_matching_ends([name for name, _ in model.named_modules()])
        # PEFT adds these, but only after the injection: too late for "all-linear".
        if config.modules_to_save is None and config.task_type in HEADS:
            config.modules_to_save = list(HEADS[config.task_type])
        self._first_init = "minmax" if config.inference_mode else config.init
        if not config.inference_mode:
            warn_of_an_unsaved_head(config, model)
        if config.was_saved:
            self._unchecked.add(adapter_name)
        all_linear = is_all_linear(config)
        try:
            with progress_bar(desc="finding first scales and zeros") as self._bar:
                super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            self._bar, self._places = None, {}  # what can be neither copied nor pickled, as models are
        if all_linear:
            config.all_linear = config.target_modules  # PEFT shortens a list of many names
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
        self._check_nothing_around(adapter_names)
        super().merge_adapter(adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """As PEFT's, but all layers or none, and a head that stays tied is not called untied."""
        self._check_nothing_around(None)
        for name, module in list(self._around()):  # PEFT would put W0 into the place of both
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, module.base_layer)
        if merge:
            self._check_mergeable(adapter_names, safe_merge)
        else:
            for layer in self.model.modules():
                if isinstance(layer, DLQATLayer):
                    layer.frozen.unpack()
        decode_weights(self.model, apart=DLQATLayer)
        self._hook.remove()
        self._places = places(self.model)
        config = getattr(self.model, "config", None)
        if not (merge and getattr(config, "tie_word_embeddings", False)):
            model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
            as_plain(model)
            return model
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
        as_plain(model)
        return model

    def _check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        for layer in self.model.modules():
            if isinstance(layer, DLQATLayer):
                layer.check_mergeable(safe_merge, adapter_names)

    def _around(self) -> Iterator[tuple[str, BaseTunerLayer]]:
        """Layers of other methods, LoRA's for one, that were put around a quantized one, by name."""
        for name, module in self.model.named_modules():
            if isinstance(module, BaseTunerLayer) and isinstance(getattr(module, "base_layer", None), DLQATLayer):
                yield name, module

    def _check_nothing_around(self, adapter_names: list[str] | None) -> None:
        """Refuse what would merge another method's adapter first, into W0, or take both out without merging this one.

        Args:
            adapter_names: those to be merged; None for all.
        """
        for name, module in self._around():
            found = set(module._all_available_adapter_names())
            if found := found if adapter_names is None else found & set(adapter_names):
                raise ValueError(
                    f"{name} is a {type(module).__module__}.{type(module).__name__} around a quantized layer: "
                    f"adapter {min(found)!r} would be merged into the weight that is quantized. Name the others, as "
                    "in merge_adapter(['default']), or delete that one first by delete_adapter."
                )

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
        if torch.compiler.is_compiling() and not self._unchecked:
            return
        self.check_loaded(model)
        if model.training and torch.is_grad_enabled():
            self._warn_if_never_calibrated(model)
            if not self._training_was_seen:
                self._training_was_seen = True
                _warn_of_moving_statistics(model)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def check_loaded(self, model: nn.Module) -> None:
        """Check tensors that came by other ways than PEFT's loading, such as transformers', if there are any.

        Raises:
            ValueError: as loading does.
        """
        while self._unchecked:
            adapter_name = next(iter(self._unchecked))
            if isinstance(config := self.peft_config.get(adapter_name), DLQATConfig):
                if adapter_name in self._before_loading:
                    _check_replaced(model, adapter_name, config, self._before_loading[adapter_name])
                check_loaded(model, adapter_name, config.storage)
            self._checked(adapter_name)

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
        layers = adapter_layers(model, adapter_name)[1]
        warn_of_inexact(sum(layer.converted.get(adapter_name, 0) for layer in layers.values()))
        for name, layer in layers.items():
            kept = stored_as(checked[tensor_key(name, "dlqat_spec", adapter_name)])
            assert kept is not None
            layer.set_storage(adapter_name, kept)
        if isinstance(tuner := getattr(model, "base_model", None), cls):
            tuner._checked(adapter_name)
        return checked


def check_what_was_loaded(model: nn.Module) -> None:
    """Check adapters as their first forward pass would, for who looks at them before.

    Raises:
        ValueError: as loading does.
    """
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(tuner := getattr(hook, "__self__", None), DLQATModel):
                tuner.check_loaded(module)


def _check_file(config: DLQATConfig, model: nn.Module) -> None:
    """Refuse an adapter of another quantized file than the model's; a new one gets the checksum of this one."""
    origin: Any = getattr(model, "origin", None)
    if origin is None or config.storage != IN_FILE:
        return
    if config.file_sha256 not in (None, origin.sha256):
        raise ValueError(
            f"the adapter belongs to another file: its sha256 is {config.file_sha256}, and {origin.path} has "
            f"{origin.sha256}; open its own file by load_quantized."
        )
    config.file_sha256 = origin.sha256


def _is_on_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _is_emptied() -> bool:
    """Whether new Parameters go to the meta device, to be loaded: PEFT's low_cpu_mem_usage."""
    probe = nn.Module()
    probe.register_parameter("empty", nn.Parameter(torch.empty(0)))
    return probe.empty.is_meta  # type: ignore[union-attr, return-value]


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
    layers = adapter_layers(model, adapter_name)[1].values()
    older = any(layer.specs[adapter_name].is_older(layer.dlqat_spec[adapter_name]) for layer in layers)
    if not older and not any(f".{PREFIX}" in key for key in replaced):
        return  # nothing was loaded
    numbers = re.compile(rf"\.({'|'.join(NUMBERS)})\.{re.escape(adapter_name)}$")
    own = re.compile(rf"{numbers.pattern}|\.modules_to_save\.{re.escape(adapter_name)}\.")
    beside = {key: value for key, value in model.state_dict().items() if own.search(key)}
    in_full = {key: value for key, value in replaced.items() if ".modules_to_save." not in key}
    check_state(model, adapter_name, in_full | beside, config.storage, biases=config.bias != "none")


def _head_is_tied(model: Any) -> bool:
    """Whether another module uses the output head's weight; True too where the model names no head."""
    head = getattr(model.get_output_embeddings(), "weight", None) if isinstance(model, PreTrainedModel) else None
    return head is None or sum(weight is head for _, weight in model.named_parameters(remove_duplicate=False)) > 1


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
            f"{len(moving)} batch norms, such as {moving[0]}, move their statistics in training mode, which are not "
            "saved with the adapter: reloaded it is another model. Put them into eval mode, or name them in "
            "modules_to_save.",
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
