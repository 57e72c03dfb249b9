"""Mutants: one small mistake each in the arithmetic, the layer or a format, which the module's own tests must notice.

    python tests/scripts/mutate.py                                 a sample of all modules, in half an hour
    python tests/scripts/mutate.py quant/fit.py --mutants 1000     all of one module
    python tests/scripts/mutate.py --only "fit.py:35 "             of the same sample those whose line says so

torch, transformers and peft are imported once; each mutant is a fork that imports a copy of the package with one file
changed. Tests that reach the changed function come first, quick ones first. Exit status 1: one survives that is not
among `EQUIVALENT`. The limit is of processor time, so that a busy machine changes nothing.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "peft_dlqat"
ROOMS = ("quant/*.py", "formats/*.py", "methods.py", "layer_spec.py", "layer.py", "frozen.py")
SECONDS = 30

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
    "layer_spec.py": ["test_new_parts.py", "test_methods.py"],
    "formats/base.py": ["formats/test_new_format.py"],
    "formats/bit_stream.py": ["formats/test_gptq.py", "formats/test_mlx.py"],
    "formats/engines.py": ["formats/test_dense.py", "formats/test_new_format.py"],
    "formats/gguf_blocks.py": ["formats/test_gguf.py"],
    "formats/gguf_metadata.py": ["formats/test_gguf.py"],
    "formats/tensor_files.py": ["formats/test_dense.py"],
}
# Names, functions and keywords in which no mistake is made, by reason.
LEFT_OUT = {
    name: reason
    for reason, names in {
        "so many at a time: the same bits in more or less time": "_PIECE _PIECE_ON_GPU _CHUNK _CHUNK_ON_GPU _WARPS",
        "the shape of a tile: the same bits": "_ROWS _COLUMNS num_warps",
        "how long the search for a grid is: better or worse by little": "_REFINEMENTS _CLIP_SHARES",
        "found by measuring a model: what is best, not what is right": "_LR_FACTOR _UPDATE _block_step_of_a",
        "runs in an environment of its own only, see make test-engines": "_gptqmodel _llama_cpp",
        "on a GPU only": "enable_fp_fusion",
        "a check of the check": "strict",
        "a message": "warn stacklevel _cannot",
    }.items()
    for name in names.split()
}
# Survivors that are right, by what they change; the reason.
EQUIVALENT: dict[str, str] = {}

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
        case (ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op)) if type(op) in SWAPS:
            yield node, but(node, op=SWAPS[type(op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node, node.operand
        case ast.Constant(value=bool(value)):
            yield node, but(node, value=not value)
        case ast.Constant(value=int(value) | float(value)) if value == 0 or 0.1 <= value <= 256:
            yield node, but(node, value=value + 1)
        case ast.Name(id=name) if name in SWAPS:
            yield node, but(node, id=SWAPS[name])
        case ast.Attribute(attr=name) if name in SWAPS:
            yield node, but(node, attr=SWAPS[name])
        case ast.keyword(arg=name) if name in SWAPS:
            yield node, but(node, arg=SWAPS[name])
        case ast.Return(value=ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div())):
            yield node, but(node, value=ast.UnaryOp(ast.USub(), node.value))
        case ast.If(body=[*_, ast.Raise()]):
            yield node.test, ast.UnaryOp(ast.Not(), node.test)


def mutants(text):
    """All mutants of a module's text: {(function, its first line): [(line, what changes, the new text)]}."""
    found, starts = {}, [0]
    for line in text.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def walk(node, scope):
        names = [getattr(node, field, None) for field in ("name", "arg", "id", "attr")]
        match node:
            case ast.Raise() | ast.JoinedStr() | ast.If(test=ast.Name(id="TYPE_CHECKING")):
                return
            case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name)):
                names.append(name)
            case ast.Assign(targets=[ast.Name(id=name)]):
                names.append(name)
            case ast.FunctionDef():
                scope = node.name, min(part.lineno for part in (node, *node.decorator_list))
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
                        walk(child, scope)

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


def tests_of(module):
    """The module's own tests."""
    room, own = Path(module).parent, f"test_{Path(module).name}"
    files = [*([f"{room}/{own}"] if (ROOT / "tests" / room / own).exists() else []), *TESTS.get(module, [])]
    return [str(ROOT / "tests" / file) for file in files]


class Order:
    """A plugin of pytest: which functions each test reaches, and how long it takes; and tests in the order of these."""

    def __init__(self, folder, known, scope):
        self.folder, self.known, self.scope, self.found = folder, known, scope, {}

    def pytest_collection_finish(self, session):
        far = {}, 1e9
        key = lambda item: (self.scope not in self.known.get(item.nodeid, far)[0], self.known.get(item.nodeid, far)[1])  # noqa: E731
        if self.known:
            session.items.sort(key=key)

    def pytest_runtest_logstart(self, nodeid):
        self.reached, self.start = set(), time.process_time()
        (self.folder / "running").write_text(json.dumps([nodeid, self.start]))
        if not self.known:
            sys.settrace(self.trace)

    def trace(self, frame, event, argument):
        code = frame.f_code
        if "peft_dlqat" in code.co_filename:
            self.reached.add(f"{code.co_filename}:{code.co_firstlineno}")

    def pytest_runtest_logfinish(self, nodeid):
        self.found[nodeid] = sorted(self.reached), time.process_time() - self.start


def run(folder, files, known, scope):
    """Fork, and run tests on the copy in `folder`; "passed", "failed", "loops" or "too long", and the seconds."""
    begun, child = time.monotonic(), os.fork()
    if child == 0:
        os.setsid()
        log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.path.insert(0, str(folder))
        os.environ.update(PYTHONPATH=str(folder), HYPOTHESIS_STORAGE_DIRECTORY=str(folder / "hypothesis"))
        if known:
            sys.dont_write_bytecode = True
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
        plugin = Order(folder, known, scope)
        import pytest

        options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", f"--basetemp={folder / 'tmp'}"]
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # anyio is imported already
        code = pytest.main([*options, f"--rootdir={ROOT}", f"-c{ROOT / 'pyproject.toml'}", *files], [plugin])
        package = sys.modules.get("peft_dlqat")
        if package is not None and not package.__file__.startswith(str(folder)):
            code = 99
        (folder / "found").write_text(json.dumps([plugin.found, sorted(sys.modules)]))
        sys.stdout.flush()
        os._exit(code)
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        if known and time.monotonic() - begun > 6 * SECONDS:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.02)
    code = os.waitstatus_to_exitcode(done[1])
    if code in (3, 5, 99):
        raise SystemExit(f"pytest cannot run {files}, status {code}:\n{(folder / 'log').read_text()}")
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        test, start = json.loads((folder / "running").read_text())
        return "loops" if SECONDS - start > 10 + 5 * known.get(test, (0, 0))[1] else "too long", SECONDS
    return "passed" if code == 0 else "failed", time.monotonic() - begun


def counts(modules, total):
    """How many mutants each module gives: by its size, three at least."""
    sizes = {module: sum(map(len, mutants((SOURCE / module).read_text()).values())) for module in modules}
    return {module: max(3, round(total * size / sum(sizes.values()))) for module, size in sizes.items() if size}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help="such as quant/fit.py; all by default")
    parser.add_argument("--mutants", type=int, default=150, help="of all modules together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only mutants in whose line this is found")
    args = parser.parse_args()
    modules = args.modules or [str(path.relative_to(SOURCE)) for room in ROOMS for path in sorted(SOURCE.glob(room))]
    os.environ.setdefault("TRITON_INTERPRET", "1")  # as the tests have it without a GPU
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    folder, known_of, table, alive = Path(tempfile.mkdtemp()), {}, [], []
    for module, count in counts(modules, args.mutants).items():
        text, files, results = (SOURCE / module).read_text(), tests_of(module), []
        for (name, first), line, what, changed in sample(text, count, args.seed):
            title = f"{module}:{line} {name}: {what}"
            if args.only not in title:
                continue
            if str(files) not in known_of:
                shutil.copytree(SOURCE, folder / "peft_dlqat", dirs_exist_ok=True)
                if run(folder, files, {}, "")[0] != "passed":
                    raise SystemExit(f"the tests of {module} fail without a mutant:\n{(folder / 'log').read_text()}")
                known_of[str(files)], imported = json.loads((folder / "found").read_text())
                print(f"{sum(seconds for _, seconds in known_of[str(files)].values()):.1f} s for {files}", flush=True)
                for heavy in imported:
                    if heavy.split(".")[0] in ("gguf", "compressed_tensors", "hypothesis", "triton", "transformers"):
                        __import__(heavy)
            (folder / "peft_dlqat" / module).write_text(changed)
            for cached in (folder / "peft_dlqat" / module).parent.glob(f"__pycache__/{Path(module).stem}.*"):
                cached.unlink()
            result, seconds = run(folder, files, known_of[str(files)], f"{folder}/peft_dlqat/{module}:{first}")
            shutil.copy2(SOURCE / module, folder / "peft_dlqat" / module)
            results.append(result)
            print(f"{result} {seconds:.1f} s  {title}", flush=True)
            reason = EQUIVALENT.get(f"{module} {name}: {what}")
            if result in ("passed", "too long"):
                alive.append(f"{title}" + (f"  (equivalent: {reason})" if reason else f"  ({result})"))
        if results:
            table.append((module, len(results), results.count("failed"), results.count("loops"), len(results)))
    shutil.rmtree(folder)
    print(f"\n{'module':28} mutants  killed  loops  survived")
    for module, all_, failed, loops, _ in [*table, ("all", *(sum(row[i] for row in table) for i in range(1, 5)))]:
        print(f"{module:28} {all_:7} {failed:7} {loops:6} {all_ - failed - loops:9}")
    print("\n".join(alive))
    raise SystemExit(any("(equivalent" not in line for line in alive))


if __name__ == "__main__":
    main()
