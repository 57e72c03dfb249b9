"""Settings by what a model is served with: grids for which the engine has fast kernels.

Each format says its own, in `Format.presets`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Format

DEFAULT_BITS = 4


@dataclass(frozen=True)
class Preset:
    """One way to be served by an engine.

    Attributes:
        engine: its name.
        settings: of `DLQATConfig`: the grid.
        type: the engine's own name for it; "" where it goes by its bits.
    """

    engine: str
    settings: dict[str, Any]
    type: str = ""


def find_preset(formats: Iterable[Format], engine: str, type: str | None, bits: int | None) -> tuple[str, Preset]:
    """The format and the settings for an engine: of a type, or the first of so many bits.

    Raises:
        ValueError: for an engine, a type or bits that no format has; says which there are.
    """
    every = [(format.name, preset) for format in formats for preset in format.presets]
    of_engine = [(name, preset) for name, preset in every if preset.engine == engine]
    if not of_engine:
        engines = dict.fromkeys(preset.engine for _, preset in every)
        raise ValueError(f"engine={engine!r} must be one of {', '.join(map(repr, engines))}.")
    wanted = DEFAULT_BITS if type is None and bits is None else bits
    for name, preset in of_engine:
        if (type is None or preset.type == type) and wanted in (None, preset.settings["bits"]):
            return name, preset
    types = dict.fromkeys(repr(preset.type) for _, preset in of_engine if preset.type)
    widths = dict.fromkeys(str(preset.settings["bits"]) for _, preset in of_engine)
    has = f"types {', '.join(types)}, and " if types else "no types, but "
    asked = " and ".join(f"{key}={value!r}" for key, value in (("type", type), ("bits", bits)) if value is not None)
    raise ValueError(f"for {engine!r} there is nothing with {asked}; it has {has}bits {', '.join(widths)}.")
