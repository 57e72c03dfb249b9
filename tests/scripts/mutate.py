"""Mutants: one small mistake each in the arithmetic, the layer or a format, which the module's own tests must notice.

    python tests/scripts/mutate.py                                 a sample of all modules, in half an hour
    python tests/scripts/mutate.py quant/fit.py --mutants 9999     all of one module
    python tests/scripts/mutate.py --only "fit.py:35 "             of the same sample those whose line says so

torch, transformers and peft are imported once; each mutant is a fork that imports a copy of the package with one file
changed, and has so many `SECONDS` of processor time, so that a busy machine changes nothing. Exit status 1: one
survives that is not among `EQUIVALENT`.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "peft_dlqat"
ROOMS = ("quant/*.py", "formats/*.py", "methods.py", "layer_spec.py", "layer.py", "frozen.py")
MODULES = [str(path.relative_to(SOURCE)) for room in ROOMS for path in sorted(SOURCE.glob(room))]
MODULES = [module for module in MODULES if not module.endswith("__init__.py")]
SECONDS = 30
# Imported before the forks where a module's tests import them.
HEAVY = {"transformers", "peft", "trl", "gguf", "compressed_tensors", "triton"}

# Tests beside tests/ROOM/test_MODULE.py, of modules that others show at work.
TESTS = {
    "quant/dispatch.py": ["quant/test_triton_kernels.py"],
    "quant/fit.py": ["quant/test_quantizer.py", "quant/test_super_blocks.py"],
    "quant/fixed_point.py": ["test_frozen.py"],
    "quant/grid.py": ["quant/test_quantizer.py", "quant/test_super_blocks.py"],
    "quant/lowrank.py": ["quant/test_op.py"],
    "quant/nvidia.py": ["quant/test_triton_kernels.py"],
    "quant/quantizer.py": ["quant/test_op.py"],
    "quant/reference.py": ["quant/test_op.py"],
    "methods.py": ["test_layer.py"],
    "layer.py": ["test_foreign_bases.py"],
    "frozen.py": ["test_layer.py"],
    "formats/gguf_metadata.py": ["formats/test_gguf.py", "formats/test_gguf_checks.py"],
    "layer_spec.py": ["test_new_parts.py"],
    "formats/base.py": ["formats/test_new_format.py"],
    "formats/bit_stream.py": ["formats/test_gptq.py", "formats/test_mlx.py"],
    "formats/copied.py": ["large/test_folder_model.py"],
    "formats/layout.py": ["formats/test_gptq.py", "large/test_folder_model.py"],
    "formats/origin.py": ["formats/test_gguf_file.py", "formats/test_safetensors_folder.py"],
    "large/quantized_file.py": ["large/test_load_quantized.py", "large/test_folder_model.py"],
    "formats/engines.py": ["formats/test_dense.py", "formats/test_new_format.py"],
    "formats/gguf_blocks.py": ["formats/test_gguf.py"],
    "formats/tensor_files.py": ["formats/test_dense.py"],
}
# Names, functions and keywords in which no mistake is made, by reason.
LEFT_OUT = {
    name: reason
    for reason, names in {
        "so many at a time: the same bits in more or less time": "_PIECE _PIECE_ON_GPU _CHUNK _CHUNK_ON_GPU",
        "the shape of a tile: the same bits": "_TILE num_warps",
        "how long the search for scales is: better or worse by little": "_REFINEMENTS _CLIP_SHARES",
        "found by measuring a model: what is best, not what is right": "_UNIT _UPDATE _block_step_of_a",
        "runs in an environment of its own only, see make test-engines": "_gptqmodel",
        "on a GPU only": "enable_fp_fusion",
        "a check of the check": "strict",
        "a message": "warn stacklevel _cannot",
    }.items()
    for name in names.split()
}
# Survivors that are right, by what they change; the reason.
EQUIVALENT = {
    "quant/fit.py initialise: `1` -> `(2)`": "rows in a piece, at least: the same bits",
    "quant/fit.py snap: `scale < 0` -> `(scale <= 0)`": "a scale of 0 gets another value, whatever its sign",
    "quant/fixed_point.py Storage.problem: `0` -> `(1)`": "no storage has one bit",
    "quant/reference.py codes: `True` -> `(False)`": "in place or not: the same bits",
    "methods.py L4Q.quantizer: `moved is not None and zero is not None` "
    "-> `(moved is not None or zero is not None)`": "its grids have both or neither",
    "formats/gguf_blocks.py _by_block: `-1` -> `(1)`": "the last of two dimensions",
    "formats/gguf_k_quants.py KQuantType._unit_scales.by_block: `-1` -> `(1)`": "the last of two dimensions",
    "quant/triton_kernels.py _of_groups: `groups[None, :] < n_groups` "
    "-> `(groups[None, :] <= n_groups)`": "what a tile has beyond a row's groups is not stored",
    "formats/engines.py float32_logits: `False` -> `(True)`": "a cache that nobody reads: the same logits",
    "quant/nvidia.py probe: `1` -> `(2)`": "whether a kernel runs, not what it computes",
    "quant/triton_kernels.py _zeros: `22` -> `(23)`": "zero points are codes, of at most 255",
    "formats/llama_cpp.py _Library.__init__: `spec is not None and spec.origin is not None` "
    "-> `(spec is not None or spec.origin is not None)`": "a module of a wheel has both",
    "layer.py DLQATLayer.merge: `False` -> `(True)`": "looked at or not, the same weight",
    "formats/llama_cpp.py half_gelu: `10` -> `(11)`": "of -10, below which the table has 0, too",
}

PAIRS = [(ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn)]
PAIRS += [(ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.And, ast.Or), (ast.LShift, ast.RShift)]
PAIRS += [("min", "max"), ("amin", "amax"), ("minimum", "maximum")]
SWAPS = {one: other for pair in PAIRS for one, other in (pair, pair[::-1])}


def but(node, **fields):
    """The node with other fields."""
    new = copy.copy(node)
    vars(new).update(fields)
    return new


def mistakes(node):
    """(what is replaced, by what) of one node."""
    match node:
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                yield node, but(node, ops=[*ops[:i], SWAPS[type(op)](), *ops[i + 1 :]])
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op) if type(op) in SWAPS:
            yield node, but(node, op=SWAPS[type(op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node, node.operand
        case ast.Constant(value=bool(value)):
            yield node, but(node, value=not value)
        case ast.Constant(value=int(value) | float(value)) if value == 0 or 0.1 <= value <= 256:
            yield node, but(node, value=value + 1)
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.keyword(arg=name) if name in SWAPS:
            yield node, but(node, **{field: SWAPS[name] for field in node._fields if getattr(node, field) == name})
        case ast.Return(value=ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div())):
            yield node, but(node, value=ast.UnaryOp(ast.USub(), node.value))
        case ast.If(body=[*_, ast.Raise()]):
            yield node.test, ast.UnaryOp(ast.Not(), node.test)


def mutants(text):
    """All mutants of a module's text: {(function, its first line): [(line, what changes, the new text)]}."""
    found, starts = {}, [0]
    for line in text.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def walk(node, scope, path=""):
        names = [getattr(node, field, None) for field in ("name", "arg", "id", "attr")]
        match node:
            case ast.Raise() | ast.JoinedStr() | ast.If(test=ast.Name(id="TYPE_CHECKING")):
                return
            case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name)):
                names.append(name)
            case ast.Assign(targets=[ast.Name(id=name)]):
                names.append(name)
            case ast.FunctionDef():
                path += f".{node.name}"
                scope = path[1:], min(part.lineno for part in (node, *node.decorator_list))
            case ast.ClassDef():
                path += f".{node.name}"
        if LEFT_OUT.keys() & names:
            return
        for old, new in mistakes(node):
            start, end = starts[old.lineno - 1] + old.col_offset, starts[old.end_lineno - 1] + old.end_col_offset
            was, code = text.encode()[start:end].decode(), ast.unparse(new)
            code = f"({code})" if isinstance(new, ast.expr) else code
            changed = (text.encode()[:start] + code.encode() + text.encode()[end:]).decode()
            found.setdefault(scope, []).append((old.lineno, f"`{' '.join(was.split())}` -> `{code}`", changed))
        for field, value in ast.iter_fields(node):
            if field not in ("annotation", "returns", "decorator_list"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        walk(child, scope, path)

    walk(ast.parse(text), ("", 0))
    return found


def sample(text, count, seed):
    """So many mutants, in turns one of each function: (function's name and line, line, what changes, the new text)."""
    chance = random.Random(seed)
    by_function = [[(scope, *mutant) for mutant in own] for scope, own in mutants(text).items()]
    for own in by_function:
        chance.shuffle(own)
    chance.shuffle(by_function)
    return [mutant for turn in zip_longest(*by_function) for mutant in turn if mutant][:count]


def own_tests(module):
    """The module's own tests."""
    room, own = Path(module).parent, f"test_{Path(module).name}"
    files = [*([f"{room}/{own}"] if (ROOT / "tests" / room / own).exists() else []), *TESTS.get(module, [])]
    return [str(ROOT / "tests" / file) for file in files]


def in_turns(items, seconds):
    """Tests, the quickest case of each function first, then the second of each and so on."""
    turn = Counter()
    turns = []
    for item in sorted(items, key=seconds):
        function = item.nodeid.split("[")[0]
        turns.append((turn[function], item))
        turn[function] += 1
    return [item for _, item in sorted(turns, key=lambda pair: pair[0])]


class Tests:
    """A plugin of pytest. A run without a mutant tells which functions a test reaches, its time, if it passes.

    Runs with one are of those that reach the changed function (or of all, where it works on import): the quickest case
    of each first, then the second of each and so on, so that every kind has its turn before the time is up.
    """

    def __init__(self, folder, known, function):
        self.folder, self.known, self.function, self.found = folder, known, function, {}

    def pytest_collection_finish(self, session):
        if self.known:
            passing = {test: functions for test, (functions, _, passes) in self.known.items() if passes}
            reaching = {test for test in passing if self.function in passing[test]} or passing.keys()
            # A mutant may bring others, where a test's parameters are what a module says of itself.
            session.items[:] = in_turns(
                (item for item in session.items if item.nodeid in reaching or item.nodeid not in self.known),
                lambda item: self.known.get(item.nodeid, ([], 0))[1],
            )

    def pytest_runtest_logstart(self, nodeid):
        self.reached, self.passes, self.start = set(), True, time.process_time()
        (self.folder / "running").write_text(json.dumps([nodeid, self.start]))
        if not self.known:
            sys.settrace(self.trace)

    def trace(self, frame, event, argument):
        self.reached.add(frame.f_code)

    def pytest_runtest_logreport(self, report):
        self.passes &= not report.failed

    def pytest_runtest_logfinish(self, nodeid):
        sys.settrace(None)
        own = sorted(f"{code.co_filename}:{code.co_firstlineno}" for code in self.reached)
        self.found[nodeid] = own, time.process_time() - self.start, self.passes


def run_here(folder, files, known, function):
    """Run tests on the copy in `folder` in this process, which ends with pytest's status."""
    os.setsid()
    log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = str(folder)
    if known:
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    import pytest

    options = [f"--rootdir={ROOT}", f"-c{ROOT / 'pyproject.toml'}", f"--basetemp={folder / 'tmp'}", "-q"]
    options += ["-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning", "-m", "not slow"]
    tests = Tests(folder, known, function)
    status = pytest.main([*options, *(["-x"] if known else []), *files], [tests])
    (folder / "found").write_text(json.dumps([tests.found, sorted(sys.modules)]))
    package = sys.modules.get("peft_dlqat")
    return 99 if package and not package.__file__.startswith(str(folder)) else status


def run(folder, files, known, function=""):
    """`run_here` in a fork: "passed", "failed", "loops" or "too long", and the seconds."""
    begun, child = time.monotonic(), os.fork()
    if child == 0:
        status = 99
        try:
            status = run_here(folder, files, known, function)
        finally:
            sys.stdout.flush()
            os._exit(status)
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        if known and time.monotonic() - begun > 6 * SECONDS:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    status = os.waitstatus_to_exitcode(done[1])
    if status in (3, 99):
        raise SystemExit(f"pytest cannot run {files}, status {status}:\n{(folder / 'log').read_text()}")
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        test, start = json.loads((folder / "running").read_text())
        return "loops" if SECONDS - start > 10 + 5 * known.get(test, ([], 0))[1] else "too long", SECONDS
    return "passed" if status in (0, 5) else "failed", time.monotonic() - begun


def start(folder, files):
    """A fresh copy of the package in `folder`, and what its tests reach without a mutant; imports what they import."""
    shutil.copytree(SOURCE, folder / "peft_dlqat", dirs_exist_ok=True)
    if run(folder, files, {})[0] != "passed":
        print(f"{files}: what fails without a mutant is left out.\n{(folder / 'log').read_text()}", file=sys.stderr)
    known, imported = json.loads((folder / "found").read_text())
    for name in imported:
        if name.split(".")[0] in HEAVY:
            importlib.import_module(name)
    seconds = sum(seconds for _, seconds, _ in known.values())
    print(f"{seconds:.0f} s without a mutant: {[Path(file).name for file in files]}", flush=True)
    return known


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", default=MODULES, help="such as quant/fit.py; all by default")
    parser.add_argument("--mutants", type=int, default=115, help="of all modules together, by their size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only mutants in whose line this is found")
    args = parser.parse_args()
    os.environ.setdefault("TRITON_INTERPRET", "1")  # as the tests have it without a GPU
    for name in ("torch", "transformers", "peft"):
        importlib.import_module(name)
    texts = {module: (SOURCE / module).read_text() for module in MODULES}
    sizes = {module: sum(map(len, mutants(text).values())) for module, text in texts.items()}
    known, results, alive = {}, {}, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for module in args.modules:
            text, files, copied = texts[module], own_tests(module), folder / "peft_dlqat" / module
            count = max(3, round(args.mutants * sizes[module] / sum(sizes.values())))
            for (function, first), line, what, changed in sample(text, count, args.seed):
                title = f"{module}:{line} {function}: {what}"
                if args.only not in title:
                    continue
                if str(files) not in known:
                    known[str(files)] = start(folder, files)
                for compiled in copied.parent.glob(f"__pycache__/{copied.stem}.*"):
                    compiled.unlink()
                copied.write_text(changed)
                result, seconds = run(folder, files, known[str(files)], f"{copied}:{first}")
                copied.write_text(text)
                print(f"{result} {seconds:.1f} s  {title}", flush=True)
                reason = EQUIVALENT.get(f"{module} {function}: {what}")
                results.setdefault(module, []).append("equivalent" if reason and result == "passed" else result)
                if result in ("passed", "too long"):
                    alive.append(f"{title}  ({reason or result})")
    results["all"] = [result for own in results.values() for result in own]
    kinds = ("failed", "loops", "equivalent", "passed", "too long")
    print("", f"{'module':30}{'mutants':>11}" + "".join(f"{kind:>11}" for kind in kinds), sep="\n")
    for module, own in results.items():
        print(f"{module:30}{len(own):11}" + "".join(f"{own.count(kind):11}" for kind in kinds))
    print(*alive, sep="\n")
    raise SystemExit(bool({"passed", "too long"} & {*results["all"]}))


if __name__ == "__main__":
    main()
