"""The documentation is there, its links lead somewhere, and no file names a folder of somebody's machine."""

import dataclasses
import importlib
import inspect
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

PACKAGE = "peft_dlqat"
ROOT = Path(__file__).parents[2]

# Folders that hold no files of the project, for a copy of it that is not a checkout.
NOT_OURS = re.compile(r"\.git|\.?venv.*|build|dist|outputs|runs|__pycache__|\..*_cache|\.hypothesis|.*\.egg-info")

# [text](target) and ![text](target "title"), and [label]: target at the start of a line.
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)|^ {0,3}\[[^\]]+\]:\s*<?([^\s>]+)", re.MULTILINE)
CODE = re.compile(r"^( *)(```|~~~).*?^ *\2|`[^`\n]*`", re.MULTILINE | re.DOTALL)

# Written so that this file does not contain what it looks for. What comes before tells an absolute path from a part of
# a relative one or of an address.
LOCAL_PATH = re.compile(r"(?<![\w.~)}\]*-])/(?:work|root|home|tmp)" + "/")


def docstring_problems(module) -> list[str]:
    """Lists the public functions and classes whose docstring is missing or lacks its arguments.

    Args:
        module: Anything with an `__all__`.
    """
    messages = []
    for name in module.__all__:
        thing = getattr(module, name)
        if not (inspect.isclass(thing) or inspect.isroutine(thing)):
            continue
        doc = thing.__doc__ or ""
        # dataclass writes the signature as the docstring of a class that has none.
        if not doc.strip() or (dataclasses.is_dataclass(thing) and doc.startswith(f"{name}(")):
            messages.append(f"{name} has no docstring")
        elif inspect.isclass(thing) or not inspect.signature(thing).parameters:
            continue
        elif not re.search(r"^\s*Args:\s*$", doc, re.MULTILINE):
            messages.append(f'{name} has parameters, and its docstring has no "Args:" section')
    return messages


def broken_links(page: Path) -> list[str]:
    """Lists the relative links of a Markdown page that lead to no file.

    Args:
        page: The page.
    """
    # Code is blanked out, not cut, so that a link across it is not put together.
    text = CODE.sub(" code ", page.read_text(encoding="utf-8"))
    targets = [first or second for first, second in LINK.findall(text)]
    broken = []
    for target in targets:
        path = target.split("#")[0].split("?")[0]
        if not path or re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", target):
            continue
        if path.startswith("/") or not (page.parent / path).exists():
            broken.append(f"{page.name}: {target} does not exist")
    return broken


def project_files(root: Path) -> list[Path]:
    """Lists the files that git tracks or, where it tracks none (an unpacked archive), all files of the project.

    Args:
        root: The project's folder.
    """
    if (root / ".git").exists():
        listing = subprocess.run(
            ["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=False
        ).stdout
        tracked = [root / name for name in listing.split("\0") if name and (root / name).is_file()]
        if tracked:
            return tracked
    files = []
    for path in sorted(root.iterdir()):
        if NOT_OURS.fullmatch(path.name):
            continue
        files += project_files(path) if path.is_dir() else [path]
    return files


def local_paths(path: Path) -> list[str]:
    """Lists the lines of a text file that contain an absolute path of a particular machine.

    Args:
        path: The file; one that is not UTF-8 text has no lines.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        return []
    return [f"{path.name}:{number}: {line.strip()}" for number, line in enumerate(lines, 1) if LOCAL_PATH.search(line)]


def test_public_names_are_documented():
    module = importlib.import_module(PACKAGE)
    assert module.__all__
    assert not docstring_problems(module), "\n".join(docstring_problems(module))


def test_links_lead_to_files():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    broken = [message for page in pages for message in broken_links(page)]
    assert not broken, "\n".join(broken)


def test_the_formula_is_the_modules():
    page = (ROOT / "docs" / "formula.md").read_text(encoding="utf-8")
    shown = page.split("<!-- naive.py -->\n```python\n")[1].split("```\n<!-- /naive.py -->")[0]
    assert shown == (ROOT / "src" / PACKAGE / "quant" / "naive.py").read_text(encoding="utf-8")


def test_the_public_names_are_listed():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"`(\w+)`", page.split("text below:")[1].split("```")[0])
    assert sorted(listed) == sorted(importlib.import_module(PACKAGE).__all__)


def test_no_local_paths():
    files = project_files(ROOT)
    assert files
    found = [f"{path.relative_to(ROOT).parent}/{message}" for path in files for message in local_paths(path)]
    assert not found, "\n".join(found)


def test_missing_docstrings_are_found():
    def bare(x): ...

    def no_args(x):
        """Does it."""

    def good(x):
        """Does it.

        Args:
            x: What it is done to.
        """

    def no_parameters():
        """Does it."""

    class Undocumented: ...

    @dataclasses.dataclass
    class Generated:
        x: int

    class Documented:
        """A thing."""

    things = [bare, no_args, good, no_parameters, Undocumented, Generated, Documented]
    module = SimpleNamespace(
        __all__=[thing.__name__ for thing in things] + ["number"],
        number=3,
        **{thing.__name__: thing for thing in things},
    )
    assert [message.split()[0] for message in docstring_problems(module)] == [
        "bare",
        "no_args",
        "Undocumented",
        "Generated",
    ]


@pytest.mark.parametrize(
    ("text", "is_broken"),
    [
        ("[a](there.md)", False),
        ("[a](there.md#part)", False),
        ("[a](#part)", False),
        ("[a](https://example.org/gone.md)", False),
        ("`[a](gone.md)`", False),
        ("```\n[a](gone.md)\n```\n", False),
        ("[a](gone.md)", True),
        ("![a](gone.png 'title')", True),
        ("[a](/there.md)", True),
        ("[a]: gone.md", True),
        ("```\ncode\n```\n[a](gone.md)\n```\ncode\n```\n", True),
        ("[![a](there.md)](gone.md)", True),
    ],
)
def test_broken_links_are_found(tmp_path, text, is_broken):
    (tmp_path / "there.md").write_text("")
    (tmp_path / "page.md").write_text(text)
    assert bool(broken_links(tmp_path / "page.md")) is is_broken


@pytest.mark.parametrize(
    ("text", "is_local"),
    [
        ("cd {}work/main", True),
        ('path = "{}home/me/data"', True),
        ("file://{}tmp/x", True),
        ("--out={}tmp/x", True),
        ("see https://example.org{}home/page", False),
        ("examples{}work/file", False),
        (".{}tmp/x", False),
        ("{}usr/bin/env bash", False),
    ],
)
def test_local_paths_are_found(tmp_path, text, is_local):
    (tmp_path / "file.txt").write_text(text.format("/"))
    assert bool(local_paths(tmp_path / "file.txt")) is is_local
    assert [path.name for path in project_files(tmp_path)] == ["file.txt"]
