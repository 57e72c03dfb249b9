"""The settings of one adapter in one layer, as one record. It is saved as numbers beside the tensors that it explains.

To add a setting, add one field to the config, a `layer_setting` with its check. It is read for each layer by its name
(and by `NAME_pattern`, module by module, where the config has such a field: a dict, of which each value must pass the
setting's check), and saved; loading compares it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from peft.utils.other import get_pattern_key

from .methods import METHODS, Method, TrainedTensor
from .quant.fixed_point import ALL_STORAGES, storage_of
from .quant.grid import SCALE_DTYPES, ZERO_POINTS, Grid, fitting_group

# Raised when the meaning of saved tensors changes. In 2, B counts in units of the step; in 3, all that trains counts
# from its start, in units of its own.
_FORMAT = 3
_STORAGE = "storage"
_STORAGE_AT, _FORMAT_AT = 6, 7  # among the numbers
_UNITS = 2.0**10  # of so many parts of 1 is the unit, behind the format's number
# The unit of what trains for few layers, and how it falls with them, see `unit_of`.
_LARGEST_UNIT, _UNIT_OF_ONE_LAYER = 64.0, 256.0
_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}  # as PEFT calls them


def layer_setting(
    default: Any, help: str, check: Callable[[str, Any], None], to_number: Callable[[Any], float] = float
) -> Any:
    """A field of the config that every layer is told in `LayerSpec.others`, and that is saved beside its tensors.

    Args:
        default: its value, also in files that were written before it was there.
        help: a line for the user.
        check: of a name and a value; raises a ValueError.
        to_number: value -> number, exact in float32.
    """
    return field(default=default, metadata={"help": help, "check": check, "to_number": to_number})


def unit_of(depth: int) -> float:
    """The unit in which an adapter's parameters count that trains so many layers, one after the other.

    With a learning rate of 2e-4, Adam moves A, B (in steps of the grid), m and the shift by 2e-4 units a step. 1.3e-2
    was best for models of 3 and 5 layers, 64 and 256 wide. For one of 30, 576 wide, 1e-3 was better than 3e-3, and
    9e-3 failed: what the layers do adds up. A power of two.
    """
    return min(_LARGEST_UNIT, 2.0 ** round(math.log2(_UNIT_OF_ONE_LAYER / depth)))


@dataclass(frozen=True)
class LayerSpec:
    """What an adapter does in one layer.

    Attributes:
        grid: the format of the codes.
        r: rank of the low-rank update.
        scaling: lora_alpha / r.
        method: the row of the formula.
        gradient: how the weight's gradient is computed, see `quant.op`.
        storage: how W0 is kept that the adapter belongs to, a key of `ALL_STORAGES`; "full" until it is packed.
        unit: in which what trains counts, see `unit_of`.
        others: values of the config's further layer settings, by name.
        numbers: these as they are saved, and as they are where nobody has set them.
    """

    grid: Grid
    r: int
    scaling: float
    method: Method
    gradient: str = "exact"
    storage: str = "full"
    unit: float = _LARGEST_UNIT
    others: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def from_config(
        cls, config: Any, name: str, in_features: int, depth: int = 1, in_file: tuple[str, Grid] | None = None
    ) -> LayerSpec:
        """The settings of a module, by the config and its patterns.

        Args:
            config: the config.
            name: of the module.
            in_features: its inputs.
            depth: in so many layers there are adapters.
            in_file: the storage and grid of a W0 that is kept as a file has it.
        """
        r, bits, group_size = (setting(config, key, name) for key in ("r", "bits", "group_size"))
        alpha = setting(config, "lora_alpha", name)
        others = [entry for entry in fields(config) if "to_number" in entry.metadata]
        values = {entry.name: setting(config, entry.name, name) for entry in others}
        to_number = {entry.name: (entry.metadata["to_number"], entry.default) for entry in others}
        return cls(
            grid=in_file[1]
            if in_file is not None
            else Grid(
                bits,
                fitting_group(in_features, group_size),
                config.zero_point,
                SCALE_DTYPES[config.scale_dtype],
                config.scale_dtype == "k_quant",
            ),
            r=r,
            scaling=alpha / (math.sqrt(r) if config.use_rslora else r),
            method=config.resolve_method(),
            gradient=config.gradient,
            # Of one that is about to be loaded, until its tensors tell. A new one's weight is packed when its scales
            # are frozen.
            storage=in_file[0] if in_file is not None else config.storage if config.inference_mode else "full",
            unit=unit_of(depth),
            others=values,
            numbers={key: (number(values[key]), number(default)) for key, (number, default) in to_number.items()},
        )

    def trained(self, out_features: int, in_features: int) -> dict[str, TrainedTensor]:
        """The tensors that train, by name."""
        found = self.method.trained(self.grid, out_features, in_features // self.grid.group_size, self.r)
        return {name: replace(tensor, unit=self.unit * tensor.unit) for name, tensor in found.items()}

    def _numbers(self) -> dict[str, float]:
        numbers = {
            "bits": self.grid.bits,
            "group_size": self.grid.group_size,
            "zero_point": ZERO_POINTS.index(self.grid.zero_point),
            "scale_dtype": list(SCALE_DTYPES).index(self.grid.scale_name),
            "lora scaling": self.scaling,
            "method": self.method.number,
            _STORAGE: ALL_STORAGES[self.storage].number,
            "format": _FORMAT + self.unit / _UNITS,
        }
        return {**numbers, **{name: value for name, (value, _) in self.numbers.items()}}

    def encode(self) -> torch.Tensor:
        """The record as numbers, float32 [8 or more].

        [bits, group_size, zero_point, scale_dtype, scaling, method, storage, format], then those of `numbers`. The
        format's number has the unit behind it, in parts of 1/1024: transformers loads no tensor of another length.
        Those at the end that are as nobody has set them are left out, as in files from before they were there.
        zero_point and scale_dtype are positions in `ZERO_POINTS` and `SCALE_DTYPES`, to which names are only appended;
        method and storage are their own `number`. Two configs can agree in every tensor's shape and name and still
        mean other weights (3 or 4 bits, say). Loading compares these numbers.
        """
        values, others = list(self._numbers().values()), list(self.numbers.values())
        while others and others[-1][0] == others[-1][1]:
            others.pop(), values.pop()
        return torch.tensor(values, device="cpu", dtype=torch.float32)

    @property
    def length(self) -> int:
        """How many numbers there are, with those that are left out."""
        return len(self._numbers())

    def completed(self, encoded: torch.Tensor) -> torch.Tensor:
        """A file's numbers with the defaults that are left out; more than there are here, if it is a newer one's."""
        defaults = [default for _, default in self.numbers.values()]
        missing = self.length - len(encoded)
        added = torch.tensor(defaults[len(defaults) - missing :] if missing > 0 else [], device="cpu")
        return torch.cat([encoded.float().cpu(), added])

    def differences(self, encoded: torch.Tensor) -> list[str]:
        """The fields in which a file's numbers are others than these, in words; how W0 is kept is not compared."""
        own = self._numbers()
        return [
            f"{name}: {self._in_words(name, theirs)} in the file, {self._in_words(name, ours)} here"
            for (name, ours), theirs in zip(own.items(), self.completed(encoded).tolist(), strict=True)
            if name != _STORAGE and not abs(theirs - ours) <= 1e-5 * abs(ours)
        ]

    def is_older(self, encoded: torch.Tensor) -> bool:
        """Whether a file's numbers are of the last format, whose tensors were values, and had no unit."""
        at_hand = encoded.dim() == 1 and len(encoded) > _FORMAT_AT and not encoded.is_meta
        return at_hand and encoded[_FORMAT_AT].item() == _FORMAT - 1

    def unit_in(self, encoded: torch.Tensor) -> float:
        """The unit that a file's tensors count in, by its numbers; 0 for values, this one where they don't tell."""
        if self.is_older(encoded):
            return 0.0
        at_hand = encoded.dim() == 1 and len(encoded) > _FORMAT_AT and not encoded.is_meta
        unit = (encoded[_FORMAT_AT].item() - _FORMAT) * _UNITS if at_hand else 0.0
        return (
            unit if 0 < unit < _UNITS and math.frexp(unit)[0] == 0.5 else self.unit
        )  # loading refuses what else it is

    def in_this_unit(self, encoded: torch.Tensor) -> torch.Tensor:
        """A file's numbers when its tensors have been brought into this unit."""
        encoded = encoded.clone()
        encoded[_FORMAT_AT] = _FORMAT + self.unit / _UNITS
        return encoded

    def _in_words(self, name: str, number: float) -> object:
        known: dict[str, dict[int, str]] = {
            "zero_point": dict(enumerate(ZERO_POINTS)),
            "scale_dtype": dict(enumerate(SCALE_DTYPES)),
            "method": {method.number: key for key, method in METHODS.items()},
        }
        if name == "format":
            return int(number)
        if name in known:
            return repr(known[name][int(number)]) if int(number) in known[name] else number
        return round(number, 6) if number != int(number) else int(number)


def pattern_of(key: str) -> str:
    """Name of the field that sets the field `key` module by module, where the config has it."""
    return _PATTERNS.get(key, f"{key}_pattern")


def setting(config: Any, key: str, name: str) -> Any:
    """A config's value for the module `name`: of the pattern that matches, or of all."""
    pattern = getattr(config, pattern_of(key), None) or {}
    return pattern.get(get_pattern_key(pattern.keys(), name), getattr(config, key))


def put_storage(encoded: torch.Tensor, spec: LayerSpec) -> None:
    """Write how W0 is kept into an adapter's numbers; its other ones may be a file's, whose unit is another."""
    encoded[_STORAGE_AT] = ALL_STORAGES[spec.storage].number


def stored_as(encoded: torch.Tensor) -> str | None:
    """How W0 was kept for an adapter with these numbers, a key of `ALL_STORAGES`; None for no known storage."""
    return storage_of(int(encoded[_STORAGE_AT]))
