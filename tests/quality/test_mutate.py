"""What tests/scripts/mutate.py makes of a module."""

import ast
from types import SimpleNamespace

import pytest
from scripts.mutate import EQUIVALENT, LEFT_OUT, MODULES, SOURCE, in_turns, mutants, own_tests, sample

MODULE = '''"""One + two."""
_PIECE = 2**21

def clip(x: "int | 1", low=0) -> "1 + 1":
    """x < 3."""
    if x is None:
        raise ValueError(f"{x + 1} is wrong")
    return max(x, -low) - 1
'''
CHANGES = {
    (5, "`0` -> `(1)`"),
    (7, "`x is None` -> `(not x is None)`"),
    (7, "`x is None` -> `(x is not None)`"),
    (9, "`max` -> `(min)`"),
    (9, "`-low` -> `(low)`"),
    (9, "`max(x, -low) - 1` -> `(max(x, -low) + 1)`"),
    (9, "`return max(x, -low) - 1` -> `return -(max(x, -low) - 1)`"),
    (9, "`1` -> `(2)`"),
}


def test_each_mutant_is_one_mistake():
    found = sample(MODULE, 100, seed=0)
    assert {(line + 1, what) for _, line, what, _ in found} == CHANGES
    texts = {ast.unparse(ast.parse(text)) for *_, text in found}
    assert len(texts) == len(found) and ast.unparse(ast.parse(MODULE)) not in texts


def test_the_sample_is_the_same_each_time_and_takes_functions_in_turns():
    text = (SOURCE / "quant" / "fit.py").read_text()
    functions = mutants(text)
    found = sample(text, len(functions), seed=1)
    assert found == sample(text, len(functions), seed=1) != sample(text, len(functions), seed=2)
    assert {scope for scope, *_ in found} == set(functions)


def test_every_test_function_has_its_turn():
    seconds = {"a[1]": 1, "a[2]": 2, "a[3]": 3, "b": 5, "c[1]": 9, "c[2]": 4}
    found = in_turns([SimpleNamespace(nodeid=name) for name in seconds], lambda item: seconds[item.nodeid])
    assert [item.nodeid for item in found] == ["a[1]", "c[2]", "b", "a[2]", "c[1]", "a[3]"]


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_mutants_and_tests(module):
    assert mutants((SOURCE / module).read_text())
    assert own_tests(module)


def test_what_is_left_out_or_equivalent_is_there():
    texts = {module: (SOURCE / module).read_text() for module in MODULES}
    everything = "\n".join(texts.values())
    assert [name for name in LEFT_OUT if name not in everything] == []
    known = {
        f"{module} {scope[0]}: {what}"
        for module, text in texts.items()
        for scope, _, what, _ in sample(text, 10**6, 0)
    }
    assert EQUIVALENT.keys() - known == set()
