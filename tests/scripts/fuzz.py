"""Files from strangers: hostile configs, adapters, manifests, shards and cache entries, made at random.

Each case spoils what was good, and uses it. Either it is refused as `ALLOWED` says, or it loads, and then the model is
the one of the files: its adapter's tensors are the file's, the base's are the base's, and all logits are numbers.

    python tests/scripts/fuzz.py --seconds 600 --seed 1
    python tests/scripts/fuzz.py --seed 1 --case 1234     # one case again, with its traceback

Prints how many cases of each kind loaded and were refused, and the tracebacks of those that did neither; exits with 1
if there are any. A case that takes more than 30 seconds ends the process with a traceback; one that takes 2 GiB fails.
"""

from __future__ import annotations

import argparse
import collections
import copy
import faulthandler
import itertools
import json
import os
import random
import re
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load, load_file, save
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from peft_dlqat import DLQATConfig, TeacherCache, export_model, regexes, verify_export
from peft_dlqat.export.manifest import MANIFEST, REFERENCE
from peft_dlqat.large.checkpoint import Checkpoint, empty_model
from peft_dlqat.layer import DLQATLayer

LIMIT_SECONDS, LIMIT_BYTES = 30, 2 * 2**30
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SETTINGS = {"group_size": 16, "r": 2, "init": "minmax", "target_modules": ["q_proj", "down_proj"]}
IDS = torch.arange(3, 15).view(2, 6)


class Wrong(AssertionError):
    """What was loaded is not what the file says."""


def deep(kind: str, depth: int = 3000) -> Any:
    """Lists or dicts inside each other."""
    value: Any = 0
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


REGEXES = [
    "(a+)+$", "(.*)*x", "(.|.)*y$", r"([a-z_.]+)*\d", "(a|a)" * 40 + "b", "a?" * 40 + "a" * 40, ".*" * 12 + "!",
    "(", "[", "(?i)q_proj", r"(x)\1", "(?P<idx>q)", "a{99999999999}", "(" * 3000 + ")" * 3000, "q_proj", "*",
    r".*\.(q|v)_proj", "(?#", "(?(1)a|b)", r"\Z", "", "(?:(?:a{1,999}){1,999}){1,999}", "q_proj|", "(?=(.*.*)*!)",
]  # fmt: skip
# Values that no field wants, or that one field wants where another is.
HOSTILE: list[Callable[[], Any]] = [
    *(lambda value=value: value for value in [
        None, True, False, 0, 1, -1, 2, 3, 8, 10**7, 2**31, 2**63, -(2**70), 10**400,
        0.0, -0.5, 1e-320, 1e300, float("nan"), float("inf"),
        "", "q_proj", "all-linear", "int9", "int8", "3", "\0", "\ud800", "../../etc/passwd", "/etc/passwd", "float32",
        "float8_e4m3fn", "nn", "CAUSAL_LM", "LORA", "DLQAT", "k_quant",
        [], [None], [1], ["q_proj"], [["q_proj"]], ["gguf"],
        {}, {"q_proj": 3}, {"q_proj": "3"}, {"": 1}, {"q_proj": None}, {"q_proj": 10**7},
        {"base": None}, {"calibration": {}}, {"storage": "int4"}, {"base": {"checksum": 3}},
        {"base": {"checksum": "x", "dtype": "load"}},
    ]),
    *(lambda regex=regex: regex for regex in REGEXES),
    *(lambda regex=regex: {regex: 3} for regex in REGEXES),
    *(lambda regex=regex: [regex] for regex in REGEXES),
    lambda: "x" * 10_000_000,
    lambda: ["a"] * 1_000_000,
    lambda: {str(i): i for i in range(3000)},
    lambda: deep("list"),
    lambda: deep("dict"),
    lambda: deep("list", 60),
]  # fmt: skip
DTYPES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "C64": 8,
    "X9": 4,
}


# Good files, of which each case gets a copy.


@cache
def base() -> LlamaForCausalLM:
    """A model of one layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def adapter(**settings: Any) -> PeftModel:
    """An adapter on it, whose tensors are no longer those that it began with."""
    config = DLQATConfig(
        **SETTINGS, task_type="CAUSAL_LM", **{k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    )
    model = get_peft_model(copy.deepcopy(base()), config)
    for name, parameter in model.named_parameters():
        if "dlqat_B" in name:
            parameter.data += 0.01 * torch.randn_like(parameter)
    return model.eval()


def good_files(room: Path) -> dict[str, Path]:
    """Folders of an adapter, one that trains more, an export, a checkpoint in shards, and a teacher's cache."""
    names = ("adapter", "more", "export", "shards", "cache")
    folders = {name: room / name for name in names}
    adapter().save_pretrained(folders["adapter"])
    adapter(modules_to_save=["lm_head"], zero_point="float", bias="all").save_pretrained(folders["more"])
    with redirect_stdout(None):
        export_model(adapter(), folders["export"], "dense", verify=False)
    base().save_pretrained(folders["shards"], max_shard_size="20KB")
    teacher(folders["cache"])
    return folders


@cache
def of_teacher() -> PeftModel:
    """Of which predictions are kept."""
    return adapter()


def teacher(folder: Path) -> torch.Tensor:
    """What a cache says of some tokens."""
    found = TeacherCache(k=4, folder=folder).teacher(of_teacher(), {"input_ids": IDS})
    return torch.cat([found.log_p.float(), found.ids.float()], -1)


# Spoiling


def spoilt_bytes(content: bytes, draw: random.Random) -> bytes:
    """Flipped, cut, longer, or another file's."""
    changed, kind = bytearray(content), draw.randrange(6)
    if kind == 0:
        return bytes(changed[: draw.randrange(len(changed) + 1)])
    if kind == 1:
        return content + draw.randbytes(draw.choice([1, 100, 10_000]))
    if kind == 2:
        return draw.choice([b"", b"\0", b"[]", b"3", b"null", b"\xff\xfe{", b"[" * 100_000, b'{"a":' * 100_000])
    start = draw.randrange(len(changed) or 1) if kind == 3 else draw.randrange(min(400, len(changed)) or 1)
    for _ in range(draw.choice([1, 1, 8])):
        if changed:
            changed[(start + draw.randrange(8)) % len(changed)] = draw.randrange(256)
    return bytes(changed)


def spoilt_json(value: Any, draw: random.Random) -> Any:
    """One to three of its values replaced, left out, renamed, or doubled."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        places = [(holder, key) for holder, key in places_in(value)]
        if not places:
            return draw.choice(HOSTILE)()
        holder, key = draw.choice(places)
        kind = draw.randrange(10)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[draw.choice(["cls", "self", "", "new_key", "files", "lora_dropout", "use_dora", "x" * 1000])] = (
                holder.pop(key)
            )
        else:
            holder[key] = draw.choice(HOSTILE)()
    return value


def places_in(value: Any) -> Iterator[tuple[Any, Any]]:
    """Where there are values: (dict or list, key or index); not far down."""
    level = [value]
    for _ in range(6):
        keyed = [(outer, key) for outer in level for key in first_keys(outer)][:500]
        yield from keyed
        level = [outer[key] for outer, key in keyed if isinstance(outer[key], dict | list)]


def first_keys(value: Any) -> list[Any]:
    """Keys or indices of a dict or list, not of a million."""
    return list(itertools.islice(value, 100)) if isinstance(value, dict) else list(range(min(len(value), 100)))


def dumped(value: Any) -> bytes:
    """As JSON: what Python itself cannot write for its depth or its digits, too."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b'{"record": ' + b"[" * 3000 + b"]" * 3000 + b"}"
    finally:
        sys.set_int_max_str_digits(limit)


def spoilt_tensors(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file: its header, or its tensors in a file that is whole."""
    length = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = draw.choice([key for key in header if key != "__metadata__"])
    kind = draw.randrange(7)
    if kind == 0:
        header = spoilt_json(header, draw)
    elif kind == 1:  # another type of as many bytes, so that the file is whole
        entry = header[name]
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        dtype = draw.choice(sorted(DTYPES))
        header[name] = {**entry, "dtype": dtype, "shape": [size // DTYPES[dtype]]}
    elif kind == 2:
        header[draw.choice([name + ".x", "model.norm.weight", name.replace("q_proj", "k_proj"), "a.dlqat_A", ""])] = (
            header.pop(name)
        )
    else:
        return whole_tensors(content, name, draw)
    text = dumped(header)
    return struct.pack("<Q", draw.choice([len(text)] * 8 + [2**40, 0])) + text + body


def whole_tensors(content: bytes, name: str, draw: random.Random) -> bytes:
    """A good file of bad tensors."""
    tensors = load(content)
    value = tensors[name]
    change: Callable[[], torch.Tensor] = draw.choice([
        lambda: value.to(draw.choice([torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])),
        lambda: value.to(draw.choice([torch.int64, torch.bool, torch.bfloat16, torch.float64])),
        lambda: torch.full_like(value.float(), draw.choice([float("nan"), float("inf"), 0.0, -1.0, 1e30, 1e-40, 0.5])),
        lambda: value.reshape(-1)[: draw.randrange(value.numel() + 1)].clone(),
        lambda: value.reshape((*value.shape, 1)),
        lambda: torch.zeros(draw.choice([0, 1, 10_000_000])),
        lambda: torch.randn(value.shape),
    ])  # fmt: skip
    tensors[name] = change().contiguous()
    if draw.random() < 0.2:
        del tensors[draw.choice(sorted(tensors))]
    if draw.random() < 0.2:
        target = draw.choice(
            ["norm.weight", "embed_tokens.weight", "layers.0.self_attn.k_proj.weight", "layers.0.mlp.x"]
        )
        tensors[f"base_model.model.model.{target}"] = torch.full((32,), float("nan"))
    return save(tensors, metadata={"format": "pt"})


def spoil(file: Path, draw: random.Random) -> None:
    """Spoil a file as what it is, or as bytes."""
    content = file.read_bytes()
    if draw.random() < 0.25:
        file.write_bytes(spoilt_bytes(content, draw))
    elif file.suffix == ".json":
        file.write_bytes(dumped(spoilt_json(json.loads(content), draw)))
    else:
        file.write_bytes(spoilt_tensors(content, draw))


# Cases: each spoils files in its folder, and uses them. `refusable` says which errors may come of it.


def case_constructor(folder: Path, draw: random.Random) -> None:
    """DLQATConfig(...), and what it makes of a model."""
    names = [entry.name for entry in fields(DLQATConfig)] + ["lora_dropout", "use_dora", "init_lora_weights", "other"]
    given = {draw.choice(names): draw.choice(HOSTILE)() for _ in range(draw.choice([1, 1, 1, 2, 3]))}
    with refusable(ValueError, TypeError, says=[*given, "task type"]):
        config = DLQATConfig(**{**SETTINGS, **given})
        with refusable(ValueError, TypeError, says=[]):
            model = get_peft_model(copy.deepcopy(base()), config)
            check_finite(model)


def case_adapter(folder: Path, draw: random.Random) -> None:
    """A saved adapter."""
    for name in draw.choice([[CONFIG], [CONFIG], [WEIGHTS], [CONFIG, WEIGHTS]]):
        spoil(folder / name, draw)
    with refusable(ValueError, says=[str(folder)]):
        config = DLQATConfig.from_pretrained(str(folder))
        if not isinstance(config, DLQATConfig):
            return
        trains = {**vars(config)}
        # PEFT looks up the tensors of modules_to_save before anybody else sees the file, and what they are in a model.
        missing = (KeyError, TypeError) if trains["modules_to_save"] else ()
        with refusable(ValueError, *missing, says=[]):
            model = PeftModel.from_pretrained(
                copy.deepcopy(base()), str(folder), config=config, low_cpu_mem_usage=draw.random() < 0.3
            )
            check_loaded(model, load_file(folder / WEIGHTS), trains)


def case_transformers(folder: Path, draw: random.Random) -> None:
    """A saved adapter, loaded by transformers' own way: what it does not see, the first forward pass does."""
    spoil(folder / WEIGHTS, draw)
    trains = json.loads((folder / CONFIG).read_text())
    model = copy.deepcopy(base())
    try:
        model.load_adapter(str(folder), is_trainable=draw.random() < 0.5)
    except Exception as error:
        raise Refused from error  # by transformers
    # A module that trains in full keeps the file's dtype there, of which torch says that it is not its input's.
    theirs = (RuntimeError,) if trains["modules_to_save"] else ()
    with refusable(ValueError, *theirs, says=[]):
        check_loaded(model, load_file(folder / WEIGHTS), trains)


def case_manifest(folder: Path, draw: random.Random) -> None:
    """An exported folder; engines are asked at times only, since they take long."""
    spoil(folder / draw.choice([MANIFEST, MANIFEST, MANIFEST, REFERENCE, "model.safetensors"]), draw)
    if draw.random() < 0.2:
        (folder / "more.json").write_bytes(b"{}")
    with refusable(ValueError, says=[str(folder)]):
        content = (folder / MANIFEST).read_bytes()
        found = verify_export(folder, engines=None if draw.random() < 0.1 else [])
        str(found)
        manifest = json.loads(content)
        if (folder / "more.json").exists() and "more.json" not in (*found.added_files, *manifest.get("files", ())):
            raise Wrong("a file that was added is not reported")


def case_shards(folder: Path, draw: random.Random) -> None:
    """A base model's files."""
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    index = "model.safetensors.index.json"
    spoil(folder / draw.choice([index, index, *files]), draw)
    with refusable(ValueError, FileNotFoundError, says=[str(folder)]):
        model = empty_model(base().config)
        weights = Checkpoint(folder, model, DLQATConfig(bits=4))
        weights.load(model, weights.names)


def case_cache(folder: Path, draw: random.Random) -> None:
    """A teacher's predictions, which are then computed anew."""
    entries = sorted(folder.rglob("*.safetensors"))
    file = draw.choice([*entries, folder / "teacher.json"])
    if file.suffix == ".json" or draw.random() < 0.8:
        spoil(file, draw)
    else:
        file.write_bytes(draw.choice(entries).read_bytes())
    with refusable(ValueError, says=[str(folder)]):
        if not torch.equal(teacher(folder), expected_teacher()):
            raise Wrong("a spoilt entry was used")


CASES = {
    "constructor": (case_constructor, []),
    "adapter": (case_adapter, ["adapter", "more"]),
    "transformers": (case_transformers, ["adapter", "more"]),
    "manifest": (case_manifest, ["export"]),
    "shards": (case_shards, ["shards"]),
    "cache": (case_cache, ["cache"]),
}


class Refused(Exception):
    """The case was refused as it should be."""


@contextmanager
def refusable(*errors: type[Exception], says: list[str]) -> Iterator[None]:
    """The block may raise these, with one of some words in the message where there are any."""
    try:
        yield
    except errors as error:
        message = error.args[0] if error.args else ""
        if says and not any(word in str(message) for word in says):
            raise Wrong(f"{type(error).__name__} says none of {says}: {str(message)[:300]}") from error
        ours = "peft_dlqat" in traceback.extract_tb(error.__traceback__)[-1].filename
        if ours and len(str(message)) > 5000:
            raise Wrong(f"a message of {len(str(message))} characters") from error
        raise Refused from error


@cache
def expected_teacher() -> torch.Tensor:
    """Without files."""
    with tempfile.TemporaryDirectory() as folder:
        return teacher(Path(folder))


@torch.no_grad()
def check_finite(model: torch.nn.Module) -> None:
    if not torch.isfinite(model.eval()(input_ids=IDS).logits).all():
        raise Wrong("a logit is no number")


def check_loaded(model: torch.nn.Module, tensors: dict[str, torch.Tensor], trains: dict[str, Any]) -> None:
    """The adapter is the file's, the rest is the base's, and all logits are numbers."""
    if all(tensor.float().abs().max() < 1e20 for tensor in tensors.values() if tensor.numel()):
        check_finite(model)  # larger numbers are numbers, but their products may be none
    else:
        model(input_ids=IDS)
    prefix = "base_model.model."
    own = {key.removeprefix(prefix): tensor for key, tensor in model.state_dict().items()}
    for path, layer in model.named_modules():
        name = path.removeprefix(prefix)
        for kind in (*layer.adapter_layer_names, *layer.other_param_names) if isinstance(layer, DLQATLayer) else ():
            loaded = own.get(f"{name}.{kind}.default.weight", own.get(f"{name}.{kind}.default"))
            key = re.compile(rf"{prefix}{name}.{kind}(.weight)?")  # a dot is any character to transformers, too
            of_file = next((tensor for other, tensor in tensors.items() if key.fullmatch(other)), None)
            none = of_file is None and (loaded is None or kind == "dlqat_record")  # files had no record once
            if none or kind == "dlqat_spec":
                continue
            if loaded is None or of_file is None or not torch.equal(loaded, of_file.float()):
                raise Wrong(f"{name}.{kind} is not the file's")
    for name, parameter in base().named_parameters():
        module, _, leaf = name.rpartition(".")
        found = own.get(name, own.get(f"{module}.base_layer.{leaf}"))
        may_change = "lm_head" in name or "embed_tokens" in name or trains["modules_to_save"]
        if found is not None and not may_change and not torch.equal(found, parameter):
            raise Wrong(f"{name} of the base is another")


def run_case(number: int, seed: int, folders: dict[str, Path], room: Path) -> tuple[str, str]:
    """One case: its kind, and what came of it."""
    draw = random.Random(f"{seed} {number}")
    kind = draw.choice(["constructor", "adapter", "adapter", "transformers", "manifest", "shards", "cache"])
    case, names = CASES[kind]
    folder = room / "case"
    shutil.rmtree(folder, ignore_errors=True)
    if names:
        shutil.copytree(folders[draw.choice(names)], folder)
    torch.manual_seed(number)
    try:
        case(folder, draw)
    except Refused:
        return kind, "refused"
    return kind, "loaded"


def fuzz(
    seconds: float, seed: int, only: int | None = None, limit: bool = True
) -> tuple[dict[tuple[str, str], int], list[str]]:
    """Cases until the time is over: the numbers of those that loaded and were refused, and tracebacks of others."""
    failures: list[str] = []
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    with (
        tempfile.TemporaryDirectory() as name,
        warnings.catch_warnings(),
        mock.patch.object(regexes, "_SECONDS", 0.5),  # many are to be tried
    ):
        warnings.simplefilter("ignore")
        room = Path(name)
        folders = good_files(room)
        expected_teacher()
        if limit:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, resource.RLIM_INFINITY))
        end, number = time.monotonic() + seconds, 0 if only is None else only
        while time.monotonic() < end:
            faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True)
            try:
                counts[run_case(number, seed, folders, room)] += 1
            except Exception:
                failures.append(f"case {number} of seed {seed}:\n{traceback.format_exc()}")
            finally:
                faulthandler.cancel_dump_traceback_later()
            if only is not None:
                break
            number += 1
    logging.set_verbosity(verbosity)
    return dict(counts), failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int)
    options = parser.parse_args()
    counts, failures = fuzz(options.seconds, options.seed, options.case)
    print(*failures, sep="\n")
    for (kind, came), count in sorted(counts.items()):
        print(f"{kind:<12} {came:<8} {count:>7}")
    print(
        f"{sum(counts.values())} cases of seed {options.seed} in {options.seconds:g} seconds, {len(failures)} failed"
    )
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
