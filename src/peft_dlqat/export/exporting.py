"""From a trained adapter to a folder that an engine loads."""

from __future__ import annotations

import importlib.util
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import nn

from ..formats import RULES, Rule, describe
from . import compressed_tensors, dense, gguf, gptq, mlx
from .card import write_card
from .fitting import check_held, fitting_grid
from .folder import check_free, companion_folder, copy_companions, whole_or_nothing
from .manifest import Manifest, save_reference
from .options import Options
from .reference import prompt_ids, reference_logits
from .source import Source, open_source
from .verify import Verification, verify_export

Writer = Callable[[Source, Path, Options], None]
WRITERS: dict[str, Writer] = {
    "compressed-tensors": compressed_tensors.write,
    "gguf": gguf.write,
    "mlx": mlx.write,
    "gptq": gptq.write,
    "dense": dense.write,
}
# What writing a format imports.
_PACKAGES = {"compressed-tensors": "compressed_tensors", "gguf": "gguf"}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_EMBEDDINGS = (*_DTYPES, "q8_0")


def export_model(
    model_or_adapter: nn.Module | str | Path,
    out_dir: str | Path,
    format: str,
    base: str | Path | None = None,
    adapter_name: str | None = None,
    dtype: str | torch.dtype | None = None,
    embeddings: str | None = None,
    tokenizer: Any = None,
    lossy: bool = False,
    verify: bool = True,
    overwrite: bool = False,
    max_shard_size: int = 2 * 1024**3,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    private: bool | None = None,
) -> Verification | None:
    """Write a trained model in the format of an engine: the very codes, scales and zeros, nothing rounded again.

    The folder holds the weights, config, tokenizer, generation config, licence and a model card of the base model, and
    `dlqat_export.json` with which [`verify_export`] compares what an engine makes of it with the trained model.

    Args:
        model_or_adapter: a model with a DL-QAT adapter, or an adapter's folder or hub id. An adapter on disk is
            exported one tensor at a time: the full-precision model never is in memory.
        out_dir: folder to make. It appears when all is done; after an exception there is nothing.
        format: "compressed-tensors", "gguf", "mlx", "gptq" or "dense".
        base: with an adapter on disk, folder or hub id of its base model in safetensors; by default the one that the
            adapter names.
        adapter_name: which adapter of a model; defaults to the active one.
        dtype: of all tensors that are not quantized (with "dense", of all): "float32", "float16" or "bfloat16";
            defaults to the model's own.
        embeddings: of the embedding and the output head in GGUF: as `dtype`, which is the default, or "q8_0".
        tokenizer: saved beside the weights; by default the base model's files are copied.
        lossy: round again, onto the nearest grid, what the format cannot hold.
        verify: run the engines that are installed on the result. An exact export on which one does not agree is an
            error.
        overwrite: replace a folder that exists.
        max_shard_size: largest safetensors file in bytes; also the memory that writing takes.
        push_to_hub: upload the folder to `repo_id`.
        repo_id: the repository, which is made if it does not exist.
        private: whether a new repository is private; the Hub's default by default.

    Returns:
        What [`verify_export`] found; None with `verify=False`.

    Raises:
        ValueError: for an unknown format or dtype, a grid that the format cannot hold exactly (unless `lossy`),
            several active adapters, a base model that is not the one trained on.
        ImportError: if the format's package is missing; names the extra.
        FileExistsError: if `out_dir` exists and is not empty.
        RuntimeError: if an engine does not find the trained model in the result.
    """
    rule = _rule(format)
    output = Path(out_dir)
    check_free(output, overwrite)
    if push_to_hub and not repo_id:
        raise ValueError("push_to_hub=True needs repo_id='you/name'.")
    chosen = _dtype(dtype)
    source = open_source(model_or_adapter, base, adapter_name)
    check_base(source)
    losses = check_held(source, rule, lossy)
    _warn_if_unfinished(source)
    options = Options(
        dtype=chosen or source.dtype,
        embeddings=_embeddings(embeddings, chosen or source.dtype),
        lossy=lossy,
        max_shard_size=max_shard_size,
    )
    with whole_or_nothing(output) as folder:
        beside = _companions(source, folder, tokenizer, options)
        WRITERS[format](source, folder, options)
        ids = prompt_ids(source.config, set())
        save_reference(folder, ids, reference_logits(source, ids))
        manifest = _manifest(source, rule, options, losses)
        manifest.save(folder)
        verification = verify_export(folder) if verify else None
        if verification is not None:
            if manifest.exact and verification.figures and not verification.ok:
                raise RuntimeError(f"the exported model is not the trained one, nothing was kept:\n{verification}")
            manifest.figures = [asdict(row) for row in verification.figures]
            manifest.save(folder)
        write_card(folder, source, rule, manifest, beside)
    for line in _report(rule, manifest, verification):
        print(line)
    if push_to_hub:
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)  # type: ignore[arg-type]
        api.upload_folder(repo_id=repo_id, folder_path=output)  # type: ignore[arg-type]
    return verification


def _rule(format: str) -> Rule:
    if format not in WRITERS:
        raise ValueError(f"format={format!r} must be one of {', '.join(map(repr, WRITERS))}.")
    package = _PACKAGES.get(format)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ImportError(
            f"format={format!r} needs the package {package.replace('_', '-')}; "
            f"install it by pip install 'peft-dlqat[{RULES[format].extra}]'."
        )
    return RULES[format]


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(map(repr, _DTYPES))}.")
    return _DTYPES.get(name)


def _embeddings(embeddings: str | None, dtype: torch.dtype) -> str:
    if embeddings is not None and embeddings not in _EMBEDDINGS:
        raise ValueError(f"embeddings={embeddings!r} must be one of {', '.join(map(repr, _EMBEDDINGS))}.")
    return embeddings or str(dtype).removeprefix("torch.")


def check_base(source: Source) -> None:
    """Refuse a base model whose weights are not those that the adapter was trained on.

    Raises:
        ValueError: if the checksums differ. An adapter without one, of an older version, is not checked.
    """
    recorded = source.adapter.record.get("base", {}).get("checksum")
    if recorded is not None and recorded != source.base_checksum:
        raise ValueError(
            f"the weights of the base model {source.base!r} are not those that the adapter was trained on (checksum "
            f"{source.base_checksum[:12]}, not {recorded[:12]}): codes would be others; pass the folder or hub id of "
            "the right one by base=..."
        )


def _warn_if_unfinished(source: Source) -> None:
    if source.untrained:
        warnings.warn(
            f"adapter {source.adapter_name!r} was never trained (B is zero and m one): what is exported is the base "
            "model rounded to nearest on its grid.",
            stacklevel=3,
        )
    elif "calibration" not in source.adapter.record:
        warnings.warn(
            f"adapter {source.adapter_name!r} was never calibrated: it was trained on its initial grid "
            f"(init={source.adapter.init!r}); calibrate before training for better accuracy.",
            stacklevel=3,
        )


def _companions(source: Source, folder: Path, tokenizer: Any, options: Options) -> Path | None:
    """Put tokenizer, generation config and licence into the folder; returns the base model's folder."""
    beside = companion_folder(source.base)
    copied = copy_companions(beside, folder) if beside is not None else []
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    elif not any(name.startswith(("tokenizer", "vocab")) for name in copied):
        options.notes.append("the base model has no tokenizer beside it; pass tokenizer=... to have one in the export")
    generation = getattr(source.model, "generation_config", None)
    if generation is not None and "generation_config.json" not in copied:
        generation.save_pretrained(folder)
    return beside


def _manifest(source: Source, rule: Rule, options: Options, losses: list[str]) -> Manifest:
    grids: Counter[tuple[str, str]] = Counter()
    for entry in source.entries:
        if entry.grid is not None and entry.name not in options.kept_dense:
            written = fitting_grid(entry, rule)
            assert written is not None
            grids[describe(entry.grid), rule.storage(written)[0]] += 1
    if options.kept_dense:
        losses = [*losses, f"{len(options.kept_dense)} weights are kept dense: {', '.join(options.kept_dense[:3])}"]
    return Manifest(
        format=rule.name,
        base=Path(source.base).name if Path(source.base).is_dir() else source.base,
        base_checksum=source.base_checksum,
        grids=[{"grid": grid, "stored": stored, "weights": count} for (grid, stored), count in grids.items()],
        exact=not options.rounded and not losses,
        lossy=losses,
        rounded=options.rounded,
        dense_linears=source.untouched_linears,
        modules_to_save=source.modules_to_save,
        notes=options.notes,
    )


def _report(rule: Rule, manifest: Manifest, verification: Verification | None) -> list[str]:
    lines = [f"{row['weights']} weights as {row['stored']} ({row['grid']})" for row in manifest.grids]
    lines += [f"lossy: {line}" for line in manifest.lossy]
    if manifest.rounded:
        lines.append(f"{len(manifest.rounded)} dense tensors rounded: {', '.join(manifest.rounded[:3])}, ...")
    for what, names in (("linear layers", manifest.dense_linears), ("modules_to_save", manifest.modules_to_save)):
        if names:
            lines.append(f"kept dense, {what}: {', '.join(names)}")
    lines += manifest.notes
    return lines if verification is None else [*lines, str(verification)]
