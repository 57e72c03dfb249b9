"""The speed benchmarks run, and the page about them says what they found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEED = ROOT / "benchmarks" / "speed"


def run(script, *args):
    return subprocess.run(
        [sys.executable, SPEED / script, *args], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout


@pytest.mark.slow
def test_a_layer_is_checked_and_timed(tmp_path):
    run("layer.py", "--quick", "--only", "2048 x 2048", "--results", str(tmp_path / "layer.json"))
    rows = json.loads((tmp_path / "layer.json").read_text())["rows"]["2048 x 2048"]["time_ratio"]
    assert rows["LoRA"]["median"] == 1 and len(rows) > 8
    assert all(row["median"] > 0 for row in rows.values())


@pytest.mark.slow
def test_an_op_that_is_off_is_not_timed(tmp_path):
    sabotage = (
        "import sys; sys.path.insert(0, sys.argv[1]); import layer, torch\nfrom peft_dlqat.quant import reference\n"
    )
    sabotage += "true = reference.weight_grads\n"
    sabotage += "reference.weight_grads = lambda *a: {k: 1.01 * v for k, v in true(*a).items()}\n"
    sabotage += "layer.check('DL-QAT', layer.ours(layer.Work(8, 256, 256)), layer.Work(8, 256, 256))"
    result = subprocess.run([sys.executable, "-c", sabotage, SPEED], capture_output=True, text=True)
    assert result.returncode == 1 and "DL-QAT is not timed: dlqat_A is off by" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_a_step_is_measured():
    output = run("model.py", "--quick", "--memory-of", "DL-QAT, int8 storage")
    found = json.loads(output.splitlines()[-1])
    assert 0 < found["before training"] < found["peak"]


def test_the_page_holds_the_results():
    sys.path.insert(0, str(SPEED))
    try:
        import table
    finally:
        sys.path.remove(str(SPEED))
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    for name, text in table.tables().items():
        assert f"<!-- {name} -->\n{text}\n<!-- /{name} -->" in page, f"run python {SPEED / 'table.py'}"


@pytest.mark.slow
def test_the_gpus_script_runs_without_one(tmp_path):
    run("gpu.py", "layer", "--quick", "--rounds", "2", "--results", str(tmp_path / "layer.json"))
    rows = json.loads((tmp_path / "layer.json").read_text())["rows"]["256 x 512"]["64 tokens"]
    assert rows["LoRA"]["time_ratio"]["median"] == 1 and len(rows) == 10
    assert rows["DL-QAT, int4 storage"]["bytes_of_layer"] < rows["DL-QAT"]["bytes_of_layer"]
    for name in ("DL-QAT, int4 storage", "LR-QAT, checkpointed, eager"):
        output = run("gpu.py", "model", "--size", "quick", "--only", name, "--steps", "1")
        assert json.loads(output.splitlines()[-1])["tokens_per_second"] > 0


@pytest.mark.slow
def test_the_gpus_script_refuses_an_op_that_is_off():
    sabotage = (
        "import sys; sys.path.insert(0, sys.argv[1]); import gpu\nfrom unittest import mock\n"
        "from peft_dlqat.quant import dispatch, reference\n"
        "class Off:\n"
        "    codes, quantized = reference.codes, reference.quantized\n"
        "    def weight_grads(*a): return {k: 1.1 * v for k, v in reference.weight_grads(*a).items()}\n"
        "model = gpu.adapted('DL-QAT', gpu.OneLayer(256, 512), ['lin'])\n"
        "chosen = lambda weight, *_: Off if dispatch._on_nvidia(weight) else reference\n"
        "dispatch._on_nvidia = lambda weight: True\n"
        "from peft_dlqat.quant import product as linear\n"
        "linear.implementation = chosen\n"
        "gpu.check('DL-QAT', model)\n"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", sabotage, SPEED], capture_output=True, text=True)
    assert result.returncode == 1 and "is not timed: dlqat_A.default is off by 1.0e-01" in result.stderr
