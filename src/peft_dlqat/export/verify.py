"""Whether an exported model is the trained one, as the engines that are installed run it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..formats import FORMATS, Engine
from ..train.divergence import kl
from .manifest import REFERENCE, load_manifest, load_reference, sha256

# Of the largest logit: what another machine's order of summing makes of the same weights in float32.
_SAME_ARITHMETIC = 1e-5


@dataclass(frozen=True)
class LogitDifference:
    """How far logits are from those they should be.

    Attributes:
        max_difference: largest difference of a logit.
        kl: KL(expected || found), in nats a token.
        top1: share of the positions at which both find the same token likeliest.
    """

    max_difference: float
    kl: float
    top1: float

    def __str__(self) -> str:
        """Part of a line."""
        return f"max difference {self.max_difference:.3g}, KL {self.kl:.3g} nats a token, top-1 {self.top1:.1%}"


def logit_difference(expected: torch.Tensor, found: torch.Tensor) -> LogitDifference:
    """Compare logits [..., vocabulary] in float32."""
    p, q = (logits.double().log_softmax(-1) for logits in (expected, found))
    return LogitDifference(
        max_difference=(found - expected).abs().max().item(),
        kl=kl(p, q).mean().clamp(min=0).item(),
        top1=(expected.argmax(-1) == found.argmax(-1)).double().mean().item(),
    )


@dataclass(frozen=True)
class EngineFigures(LogitDifference):
    """What one engine makes of an artefact, against the model as it was written, in float32.

    That is the merged model to the bit where the artefact is exact, else the merged model rounded as the format does;
    how far that is from the trained one is `Verification.loss`.

    Attributes:
        engine: its name.
        agrees: whether the differences are no larger than the engine's own arithmetic makes them.
        error: why the engine could not run files that have changed; the differences are NaN then.
    """

    engine: str
    agrees: bool
    error: str = ""

    def __str__(self) -> str:
        """One line."""
        if self.error:
            return f"{self.engine}: cannot run it ({self.error})  DIFFERS"
        return f"{self.engine}: {super().__str__()}{'' if self.agrees else '  DIFFERS'}"


@dataclass(frozen=True)
class Verification:
    """What `verify_export` found; `print` it for a table.

    Attributes:
        figures: one [`EngineFigures`] an engine.
        changed_files: files that are not, or no longer, those that were written.
        loss: what rounding for the format has cost, from the trained model to the one that was written; None where
            nothing was rounded. No engine has a part in it.
    """

    figures: tuple[EngineFigures, ...]
    changed_files: tuple[str, ...] = ()
    loss: LogitDifference | None = None

    @property
    def ok(self) -> bool:
        """Whether all engines find what was written, and no file has changed; without an engine nothing was shown."""
        return bool(self.figures) and all(row.agrees for row in self.figures) and not self.changed_files

    def __str__(self) -> str:
        """A line for the loss, and one an engine."""
        lines = [] if self.loss is None else [f"rounded for the format: {self.loss}"]
        lines += [str(row) for row in self.figures]
        if not self.figures:
            lost = REFERENCE in self.changed_files
            why = "the reference has changed" if lost else "no engine for this format is installed"
            lines.append(f"{why}: nothing was compared")
        lines += [f"changed since it was written: {name}" for name in self.changed_files]
        return "\n".join(lines)


def verify_export(out_dir: str | Path, engines: list[str] | None = None) -> Verification:
    """Load an exported model with the engines that are installed, and compare its logits with the written model's.

    Files that are damaged or missing are reported, not raised; they are known by their checksums.

    Args:
        out_dir: a folder written by [`export_model`].
        engines: which of the format's engines, by name ("transformers", "llama-cpp-python", "mlx-lm", "gptqmodel");
            by default all that are installed.

    Returns:
        A [`Verification`].

    Raises:
        FileNotFoundError: if the folder was not written by [`export_model`].
        ValueError: for an engine that does not run the format or is not installed, or a damaged `dlqat_export.json`.
    """
    folder = Path(out_dir)
    manifest = load_manifest(folder)
    changed = [
        name
        for name, digest in manifest.files.items()
        if not (folder / name).is_file() or sha256(folder / name) != digest
    ]
    found = [
        engine for engine in FORMATS[manifest.format].engines if engine.installed and _knows(engine, folder, changed)
    ]
    if engines is not None:
        names = [engine.name for engine in found]
        wrong = sorted(set(engines) - set(names))
        if wrong:
            raise ValueError(f"engines={wrong!r} are not installed or do not run {manifest.format!r}; use {names!r}.")
        found = [engine for engine in found if engine.name in engines]
    loss = None if manifest.loss is None else LogitDifference(**manifest.loss)
    figures = [] if REFERENCE in changed else [_figures(engine, folder, changed) for engine in found]
    return Verification(tuple(figures), tuple(changed), loss)


def _knows(engine: Engine, folder: Path, changed: list[str]) -> bool:
    try:
        return engine.knows(folder)
    except Exception:
        if not changed:
            raise
        return True  # running it says what is wrong with the file that it wanted to know from


def _figures(engine: Engine, folder: Path, changed: list[str]) -> EngineFigures:
    """What an engine finds, or how it fails on files that have changed; any other failure is an error."""
    try:
        return _compare(engine, folder)
    except Exception as error:
        if not changed:
            raise
        nan = float("nan")
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        return EngineFigures(nan, nan, nan, engine=engine.name, agrees=False, error=first)


@torch.no_grad()
def _compare(engine: Engine, folder: Path) -> EngineFigures:
    ids, expected = load_reference(folder, written=True)
    found = engine.logits(folder, ids)[..., : expected.shape[-1]]
    difference = logit_difference(expected, found)
    if engine.largest_kl is not None:
        agrees = difference.kl <= engine.largest_kl  # never of NaN
    else:
        agrees = difference.max_difference <= _SAME_ARITHMETIC * max(1.0, expected.abs().max().item())
    return EngineFigures(**asdict(difference), engine=engine.name, agrees=agrees)
