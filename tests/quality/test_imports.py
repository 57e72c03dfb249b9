"""Imports inside the package point one way: a module imports only modules below it."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "peft_dlqat"

# Floors, from the lowest to the highest. A sub-package, such as quant, is one: what happens inside it is its own
# affair. `__init__` stands above all and may import any of them.
ORDER = [
    "files",
    "console",
    "module_names",
    "messages",
    "regexes",
    "quant",
    "formats",
    "methods",
    "hub",
    "layer_spec",
    "lora_arguments",
    "config",
    "placement",
    "float32",
    "deferred",
    "file_layers",
    "frozen",
    "record",
    "kept_weight",
    "layer",
    "contents",
    "summary",
    "places",
    "targets",
    "base_weights",
    "adapter_file",
    "model",
    "packing",
    "running",
    "decoder",
    "train",
    "large",
    "evaluate",
    "export",
    "cli",
    "__main__",
]


def imports(path, root):
    """(line, dotted name as a list) of all that a module imports when it runs, in functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    package = path.relative_to(root.parent).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = node.module.split(".") if node.module else []
            yield from ((node.lineno, [*start, *module, alias.name]) for alias in node.names)


def upward(root, order):
    """The imports of a floor above, or of the package itself."""
    for path in sorted(root.rglob("*.py")):
        floor = path.relative_to(root).with_suffix("").parts[0]
        for line, (package, *rest) in imports(path, root) if floor != "__init__" else ():
            if package == root.name and not {*rest[:1]} & {*order[: order.index(floor) + 1]}:
                yield f"{path.relative_to(root)}:{line}: {'.'.join([package, *rest])}"


def test_imports_point_one_way():
    floors = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert floors - {"__init__"} == set(ORDER)
    assert list(upward(SOURCE, ORDER)) == []


ONLY_TYPES = "if TYPE_CHECKING:\n    from pkg.high import x"


@pytest.mark.parametrize("text", ["from pkg.low import x", "from ..low import x", "from . import other", ONLY_TYPES])
def test_imports_of_floors_below_are_fine(text, tmp_path):
    assert list(upward(package(tmp_path, text), ["low", "mid", "high"])) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pkg.high",
        "from pkg.high import x",
        "from pkg import high",
        "from ..high import x",
        "from .. import low, high",
        "import pkg",
        "from pkg import x",
        "def f():\n    from ..high import x",
    ],
)
def test_imports_of_a_floor_above_are_found(text, tmp_path):
    (found,) = upward(package(tmp_path, text), ["low", "mid", "high"])
    assert found.startswith("mid/b.py:")


def package(folder, text):
    root = folder / "pkg"
    (root / "mid").mkdir(parents=True)
    for name, content in {"__init__": "from .high import x", "low": "", "high": "", "mid/b": text}.items():
        (root / f"{name}.py").write_text(content)
    return root
