"""Imports inside the package point one way: a module imports only modules below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "peft_dlqat"
SOURCE = Path(__file__).parents[2] / "src" / PACKAGE

# From the lowest layer to the highest. A sub-package, such as quant, is one layer: what happens inside it is its own
# affair. `__init__` stands above all and may import any of them.
ORDER = [
    "quant",
    "formats",
    "methods",
    "adapter_card",
    "base_checksum",
    "config",
    "placement",
    "float32",
    "layer_spec",
    "frozen",
    "layer",
    "adapter_file",
    "model",
    "packing",
    "register",
    "running",
    "decoder",
    "train",
    "large",
    "evaluate",
    "export",
]


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yields a node and all below it, without what stands under `if TYPE_CHECKING:`.

    Such an import serves annotations only: nothing of it runs, so it makes no module depend on another.
    """
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        children = node.orelse
    else:
        yield node
        children = list(ast.iter_child_nodes(node))
    for child in children:
        yield from runtime_nodes(child)


def imported_modules(path: Path, root: Path) -> list[tuple[int, str]]:
    """Finds the package's own modules that a file imports when it runs, inside functions too.

    Args:
        path: The file to read.
        root: The package's folder.

    Returns:
        (line, layer) pairs. The layer is "" where the package's own `__init__` is imported from.
    """
    parts = path.relative_to(root).with_suffix("").parts
    # The package that a relative import of this file starts from, as parts below the root.
    here = list(parts[:-1])
    found = []
    for node in runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names = alias.name.split(".")
                if names[0] == root.name:
                    found.append((node.lineno, names[1] if len(names) > 1 else ""))
        elif isinstance(node, ast.ImportFrom):
            names = node.module.split(".") if node.module else []
            if node.level:
                names = here[: len(here) - node.level + 1] + names
            elif names[:1] == [root.name]:
                names = names[1:]
            else:
                continue
            if names:
                found.append((node.lineno, names[0]))
            else:  # `from peft_dlqat import x` or `from . import x`: x is a module or a name in __init__
                for alias in node.names:
                    is_module = (root / alias.name).is_dir() or (root / f"{alias.name}.py").is_file()
                    found.append((node.lineno, alias.name if is_module else ""))
    return found


def layers(root: Path) -> list[str]:
    """Lists the modules and sub-packages directly inside a package, without `__init__`."""
    modules = {path.stem for path in root.glob("*.py")} - {"__init__"}
    packages = {path.parent.name for path in root.glob("*/*.py")}
    return sorted(modules | packages)


def problems(root: Path, order: list[str]) -> list[str]:
    """Lists every way in which a package departs from the order, as messages.

    Args:
        root: The package's folder.
        order: Its layers, from the lowest to the highest.
    """
    messages = [
        f"{layer} has no place in the order of layers: put it into ORDER in {Path(__file__).name}, after every module "
        "that it imports and before every module that imports it"
        for layer in layers(root)
        if layer not in order
    ]
    for path in sorted(root.rglob("*.py")):
        layer = path.relative_to(root).with_suffix("").parts[0]
        if layer == "__init__" or layer not in order:
            continue
        for line, target in imported_modules(path, root):
            where = f"{path.relative_to(root)}:{line}"
            if target == "":
                messages.append(f"{where}: imports from {root.name} itself; import from the module that defines it")
            elif target != layer and target in order and order.index(target) > order.index(layer):
                messages.append(f"{where}: {layer} imports {target}, which is above it in ORDER")
            elif target != layer and target not in order and target not in layers(root):
                messages.append(f"{where}: imports {root.name}.{target}, which does not exist")
    return messages


def test_imports_point_one_way():
    assert layers(SOURCE), f"no modules in {SOURCE}"
    assert not problems(SOURCE, ORDER), "\n".join(problems(SOURCE, ORDER))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from pkg.low import x", None),
        ("from .low import x", None),
        ("from . import low", None),
        ("import pkg.mid.other", None),
        ("import os, torch.low", None),
        ("import pkg.high", "mid imports high"),
        ("from pkg.high import x", "mid imports high"),
        ("from pkg import high", "mid imports high"),
        ("from ..high import x", "mid imports high"),
        ("from .. import low, high", "mid imports high"),
        ("def f():\n    from ..high import x", "b.py:2: mid imports high"),
        ("if TYPE_CHECKING:\n    import pkg.high", None),
        ("if TYPE_CHECKING:\n    import pkg.low\nelse:\n    import pkg.high", "b.py:4: mid imports high"),
        ("if flag:\n    import pkg.high", "b.py:2: mid imports high"),
        ("from pkg import x", "imports from pkg itself"),
        ("import pkg", "imports from pkg itself"),
        ("from ..gone import x", "pkg.gone, which does not exist"),
    ],
)
def test_each_kind_of_import_is_judged(tmp_path, text, expected):
    root = tmp_path / "pkg"
    (root / "mid").mkdir(parents=True)
    for name in ("__init__", "low", "high", "mid/__init__", "mid/other"):
        (root / f"{name}.py").write_text("")
    (root / "__init__.py").write_text("from .high import x\n")
    # The forms with one dot mean the package itself only in a file directly in it.
    file = root / ("mid/b.py" if ".." in text or "pkg" in text or "os" in text else "low2.py")
    file.write_text(text + "\n")
    found = problems(root, ["low", "low2", "mid", "high"])
    if expected is None:
        assert not found
    else:
        assert len(found) == 1
        assert expected in found[0]


def test_module_without_a_place_is_reported(tmp_path):
    root = tmp_path / "pkg"
    root.mkdir()
    (root / "stray.py").write_text("")
    (message,) = problems(root, ["low"])
    assert "stray" in message
    assert "ORDER in test_imports.py" in message
