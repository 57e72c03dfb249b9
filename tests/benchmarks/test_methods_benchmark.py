"""The methods benchmark, in its quick form: everything runs, results are kept, and nothing is run twice."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_dlqat import RECIPE, evaluate_tasks

METHODS = Path(__file__).parents[2] / "benchmarks" / "methods"
EXPERIMENTS = sorted((METHODS / "experiments").glob("*.json"))
EMBEDDED = METHODS.parents[1] / "examples" / "embedded" / "model"
# Contenders whose libraries are extras of the benchmark's own.
LIBRARIES = {"autoround": "auto_round", "torchao-qat-lora": "torchao"}


sys.path.insert(0, str(METHODS))  # where its modules look for each other


def arguments(tmp_path, experiment, *more):
    own = ["--model", str(tmp_path / "tiny"), "--tokens", str(tmp_path / "tokens.safetensors")]
    return [str(experiment), "--jobs", "1", *more, *own, "--results", str(tmp_path / "results")]


def run(monkeypatch, tmp_path, experiment, *more):
    """With no process but the workers': each takes long to import its libraries."""
    import run as runner

    for name, value in {"OMP_NUM_THREADS": "1", **runner.ALLOCATOR}.items():
        monkeypatch.setenv(name, value)  # which it would set for good
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments(tmp_path, experiment, *more)])
    runner.main()


@pytest.fixture
def task(tmp_path):
    tiny_model().save_pretrained(tmp_path / "tiny")
    ids = torch.randint(3, 64, (32, 32), dtype=torch.int16)
    parts = dict(zip(("train", "heldout", "other"), ids.split([16, 8, 8]), strict=True))
    save_file({name: part.contiguous() for name, part in parts.items()}, tmp_path / "tokens.safetensors")
    return tmp_path


def test_no_two_experiments_give_different_settings_one_name(tmp_path):
    """They share a folder of results, where `make bench-quality EXPERIMENTS=all` puts them."""
    import run as runner
    import runs as kept

    heads = {}
    for path in EXPERIMENTS:
        experiment = {**json.loads(path.read_text()), "model_name": "tiny"}
        for setting, contender, results in runner.plan(experiment, [], tmp_path):
            head = {key: results.data.get(key) for key in kept.HEAD}
            assert heads.setdefault((setting, contender), head) == head, (path.stem, setting, contender)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.stem)
def test_the_schedule_is_the_recipes(experiment):
    """What is called the default recipe is that, and the others run under it."""
    plan = json.loads(experiment.read_text())
    training = plan["training"]
    assert (training["schedule"], training["schedule_arguments"]) == (RECIPE.schedule, dict(RECIPE.schedule_arguments))
    assert training["warmup_steps"] == RECIPE.warmup * training["steps"] and "calibration_steps" not in training


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_runs(task, experiment, monkeypatch, capsys):
    if experiment.stem == "k_quants":
        tiny_model("wide llama").save_pretrained(task / "tiny")
    if experiment.stem == "tasks":  # asks questions in words
        pytest.importorskip("lm_eval")
        shutil.copytree(EMBEDDED, task / "tiny", dirs_exist_ok=True)
    run(monkeypatch, task, experiment, "--quick")
    printed = capsys.readouterr().out
    plan = json.loads(experiment.read_text())
    for name, setting in plan["settings"].items():
        for contender in setting.get("contenders", plan["contenders"]):
            path = task / "results" / name / f"{contender}.json"
            if importlib.util.find_spec(LIBRARIES.get(contender, "torch")) is None:
                assert not path.exists() and f"{contender} left out" in printed
                continue
            results = json.loads(path.read_text())
            assert len(results["runs"]) == 1 and results["setting"] == setting["config"]
            assert 0 <= results["runs"][0]["kl"] < 10 and 0 < results["runs"][0]["agreement"] <= 1
            assert f"| {contender} |" in (task / "results" / "table.md").read_text()
            assert ("tasks" in plan) == ("tasks" in results["runs"][0])

    if experiment.stem == "tasks":
        figures = json.loads((task / "results" / "tasks-2bit-g32" / "full-precision.json").read_text())["runs"][0]
        model, tokenizer = AutoModelForCausalLM.from_pretrained(EMBEDDED), AutoTokenizer.from_pretrained(EMBEDDED)
        expected = evaluate_tasks(
            model.float(), tokenizer, "small_facts", include_path=METHODS.parents[1] / "examples" / "tasks"
        )
        assert figures["tasks"] == {"small_facts": expected["small_facts"]["acc"]}

    if experiment.stem != "domains":  # one is enough for what follows
        return
    files = {path: path.read_bytes() for path in (task / "results").rglob("*.json")}
    run(monkeypatch, task, experiment, "--quick")
    assert "runs seed" not in capsys.readouterr().out
    assert files == {path: path.read_bytes() for path in (task / "results").rglob("*.json")}


def test_results_of_another_setting_are_not_mixed(task, monkeypatch):
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
    run(monkeypatch, task, path, "--quick")
    experiment["settings"]["a"]["config"]["bits"] = 2
    path.write_text(json.dumps(experiment))
    with pytest.raises(SystemExit, match=r"another setting \("):
        run(monkeypatch, task, path, "--quick")
    experiment["settings"]["a"]["config"]["bits"] = 3
    path.write_text(json.dumps(experiment))
    tiny_model("gpt2").save_pretrained(task / "tiny")  # under the same name
    with pytest.raises(SystemExit, match=r"another work \("):
        run(monkeypatch, task, path, "--quick")


def test_steps_are_timed_against_dlqats(task, monkeypatch):
    experiment = {
        "settings": {"a": {"config": {"bits": 3, "group_size": 32}}},
        "contenders": ["rtn-mse", "lsq", "dlqat"],
        "training": {"schedule": "linear", "batch_size": 2},
        "learning_rates": [1e-3],
        "search_share": 0.5,
        "seeds": [0],
    }
    path = task / "experiment.json"
    path.write_text(json.dumps(experiment))
    run(monkeypatch, task, path, "--quick")
    done = subprocess.run(
        [sys.executable, str(METHODS / "step_times.py"), *arguments(task, path, "--quick")],
        capture_output=True,
        text=True,
        cwd=task,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    times = json.loads((task / "results" / "step_times.json").read_text())["a"]["ratios"]
    assert times.keys() == {"dlqat", "lsq"} and times["dlqat"]["median"] == 1 and times["lsq"]["median"] != 1
    lines = {line.split("|")[1].strip(): line for line in (task / "results" / "table.md").read_text().splitlines()[2:]}
    assert f" {times['lsq']['median']:.2f} | 1 |" in lines["lsq"] and "|  | 1 |" in lines["rtn-mse"]


def test_the_best_of_the_learning_rates_is_used(task, monkeypatch):
    plan = {
        "settings": {"a": {"config": {"bits": 2, "group_size": 32, "zero_point": "float"}}},
        "contenders": ["l4q"],
        "training": {"batch_size": 4, "steps": 8, "warmup_steps": 1, "schedule": "linear"},
        "learning_rates": [1e-6, 2e-2],
        "search_share": 0.5,
        "seeds": [0, 1],
    }
    path = task / "experiment.json"
    path.write_text(json.dumps(plan))
    run(monkeypatch, task, path)
    results = json.loads((task / "results" / "a" / "l4q.json").read_text())
    searched = {run["lr"]: run["kl"] for run in results["search"]}
    best = min(searched, key=searched.get)
    assert {1e-6, 2e-2} < searched.keys()  # one of the two was the best, at an end
    assert len(searched) == 5 or min(searched) < best < max(searched)
    assert [(run["seed"], run["lr"]) for run in results["runs"]] == [(0, best), (1, best)]


def test_a_search_goes_on_while_the_best_is_at_an_end(tmp_path):
    from runs import Results

    results = Results(tmp_path / "l4q.json", {})
    other_seed = {"seed": 1, "lr": 9.0, "kl": 0.0}
    results.data["search"] = [{"seed": 0, "lr": 0.2, "kl": 0.5}, other_seed]
    assert results.next_rates([0.1, 0.2], 0) == [0.1]
    results.add("search", {"seed": 0, "lr": 0.1, "kl": 0.6})
    assert results.next_rates([0.1, 0.2], 0) == [0.4] and results.best_lr(0) == 0.2
    results.add("search", {"seed": 0, "lr": 0.4, "kl": math.nan})  # diverged: no best, though nothing is below it
    assert results.next_rates([0.1, 0.2], 0) == [] and results.best_lr(0) == 0.2
    for lr in (0.05, 0.025):
        results.add("search", {"seed": 0, "lr": lr, "kl": lr})
    assert results.next_rates([0.1, 0.2], 0) == []  # three beyond, and no more


def test_a_rate_that_whole_runs_have_shown_to_be_better_is_used_and_two_runners_share_a_file(tmp_path):
    from runs import Results

    def kept():
        data = Results(tmp_path / "l4q.json", {}).data
        return [[(run["lr"], run["seed"]) for run in data.get(key, [])] for key in ("runs", "other_rates")]

    first, second = (Results(tmp_path / "l4q.json", {}) for _ in range(2))
    first.data["search"] = second.data["search"] = [{"seed": 0, "lr": lr, "kl": -lr} for lr in (0.1, 0.2)]
    assert first.best_lrs(0) == [0.2]
    first.add("runs", {"seed": 0, "lr": 0.1, "kl": 0.4})
    second.add("runs", {"seed": 0, "lr": 0.2, "kl": 0.5})
    assert second.best_lrs(0) == [0.2, 0.1]
    second.keep(0.2)
    assert kept() == [[(0.2, 0)], [(0.1, 0)]] and second.has("runs", 0, 0.1)
    second.keep()
    assert kept() == [[(0.1, 0)], [(0.2, 0)]]
    second.add("runs", {"seed": 1, "lr": 0.2, "kl": 0.5})
    second.keep()
    assert kept() == [[(0.2, 0), (0.2, 1)], [(0.1, 0)]]  # of most runs
    second.add("runs", {"seed": 1, "lr": 0.1, "kl": math.nan})
    second.keep()
    assert kept() == [[(0.2, 0), (0.2, 1)], [(0.1, 0), (0.1, 1)]]


def test_a_run_with_other_versions_says_so(tmp_path):
    from runs import Results

    for seed, version in enumerate(["5.23", "5.23", "5.24"]):
        results = Results(tmp_path / "l4q.json", {"versions": {"transformers": version}})
        results.add("runs", {"seed": seed, "lr": 0.1, "kl": 0.4})
    assert results.data["versions"] == {"transformers": "5.23"}
    assert [run.get("versions") for run in results.data["runs"]] == [None, None, {"transformers": "5.24"}]


def test_what_runs_beside_a_failure_is_kept(task, monkeypatch):
    experiment = {
        "settings": {"a": {"config": {"bits": 3, "group_size": 32}}},
        "contenders": ["peqa", "rtn-mse", "gptq"],
        "training": {"batch_size": 2, "schedule": "no such schedule"},  # of the first, which takes longest
        "learning_rates": [1e-3],
        "search_share": 0.5,
        "seeds": [0],
    }
    path = task / "experiment.json"
    path.write_text(json.dumps(experiment))
    with pytest.raises(ValueError, match="no such schedule"):
        run(monkeypatch, task, path, "--quick", "--jobs", "2")
    assert {path.stem for path in (task / "results" / "a").iterdir()} >= {"rtn-mse"}


def test_figures_of_a_run(task, monkeypatch):
    import contenders
    import training

    setting = {"bits": 3, "group_size": 32, "zero_point": "float"}
    assert contenders.own_grid("autoround", setting) == {**setting, "zero_point": "integer"}
    assert contenders.own_grid("autoround", {**setting, "zero_point": "none"})["zero_point"] == "none"
    assert contenders.own_grid("gptq", setting) == setting
    loaded = training.Task(str(task / "tiny"), task / "tokens.safetensors")
    model = loaded.load_model()
    assert training.bits_per_weight(model, setting) == 3 + 32 / 32
    assert training.bits_per_weight(model, contenders.own_grid("autoround", setting)) == pytest.approx(
        3 + 19 / 32, abs=1e-3
    )

    # A clock that only the evaluations move.
    now = [0]
    monkeypatch.setattr(training.time, "process_time", lambda: now[0])
    evaluate = training.Task.evaluate
    monkeypatch.setattr(
        training.Task, "evaluate", lambda *args: (now.__setitem__(0, now[0] + 100), evaluate(*args))[1]
    )
    plan = {"batch_size": 4, "steps": 2, "warmup_steps": 1, "schedule": "linear", "calibration_data": "other"}
    figures = training.run(loaded, "dlqat", setting, plan, 0, 1e-3)
    assert figures["seconds"] == 0 and now[0] == 200
    with pytest.raises(ValueError, match=r"'tests'.*only \['heldout', 'other', 'train'\]"):
        loaded.calibration(4, 0, 0, "tests")


def test_calibration_takes_the_rows_that_it_is_told(task):
    import training

    loaded = training.Task(str(task / "tiny"), task / "tokens.safetensors")
    for data in ("train", "other"):
        rows = {tuple(row) for row in loaded.ids[data].tolist()}
        batches = loaded.calibration(4, 0, 0, data)
        assert len(batches) == 8 and all(tuple(row) in rows for b in batches for row in b["input_ids"].tolist())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_attention_in_blocks_is_exact_for_each_shape(kind, tmp_path):
    import attention
    from transformers import AutoModelForCausalLM

    tiny_model(kind).save_pretrained(tmp_path)
    ids = torch.randint(3, 64, (2, 21))
    logits = [
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)(input_ids=ids).logits
        for name in ("eager", attention.NAME)
    ]
    assert torch.allclose(*logits, atol=1e-5)


@pytest.mark.parametrize("compiler", ["g++", "no such compiler"])
def test_attention_in_heads_of_8_has_autograds_gradients(compiler, monkeypatch, request):
    import attention

    monkeypatch.setenv("CXX", compiler)
    attention.kernel.cache_clear()
    request.addfinalizer(attention.kernel.cache_clear)
    assert (attention.kernel() is not None) == (shutil.which(compiler) is not None)
    torch.manual_seed(0)
    query, key, value, grad = (5 * torch.randn(2, heads, 48, 8) for heads in (4, 2, 2, 4))
    results = []
    for dtype in (torch.float32, torch.float64):  # float64 goes to autograd through the formula
        inputs = [x.detach().to(dtype).requires_grad_(True) for x in (query, key, value)]
        if dtype == torch.float32:
            output = attention.attend(torch.nn.Identity(), *inputs, None, 0.3)[0].transpose(1, 2)
        else:
            q, k, v = (x.repeat_interleave(4 // x.shape[1], 1) for x in inputs)
            scores = 0.3 * q @ k.mT + torch.full((48, 48), -torch.inf, dtype=dtype).triu(1)
            output = scores.softmax(-1) @ v
        output.backward(grad.to(dtype))
        results.append([output.detach(), *(x.grad for x in inputs)])
    for found, true in zip(*results, strict=True):
        assert ((found - true).norm() / true.norm()).item() < 1e-5


def test_tokens_of_pythons_own_text(tmp_path):
    from safetensors.torch import load_file
    from tokens import python_tokens

    path = python_tokens(str(EMBEDDED), "embedded", 6, 4, 32, tmp_path)
    rows = load_file(path)
    assert {name: list(ids.shape) for name, ids in rows.items()} == {
        "train": [6, 32],
        "heldout": [4, 32],
        "other": [6, 32],
    }
    assert python_tokens(str(EMBEDDED), "embedded", 6, 4, 32, tmp_path) == path


def test_the_page_holds_the_results():
    sys.path.insert(0, str(METHODS))
    try:
        import page
        import pages
    finally:
        sys.path.remove(str(METHODS))
    text = page.PAGE.read_text(encoding="utf-8")
    assert pages.filled(text, page.tables()) == text, f"run python {METHODS / 'page.py'}"
