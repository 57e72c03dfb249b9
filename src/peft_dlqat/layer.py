"""The adapter layer: a frozen linear layer whose weight is quantized with a low-rank update inside the quantizer.

y = x @ w_hat.T + bias,    w_hat = m * Quantize(W0 + scaling * tBA; s, zero)       (arXiv 2504.09223, eq. 3)

or as another of the `methods` has it; `quant.naive` is the formula in a page.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from .deferred import DeferredWeight
from .file_layers import FileLinear
from .float32 import Float32BufferDict, Float32ParameterDict
from .frozen import FrozenWeight
from .kept_weight import KeptWeight
from .layer_spec import LayerSpec, put_storage
from .methods import AdapterTensors, TrainedTensor
from .placement import at_hand, check_here, full_shape, gather_with, is_partitioned
from .quant.dispatch import harden
from .quant.fit import initialise
from .quant.fixed_point import FILE_STORAGES, as_rows
from .quant.op import fake_quantize, fake_quantize_linear, linear, quantized
from .quant.quantizer import QuantizedWeight, Quantizer
from .record import OtherBaseWarning, Record

PREFIX = "dlqat_"
# What is saved of an adapter beside its trained tensors. Scales and zeros are Parameters that take no gradient: so
# whoever copies, gathers or broadcasts an adapter by its parameters has all of it.
CALIBRATED = ("dlqat_scale", "dlqat_zero_point", "dlqat_offset")
NUMBERS = ("dlqat_spec", "dlqat_record")
SAVED = (*CALIBRATED, *NUMBERS)


class DLQATLayer(BaseTunerLayer):
    """Adapter state of one linear layer and what can be done with it.

    Per adapter (in = in_features, out = out_features):

    | name                 | shape           | kind                                                             |
    |----------------------|-----------------|------------------------------------------------------------------|
    | `dlqat_A`            | [r, in]         | trained; of QA-LoRA, [r, n_groups]                               |
    | `dlqat_B`            | [out, r]        | trained; zero at the start                                       |
    | `dlqat_magnitude`    | [out, n_groups] | m, trained; one at the start; `magnitude="row"`: [out, 1]        |
    | `dlqat_shift`        | [out, n_groups] | trained move of the zero in codes; L4Q, DL-QAT with an offset    |
    | `dlqat_scale`        | [out, n_groups] | s; calibrated, then frozen                                       |
    | `dlqat_zero_point`   | [out, n_groups] | z, integers, frozen as s is; only `zero_point="integer"`         |
    | `dlqat_offset`       | [out, n_groups] | b, frozen as s is; only `zero_point="float"`                     |
    | `dlqat_spec`         | [8 or more]     | buffer: `specs` as numbers, see [`LayerSpec.encode`]             |
    | `dlqat_record`       | [11]            | buffer: a [`Record`] as numbers                                  |
    | `specs`              |                 | the settings, a [`LayerSpec`]                                    |

    All tensors are float32. But for the buffers they are Parameters; the frozen ones take no gradient. The trained
    ones count from their start, each in a unit of its own, see [`TrainedTensor`]. Which of them there are is the
    method's choice; one that is not in this table gets a dict of its own when the adapter is added. `frozen` is W0, a
    [`FrozenWeight`]. Where that is kept as a quantized file has it, s and b are in its bytes, and none is here.
    """

    adapter_layer_names: tuple[str, ...] = ("dlqat_A", "dlqat_B", "dlqat_magnitude", "dlqat_shift")
    other_param_names: tuple[str, ...] = (*SAVED, "specs", "described", "converted")
    active_adapters: list[str]
    merged_adapters: list[str]

    def __init__(self, base_layer: nn.Module, fan_in_fan_out: bool) -> None:
        self.base_layer = base_layer
        for name in self.adapter_layer_names:
            setattr(self, name, Float32ParameterDict())
        for name in CALIBRATED:
            setattr(self, name, Float32ParameterDict())
        self.dlqat_spec, self.dlqat_record = Float32BufferDict(), Float32BufferDict()
        self.specs: dict[str, LayerSpec] = {}
        self.described: dict[str, dict[str, TrainedTensor]] = {}  # what each adapter trains, by name
        self.converted: dict[str, int] = {}  # adapters whose file was of an older format, see `convert`
        self.fan_in_fan_out = fan_in_fan_out
        self._set_aside: list[nn.Parameter] = []  # in a list: as an attribute it would be registered
        self._kept_weight = KeptWeight()
        self._was_read = False  # the weight, by a parent; whoever watches sets it back
        self.on_other_base: set[str] = set()  # adapters of which that was said
        self._disable_adapters = False
        self.merged_adapters = []
        own: Any = self.get_base_layer()
        if isinstance(own, FileLinear):
            own.read_by_others = False
        shape = own.shape if isinstance(own, FileLinear) else full_shape(own.weight)
        self.out_features, self.in_features = shape[::-1] if fan_in_fan_out else shape

    @property
    def frozen(self) -> FrozenWeight:
        """W0. Made at each call: an object that was kept would hold the layer, and so W0, in a cycle."""
        return FrozenWeight(self)

    def update_layer(
        self,
        adapter_name: str,
        spec: LayerSpec,
        init: str,
        init_weights: bool = True,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter, its scales and zeros fitted to W0 by `init` (skipped for a weight on the meta device).

        On a packed W0 they are those that it is packed by: it is known in their units only. Of a W0 that is kept as a
        file has it they are in its bytes, and are kept nowhere else.
        """
        weight, grid, record = self.frozen.as_kept(), spec.grid, self.base_record()
        # Adapters are initialised where the weight is; under `low_cpu_mem_usage` both are on the meta device.
        device = torch.empty(0).device if torch.empty(0).is_meta else weight.device
        scale: torch.Tensor | None
        if self.frozen.in_file is not None:
            scale = zero = None
        elif device.type == "meta" or weight.is_meta:
            scale = torch.empty(self.out_features, self.in_features // grid.group_size, device=device)
            zero = None if grid.zero_point == "none" else torch.empty_like(scale)
        elif self.frozen.packed:
            owner, own = next(iter(self.specs.items()))
            spec = replace(spec, storage=own.storage)
            own_scale, zero = self.scales_and_zeros(owner)
            scale, zero = own_scale.detach().clone(), None if zero is None else zero.detach().clone()
        else:
            scale, zero = initialise(weight, grid, init)
        self.specs[adapter_name] = spec
        self.on_other_base.discard(adapter_name)
        if scale is not None:
            self.dlqat_scale[adapter_name] = nn.Parameter(scale, requires_grad=False)
        if zero is not None:
            zeros = self.dlqat_zero_point if grid.zero_point == "integer" else self.dlqat_offset
            zeros[adapter_name] = nn.Parameter(zero, requires_grad=False)
        self.dlqat_spec[adapter_name] = spec.encode().to(device)
        self.dlqat_record[adapter_name] = record.encode().to(device)
        self.described[adapter_name] = spec.trained(self.out_features, self.in_features)
        for name, tensor in self.described[adapter_name].items():
            # All state is float32 whatever the base and `autocast_adapter_dtype`: an A rounded on loading moves codes.
            data = torch.zeros(tensor.shape, device=device, dtype=torch.float32)
            if tensor.start is None or (name == "B" and not init_weights):
                nn.init.kaiming_uniform_(data, a=math.sqrt(5)).div_(tensor.unit)
            self._tensors_named(name)[adapter_name] = nn.Parameter(data)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _tensors_named(self, name: str) -> Float32ParameterDict:
        """The dict, by adapter, of the trained tensors of one name."""
        attribute = f"{PREFIX}{name}"
        if attribute not in self.adapter_layer_names:
            setattr(self, attribute, Float32ParameterDict())
            self.adapter_layer_names = (*self.adapter_layer_names, attribute)
        return getattr(self, attribute)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As PEFT's, but no dtype changes: a loaded adapter stays, to the bit, what was saved."""
        device = self.get_base_layer().weight.device if device is None else device
        for name in self.adapter_layer_names + self.other_param_names:
            entries = getattr(self, name)
            if isinstance(entries, Float32ParameterDict | BufferDict) and adapter_name in entries:
                tensor = entries[adapter_name]
                if device.type != "meta" and not tensor.is_meta:
                    tensor.data = tensor.data.to(device)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; with the last adapter a packed weight is unpacked, as far as it goes."""
        if list(self.specs) == [adapter_name] and self.frozen.in_file is None:
            self.frozen.unpack()
        super().delete_adapter(adapter_name)

    def set_storage(self, adapter_name: str, storage: str) -> None:
        """Say that the adapter belongs to W0 as this storage keeps it."""
        self.specs[adapter_name] = spec = replace(self.specs[adapter_name], storage=storage)
        put_storage(self.dlqat_spec[adapter_name], spec)

    def record(self, adapter_name: str) -> Record:
        """How the adapter was made."""
        return Record.decode(self.dlqat_record[adapter_name])

    def base_record(self) -> Record:
        """A new adapter's on this W0: of a packed one that of the adapter whose scales it shares."""
        weight, in_file = self.frozen.as_kept(), self.frozen.in_file
        if in_file is not None and not weight.is_meta:
            return Record.of_file(weight, in_file.name, self.frozen.dtype)
        if self.frozen.packed and in_file is None:
            return self.record(next(iter(self.specs)))
        return Record() if weight.is_meta else Record.of_weight(weight)

    def set_record(self, adapter_name: str, **changes: Any) -> None:
        """Change fields of the [`Record`]."""
        self.dlqat_record[adapter_name].copy_(replace(self.record(adapter_name), **changes).encode())

    def same_scales(self, one: str, other: str) -> bool:
        """Whether two adapters have the same grid, scales and zeros, to the bit: a weight can be packed for both."""
        pairs = zip(self.scales_and_zeros(one), self.scales_and_zeros(other), strict=True)
        return self.specs[one].grid == self.specs[other].grid and all(
            a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs
        )

    def scales_and_zeros(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """s, and z or b, or None for a symmetric grid; both [out, n_groups]."""
        if (in_file := self.frozen.in_file) is not None:
            return in_file.scales_and_zeros(self.frozen.as_kept(), self.specs[adapter_name].grid)
        s, z, b = (self._modules[name].get(adapter_name) for name in CALIBRATED)  # type: ignore[union-attr]
        assert s is not None
        return s, b if z is None else z

    def trained(self, adapter_name: str) -> dict[str, tuple[TrainedTensor, nn.Parameter]]:
        """The adapter's trained tensors by name, each with what must be known of it."""
        return {
            name: (tensor, self._tensors_named(name)[adapter_name])
            for name, tensor in self.described[adapter_name].items()
        }

    @torch.no_grad()
    def convert(self, adapter_name: str, state: dict[str, torch.Tensor]) -> int:
        """Bring an adapter's tensors into its unit, in a dict of them by kind, such as `dlqat_A`.

        A file's may count in another one, or, in the last format, be values.

        Returns:
            Of how many numbers the value is not the same to the bit; `converted` then has it, too.
        """
        spec, encoded, inexact = self.specs[adapter_name], state.get("dlqat_spec"), 0
        unit = spec.unit if encoded is None else spec.unit_in(encoded)
        if encoded is None or unit == spec.unit:
            return 0
        for name, tensor in self.described[adapter_name].items():
            found = state.get(f"{PREFIX}{name}")
            if found is not None and unit:
                state[f"{PREFIX}{name}"] = found.float() * (unit / spec.unit)
            elif found is not None:
                state[f"{PREFIX}{name}"] = parameter = tensor.parameter(found.float())
                inexact += int((tensor.value(parameter) != found.float()).sum())
        state["dlqat_spec"] = spec.in_this_unit(encoded)
        self.converted[adapter_name] = inexact
        return inexact

    def moved(self, adapter_name: str) -> bool:
        """Whether a trained tensor is no longer as it started."""
        return any(
            tensor.start is not None and bool(parameter.any())
            for tensor, parameter in self.trained(adapter_name).values()
        )

    def tensors(self, adapter_name: str) -> AdapterTensors:
        """All that the method makes its quantizer of.

        Raises:
            ValueError: for a trained tensor that is not float32.
        """
        spec, (s, zero) = self.specs[adapter_name], self.scales_and_zeros(adapter_name)
        modules, scaling, trained = self._modules, spec.scaling, {}  # past nn.Module's own, slow lookup
        for name, tensor in self.described[adapter_name].items():
            parameter: Any = modules[PREFIX + name][adapter_name]  # type: ignore[index]
            _check_float32(name, parameter)
            trained[name] = parameter if tensor.in_scaling else tensor.value(parameter)
            scaling *= tensor.unit if tensor.in_scaling else 1
        _check_float32("scale", s)
        if zero is not None:
            _check_float32("zero", zero)
        return AdapterTensors(spec.grid, scaling, s, zero, trained, spec.others)

    def quantizer(self, adapter_name: str) -> Quantizer:
        """The way of the weight into the grid and out of it, differentiable in what the adapter's method trains."""
        spec = self.specs[adapter_name]
        quantizer = spec.method.quantizer(self.tensors(adapter_name))
        if (in_file := self.frozen.in_file) is not None:
            return replace(quantizer, storage=spec.storage, step=in_file.step(quantizer.step))
        return quantizer if spec.storage == "full" else replace(quantizer, storage=spec.storage)

    @torch.no_grad()
    def quantized_weight(self, adapter_name: str | None = None) -> QuantizedWeight:
        """The weight as it ships: codes, scale and zero.

        Args:
            adapter_name: defaults to the active adapter.

        Raises:
            ValueError: if the layer has no such adapter, or if several are active: their sum lies on no grid; or if
                NaN or infinity takes part in choosing codes.
        """
        names = self._present(self.active_adapters if adapter_name is None else [adapter_name])
        if len(names) != 1:
            what = (
                f"adapters {names} are active and their sum lies on no grid" if names else "there is no such adapter"
            )
            raise ValueError(f"{what}: codes belong to one adapter; name one of {sorted(self.specs)}.")
        warn_of_inexact(self.convert_in_place(names[0]))
        self._check_codes(names[0])
        return harden(self.frozen.as_kept(), self.quantizer(names[0]))

    def _present(self, adapter_names: list[str]) -> list[str]:
        return [name for name in adapter_names if name in self.specs]

    @torch.no_grad()
    def convert_in_place(self, adapter_name: str) -> int:
        """As `convert`, of the tensors that are in the layer: some loading puts them there and asks nobody."""
        kinds = (*self.adapter_layer_names, *SAVED)
        own = {kind: entries[adapter_name] for kind in kinds if adapter_name in (entries := getattr(self, kind))}
        new = dict(own)
        inexact = self.convert(adapter_name, new)
        for kind, tensor in own.items():
            if new[kind] is not tensor:
                tensor.data.copy_(new[kind])
        return inexact

    def _check_codes(self, adapter_name: str) -> None:
        """Refuse to make codes of NaN: they are integers, which would hide that the adapter is broken."""
        with at_hand(self):
            quantizer = self.quantizer(adapter_name)
            chosen_by = (quantizer.A, quantizer.B, quantizer.step, quantizer.rounding_zero)
            finite = all(torch.isfinite(tensor).all() for tensor in chosen_by if tensor is not None)
        if not finite:
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: A, B, scales or "
                "zeros, which choose the codes, hold NaN or infinity; load its last good checkpoint."
            )

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """w_hat - W0 [out, in], float32."""
        return self.quantized_weight(adapter_name).dequantize() - self.frozen.original().float()

    def _merged_weight(self, adapter_names: list[str]) -> torch.Tensor:
        """w_hat, or for several adapters W0 plus the sum of their differences to it; [out, in]."""
        if len(adapter_names) == 1:
            weight = self.quantized_weight(adapter_names[0]).dequantize()
        else:
            weight = self.frozen.original().float() + sum(self.get_delta_weight(name) for name in adapter_names)
        return weight.to(self.frozen.dtype)

    def check_mergeable(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise what `merge` would raise of dtypes and numbers; changes nothing.

        Where the base layer lies is not asked: merging a whole model loads what is offloaded.
        """
        wanted = self.active_adapters if adapter_names is None else adapter_names
        names = self._present([name for name in wanted if name not in self.merged_adapters])
        self._check_own_base()
        for name in names:
            self._check_codes(name)
        if safe_merge and names:
            self._finite_merged_weight(names)

    def _check_own_base(self) -> None:
        """Refuse a W0 that somebody has quantized since, or changed without a word: LoRA that was merged into it."""
        self.frozen.check_float()
        unsaid = [name for name in self.specs if name not in self.on_other_base]
        base = self.base_record() if unsaid and not is_partitioned(self.get_base_layer().weight) else Record()
        for name in unsaid:
            if not self.record(name).fits(base):
                raise ValueError(
                    f"the frozen weight is no longer the one that adapter {name!r} was made on: was another adapter "
                    "merged into it? unmerge that one (unmerge_adapter), and merge this one first, or load the base "
                    "model again."
                )

    def _finite_merged_weight(self, adapter_names: list[str]) -> torch.Tensor:
        weight = self._merged_weight(self.merged_adapters + adapter_names)
        if not torch.isfinite(weight).all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {adapter_names[-1]} seems to be broken"
            )
        return weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put w_hat into the base layer, computed from the original weight, which is kept for `unmerge`.

        Args:
            safe_merge: check for NaN and infinity first.
            adapter_names: adapters to merge; all active ones by default.

        Raises:
            ValueError: if NaN or infinity takes part in choosing codes; with `safe_merge`, if the merged weight is not
                finite; if W0 was changed since the adapter was made.
            TypeError: if the base layer's weight is itself quantized.
        """
        self._check_own_base()
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        check_here(self.get_base_layer(), "merge into")
        merged = self.merged_adapters + names
        self.frozen.replace(self._finite_merged_weight(names) if safe_merge else self._merged_weight(merged))
        self.merged_adapters = merged

    def unmerge(self) -> None:
        """Put the very tensor back that `merge` replaced."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.frozen.restore()
        self.merged_adapters.clear()

    @contextmanager
    def unmerged(self) -> Iterator[None]:
        """Inside the block the layer is not merged; after it what was merged is merged again, the very tensor."""
        if not self.merged:
            yield
            return
        names, self.merged_adapters = self.merged_adapters, []
        try:
            with self.frozen.in_its_place():
                yield
        finally:
            self.merged_adapters = names

    @property
    def weight(self) -> torch.Tensor:
        """What the layer multiplies with, [out, in] as the base layer has it: w_hat while an adapter is active.

        A parent module may compute with it instead of calling the layer; it gets the gradient of a call. Its shape,
        dtype and device cost nothing, see [`DeferredWeight`].
        """
        names, base = self._computing(), self.get_base_layer().weight
        if not names and base.is_floating_point():
            return base
        if torch.compiler.is_compiling():
            return self._weight_of(names)
        shape = (self.out_features, self.in_features)
        return DeferredWeight(
            lambda: self._weight_of(names),
            shape[::-1] if self.fan_in_fan_out else shape,
            self.frozen.dtype,
            base.device,
        )

    def _computing(self) -> list[str]:
        """The adapters that a forward pass goes through."""
        return [] if self.disable_adapters or self.merged else self._present(self.active_adapters)

    def _weight_of(self, adapter_names: list[str]) -> torch.Tensor:
        """w_hat, or for several adapters W0 plus the sum of their differences to it, differentiable; in W0's dtype.

        As the base layer has it. Merging gives the same to the bit.
        """
        self._was_read = True
        with at_hand(self):
            dtype = self.frozen.dtype
            if len(adapter_names) == 1:
                return self._fake_quantized(adapter_names[0], dtype)
            weight = original = self.frozen.as_base_layer_has_it(self.frozen.original()).float()
            if adapter_names:
                weight = original + sum(self._fake_quantized(name, torch.float32) - original for name in adapter_names)
            return weight.to(dtype)

    def _fake_quantized(self, adapter_name: str, dtype: torch.dtype) -> torch.Tensor:
        weight = self.get_base_layer().weight
        return fake_quantize(weight, self.quantizer(adapter_name), dtype, self.fan_in_fan_out)

    def _quantized_output(
        self, base_layer: Any, dtype: torch.dtype, x: torch.Tensor, adapter_name: str
    ) -> torch.Tensor:
        """x @ w_hat.T + bias with one adapter, computed in a dtype."""
        weight, bias, spec = base_layer.weight, base_layer.bias, self.specs[adapter_name]
        inputs = x if x.dtype == dtype else self._cast_input_dtype(x, dtype)
        bias = bias if bias is None or bias.dtype == inputs.dtype else bias.to(inputs.dtype)
        if not torch.is_grad_enabled() and self._may_keep(base_layer):
            w_hat = self._kept_weight.get(
                (adapter_name, spec, dtype),
                weight,
                self._made_of(adapter_name),
                inputs.numel() // self.in_features,
                lambda: quantized(weight, self.quantizer(adapter_name), dtype, self.fan_in_fan_out),
                budget=self.out_features * self.in_features * dtype.itemsize * (spec.storage != "full"),
            )
            if w_hat is not None:
                return linear(inputs, bias, w_hat, self.fan_in_fan_out)
        return fake_quantize_linear(
            inputs, bias, weight, self.quantizer(adapter_name), self.fan_in_fan_out, spec.gradient
        )

    def _made_of(self, adapter_name: str) -> list[torch.Tensor]:
        """An adapter's tensors, past nn.Module's own, slow lookup."""
        entries = (self._modules[name]._modules.get(adapter_name) for name in (*self.adapter_layer_names, *CALIBRATED))  # type: ignore[union-attr]
        return [entry._parameters["weight"] for entry in entries if entry is not None]  # type: ignore[misc]

    def _may_keep(self, base_layer: Any) -> bool:
        """Whether w_hat may be kept beside W0: on a CPU. On a GPU comparing takes as long as computing."""
        weight = base_layer.weight
        return (
            not self.training  # type: ignore[attr-defined]
            and weight.device.type == "cpu"
            and "_hf_hook" not in base_layer.__dict__  # offloaded to save memory
            and type(weight.data) is torch.Tensor
            and weight.is_contiguous()
            and not weight.is_inference()
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
        )

    def _base_output(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the layer gives without adapters, or with merged ones."""
        base_layer = self.get_base_layer()
        if base_layer.weight.is_floating_point() or isinstance(base_layer, FileLinear):
            return self.base_layer(x, *args, **kwargs)
        if not torch.compiler.is_compiling():
            _warn_that_the_base_is_decoded()
        return self._output_with(self._weight_of([]), x, *args, **kwargs)

    def _output_with(self, weight: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the base layer itself, whatever it does, gives with another weight in W0's dtype."""
        inputs = x if torch.is_autocast_enabled(x.device.type) else self._cast_input_dtype(x, weight.dtype)
        base_layer: Any = self.get_base_layer()
        hooked = base_layer.__dict__.get("forward") if "_hf_hook" in base_layer.__dict__ else None
        if hooked is not None:  # accelerate's would fetch W0; `at_hand` has done its work
            base_layer.forward = base_layer._old_forward
        try:
            output = functional_call(base_layer, {"weight": weight}, (inputs, *args), kwargs)
        finally:
            if hooked is not None:
                base_layer.forward = hooked
        return output.to(x.dtype) if isinstance(output, torch.Tensor) and inputs is not x else output


@cache
def _warn_that_the_base_is_decoded() -> None:
    warnings.warn(
        "the frozen weights are packed: without its adapter the model is what is left of the base model, not the base "
        "model itself. Load that one again where you need it, and keep a teacher's predictions in a `TeacherCache` "
        "that is filled before the weights are packed."
    )


class DLQATLinear(nn.Module, DLQATLayer):
    """DL-QAT on an `nn.Linear`, or on transformers' `Conv1D` (`fan_in_fan_out`)."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, fan_in_fan_out: bool, **kwargs: Any) -> None:
        super().__init__()
        DLQATLayer.__init__(self, base_layer, fan_in_fan_out)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, **kwargs)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """y [..., out] from x [..., in]; the dtype is the base layer's own."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        base_layer: Any = self.get_base_layer()  # type: ignore[operator]
        weight = base_layer.weight
        if is_partitioned(weight):
            gather_with(self)
        # device_map may have taken tensors away
        with at_hand(self) if "_hf_hook" in base_layer.__dict__ else nullcontext():
            names = self._computing()
            if not names:
                return self._base_output(x, *args, **kwargs)
            dtype = weight.dtype if weight.is_floating_point() else self.frozen.dtype
            autocast = torch.is_autocast_enabled(x.device.type)
            product = torch.get_autocast_dtype(x.device.type) if autocast else dtype
            # Rounded to one 16-bit dtype w_hat is not what it is when it was rounded to another one first, as merged.
            if len(names) > 1 or not is_plain(base_layer) or dtype not in (product, torch.float32):
                return self._output_with(self._weight_of(names), x, *args, **kwargs)
            output = self._quantized_output(base_layer, product, x, names[0])
            return output if autocast or output.dtype == x.dtype else output.to(x.dtype)

    def train(self, mode: bool = True) -> DLQATLinear:
        """As torch's; a kept w_hat is let go."""
        if mode:
            self._kept_weight.clear()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As torch's; says what a cast of W0 does to adapters."""
        before = self.frozen.dtype
        super()._apply(fn, recurse)  # type: ignore[misc]
        self._kept_weight.clear()
        if self.frozen.dtype != before and not self.frozen.packed:
            self._follow_cast()
        return self

    def _follow_cast(self) -> None:
        """A new adapter's record follows W0 to another dtype; of one that was trained, W0 is another one now."""
        weight = self.frozen.as_kept().to(self.frozen.dtype)  # where it is set aside, it is cast when it comes back
        base = Record() if weight.is_meta else Record.of_weight(weight)
        for name in self.specs:
            if self.dlqat_record[name].is_meta or weight.is_meta:
                continue
            record = self.record(name)
            if not record.calibrated and not self.moved(name):
                self.dlqat_record[name].copy_(base.encode())
            elif not record.fits(base):
                self.on_other_base.add(name)
                warnings.warn(
                    f"the base weights become {str(weight.dtype).removeprefix('torch.')}, but adapter {name!r} was "
                    "trained on others: with these some codes are others, and so is the model; cast the base model "
                    "before get_peft_model or from_pretrained.",
                    OtherBaseWarning,
                )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, spec in self.specs.items():
            kinds = {kind: "" if kind in NUMBERS else ".weight" for kind in (*self.adapter_layer_names, *SAVED)}
            keys = {kind: f"{prefix}{kind}.{name}{end}" for kind, end in kinds.items()}
            found = {kind: state_dict[key] for kind, key in keys.items() if key in state_dict}
            if self.convert(name, found):
                warn_of_inexact("some")  # in the same words for each layer
            state_dict.update({keys[kind]: tensor for kind, tensor in found.items()})
            _check_complete(prefix, spec, found)
        weight = state_dict.get(f"{prefix}base_layer.weight")
        self.frozen.check_same_kind(weight)
        if weight is not None and type(weight) in (torch.Tensor, nn.Parameter) and weight.is_floating_point():
            self._warn_if_other_base(state_dict, f"{prefix}dlqat_record.", as_rows(weight, self.fan_in_fan_out))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _warn_if_other_base(self, state_dict: dict[str, Any], prefix: str, weight: torch.Tensor) -> None:
        """Warn, in words that are the same for each layer, if the W0 of a state dict is not its adapters' own."""
        records = [Record.decode(state_dict[key]) for name in self.specs if (key := prefix + name) in state_dict]
        if self.merged or weight.is_meta or not records:
            return
        base = Record.of_weight(weight)
        if not all(record.fits(base) for record in records):
            self.on_other_base |= self.specs.keys()
            warnings.warn(
                "the base weights of the state dict are not those that its adapter was trained on: it was taken while "
                "merged, or in another dtype, and is another model here. Take it after unmerge_adapter(), or save the "
                "adapter by save_pretrained().",
                OtherBaseWarning,
            )

    def __repr__(self) -> str:
        """Named as PEFT names its layers."""
        return "dlqat." + super().__repr__()

    def extra_repr(self) -> str:
        """The grids, by adapter."""
        grids = {name: spec.grid for name, spec in self.specs.items()}
        return f"in_features={self.in_features}, out_features={self.out_features}, grids={grids}"


def _check_complete(prefix: str, spec: LayerSpec, found: dict[str, torch.Tensor]) -> None:
    """Refuse an adapter's tensors of a state dict that mean another weight here, or lack what they go with."""
    encoded = found.get("dlqat_spec")
    if encoded is not None and not encoded.is_meta and (differences := spec.differences(encoded)):
        raise ValueError(
            f"{prefix}dlqat_spec of the state dict was made with another config ({'; '.join(differences)}); make the "
            "model with that config."
        )
    if found and encoded is None:
        raise ValueError(
            f"the state dict has {prefix}{next(iter(found))}, but not the dlqat_spec that says in which unit it "
            "counts: buffers were left out; take model.state_dict(), or load the adapter's own file by load_adapter()."
        )
    if found and "dlqat_scale" not in found and spec.storage not in FILE_STORAGES:
        raise ValueError(
            f"the state dict has {prefix}{next(iter(found))}, but not the scales that it goes with: frozen parameters "
            "were left out, as in DeepSpeed's checkpoints; load the adapter's own file by load_adapter()."
        )


def _check_float32(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise ValueError(
            f"{name} arrives in {str(tensor.dtype).removeprefix('torch.')}, but codes are chosen in float32: "
            "FSDP2's mixed precision has rounded it; leave param_dtype (fsdp mixed precision, bf16=True) out, "
            "and load the base model in bfloat16."
        )


def is_plain(layer: nn.Module) -> bool:
    """Whether a linear layer does nothing but y = x @ W.T + bias: no forward of its own, and no hooks."""
    own = layer.__dict__
    return (
        type(layer).forward in (nn.Linear.forward, Conv1D.forward, FileLinear.forward)
        and ("forward" not in own or "_hf_hook" in own)  # the forward is accelerate's; `at_hand` does its work
        and not (own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"])
        and not own["_backward_pre_hooks"]
    )


def adapter_layers(model: nn.Module, adapter_name: str | None = None) -> tuple[str, dict[str, DLQATLayer]]:
    """The layers that hold an adapter, by module name.

    Args:
        model: a model with DL-QAT adapters, wrapped by PEFT or injected.
        adapter_name: defaults to the active adapter.

    Returns:
        The adapter's name and its layers.

    Raises:
        ValueError: if the model has no such adapter, or several are active and none is named.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, DLQATLayer)}
    if not layers:
        raise ValueError("the model has no DL-QAT adapter; make one by get_peft_model(model, DLQATConfig(bits=4)).")
    if adapter_name is None:
        active = next(iter(layers.values())).active_adapters
        if len(active) != 1:
            raise ValueError(f"{len(active)} adapters are active {list(active)}; name one by adapter_name.")
        adapter_name = active[0]
    found = {name: layer for name, layer in layers.items() if adapter_name in layer.specs}
    if not found:
        known = sorted({adapter for layer in layers.values() for adapter in layer.specs})
        raise ValueError(f"there is no DL-QAT adapter {adapter_name!r}; the model has {known}.")
    return adapter_name, found


def warn_of_inexact(count: int | str) -> None:
    """Say that an older file's numbers have no exact counterpart in the units of today, if some have none."""
    if count:
        warnings.warn(
            f"{count} magnitudes of the saved adapter, which is of an older version, lie below 0.5 and are rounded in "
            "the units of this one, by less than 1e-6; a few of their scales may ship one bit off.",
            stacklevel=2,
        )


def is_calibrated(layers: Collection[DLQATLayer], adapter_name: str) -> bool:
    """Whether the adapter's scales and zeros were fitted to data, in all of its layers."""
    return all(layer.record(adapter_name).calibrated for layer in layers)
