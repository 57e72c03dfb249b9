"""From a trained adapter to a folder that an engine loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import nn

from ..export import compressed_tensors, dense, gguf, gptq, mlx
from .card import write_card
from .checks import check_base, check_embeddings, dtype_of, rule_of, warn_if_unfinished
from .fitting import check_held
from .folder import check_free, companion_folder, copy_companions, whole_or_nothing
from .manifest import save_reference
from .options import Options
from .reference import prompt_ids, reference_logits
from .source import Source, open_source
from .summary import report, summarise
from .verify import Verification, logit_difference, verify_export
from .written import read_written

Writer = Callable[[Source, Path, Options], None]
WRITERS: dict[str, Writer] = {
    "compressed-tensors": compressed_tensors.write,
    "gguf": gguf.write,
    "mlx": mlx.write,
    "gptq": gptq.write,
    "dense": dense.write,
}


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
    datasets: str | Sequence[str] = (),
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
        tokenizer: saved beside the weights in place of the base model's; by default the base's files are copied.
        lossy: round again, onto the nearest grid, what the format cannot hold; what that costs is measured and said.
        verify: run the engines that are installed on the result. It is an error if one does not find what was to be
            written: the trained model, or, where the format rounds, the model that this rounding gives.
        overwrite: replace a folder that an export has made.
        max_shard_size: largest safetensors file in bytes; also the memory that writing takes.
        push_to_hub: upload the folder to `repo_id`.
        repo_id: the repository, which is made if it does not exist.
        private: whether a new repository is private; the Hub's default by default.
        datasets: what the model was fine-tuned on, by hub id, for its card.

    Returns:
        What [`verify_export`] found; None with `verify=False`.

    Raises:
        ValueError: for an unknown format or dtype, a grid that the format cannot hold exactly (unless `lossy`),
            several active adapters, a base model that is not the one trained on, a number too large for its dtype.
        ImportError: if the format's package is missing; names the extra.
        FileExistsError: if `out_dir` exists and is not empty.
        RuntimeError: if an engine does not find in the result what was to be written.
    """
    rule = rule_of(format)
    output = Path(out_dir).resolve()
    check_free(output, overwrite)
    if push_to_hub and not repo_id:
        raise ValueError("push_to_hub=True needs repo_id='you/name'.")
    chosen = dtype_of(dtype)
    check_embeddings(embeddings)
    source = open_source(model_or_adapter, base, adapter_name)
    check_base(source)
    losses = check_held(source, rule, lossy)
    warn_if_unfinished(source)
    options = Options(
        dtype=chosen or source.dtype,
        embeddings=embeddings or str(chosen or source.dtype).removeprefix("torch."),
        lossy=lossy,
        max_shard_size=max_shard_size,
    )
    with whole_or_nothing(output) as folder:
        beside = _companions(source, folder, tokenizer, options)
        WRITERS[format](source, folder, options)
        ids = prompt_ids(source.config, set())
        trained, written = reference_logits(source, ids), None
        manifest = summarise(source, rule, options, losses)
        if not manifest.exact:
            written = reference_logits(source, ids, partial(read_written, source, rule, options))
            manifest.loss = asdict(logit_difference(trained, written))
        save_reference(folder, ids, trained, written)
        manifest.save(folder)
        verification = verify_export(folder) if verify else None
        if verification is not None:
            if verification.figures and not verification.ok:
                wanted = "trained one" if manifest.exact else "trained one rounded for the format"
                raise RuntimeError(f"the exported model is not the {wanted}, nothing was kept:\n{verification}")
            manifest.figures = [asdict(row) for row in verification.figures]
            manifest.save(folder)
        named = [datasets] if isinstance(datasets, str) else datasets
        write_card(folder, source, rule, manifest, beside, repo_id, named)
    for line in report(manifest, verification):
        print(line)
    if push_to_hub:
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)  # type: ignore[arg-type]
        api.upload_folder(repo_id=repo_id, folder_path=output)  # type: ignore[arg-type]
    return verification


def _companions(source: Source, folder: Path, tokenizer: Any, options: Options) -> Path | None:
    """Put tokenizer, generation config and licence into the folder; returns the base model's folder."""
    beside = companion_folder(source.base, source.adapter.revision)
    copied = copy_companions(beside, folder, tokenizer=tokenizer is None) if beside is not None else []
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    elif not any(name.startswith(("tokenizer", "vocab")) for name in copied):
        options.notes.append("the base model has no tokenizer beside it; pass tokenizer=... to have one in the export")
    generation = getattr(source.model, "generation_config", None)
    if generation is not None and "generation_config.json" not in copied:
        generation.save_pretrained(folder)
    return beside
