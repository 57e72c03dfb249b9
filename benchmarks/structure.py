"""How much there is of the project, and how far one forward pass goes through it: prints a Markdown table.

    python benchmarks/structure.py [--root CHECKOUT]                              # this checkout
    PYTHONPATH=OTHER/src python benchmarks/structure.py --root OTHER --name before  # another, to compare

Rooms are what lies directly below the package; an arrow is that one room imports another. The forward pass is that of
one layer of 64 x 64, eager, after two that warm it up: the package's own frames are counted, and for PEFT's LoRA and
DoRA those of peft. Host time is the thread's own, of one token, so that what the arithmetic takes does not count much;
the layer and LoRA's take turns, and the median of the ratios is given.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGE = "peft_dlqat"
PARTS = {"src": ("*.py",), "tests": ("*.py",), "benchmarks": ("*.py", "*.sh", "*.cpp"), "docs": ("*.md",)}
WIDTH, REPETITIONS = 64, 2000


def files_of(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Without what Python and tools leave there."""
    found = {path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}
    return sorted(path for path in found if not any(part in ("__pycache__", "outputs") for part in path.parts))


def sizes(root: Path) -> dict[str, str]:
    """Files, and lines as `wc -l` counts them."""
    rows = {}
    for part, patterns in PARTS.items():
        files = files_of(root / part, patterns)
        lines = sum(path.read_bytes().count(b"\n") for path in files)
        rows[f"{part}: files, lines"] = f"{len(files)}, {lines:,}"
    rows["benchmarks: result files"] = str(len(files_of(root / "benchmarks" / "results", ["*"])))
    return rows


def imports_of(path: Path, module: str, modules: set[str], at_import: bool) -> set[str]:
    """Modules of the package that a module imports: anywhere, or only those imported with it."""
    found: set[str] = set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if at_import and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if at_import and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = ".".join(package.split(".")[: len(package.split(".")) + 1 - child.level]) if child.level else ""
                source = ".".join(filter(None, (base, child.module)))
                found.update(f"{source}.{a.name}" if f"{source}.{a.name}" in modules else source for a in child.names)
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return (found & modules) - {module}


def graph(root: Path, at_import: bool) -> dict[str, set[str]]:
    """What each module of the package imports of it."""
    source = root / "src"
    paths = {}
    for path in files_of(source / PACKAGE, ["*.py"]):
        parts = path.relative_to(source).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {module: imports_of(path, module, set(paths), at_import) for module, path in paths.items()}


def longest_chain(imports: dict[str, set[str]]) -> list[str]:
    """The most modules that import one another in a row."""
    known: dict[str, list[str]] = {}

    def chain(module: str, above: tuple[str, ...]) -> list[str]:
        if module in above:
            raise SystemExit(f"modules import one another in a circle: {' -> '.join([*above, module])}")
        if module not in known:
            below = [chain(other, (*above, module)) for other in imports[module]]
            known[module] = [module, *max(below, key=len, default=[])]
        return known[module]

    return max((chain(module, ()) for module in imports), key=len)


def rooms(root: Path) -> dict[str, str]:
    """Of the import graph."""

    def room(module: str) -> str:
        return module.split(".")[1] if "." in module else ""

    arrows = {(room(a), room(b)) for a, others in graph(root, at_import=False).items() for b in others}
    between = {(a, b) for a, b in arrows if a and b and a != b}
    below = {
        path for path in (root / "src" / PACKAGE).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    chain = longest_chain(graph(root, at_import=True))
    return {
        "public names": str(len(importlib.import_module(PACKAGE).__all__)),
        "rooms, arrows": f"{len(below) - 1}, {len(between)}",  # less the package's own __init__
        "longest import chain": str(len(chain)),
    }


def adapted(kind: str) -> tuple[Any, Any]:
    """One layer with its adapter, and an input of one token."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH))
    if kind == "DL-QAT":
        config = importlib.import_module(PACKAGE).DLQATConfig(target_modules=["0"], group_size=32)
    else:
        config = LoraConfig(target_modules=["0"], use_dora=kind == "DoRA")
    with contextlib.redirect_stdout(None):  # what it says of the model is no figure
        layer = get_peft_model(base, config).base_model.model[0]
    return layer.train(), torch.randn(1, WIDTH, requires_grad=True)


def trace(kind: str, grad: bool) -> str:
    """Files, functions and changes of file of a forward pass."""
    import peft
    import torch

    own = importlib.import_module(PACKAGE) if kind == "DL-QAT" else peft
    folder = str(Path(str(own.__file__)).resolve().parent)
    layer, x = adapted(kind)
    calls: list[tuple[str, str, int]] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(folder):
            calls.append((code.co_filename, code.co_name, code.co_firstlineno))

    with torch.set_grad_enabled(grad):
        layer(x), layer(x)
        before = sys.gettrace()
        sys.settrace(note)
        try:
            layer(x)
        finally:
            sys.settrace(before)
    files = [call[0] for call in calls]
    changes = sum(a != b for a, b in pairwise(files))
    return f"{len(set(files))}, {len(set(calls))}, {changes}"


def host_time(backward: bool) -> str:
    """Median of the layer's time over LoRA's."""
    import torch

    def step(kind: str) -> Callable[[], None]:
        layer, x = adapted(kind)
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]

        def run() -> None:
            if not backward:
                with torch.no_grad():
                    layer(x)
                return
            for tensor in (x, *trained):
                tensor.grad = None
            layer(x).sum().backward()

        return run

    torch.set_num_threads(1)
    steps, found = {kind: step(kind) for kind in ("DL-QAT", "LoRA")}, []
    for i in range(REPETITIONS + 50):
        times = {}
        for kind in list(steps) if i % 2 else reversed(list(steps)):
            started = time.thread_time_ns()
            steps[kind]()
            times[kind] = time.thread_time_ns() - started
        found.append((times["DL-QAT"], times["LoRA"]))
    found = found[50:]
    microseconds = (statistics.median(times[i] for times in found) / 1e3 for i in (0, 1))
    ratio = statistics.median(own / lora for own, lora in found)
    return f"{ratio:.2f} ({' / '.join(f'{value:.0f}' for value in microseconds)} us)"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="the checkout")
    parser.add_argument("--name", default="now", help="heading of the column")
    args = parser.parse_args()
    root = args.root.resolve()
    package = Path(str(importlib.import_module(PACKAGE).__file__)).resolve()
    if not package.is_relative_to(root):
        raise SystemExit(f"{PACKAGE} is imported from {package.parent}: set PYTHONPATH={root / 'src'}")
    warnings.simplefilter("ignore")
    rows = {**sizes(root), **rooms(root)}
    for grad in (False, True):
        for kind in ("DL-QAT", "LoRA", "DoRA"):
            rows[f"{kind}, forward {'with' if grad else 'without'} grad: files, functions, changes of file"] = trace(
                kind, grad
            )
    for backward in (False, True):
        rows[f"host time of forward{' and backward' if backward else ''} over LoRA's"] = host_time(backward)
    print(f"| | {args.name} |\n|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), sep="\n")


if __name__ == "__main__":
    main()
