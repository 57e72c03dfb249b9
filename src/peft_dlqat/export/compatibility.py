"""Which formats hold a config's grids, before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import DLQATConfig
from ..formats import FORMATS, describe


@dataclass(frozen=True)
class FormatRow:
    """What one format makes of one grid of a config.

    Attributes:
        format: its name.
        grid: the settings that make the grid.
        stored: the type in which a weight is stored; "" where the grid is not held exactly.
        bits_per_weight: of a stored weight, its scale and zero included.
        problem: why the grid is not held, and what to change; "" where it is.
    """

    format: str
    grid: str
    stored: str
    bits_per_weight: float
    problem: str


@dataclass(frozen=True)
class FormatTable:
    """What each format makes of a config; `print` it for a table.

    Attributes:
        rows: one [`FormatRow`] a format and grid.
    """

    rows: tuple[FormatRow, ...]

    def __str__(self) -> str:
        """A table."""
        lines = [f"{'format':<18}  {'stored as':<20}  bits a weight"]
        for row in self.rows:
            if row.problem:
                lines.append(f"{row.format:<18}  not exactly: {row.problem}")
            else:
                remark = FORMATS[row.format].remark
                lines.append(f"{row.format:<18}  {row.stored:<20}  {row.bits_per_weight:.2f}{remark}")
        return "\n".join(lines)


def export_formats(config: DLQATConfig) -> FormatTable:
    """Say which formats hold a config's grids exactly, in how many bits a weight, and what to change for the others.

    A group size that does not divide a layer's in_features shrinks, which is only known with the model: put the
    formats into `DLQATConfig(export=[...])` to have that checked too.

    Args:
        config: an adapter's config.

    Returns:
        A [`FormatTable`].
    """
    rows = []
    for name, format in FORMATS.items():
        for grid in config.grids():
            problem = format.problem(grid)
            stored, bits = ("", float("nan")) if problem else format.stored_as(grid)
            rows.append(FormatRow(name, describe(grid), stored, bits, problem))
    return FormatTable(tuple(rows))
