"""The benchmarks run on tiny models, and the pages hold what the committed results say."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import save_file

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
EXPERIMENTS = sorted((BENCHMARKS / "experiments").glob("*.json"))


@pytest.fixture(autouse=True)
def paths(monkeypatch):
    for folder in ("", "speed", "card"):
        monkeypatch.syspath_prepend(BENCHMARKS / folder)


@pytest.fixture
def main(monkeypatch):
    """Calls a script's `main` with a command line."""

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        importlib.import_module(script).main()

    return call


@pytest.fixture
def experiment(tmp_path, main):
    """Runs an experiment of two steps, as changed; returns its runs."""
    tiny_model().save_pretrained(tmp_path / "tiny")
    ids = torch.randint(3, 64, (24, 32), generator=torch.Generator().manual_seed(0)).int()
    save_file({"train": ids[:16].contiguous(), "heldout": ids[16:].contiguous()}, tmp_path / "tokens.safetensors")
    training = {"batch_size": 4, "steps": 2, "warmup_steps": 1, "schedule": "linear"}
    plan = {
        "settings": {"a": {"config": {"bits": 2, "group_size": 32, "zero_point": "float"}}},
        "contenders": ["full-precision", "rtn-mse", "gptq", "lsq", "lora-rtn", "l4q", "dlqat"],
        "training": training,
        "learning_rates": {"others": [1e-4], "l4q": [1e-6, 2e-2]},
        "search_share": 0.5,
        "seeds": [0],
    }

    def run(*arguments, **changes):
        (tmp_path / "small.json").write_text(json.dumps(plan | changes))
        own = ["--model", tmp_path / "tiny", "--tokens", tmp_path / "tokens.safetensors", "--jobs", 1]
        results = tmp_path / "results.json"
        main("run", tmp_path / "small.json", *own, "--results", results, *arguments)
        return json.loads(results.read_text())

    return run


@pytest.mark.slow
def test_an_experiment_of_two_steps(experiment, capsys):
    from runs import that_count

    data = experiment()
    runs = {name: [run for run in data["runs"] if run["contender"] == name] for name in ("l4q", "dlqat")}
    counts = {run["contender"]: run for run in data["runs"] if run in that_count([run])}
    assert len(counts) == 7 and counts["full-precision"]["kl"] == pytest.approx(0, abs=1e-6)
    assert 0 < counts["gptq"]["kl"] < counts["rtn-mse"]["kl"] < 10
    assert {counts[name]["bits_per_weight"] for name in ("gptq", "lsq", "dlqat")} == {3}
    assert len(data["work"]["tiny"]) == 16 and data["settings"]["a"]["config"]["bits"] == 2
    assert data["versions"][counts["lsq"]["versions"]]["torch"] == torch.__version__

    # The search goes beyond its end, and its best has the whole run.
    tried = {run["lr"]: run["kl"] for run in runs["l4q"] if run["share"] < 1}
    best = min(tried, key=tried.get)
    assert {1e-6, 2e-2} < tried.keys() and that_count(runs["l4q"])[0]["lr"] == best
    assert len(tried) == 5 or min(tried) < best < max(tried)

    capsys.readouterr()
    assert experiment("--only", "dlqat", "rtn-mse")["runs"] == data["runs"]  # nothing is run twice
    assert len(experiment("--only", "rtn-mse", "--seeds", 1)["runs"]) == len(data["runs"]) + 1
    with pytest.raises(SystemExit, match="has a of tiny with another setting"):
        experiment(settings={"a": {"config": {"bits": 3, "group_size": 32}}})


def test_steps_are_timed_against_dlqats(experiment, monkeypatch):
    runner = importlib.import_module("run")
    for name, value in runner.ALLOCATOR.items():
        monkeypatch.setenv(name, value)  # else it starts anew with them
    (row,) = experiment("--step_times", "--quick", contenders=["lsq", "rtn-mse", "dlqat"])["step_times"]
    assert row["ratios"].keys() == {"dlqat", "lsq"} and row["ratios"]["dlqat"]["median"] == 1


def test_a_failure_does_not_cost_what_runs_beside_it(experiment, tmp_path):
    training = {"batch_size": 2, "steps": 2, "warmup_steps": 1, "schedule": "no such schedule"}
    with pytest.raises(ValueError, match="no such schedule"):
        experiment(contenders=["rtn-mse", "lsq"], training=training)
    assert [run["contender"] for run in json.loads((tmp_path / "results.json").read_text())["runs"]] == ["rtn-mse"]


def test_which_learning_rate_comes_next_and_which_counts():
    from runs import best_rates, next_rates, that_count

    def run(lr, kl, seed=0, share=1.0, contender="l4q"):
        return {"contender": contender, "seed": seed, "share": share, "lr": lr, "kl": kl}

    search = [run(0.2, 0.5, share=0.25), run(9.0, 0.0, seed=1, share=0.25)]
    assert next_rates(search, [0.1, 0.2], 0) == [0.1]
    search += [run(0.1, 0.6, share=0.25)]
    assert next_rates(search, [0.1, 0.2], 0) == [0.4]
    search += [run(0.4, math.nan, share=0.25)]  # diverged: no best, though nothing is below it
    assert next_rates(search, [0.1, 0.2], 0) == [] and best_rates(search, 0) == [0.2]

    whole = [run(0.2, 0.5), run(0.1, 0.4)]
    assert best_rates(search + whole, 0) == [0.2, 0.1]
    assert that_count(search + whole) == [whole[1]]
    assert [each["lr"] for each in that_count([*whole, run(0.2, 0.5, seed=1)])] == [0.2, 0.2]  # of most runs
    assert that_count([run(0.1, 0.4, contender="dlqat"), run(0.2, 0.5, contender="dlqat")])[0]["lr"] == 0.2


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiments_results_are_of_it(path):
    from run import plan

    experiment = json.loads(path.read_text())
    planned = {job.setting: job.what for job in plan(experiment, [])}
    found = json.loads((BENCHMARKS / "results" / path.name).read_text())
    assert found["runs"] and {run["setting"] for run in found["runs"]} <= found["settings"].keys()
    assert all(planned[name] == what for name, what in found["settings"].items())


def test_the_pages_hold_the_results():
    import report

    for page, tables in report.tables().items():
        text = (report.PAGES / page).read_text(encoding="utf-8")
        assert report.filled(text, tables) == text, "run python benchmarks/report.py"


def test_the_pictures_are_drawn(tmp_path):
    import report

    report.draw("stories260k", tmp_path)
    report.draw_overview(tmp_path / "overview.png")
    assert {path.name for path in tmp_path.iterdir()} == {"bits.png", "time.png", "overview.png"}


def test_a_layer_is_timed(tmp_path, main):
    main("layer", "--quick", "--only", "2048 x 2048", "--results", tmp_path / "layer.json")
    row = json.loads((tmp_path / "layer.json").read_text())["rows"]["2048 x 2048"]
    assert row["time_ratio"]["LoRA"]["median"] == 1 and row["time_ratio"]["DL-QAT"]["median"] > 0
    kept = row["kept_bytes"]
    assert kept["DL-QAT"] < kept["DL-QAT, lowrank gradient"] < kept["QAT of the full weight, eager"]


def test_the_hosts_time_is_taken(tmp_path, main):
    pytest.importorskip("triton")
    main("host", "--quick", "--results", tmp_path / "host.json")
    rows = json.loads((tmp_path / "host.json").read_text())["rows"]
    assert len(rows) == 3 and all(row["DL-QAT"]["ratio"] > 0 and row["LoRA"]["ratio"] == 1 for row in rows.values())


def test_generation_is_timed(tmp_path, main):
    main("generate", "--quick", "--results", tmp_path / "generate.json")
    (row,) = json.loads((tmp_path / "generate.json").read_text())["rows"].values()
    assert row["time_ratio"]["LoRA"]["median"] == 1 and row["time_ratio"]["DL-QAT"]["median"] > 0
    assert row["bytes"]["LoRA"] < row["bytes"]["DL-QAT, int4 storage"] < row["bytes"]["DL-QAT"]  # both keep w_hat


@pytest.mark.filterwarnings("ignore:.*never calibrated")
def test_a_layer_that_is_off_is_not_timed(monkeypatch):
    import layer

    work = layer.Work(tokens=8, n_in=128, n_out=64)
    model = layer.ours(work)
    layer.check("DL-QAT", model, work)
    true = model.forward
    monkeypatch.setattr(model, "forward", lambda x: 1.01 * true(x))
    with pytest.raises(SystemExit, match="DL-QAT is not timed: its output is off by 1"):
        layer.check("DL-QAT", model, work)


@pytest.mark.slow
def test_the_cards_check_in_short(tmp_path, main):
    import report

    main("check", "--short", "--results", tmp_path / "card.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "card.jsonl").read_text().splitlines()]
    assert not [line for line in lines if "error" in line]
    parts = {line["part"]: line for line in lines}
    assert parts.keys() == {"machine", "tests", "layer", "model", "room", "done"}
    assert (parts["tests"]["passed"], parts["tests"]["failed"]) == (1, 0)
    assert report.card_layers(lines).count("\n") == 3  # head, line, two numbers of tokens
    assert "| DL-QAT, int4 storage | a generated token |" in report.card_models(lines)


def test_the_structure_is_counted(main, monkeypatch, capsys):
    import structure

    monkeypatch.setattr(structure, "REPETITIONS", 10)
    main("structure")
    rows = dict(line.split("|")[1:3] for line in capsys.readouterr().out.splitlines())
    files, functions, changes = map(
        int, rows[" DL-QAT, forward with grad: files, functions, changes of file "].split(",")
    )
    assert 1 < files <= changes + 1 and files < functions
    assert structure.longest_chain({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == ["a", "b", "c"]
    with pytest.raises(SystemExit, match="a circle: a -> b -> a"):
        structure.longest_chain({"a": {"b"}, "b": {"a"}})
