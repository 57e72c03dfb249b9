"""The exported model's card (README.md)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..formats import Format
from ..methods import METHODS
from ..module_names import folded
from .folder import MANIFEST
from .manifest import Manifest, trained_on
from .source import Source
from .verify import LogitDifference

# Of the base model's metadata, what holds for the exported one too.
_KEPT = ("license", "license_name", "license_link", "language", "datasets")


def write_card(
    folder: Path,
    source: Source,
    target: Format,
    manifest: Manifest,
    beside: Path | None,
    repo_id: str | None = None,
    datasets: Sequence[str] = (),
) -> None:
    """Write README.md: base model, data, grids, how to load it, and what the engines found.

    Args:
        folder: the exported folder, all its other files written.
        source: the model.
        target: the format.
        manifest: what was written and found.
        beside: the base model's folder, whose card names licence, language and data.
        repo_id: where it goes on the Hub, if that is known.
        datasets: what it was fine-tuned on.
    """
    kept = _base_metadata(beside)
    if datasets:
        of_base = kept.get("datasets", [])
        kept["datasets"] = [*datasets, *([of_base] if isinstance(of_base, str) else of_base)]
    on_hub = bool(manifest.base) and not Path(source.base).is_dir()
    data = ModelCardData(
        base_model=manifest.base if on_hub else None,
        base_model_relation="quantized" if on_hub else None,
        library_name=target.library,
        pipeline_tag="text-generation",
        tags=["dlqat", "quantization-aware-training", target.name],
        **kept,
    )
    text = "\n".join(_lines(folder, source, target, manifest, repo_id, datasets))
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(folder / "README.md")


def _base_metadata(beside: Path | None) -> dict[str, Any]:
    if beside is None or not (beside / "README.md").is_file():
        return {}
    try:
        found = ModelCard.load(beside / "README.md", ignore_metadata_errors=True).data.to_dict()
    except ValueError:  # a card whose metadata is no YAML is no reason to fail
        return {}
    return {key: found[key] for key in _KEPT if key in found}


def _lines(
    folder: Path, source: Source, target: Format, manifest: Manifest, repo_id: str | None, datasets: Sequence[str]
) -> list[str]:
    config = source.adapter
    method = METHODS[config.method]
    base = manifest.base or "its base model"
    size = sum(path.stat().st_size for path in folder.glob(target.files))
    weights = sum(prod(tensor.shape) for tensor in source.tensors)
    lines = [
        f"# {base}, trained at {config.bits} bits ({target.name})",
        "",
        f"Fine-tuned from {base} inside a low-bit quantizer "
        f"([{method.title}](https://arxiv.org/abs/{method.arxiv})) with `peft-dlqat`. "
        + ("The weights are the trained ones to the bit." if manifest.exact else "What was rounded is said below."),
        "",
        target.usage.replace("THIS_REPOSITORY", repo_id or "THIS_REPOSITORY"),
        "",
        "| | |",
        "|---|---|",
        *([f"| fine-tuned on | {', '.join(datasets)} |"] if datasets else []),
        *(
            f"| {row['weights']} weights | {row['grid']}, stored as {row['stored']}{trained_on(row)} |"
            for row in manifest.grids
        ),
        f"| size | {size / 1e6:,.1f} MB, {8 * size / weights:.2f} bits a parameter; in bfloat16 "
        f"{2 * weights / 1e6:,.1f} MB |",
        f"| scales | {config.scale_dtype} in training |",
    ]
    for title, names in (
        ("dense linear layers", manifest.dense_linears),
        ("trained in full", manifest.modules_to_save),
    ):
        if names:
            lines.append(f"| {title} | {folded(names)} |")
    if manifest.rounded:
        lines.append(f"| rounded to their dtype | {len(manifest.rounded)} dense tensors |")
    lines += ["", *(f"Note: {note}.\n" for note in manifest.notes)]
    if manifest.loss is not None:
        difference = LogitDifference(**manifest.loss)
        lines += [f"What was rounded for the format, against the trained model in float32: {difference}.", ""]
    if manifest.figures:
        model = "trained model" if manifest.exact else "model so rounded"
        lines += [
            f"Against the {model} in float32, on the prompts in this repository (`verify_export`, {MANIFEST}):",
            "",
            "| engine | largest difference of a logit | KL, nats a token | top-1 |",
            "|---|---|---|---|",
            *(
                f"| {row['engine']} | {row['max_difference']:.3g} | {row['kl']:.3g} | {row['top1']:.1%} |"
                for row in manifest.figures
            ),
        ]
    return lines
