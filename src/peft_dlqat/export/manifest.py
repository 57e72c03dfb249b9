"""dlqat_export.json: what an exported folder holds, and the logits that an engine must find in it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..files import save_tensors, sha256_of
from ..formats import FORMATS
from ..formats.safetensors_folder import OURS
from ..formats.tensor_files import write_json
from ..messages import cut, shown
from .folder import MANIFEST

# In a folder of its own: engines read every safetensors file that lies beside config.json.
REFERENCE = f"{OURS}/reference.safetensors"
REPORT = f"{OURS}/report.txt"  # of an export with which an engine disagrees
TRAINED, WRITTEN = "logits", "written"
_LOSS = {"max_difference", "kl", "top1"}  # the fields of `verify.LogitDifference`
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

    def check(self) -> None:
        """Refuse values that are not of their fields' types, and paths that lead out of the folder.

        Raises:
            ValueError: naming the field.
        """
        if not isinstance(self.format, str) or not isinstance(self.files, dict):
            raise ValueError(f"format={shown(self.format)} or files={shown(self.files)} is of another type")
        for name, digest in self.files.items():
            path = PureWindowsPath(name)  # which knows both kinds of slashes
            strange = [part for part in path.parts if part == ".." or len(part.encode(errors="replace")) > 255]
            if path.anchor or strange or not path.parts:
                raise ValueError(f"files[{shown(name)}] is no path inside the folder")
            if not isinstance(digest, str):
                raise ValueError(f"files[{shown(name)}]={shown(digest)} is no checksum")
        loss = self.loss
        if loss is not None and not (
            isinstance(loss, dict) and loss.keys() == _LOSS and all(isinstance(part, float) for part in loss.values())
        ):
            raise ValueError(f"loss={shown(loss)} is no {', '.join(sorted(_LOSS))}")

    def save(self, folder: Path) -> None:
        """Write it, with the checksums of all files that lie there."""
        packages = (*_PACKAGES, FORMATS[self.format].package)
        self.versions = {package: found for package in packages if package and (found := _version(package))}
        self.files = {name: sha256_of(folder / name) for name in files_of(folder)}
        write_json(folder / MANIFEST, asdict(self))


def files_of(folder: Path) -> list[str]:
    """The files of an exported folder, but for the manifest itself and the card, which anybody may edit."""
    return [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, "README.md")
    ]


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
        manifest.check()
    except (ValueError, TypeError, RecursionError) as error:  # no text, no JSON, other fields, or other values
        raise ValueError(f"{path} cannot be read ({cut(error)}); export the model again.") from error
    if manifest.format not in FORMATS:
        raise ValueError(
            f"{path} says format={shown(manifest.format)}, which must be one of {', '.join(map(repr, FORMATS))}; "
            "add it to peft_dlqat.formats.FORMATS, or export the model again."
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
    save_tensors({"input_ids": ids, **{name: rows.contiguous() for name, rows in logits.items()}}, folder / REFERENCE)


def load_reference(folder: Path, *names: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference prompts, and the logits of the first of some names that are there, else of the trained model.

    Raises:
        ValueError: if the file holds no such tensors.
    """
    path = folder / REFERENCE
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({str(error)[:300]}); export the model again.") from error
    none = torch.empty(0)
    ids = tensors.get("input_ids", none)
    logits = next((tensors[name] for name in (*names, TRAINED) if name in tensors), none)
    if ids.dtype != torch.int64 or ids.dim() != 2 or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise ValueError(f"{path} holds no prompts with the logits of each token; export the model again.")
    return ids, logits
