# SPDX-License-Identifier: Apache-2.0
"""Text for a small language model, taken from what every Python installation carries.

Two bodies of text, both read from the running interpreter's own standard library, without a download and without
importing any of the modules read:

* `docstrings`: the docstrings of the standard library, which `pretrain.py` trains the small model on;
* `topics`: the language reference that `help()` shows (`pydoc_data.topics`), left for fine-tuning.

The text differs slightly from one Python version to the next. `split` therefore decides by a hash of each text's
key, so that a text held out under one version is held out under the others.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
MIN_DOCSTRING = 40  # docstrings must be longer than this many characters
MAX_HEADING = 100  # signatures that would make a longer heading are shortened to "(...)"
MIN_REPEAT = 40  # paragraphs of at least this many characters are kept once by `chunks`
SALT = "3:"  # hashed before the key by `split`; with it about a tenth of the characters, not only of the keys, is out


def _heading(name: str, node: ast.AST) -> str:
    """The line above a docstring: the dotted name and, for a function, its arguments."""
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return name
    line = f"{name}({ast.unparse(node.args)})"
    return line if len(line) <= MAX_HEADING and "\n" not in line else f"{name}(...)"


def _walk(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yields (heading, docstring) of a module, class or function and of all that it defines, in source order."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        docstring = ast.get_docstring(node)
        if docstring:
            yield _heading(name, node), docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _walk(child, f"{name}.{child.name}")
        elif not isinstance(child, ast.expr):
            yield from _walk(child, name)  # definitions under if, try, with


def _clean(text: str) -> str:
    """Without trailing whitespace, carriage returns and characters that UTF-8 cannot hold."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return "\n".join(line.rstrip() for line in text.expandtabs().splitlines()).strip("\n")


def docstrings() -> dict[str, str]:
    """The docstrings of the standard library, by module name.

    A module's text is one entry per documented module, class or function, in source order: a line with the dotted
    name (with the arguments, for a function), then the docstring; entries are separated by a blank line. A docstring
    that occurs more than once is kept at its first place only, modules taken in alphabetical order.
    """
    root = Path(sysconfig.get_path("stdlib"))
    sources = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.isdisjoint(parts[:-1]) and not parts[0].startswith("config-"):
            sources[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    seen: set[str] = set()
    texts = {}
    for module, path in sorted(sources.items()):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in the parsed source
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        entries = []
        for heading, docstring in _walk(tree, module):
            docstring = _clean(docstring)
            if len(docstring) > MIN_DOCSTRING and docstring not in seen:
                seen.add(docstring)
                entries.append(f"{heading}\n{docstring}")
        if entries:
            texts[module] = "\n\n".join(entries)
    return texts


def topics() -> dict[str, str]:
    """The topics of the language reference, by topic name."""
    from pydoc_data.topics import topics as texts

    return {name: _clean(text) for name, text in sorted(texts.items())}


def chunks(texts: dict[str, str], size: int = 2000) -> dict[str, str]:
    """Cuts long texts at blank lines into chunks of about `size` characters, keyed "name/index".

    A chunk is longer than `size` only if it is a single paragraph.

    Many topics repeat parts of others word for word ("specialnames" holds "attribute-access", for example). Such a
    paragraph is kept at its first place only, so that no chunk held out by `split` can be read in a training chunk.
    """
    seen: set[str] = set()
    out = {}
    for name, text in sorted(texts.items()):
        groups: list[list[str]] = []
        length = 0
        for paragraph in text.split("\n\n"):
            words = " ".join(paragraph.split())
            if not words or (len(words) >= MIN_REPEAT and words in seen):
                continue
            seen.add(words)
            if not groups or length + len(paragraph) > size:
                groups.append([])
                length = 0
            groups[-1].append(paragraph.strip("\n"))
            length += len(paragraph) + 2
        for index, group in enumerate(groups):
            out[f"{name}/{index}"] = "\n\n".join(group)
    return out


def split(texts: dict[str, str]) -> tuple[list[str], list[str]]:
    """Splits texts into (train, heldout), about one key in ten held out, by a hash of the key alone."""
    train, heldout = [], []
    for key, text in sorted(texts.items()):
        bucket = int.from_bytes(hashlib.sha256((SALT + key).encode("utf-8")).digest()[:4], "big") % 10
        (heldout if bucket == 0 else train).append(text)
    return train, heldout


def token_stream(texts: list[str], tokenizer: Any) -> torch.LongTensor:
    """The tokens of all texts in one row, EOS between texts: [tokens]."""
    import torch

    ids: list[int] = []
    for text in texts:
        if ids:
            ids.append(tokenizer.eos_token_id)
        ids.extend(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
    return torch.tensor(ids, dtype=torch.long)


def token_blocks(texts: list[str], tokenizer: Any, length: int) -> torch.LongTensor:
    """The tokens of all texts, EOS between texts, cut in blocks: [n, length]. An incomplete last block is dropped."""
    stream = token_stream(texts, tokenizer)
    n = stream.numel() // length
    return stream[: n * length].view(n, length)
