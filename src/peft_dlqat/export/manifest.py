"""dlqat_export.json: what an exported folder holds, and the logits that an engine must find in it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..formats import FORMATS
from ..formats.tensor_files import write_json
from .folder import MANIFEST

# In a folder of its own: engines read every safetensors file that lies beside config.json.
REFERENCE = "dlqat_export/reference.safetensors"
REPORT = "dlqat_export/report.txt"  # of an export with which an engine disagrees
TRAINED, WRITTEN = "logits", "written"
_PACKAGES = ("peft-dlqat", "torch", "transformers", "peft")


@dataclass
class Manifest:
    """What an export is.

    Attributes:
        format: name of the format.
        base: folder name or hub id of the base model.
        grids: number of weights written on each grid, how it is stored, and the grid that they were trained on.
        exact: whether the artefact holds the trained weights and every other tensor to the bit.
        rounded: dense tensors that the chosen dtype has rounded.
        dense_linears: linear layers that are not quantized.
        modules_to_save: modules that were trained in full, and stay dense.
        notes: what else the user should know.
        versions: of the packages that made it.
        files: sha256 of each file.
        loss: of an artefact that is not exact, by how much its logits are not the trained model's, whatever runs it.
        figures: what `verify_export` found when it was made, by engine.
    """

    format: str
    base: str
    grids: list[dict[str, Any]]
    exact: bool
    rounded: list[str] = field(default_factory=list)
    dense_linears: list[str] = field(default_factory=list)
    modules_to_save: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    loss: dict[str, float] | None = None
    figures: list[dict[str, Any]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write it, with the checksums of all files that lie there."""
        packages = (*_PACKAGES, FORMATS[self.format].package)
        self.versions = {package: found for package in packages if package and (found := _version(package))}
        self.files = {
            str(path.relative_to(folder)): sha256(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in (MANIFEST, "README.md")
        }
        write_json(folder / MANIFEST, asdict(self))


def _version(package: str) -> str:
    """Of a distribution; "" where it is not installed as one, as from a checkout."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def trained_on(row: dict[str, Any]) -> str:
    """The grid that one of `Manifest.grids` was trained on, where it is written on another."""
    return "" if row["trained"] == row["grid"] else f"; trained on {row['trained']}"


def load_manifest(folder: Path) -> Manifest:
    """Read it.

    Raises:
        FileNotFoundError: if the folder was not written by `export_model`.
        ValueError: if the file is damaged, or another version's, or of a format that is not in `FORMATS`.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {MANIFEST}; only folders written by export_model() can be verified.")
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:  # no text, no JSON, or other fields
        raise ValueError(f"{path} cannot be read ({error}); export the model again.") from error
    if manifest.format not in FORMATS:
        raise ValueError(
            f"{path} says format={manifest.format!r}, which must be one of {', '.join(map(repr, FORMATS))}; add it to "
            "peft_dlqat.formats.FORMATS, or export the model again."
        )
    return manifest


def save_reference(folder: Path, ids: torch.Tensor, logits: dict[str, torch.Tensor]) -> None:
    """Write the reference prompts, and logits [prompts, tokens, vocabulary] by name.

    Args:
        folder: the exported folder.
        ids: the prompts [prompts, tokens].
        logits: TRAINED, the model as it trained; WRITTEN, what was written, where that has been rounded; and by an
            engine's name, what was written in the arithmetic of that engine, where it has one of its own.
    """
    (folder / REFERENCE).parent.mkdir()
    save_file({"input_ids": ids, **{name: rows.contiguous() for name, rows in logits.items()}}, folder / REFERENCE)


def load_reference(folder: Path, *names: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference prompts, and the logits of the first of some names that are there, else of the trained model."""
    tensors = load_file(folder / REFERENCE)
    return tensors["input_ids"], next(tensors[name] for name in (*names, TRAINED) if name in tensors)


def sha256(path: Path) -> str:
    """A file's checksum."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**24):
            digest.update(chunk)
    return digest.hexdigest()
