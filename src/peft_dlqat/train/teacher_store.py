"""Where a teacher's predictions are kept on disk, and what tells one teacher from another."""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..files import save_tensors
from ..layer import DLQATLayer
from ..messages import cut, shown
from ..placement import check_whole, loaded
from ..running import adapter_parameters, unwrapped

Entry = dict[str, torch.Tensor]

_HEADER, _CHECKSUM = "teacher.json", "blake2b"
# Values of each weight that go into a fingerprint: training moves nearly all of them.
_SAMPLES = 64
# What a config's fields are called that change the logits and leave the weights as they are. No others: new releases
# of transformers add fields.
_COMPUTES = re.compile(
    "model_type|head|expert|top_?k|rope|rotary|scal|window|layer_types|act|norm|residual|softcap|multiplier|eps|alibi|causal"
)


class EntryMemory:
    """Entries by key, in memory, up to a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._entries: dict[str, Entry] = {}
        self._left = self._most = max_bytes
        self._full = False

    def get(self, key: str) -> Entry | None:
        """The entry, or None if there is none."""
        return self._entries.get(key)

    def __setitem__(self, key: str, entry: Entry) -> None:
        """Keep an entry where there is room for it; one that was kept stays."""
        size = sum(tensor.nbytes for tensor in entry.values())
        if size <= self._left:
            self._entries[key] = entry
            self._left -= size
        elif not self._full:
            self._full = True
            tokens = len(next(iter(entry.values())))
            warnings.warn(
                f"the teacher's cache is full: {len(self._entries)} sequences take {self._most - self._left:,} of "
                f"max_bytes={self._most:,}, {size // tokens:,} bytes a token; the teacher runs anew for the others. "
                "Keep the likeliest tokens only, TeacherCache(k=64), or use the disk, TeacherCache(folder=...).",
                stacklevel=2,
            )


class EntryFolder:
    """Entries by key, each a safetensors file, with the methods of [`EntryMemory`]; to be claimed first.

    A file appears under its name when it is whole, so a writer may be killed at any time (what it leaves then are
    files whose names begin with a dot: `find FOLDER -name ".*.safetensors.*" -delete` while no run goes on), and
    several processes may share the folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._owner = ""

    def get(self, key: str) -> Entry | None:
        """The entry, or None if there is none, its file cannot be read, or is not as it was written for this key."""
        try:
            with safe_open(self._path(key), framework="pt") as file:
                entry = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
                checksum = (file.metadata() or {}).get(_CHECKSUM)
        except (FileNotFoundError, SafetensorError):
            return None
        return entry if checksum == self._checksum(key, entry) else None

    def __setitem__(self, key: str, entry: Entry) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        checksum = {_CHECKSUM: self._checksum(key, entry)}
        write_whole(path, lambda temporary: save_tensors(entry, temporary, checksum))

    def _checksum(self, key: str, entry: Entry) -> str:
        """Of an entry, the sequence that it is of, and the folder's header."""
        digest = hashlib.blake2b(f"{self._owner} {key}".encode(), digest_size=20)
        for name in sorted(entry):
            digest.update(f"{name} {entry[name].dtype} {list(entry[name].shape)}".encode())
            digest.update(entry[name].reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def claim(self, k: int | None, fingerprint: str) -> None:
        """Say whose predictions the folder holds, or check it.

        Raises:
            ValueError: if it holds those of another model, another k, or cannot be read.
        """
        header = {"k": k, "teacher": fingerprint}
        self._owner = json.dumps(header)
        path = self.folder / _HEADER
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(
                path, lambda temporary: temporary.write_text(json.dumps(header), encoding="utf-8"), put=_put_if_new
            )
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            found_k, found_fingerprint = found["k"], found["teacher"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read ({cut(error)}); remove the folder, or use another.") from error
        if found_k != k:
            raise ValueError(
                f"{self.folder} was filled with k={shown(found_k)}, not k={k}; use that, or another folder."
            )
        if found_fingerprint != fingerprint:
            raise ValueError(
                f"{self.folder} holds the predictions of another base model, or of this one in another dtype or with "
                "another config; use another folder."
            )

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def _put_if_new(temporary: Path, path: Path) -> None:
    """Give a file its name unless another process was first."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.replace(temporary, path)


def write_whole(path: Path, write: Callable[[Path], object], put: Callable[[Path, Path], object] = os.replace) -> None:
    """Write a file so that it is never seen in part."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write(temporary)
        put(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@torch.no_grad()
def base_fingerprint(model: nn.Module) -> str:
    """A hash of the base model under the adapters: its config, and shape, dtype and some values of each weight.

    The same whether an adapter is wrapped around it or injected, merged or not, and whichever layers it adapts.

    Raises:
        ValueError: if FSDP2 shards it.
    """
    model = unwrapped(model)
    seen = adapter_parameters(model)
    layers = {id(module.get_base_layer()): module for module in model.modules() if isinstance(module, DLQATLayer)}
    digest = hashlib.blake2b(_what_computes(model).encode(), digest_size=20)
    for module in model.modules():
        own = {name: parameter for name, parameter in module.named_parameters(recurse=False) if parameter.numel()}
        new = [name for name, parameter in own.items() if id(parameter) not in seen]
        seen.update(map(id, own.values()))
        with loaded(module):
            layer = layers.get(id(module))
            for name in new:
                parameter = getattr(module, name)
                check_whole(parameter)
                values = parameter.detach()
                if layer is not None and name == "weight":  # perhaps merged
                    original = layer.frozen.original()
                    values = original.t() if layer.frozen.fan_in_fan_out else original
                values = values.reshape(-1)
                # Integers: float32 cannot tell the last two indices of 2**24 values apart.
                sample = values[torch.arange(_SAMPLES, device=values.device) * (len(values) - 1) // (_SAMPLES - 1)]
                digest.update(f"{list(parameter.shape)} {parameter.dtype}".encode())
                digest.update(sample.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _what_computes(model: nn.Module) -> str:
    """What of the config changes the logits; rope scaling, say, is in no weight."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return ""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    known = {key: value for key, value in text.to_dict().items() if _COMPUTES.search(key)}
    return json.dumps(known, sort_keys=True, default=str)
