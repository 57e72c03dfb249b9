"""The script for full-size runs, on a small model and data of its own."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "full_size" / "run.py"

spec = importlib.util.spec_from_file_location("full_size_run", SCRIPT)
full_size = importlib.util.module_from_spec(spec)
spec.loader.exec_module(full_size)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the learning rate of A and B")  # is for a width of 4096
def test_trains_measures_and_writes(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install peft-dlqat[eval]")
    rows = [
        {"instruction": f"Say {i}.", "input": "" if i % 2 else f"the number {i}", "output": str(i)} for i in range(24)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    settings = json.loads((ROOT / "benchmarks" / "full_size" / "llama-7b-alpaca.json").read_text())
    settings.update(
        model=str(ROOT / "examples" / "embedded" / "model"),
        dataset=str(tmp_path / "data.jsonl"),
        dtype="float32",
        held_out=4,
        max_length=64,
        calibration_steps=1,
        max_steps=2,
        gradient_accumulation_steps=1,
        tasks=["small_facts"],
        task_folder=str(ROOT / "examples" / "tasks"),
    )
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    command = ["run.py", str(tmp_path / "settings.json"), "--only", "3bit-g128", "--limit", "4"]
    command += ["--results", str(tmp_path / "results"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    full_size.main()
    figures = json.loads((tmp_path / "results" / "3bit-g128.json").read_text())
    assert figures["calibration"]["steps"] == 1
    assert figures["held_out"]["kl"] > 0 and figures["held_out"]["tokens"] > 0
    assert 0 <= figures["tasks"]["small_facts"]["acc"] <= 1
    assert (tmp_path / "out" / "3bit-g128" / "adapter_model.safetensors").exists()


def test_only_the_answer_has_labels():
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "embedded" / "model")
    rows = datasets.Dataset.from_list([{"instruction": "Add.", "input": "1 and 2", "output": "three"}])
    row = full_size.tokenize(rows, tokenizer, 64)[0]
    answer = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == "three"
    assert row["input_ids"][-len(answer) :] == answer and answer[-1] == tokenizer.eos_token_id
    assert "1 and 2" in tokenizer.decode(row["input_ids"])
