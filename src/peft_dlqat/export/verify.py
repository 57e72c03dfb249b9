"""Whether an exported model is the trained one, as the engines that are installed run it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..distillation.divergence import kl
from .engines import ENGINES, runs
from .manifest import REFERENCE, Manifest, load_manifest, load_reference, sha256

# Of the largest logit: what another machine's order of summing makes of the same weights in float32.
_SAME_ARITHMETIC = 1e-5


@dataclass(frozen=True)
class EngineFigures:
    """What one engine makes of an artefact, against the merged model in float32.

    Attributes:
        engine: its name.
        max_difference: largest difference of a logit.
        kl: KL(merged model || engine), in nats a token.
        top1: share of the positions at which both find the same token likeliest.
        agrees: whether the differences are no larger than the engine's own arithmetic makes them, or, of an artefact
            that is not exact, than they were when it was written.
    """

    engine: str
    max_difference: float
    kl: float
    top1: float
    agrees: bool

    def __str__(self) -> str:
        """One line."""
        verdict = "" if self.agrees else "  DIFFERS"
        return (
            f"{self.engine}: max difference {self.max_difference:.3g}, KL {self.kl:.3g} nats a token, "
            f"top-1 {self.top1:.1%}{verdict}"
        )


@dataclass(frozen=True)
class Verification:
    """What `verify_export` found; `print` it for a table.

    Attributes:
        figures: one [`EngineFigures`] an engine.
        changed_files: files that are not, or no longer, those that were written.
    """

    figures: tuple[EngineFigures, ...]
    changed_files: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether all engines agree and no file has changed; without an engine nothing was shown."""
        return bool(self.figures) and all(row.agrees for row in self.figures) and not self.changed_files

    def __str__(self) -> str:
        """A line an engine."""
        lines = [str(row) for row in self.figures] or ["no engine for this format is installed: nothing was compared"]
        lines += [f"changed since it was written: {name}" for name in self.changed_files]
        return "\n".join(lines)


def verify_export(out_dir: str | Path, engines: list[str] | None = None) -> Verification:
    """Load an exported model with the engines that are installed, and compare its logits with the trained model's.

    Args:
        out_dir: a folder written by [`export_model`].
        engines: which engines, of "transformers", "llama-cpp-python", "mlx-lm" and "gptqmodel"; by default all that
            are installed and run the format.

    Returns:
        A [`Verification`].

    Raises:
        FileNotFoundError: if the folder was not written by [`export_model`].
        ValueError: for an engine that does not run the format or is not installed.
    """
    folder = Path(out_dir)
    manifest = load_manifest(folder)
    names = [name for name in ENGINES if runs(name, folder, manifest.format)]
    if engines is not None:
        wrong = sorted(set(engines) - set(names))
        if wrong:
            raise ValueError(f"engines={wrong!r} are not installed or do not run {manifest.format!r}; use {names!r}.")
        names = [name for name in names if name in engines]
    changed = [
        name
        for name, digest in manifest.files.items()
        if not (folder / name).is_file() or sha256(folder / name) != digest
    ]
    if REFERENCE in changed:
        return Verification((), tuple(changed))
    return Verification(tuple(_compare(name, folder, manifest) for name in names), tuple(changed))


@torch.no_grad()
def _compare(name: str, folder: Path, manifest: Manifest) -> EngineFigures:
    engine = ENGINES[name]
    ids, expected = load_reference(folder)
    found = engine.logits(folder, manifest.format, ids)[..., : expected.shape[-1]]
    difference = (found - expected).abs().max().item()
    p, q = (logits.double().log_softmax(-1) for logits in (expected, found))
    divergence = kl(p, q).mean().clamp(min=0).item()
    top1 = (expected.argmax(-1) == found.argmax(-1)).double().mean().item()
    before = next((row for row in manifest.figures if row["engine"] == name), None)
    if not manifest.exact and before is None:
        agrees = difference == difference  # nothing to compare with yet; NaN never agrees
    elif engine.largest_kl is not None:
        agrees = divergence <= engine.largest_kl + (0.0 if manifest.exact or before is None else 1.01 * before["kl"])
    else:
        allowed = _SAME_ARITHMETIC * max(1.0, expected.abs().max().item())
        agrees = difference <= allowed + (0.0 if manifest.exact or before is None else before["max_difference"])
    return EngineFigures(name, difference, divergence, top1, agrees)
