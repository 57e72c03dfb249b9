"""From a trained adapter to a folder that an engine loads."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub import HfApi
from torch import nn

from ..console import progress_bar, say
from ..formats import FORMATS, Format, Outline, TensorInfo, describe, expected_file, writer_of
from ..formats.engines import TRANSFORMERS
from ..formats.expected import megabytes
from ..formats.tensor_files import write_json
from ..layer import is_calibrated
from ..messages import shown
from ..module_names import folded
from ..quant.quantizer import QuantizedWeight
from ..record import weight_checksum
from .folder import check_free, companion_folder, copy_companions, keep_unproven, whole_or_nothing
from .manifest import REPORT, TRAINED, WRITTEN, Manifest, save_reference
from .model_card import write_card
from .reference import Reader, gelus, prompt_ids, trained_logits, written_logits
from .source import Source, open_source
from .verify import LogitDifference, Verification, agree, logit_difference, verify_export

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def export_model(
    model_or_adapter: nn.Module | str | Path,
    out_dir: str | Path,
    format: str,
    base: str | Path | None = None,
    adapter_name: str | None = None,
    dtype: str | torch.dtype | None = None,
    embeddings: str | None = None,
    tokenizer: Any = None,
    template: str | Path | None = None,
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
        out_dir: folder to make. It appears when all is done; after an exception there is nothing, but where an engine
            disagrees, the finished files are in OUT_DIR.unproven.
        format: "compressed-tensors", "gguf", "mlx", "gptq", "awq" or "dense"; the keys of `formats.FORMATS`. In the
            format of the quantized file that the model was opened from, that file is written again.
        base: with an adapter on disk, folder or hub id of its base model in safetensors; by default the one that the
            adapter names.
        adapter_name: which adapter of a model; defaults to the active one.
        dtype: of all tensors that are not quantized (with "dense", of all): "float32", "float16" or "bfloat16";
            defaults to the model's own, and for each tensor to a narrower one that holds it exactly: a base of 16 bits
            that was loaded in float32 is written in 16 bits, and in GGUF one that came from Q8_0 in Q8_0.
        embeddings: of the embedding and the output head, in GGUF only: as `dtype`, or "q8_0"; by default as `dtype`'s
            default.
        tokenizer: saved beside the weights in place of the base model's; by default the base's files are copied.
        template: in GGUF, a file that llama.cpp's converter made of the same base model, of any architecture whose
            tensors are transformers' own, if in another order: metadata, tokenizer, names and order of rows are its
            own, and so are the types of tensors that it has not quantized, but for `embeddings`. Its numbers are
            compared with the base model's, and those that are written are the model's.
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
        FileNotFoundError: if there is no such template.
        ValueError: for an unknown format or dtype, a template of another model, a weight that the format cannot hold
            exactly, several active adapters, a base model that is not the one trained on, a number too large for its
            dtype.
        ImportError: if the format's package is missing or too old; names the extra.
        FileExistsError: if `out_dir` exists and is not empty.
        RuntimeError: if the model does not compute the same with its adapter merged, or an engine does not find in the
            result what was to be written.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} must be one of {', '.join(map(repr, FORMATS))}.")
    target, output = FORMATS[format], Path(out_dir).resolve()
    target.check_installed()
    check_free(output, overwrite)
    if push_to_hub and not repo_id:
        raise ValueError("push_to_hub=True needs repo_id='you/name'.")
    chosen = _dtype(dtype)
    _check_embeddings(embeddings, target)
    source = open_source(model_or_adapter, base, adapter_name)
    _check_base(source)
    outline = source.outline(chosen or source.dtype, embeddings or "", max_shard_size)
    target = writer_of(target, outline)
    _check_held(source, target)
    _warn_if_unfinished(source)
    copied = source.origin if target is not FORMATS[format] else None
    if copied is not None:
        _check_copied(source, output, dtype=dtype, embeddings=embeddings, template=template, tokenizer=tokenizer)
    elif template is not None:
        if dtype is not None:
            raise ValueError(
                f"dtype={dtype!r} has no meaning with a template, whose tensors in full precision keep its types; "
                "leave dtype out (embeddings=... may be given)."
            )
        if tokenizer is not None:
            raise ValueError(
                "tokenizer=... has no meaning with a template, whose own stays in the file; leave it out."
            )
        target = target.with_template(template, outline, source.originals())
    target.check_model(outline)
    if chosen is None:
        outline = target.narrowed(outline, source.dense())
    notes: list[str] = []
    ids = prompt_ids(source.config, set())
    trained = _trained(source, ids, notes)
    with whole_or_nothing(output) as folder:
        beside: Path | None
        if copied is not None and copied.is_folder:
            beside = copied.path
        else:
            beside = _companions(source, folder, tokenizer, notes if template is None else [])
        rounded = _write(source, target, outline, folder, notes)
        manifest = _manifest(source, target, outline, rounded, notes)
        logits = {TRAINED: trained} | _rounded_logits(source, target, outline, ids, manifest.exact)
        if not manifest.exact:
            manifest.loss = asdict(logit_difference(trained, logits[WRITTEN]))
        save_reference(folder, ids, logits)
        manifest.save(folder)
        verification = verify_export(folder) if verify else None
        if verification is not None:
            manifest.figures = [asdict(row) for row in verification.figures]
            if verification.figures and not verification.ok:
                _keep_unproven(folder, output, manifest, verification)
            manifest.save(folder)
        named = [datasets] if isinstance(datasets, str) else datasets
        write_card(folder, source, target, manifest, beside, repo_id, named)
    say("\n".join(_report(target, outline, output, manifest, verification)))
    if push_to_hub:
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)  # type: ignore[arg-type]
        api.upload_folder(repo_id=repo_id, folder_path=output)  # type: ignore[arg-type]
    return verification


def _trained(source: Source, ids: torch.Tensor, notes: list[str]) -> torch.Tensor:
    """Logits of the model as it trained, which a fresh model with the merged weights must have, too.

    Raises:
        RuntimeError: if that has others: a layer is not used as its weight alone says.
    """
    trained, merged = trained_logits(source, ids, notes), written_logits(source, ids)
    difference = logit_difference(trained, merged)
    if not agree(difference, trained, TRANSFORMERS.largest_kl, TRANSFORMERS.largest_difference):
        raise RuntimeError(
            f"the model with its adapter merged is not the model that trained ({difference}), so no file can be: it "
            "uses a layer otherwise than by its weight (a hook, a parent that reads the weight, or a module that was "
            "replaced); leave that layer out of target_modules, and train again."
        )
    return trained


def _rounded_logits(
    source: Source, target: Format, outline: Outline, ids: torch.Tensor, exact: bool
) -> dict[str, torch.Tensor]:
    """Logits of what is written, where it is rounded, and in each engine's own arithmetic, where it has one."""
    read: Reader = partial(_as_written, source, target, outline, [])
    logits = {} if exact else {WRITTEN: written_logits(source, ids, read)}
    for engine in target.engines:
        gelu = engine.gelu if gelus(source.model) else None
        if gelu is not None or engine.dense_dtype not in (None, outline.dtype):
            own = partial(_with_dense_dtype, read, engine.dense_dtype)
            logits[engine.name] = written_logits(source, ids, own, gelu)
    return logits


def _with_dense_dtype(
    read: Reader, dtype: torch.dtype | None, names: Iterable[str]
) -> Iterator[tuple[TensorInfo, torch.Tensor | QuantizedWeight]]:
    """What `read` gives, tensors without codes rounded to a dtype, if any."""
    for tensor, value in read(names):
        if dtype is not None and isinstance(value, torch.Tensor) and value.is_floating_point():
            value = value.to(dtype)
        yield tensor, value


def _keep_unproven(folder: Path, output: Path, manifest: Manifest, verification: Verification) -> NoReturn:
    """Put files that an engine does not run as it should beside `output`, with what it found.

    Raises:
        RuntimeError: always; says where they are.
    """
    (folder / REPORT).write_text(f"{verification}\n", encoding="utf-8")
    manifest.save(folder)
    kept = keep_unproven(folder, output)
    wanted = "trained one" if manifest.exact else "trained one rounded for the format"
    raise RuntimeError(
        f"an engine does not find the {wanted} in the exported model:\n{verification}\nThe files are kept in {kept}, "
        f"this report in its {REPORT}. verify=False exports without asking an engine."
    )


def _write(source: Source, target: Format, outline: Outline, folder: Path, notes: list[str]) -> list[str]:
    """Write all tensors, and the config that names them; returns the tensors that their dtype has rounded."""
    rounded: list[str] = []
    with target.writing(folder, outline, notes) as add:
        written = _as_written(source, target, outline, rounded)
        for tensor, value in progress_bar(written, desc=f"writing {target.name}", total=len(outline.tensors)):
            add(tensor, value)
    for name, content in target.json_files(outline).items():
        write_json(folder / name, content)
    return rounded


def _as_written(
    source: Source, target: Format, outline: Outline, rounded: list[str], names: Iterable[str] | None = None
) -> Iterator[tuple[TensorInfo, torch.Tensor | QuantizedWeight]]:
    """As `Source.read`, with the numbers that the file has; `rounded` gets the names of what is not the source's.

    How the format packs, names and orders them has no part in it: an engine that finds the same logits has found all
    that in order.
    """
    grids = target.grids(outline)
    for tensor, value in source.read(names):
        if isinstance(value, QuantizedWeight):
            value = target.fit(tensor, value, grids[tensor.name])
        if isinstance(value, torch.Tensor):
            exact, value = value, target.rounded(outline, tensor, value)
            lost = exact.isfinite() & ~value.isfinite()
            if lost.any():
                raise ValueError(
                    f"{tensor.name}: {exact[lost][0].item():.6g} is too large for "
                    f"{target.dense_type(outline, tensor)}, in which it would be written; pass "
                    f"{outline.setting(tensor)[0]}='bfloat16' or 'float32'."
                )
            wide = torch.promote_types(value.dtype, exact.dtype)
            if not torch.equal(value.to(wide), exact.to(wide)):
                rounded.append(tensor.name)
        yield tensor, value


def _manifest(source: Source, target: Format, outline: Outline, rounded: list[str], notes: list[str]) -> Manifest:
    """What has been written."""
    rows = Counter(
        (describe(grid), target.stored_as(grid, outline.dtype)[0], describe(outline.adapted[name]))
        for name, grid in target.grids(outline).items()
    )
    return Manifest(
        format=target.name,
        base=Path(source.base).name if Path(source.base).is_dir() else source.base,
        grids=[
            {"grid": grid, "stored": stored, "trained": trained, "weights": count}
            for (grid, stored, trained), count in rows.items()
        ],
        exact=not rounded,
        rounded=rounded,
        dense_linears=source.untouched_linears,
        modules_to_save=source.modules_to_save,
        notes=notes,
    )


def _report(
    target: Format,
    outline: Outline,
    output: Path,
    manifest: Manifest,
    verification: Verification | None,
) -> list[str]:
    """What the user is told: bits in and out, what is rounded or dense, and what the engines found."""
    expected = expected_file(target, outline)
    size = sum(path.stat().st_size for path in output.glob(target.files))
    advice = f"; {expected.advice}" if expected.advice else ""
    weights = sum(row["weights"] for row in manifest.grids)
    lines = [
        f"{target.name}, {megabytes(size)}: {weights} weights, trained at {outline.bits_per_weight:.2f} bits, are "
        f"stored as {expected.stored} at {expected.bits_per_weight:.2f}{advice}"
    ]
    if manifest.rounded:
        lines.append(f"{len(manifest.rounded)} dense tensors rounded: {folded(manifest.rounded)}")
    for what, names in (("linear layers", manifest.dense_linears), ("modules_to_save", manifest.modules_to_save)):
        if names:
            lines.append(f"kept dense, {what}: {folded(names)}")
    lines += manifest.notes
    if verification is not None:
        return [*lines, str(verification)]
    return lines if manifest.loss is None else [*lines, f"rounded for the format: {LogitDifference(**manifest.loss)}"]


def _companions(source: Source, folder: Path, tokenizer: Any, notes: list[str]) -> Path | None:
    """Put tokenizer, generation config and licence into the folder; returns the base model's folder."""
    beside = companion_folder(source.base, source.adapter.revision)
    copied = copy_companions(beside, folder, tokenizer=tokenizer is None) if beside is not None else []
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    elif source.origin is None and not any(name.startswith(("tokenizer", "vocab")) for name in copied):
        notes.append("the base model has no tokenizer beside it; pass tokenizer=... to have one in the export")
    generation = getattr(source.model, "generation_config", None)
    if generation is not None and "generation_config.json" not in copied:
        generation.save_pretrained(folder)
    return beside


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype that a user has written, if any."""
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(map(repr, _DTYPES))}.")
    return _DTYPES.get(name)


def _check_embeddings(embeddings: str | None, target: Format) -> None:
    """Refuse a type of embeddings and output head that the format is not written with."""
    if embeddings is None or embeddings in target.embedding_types:
        return
    if not target.embedding_types:
        raise ValueError(
            f"embeddings={embeddings!r} has no meaning in format={target.name!r}, whose dense tensors all have one "
            "dtype; leave it out, or use dtype=..."
        )
    raise ValueError(f"embeddings={embeddings!r} must be one of {', '.join(map(repr, target.embedding_types))}.")


def _check_base(source: Source) -> None:
    """Refuse a base model whose weights are not those that the adapter was trained on.

    Raises:
        ValueError: if the checksums differ. An adapter without them, of an older version, is not checked.
    """
    if others := source.on_other_weights:
        base = source.base or source.config.model_type
        raise ValueError(
            f"{len(others)} of {len(source.layers)} weights of the base model {base!r}, such as {others[0]}, are not "
            "those that the adapter was trained on: codes would be others; export the model as it was trained, or "
            "pass the folder or hub id of its base by base=..."
        )


def _check_copied(source: Source, output: Path, **given: Any) -> None:
    """Refuse what a copy of the file that the model was opened from cannot hold.

    Args:
        source: the model.
        output: where the copy goes.
        given: arguments of `export_model` on what the file has of its own; None where they were left out.

    Raises:
        ValueError: for types, which are the file's; or if a tensor without codes is not the file's any more.
    """
    assert source.origin is not None
    path, is_folder = source.origin.path, source.origin.is_folder
    for name, chosen in given.items():
        if chosen is not None and (is_folder or name != "tokenizer"):
            raise ValueError(
                f"{name}={shown(chosen)} has no meaning here: {path}, from which the model was opened, is written "
                f"again, with the types and files that it has; leave {name} out."
            )
    if is_folder and output.is_relative_to(path.resolve()):
        raise ValueError(f"out_dir={str(output)!r} lies in {path}, of which a copy is made; name a folder outside.")
    in_full = [tensor.name for tensor in source.tensors if tensor.name not in source.origin.names]
    for tensor, value in source.read(in_full):
        assert isinstance(value, torch.Tensor)
        if weight_checksum(value) != source.origin.checksums.get(tensor.name, 0):
            raise ValueError(
                f"{tensor.name} is no longer as the file has it, which keeps its own: it was trained, or cast by "
                "model.to(); open the file in that dtype by load_quantized(dtype=...), or export another format."
            )


def _check_held(source: Source, target: Format) -> None:
    """Refuse weights that the format does not hold exactly, before anything is written.

    Raises:
        ValueError: naming what cannot be held, what to change, and the formats that hold all of it.
    """
    problems = _problems(source, target)
    if problems:
        lines = [f"{problem} ({len(names)} weights: {names[0]}, ...)" for problem, names in problems.items()]
        others = [repr(name) for name, other in FORMATS.items() if not _problems(source, other)]
        raise ValueError(f"{'; '.join(lines)}. Every weight is held by {', '.join(others)}.")


def _problems(source: Source, target: Format) -> dict[str, list[str]]:
    """Weights by why they are not held."""
    problems: dict[str, list[str]] = {}
    for tensor in source.tensors:
        if tensor.grid is not None and (problem := target.problem(tensor.grid, tensor.out_in, tensor.transposed)):
            problems.setdefault(problem, []).append(tensor.name)
    return problems


def _warn_if_unfinished(source: Source) -> None:
    """Warn of an adapter that was never trained, or never calibrated, saying what is exported then."""
    if source.untrained:
        what = "the base model rounded to nearest on its grid" if source.origin is None else "the file as it was"
        warnings.warn(
            f"adapter {source.adapter_name!r} was never trained (all that trains is as it started): what is "
            f"exported is {what}.",
            stacklevel=3,
        )
    elif not is_calibrated(source.layers.values(), source.adapter_name):
        warnings.warn(
            f"adapter {source.adapter_name!r} was never calibrated: it was trained on its initial scales and "
            f"zeros (init={source.adapter.init!r}); calibrate before training for better accuracy.",
            stacklevel=3,
        )
