"""Tests are where their module is: what src/peft_dlqat/X/Y.py does is tested in tests/X/test_Y.py."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE, TESTS = ROOT / "src" / "peft_dlqat", ROOT / "tests"
# What is no module's: the repository, examples and benchmarks, runs of several processes.
OTHERS = {"quality", "docs", "examples", "benchmarks", "distributed"}
# Of several modules: what a room refuses, all that talks to the Hub, what comes from strangers.
SHARED = {
    "train/test_refused",
    "export/test_refused",
    "test_new_parts",
    "test_foreign_bases",
    "test_architectures",
    "test_old_adapters",
    "test_strangers",
    "formats/test_new_format",
}


def test_each_test_file_has_its_module():
    tests = {path.relative_to(TESTS).with_suffix("") for path in TESTS.rglob("test_*.py")}
    tests = {path for path in tests if path.parts[0] not in OTHERS and path.as_posix() not in SHARED}
    modules = [SOURCE / path.parent / path.name.removeprefix("test_") for path in tests]
    assert [str(path) for path in modules if not (path.with_suffix(".py").exists() or path.is_dir())] == []
