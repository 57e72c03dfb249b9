"""Whether an exported model is the trained one, as the engines that are installed run it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..console import progress_bar
from ..files import sha256_of
from ..formats import FORMATS, Engine
from ..messages import cut
from ..train.divergence import kl
from .manifest import REFERENCE, WRITTEN, files_of, load_manifest, load_reference


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
    """What one engine makes of an artefact, against the model as it was written, in the engine's own arithmetic.

    What was written is the trained model, unmerged, where the artefact is exact, else the merged model rounded as the
    format does; how far that is from the trained one is `Verification.loss`.

    Attributes:
        engine: its name.
        agrees: whether the differences are no larger than the order of summing makes them.
        error: why the engine could not run it; the differences are NaN then.
        served: the differences as users run it, where the engine then computes with fewer digits; they are not judged.
    """

    engine: str
    agrees: bool
    error: str = ""
    served: LogitDifference | None = None

    def __str__(self) -> str:
        """One line, and one for what is served."""
        if self.error:
            return f"{self.engine}: cannot run it ({self.error})"
        line = f"{self.engine}: {super().__str__()}{'' if self.agrees else '  DIFFERS'}"
        return line if self.served is None else f"{line}\n{self.engine} with its rounded activations: {self.served}"


@dataclass(frozen=True)
class Verification:
    """What `verify_export` found; `print` it for a table.

    Attributes:
        figures: one [`EngineFigures`] an engine.
        changed_files: files that are not, or no longer, those that were written.
        added_files: files that were not written, and that an engine may read: all but the card, and what begins with a
            dot.
        loss: what rounding for the format has cost, from the trained model to the one that was written; None where
            nothing was rounded. No engine has a part in it.
    """

    figures: tuple[EngineFigures, ...]
    changed_files: tuple[str, ...] = ()
    added_files: tuple[str, ...] = ()
    loss: LogitDifference | None = None

    @property
    def ok(self) -> bool:
        """Whether all engines find what was written, and no other; without an engine nothing was shown."""
        as_written = not self.changed_files and not self.added_files
        return bool(self.figures) and all(row.agrees for row in self.figures) and as_written

    def __str__(self) -> str:
        """A line for the loss, and one an engine."""
        lines = [] if self.loss is None else [f"rounded for the format: {self.loss}"]
        lines += [str(row) for row in self.figures]
        if not self.figures:
            lost = REFERENCE in self.changed_files
            why = "the reference has changed" if lost else "no engine for this format is installed"
            lines.append(f"{why}: nothing was compared")
        lines += [f"changed since it was written: {name}" for name in self.changed_files]
        lines += [f"added since it was written: {name}" for name in self.added_files]
        return "\n".join(lines)


def verify_export(out_dir: str | Path, engines: list[str] | None = None) -> Verification:
    """Load an exported model with the engines that are installed, and compare its logits with the written model's.

    Files that are damaged or missing are reported, not raised; they are known by their checksums.

    Args:
        out_dir: a folder written by [`export_model`].
        engines: which of the format's engines, by name ("transformers", "llama.cpp", "mlx-lm", "gptqmodel");
            by default all that are installed.

    Returns:
        A [`Verification`].

    Raises:
        FileNotFoundError: if the folder was not written by [`export_model`].
        ValueError: for an engine that does not run the format or is not installed, or a damaged `dlqat_export.json`.
    """
    folder = Path(out_dir)
    manifest = load_manifest(folder)
    listed = {REFERENCE: "", **manifest.files}
    changed = [
        name for name, digest in listed.items() if not (folder / name).is_file() or sha256_of(folder / name) != digest
    ]
    # But for what the Hub or a system adds: .gitattributes, .cache/...
    added = [name for name in files_of(folder) if name not in listed and not name.startswith(".")]
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
    bar = progress_bar([] if REFERENCE in changed else found, desc="asking engines")
    figures = [_figures(engine, folder) for engine in bar]
    return Verification(tuple(figures), tuple(changed), tuple(added), loss)


def _knows(engine: Engine, folder: Path, changed: list[str]) -> bool:
    try:
        return engine.knows(folder)
    except Exception:
        if not changed:
            raise
        return True  # running it says what is wrong with the file that it wanted to know from


@torch.no_grad()
def _figures(engine: Engine, folder: Path) -> EngineFigures:
    """What an engine finds, or how it fails."""
    ids, written = load_reference(folder, WRITTEN)
    _, expected = load_reference(folder, engine.name, WRITTEN)
    try:
        found = engine.logits(folder, ids)[..., : expected.shape[-1]]
        served = None if engine.served is None else engine.served(folder, ids)[..., : expected.shape[-1]]
    except Exception as error:
        nan = float("nan")
        first = f"{type(error).__name__}: {cut(error)}".splitlines()[0]
        return EngineFigures(nan, nan, nan, engine=engine.name, agrees=False, error=first)
    difference = logit_difference(expected, found)
    # A last digit decides which way a number is rounded, so as far as its own rounding goes, it may be off.
    rounding = logit_difference(written, expected)
    largest_kl, largest_difference = max(engine.largest_kl, rounding.kl), engine.largest_difference
    return EngineFigures(
        **asdict(difference),
        engine=engine.name,
        agrees=agree(difference, expected, largest_kl, largest_difference, rounding.max_difference),
        served=None if served is None else logit_difference(written, served),
    )


def agree(
    difference: LogitDifference,
    expected: torch.Tensor,
    largest_kl: float,
    largest_difference: float,
    rounding: float = 0.0,
) -> bool:
    """Whether a difference is no larger than it may be; never of NaN.

    Args:
        difference: of the logits.
        expected: the logits.
        largest_kl: in nats a token.
        largest_difference: of a logit, as a part of the largest one.
        rounding: a difference of a logit that may be, where that is more.
    """
    largest = largest_difference * max(1.0, expected.abs().max().item())
    return difference.kl <= largest_kl and difference.max_difference <= max(largest, rounding)
