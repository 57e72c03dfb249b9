"""What an export says of itself: its manifest, and the lines that are printed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ..formats import Rule, describe
from .manifest import Manifest
from .options import Options
from .source import Source
from .verify import LogitDifference, Verification


def summarise(source: Source, rule: Rule, options: Options, losses: list[str]) -> Manifest:
    """The manifest of what has been written."""
    grids: Counter[tuple[str, str, str]] = Counter()
    for entry in source.entries:
        if entry.grid is not None and (written := options.grids.get(entry.name)) is not None:
            # A dense weight is stored in the dtype that was asked for.
            stored = rule.storage(written)[0] if rule.name != "dense" else str(options.dtype).removeprefix("torch.")
            grids[describe(written), stored, describe(entry.grid)] += 1
    if options.kept_dense:
        losses = [*losses, f"{len(options.kept_dense)} weights are kept dense: {', '.join(options.kept_dense[:3])}"]
    if options.rescaled:
        names = ", ".join(options.rescaled[:3])
        losses = [*losses, f"scales or offsets of {len(options.rescaled)} weights are rounded: {names}"]
    return Manifest(
        format=rule.name,
        base=Path(source.base).name if Path(source.base).is_dir() else source.base,
        base_checksum=source.base_checksum,
        grids=[
            {"grid": grid, "stored": stored, "trained": trained, "weights": count}
            for (grid, stored, trained), count in grids.items()
        ],
        exact=not options.rounded and not losses,
        lossy=losses,
        rounded=options.rounded,
        dense_linears=source.untouched_linears,
        modules_to_save=source.modules_to_save,
        notes=options.notes,
    )


def trained_on(row: dict[str, Any]) -> str:
    """The grid that one of `Manifest.grids` was trained on, where it is written on another."""
    return "" if row["trained"] == row["grid"] else f"; trained on {row['trained']}"


def report(manifest: Manifest, verification: Verification | None) -> list[str]:
    """What the user is told: how weights are stored, what is lossy or dense, and what the engines found."""
    lines = [f"{row['weights']} weights as {row['stored']} ({row['grid']}{trained_on(row)})" for row in manifest.grids]
    lines += [f"lossy: {line}" for line in manifest.lossy]
    if manifest.rounded:
        lines.append(f"{len(manifest.rounded)} dense tensors rounded: {', '.join(manifest.rounded[:3])}, ...")
    for what, names in (("linear layers", manifest.dense_linears), ("modules_to_save", manifest.modules_to_save)):
        if names:
            lines.append(f"kept dense, {what}: {', '.join(names)}")
    lines += manifest.notes
    if verification is not None:
        return [*lines, str(verification)]
    return lines if manifest.loss is None else [*lines, f"rounded for the format: {LogitDifference(**manifest.loss)}"]
