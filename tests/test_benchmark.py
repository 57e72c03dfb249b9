"""The methods benchmark, in its quick form: everything runs, results are kept, and nothing is run twice."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import save_file

METHODS = Path(__file__).parents[1] / "benchmarks" / "methods"
EXPERIMENTS = sorted((METHODS / "experiments").glob("*.json"))
# Contenders whose libraries are extras of the benchmark's own.
LIBRARIES = {"autoround": "auto_round", "torchao-qat-lora": "torchao"}


def run(tmp_path, experiment, *arguments):
    command = [sys.executable, str(METHODS / "run.py"), str(experiment), "--quick", "--jobs", "1", *arguments]
    command += ["--model", str(tmp_path / "tiny"), "--tokens", str(tmp_path / "tokens.safetensors")]
    command += ["--results", str(tmp_path / "results")]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@pytest.fixture
def task(tmp_path):
    tiny_model().save_pretrained(tmp_path / "tiny")
    ids = torch.randint(3, 64, (24, 32), dtype=torch.int16)
    save_file({"train": ids[:16].contiguous(), "heldout": ids[16:].contiguous()}, tmp_path / "tokens.safetensors")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_runs(task, experiment):
    if experiment.stem == "k_quants":
        tiny_model("wide llama").save_pretrained(task / "tiny")
    first = run(task, experiment)
    assert first.returncode == 0, first.stderr[-3000:]
    plan = json.loads(experiment.read_text())
    for name, setting in plan["settings"].items():
        for contender in setting.get("contenders", plan["contenders"]):
            path = task / "results" / name / f"{contender}.json"
            if importlib.util.find_spec(LIBRARIES.get(contender, "torch")) is None:
                assert not path.exists() and f"{contender} left out" in first.stdout
                continue
            results = json.loads(path.read_text())
            assert len(results["runs"]) == 1 and results["setting"] == setting["config"]
            assert 0 <= results["runs"][0]["kl"] < 10 and 0 < results["runs"][0]["agreement"] <= 1
            assert f"| {contender} |" in (task / "results" / "table.md").read_text()

    files = {path: path.read_bytes() for path in (task / "results").rglob("*.json")}
    again = run(task, experiment)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "runs seed" not in again.stdout
    assert files == {path: path.read_bytes() for path in (task / "results").rglob("*.json")}


def test_results_of_another_setting_are_not_mixed(task):
    experiment = {
        "settings": {"a": {"config": {"bits": 3, "group_size": 32}}},
        "contenders": ["rtn-mse"],
        "training": {},
        "learning_rates": [1e-3],
        "search_share": 0.5,
        "seeds": [0],
    }
    path = task / "experiment.json"
    path.write_text(json.dumps(experiment))
    assert run(task, path).returncode == 0
    experiment["settings"]["a"]["config"]["bits"] = 2
    path.write_text(json.dumps(experiment))
    second = run(task, path)
    assert second.returncode != 0 and "another setting" in second.stderr
