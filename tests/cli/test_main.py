"""The commands, replayed as a user would type them, on the embedded model."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import datasets
import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_dlqat import DLQATConfig, export_model
from peft_dlqat.cli.destination import config_for_file
from peft_dlqat.cli.main import main
from peft_dlqat.formats.llama_cpp import logits

ROOT = Path(__file__).parents[2]
CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}{% endfor %}"

SHORT = ["--max_steps=2", "--per_device_train_batch_size=2", "--max_length=48", "--report_to=none", "--use_cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model that can chat, a dataset of chat, one of text, and what `dlqat train` made of them."""
    folder = tmp_path_factory.mktemp("cli")
    shutil.copytree(ROOT / "examples" / "embedded" / "model", folder / "base")
    path = folder / "base" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": CHAT}))
    turns = [("user", "What does list.append do?"), ("assistant", "It adds an item to the end of the list.")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(16)))
    sentences = "\n\n".join(f"The list has {i} items, and append adds one more." for i in range(99))
    (folder / "text.txt").write_text(sentences)
    (folder / "taken" / "gguf").mkdir(parents=True)
    (folder / "taken" / "gguf" / "mine.txt").write_text("")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(folder / "saved")
    assert main(["train", *_base(folder), "--to", "gguf:Q3_K", "--output", str(folder / "out"), *SHORT]) == 0
    return folder


def _base(folder):
    return ["--model", str(folder / "base"), "--dataset", str(folder / "chat.jsonl")]


def test_training_makes_a_file_that_llama_cpp_runs_as_the_model_trained(folder):
    adapter = json.loads((folder / "out" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["bits"], adapter["scale_dtype"], adapter["export"]) == (3, "k_quant", ["gguf"])
    ids = torch.arange(40)[None]
    found = logits(folder / "out" / "gguf" / "model.gguf", ids, as_float32=True)
    model = AutoPeftModelForCausalLM.from_pretrained(folder / "out" / "adapter", dtype=torch.float32)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-3)


@pytest.mark.slow
def test_a_quantized_file_is_trained_and_written_again(folder):
    file, out = folder / "out" / "gguf" / "model.gguf", folder / "again"
    arguments = ["--model", str(file), "--base", str(folder / "base"), "--dataset", str(folder / "chat.jsonl")]
    assert main(["train", *arguments, "--output", str(out), *SHORT]) == 0
    written = out / "gguf" / "model.gguf"
    assert written.stat().st_size == file.stat().st_size
    assert written.read_bytes() != file.read_bytes()
    with pytest.raises(ValueError, match="--bits 3 has no meaning for a quantized file"):
        config_for_file("gguf", None, 3, [])


@pytest.mark.slow
def test_a_quantized_folder_is_trained_and_written_again(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    settings = {"bits": 4, "zero_point": "none", "scale_dtype": "float16", "init": "minmax", "group_size": 32}
    source = tmp_path / "gptq"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it was not trained
        export_model(
            get_peft_model(model, DLQATConfig(**settings, task_type="CAUSAL_LM")), source, "gptq", verify=False
        )
    data = ["--dataset", str(folder / "chat.jsonl"), "--output", str(tmp_path / "out")]
    assert main(["train", "--model", str(source), *data, *SHORT]) == 0
    written = tmp_path / "out" / "gptq"
    assert (written / "config.json").read_bytes() == (source / "config.json").read_bytes()
    old, new = (load_file(path / "model.safetensors") for path in (source, written))
    assert any(not torch.equal(old[name], new[name]) for name in old if name.endswith("down_proj.scales"))
    adapter = tmp_path / "out" / "adapter"
    assert main(["export", str(adapter), "--to", "gptq", "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (written / "model.safetensors").read_bytes()


def test_llama_cpp_writes_on_as_the_model_does(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "out" / "adapter")
    ids = tokenizer("user: What does list.append do?", return_tensors="pt").input_ids
    model = AutoPeftModelForCausalLM.from_pretrained(folder / "out" / "adapter", dtype=torch.float32)
    expected = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    for _ in range(4):
        found = logits(folder / "out" / "gguf" / "model.gguf", ids, as_float32=True)
        ids = torch.cat([ids, found[:, -1:].argmax(-1)], dim=1)
    assert ids.tolist() == expected.tolist()


def test_an_adapter_is_exported_verified_and_inspected(folder, capsys):
    adapter, out = str(folder / "out" / "adapter"), str(folder / "dense")
    assert main(["export", adapter, "--to", "dense", "--output", out]) == 0
    assert main(["verify", out]) == 0
    assert "transformers: max difference 0" in capsys.readouterr().out
    weights = folder / "dense" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    assert main(["verify", out]) == 1
    picture = folder / "layers.png"
    assert main(["inspect", adapter, "--png", str(picture)]) == 0
    assert "layers.2.mlp.down_proj" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_adapter_and_a_plain_model_are_measured(folder, capsys):
    text = ["--dataset", str(folder / "text.txt"), "--split", "train", "--length", "32", "--blocks", "4"]
    assert main(["eval", str(folder / "out" / "adapter"), *text]) == 0
    of_adapter = capsys.readouterr().out
    assert main(["eval", str(folder / "base"), "--teacher", str(folder / "base"), *text]) == 0
    of_base = capsys.readouterr().out
    assert "KL" in of_adapter and of_adapter != of_base


def test_a_plan_names_the_size_that_the_file_has(folder, capsys):
    assert main(["plan", str(folder / "base"), "--to", "gguf:Q3_K", "--set", "r=4"]) == 0
    said = capsys.readouterr().out
    size = (folder / "out" / "gguf" / "model.gguf").stat().st_size / 1e6
    printed = re.search(r"gguf +([\d.]+) MB", said)
    assert float(printed[1]) == pytest.approx(size, rel=0.02) and "GiB" in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--bits", "3", "--model", "none/such", "--dataset", "{chat}", "--output", "o"], "none/such"),
        (["train", "--model", "{base}", "--dataset", "{chat}", "--output", "o"], "--bits 3, or --to"),
        (["train", "--to", "phone:3", "--model", "{base}", "--dataset", "{chat}", "--output", "o"], "'phone'"),
        (["train", "--to", "gguf:Q9", "--model", "{base}", "--dataset", "{chat}", "--output", "o"], "Q9"),
        (["train", "--bits", "3", "--model", "{base}", "--dataset", "no.csv", "--output", "o"], "no.csv"),
        (["export", "{base}", "--to", "gguf", "--output", "o"], "adapter_config.json"),
        (["verify", "{base}"], "export"),
        (["eval", "{base}"], "--dataset"),
        (["plan", "{base}", "--bits", "3", "--set", "colour=red"], "colour=red"),
        (["plan", "{base}", "--bits", "3", "--set", "bits=2"], "an option of its own"),
        (["plan", "{base}", "--bits", "3", "--to", "vllm:4"], "different widths"),
        (["plan", "small.gguf", "--bits", "3"], "small.gguf is quantized, and is written again with its own types"),
        (
            ["train", "--to", "gguf:Q3_K", "--model", "{base}", "--dataset", "{chat}", "--output", "{taken}"],
            "not empty",
        ),
        (
            ["train", "--to", "vllm:4", "--model", "{base}", "--dataset", "{chat}", "--output", "o", "--push_to_hub"],
            "hf upload",
        ),
        (["eval", "{base}", "--dataset", "{saved}"], "without splits"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else None,
)
def test_mistakes_are_told_in_a_line(arguments, message, folder, capsys):
    names = {name: str(folder / name) for name in ("base", "taken", "saved")} | {"chat": str(folder / "chat.jsonl")}
    assert main([argument.format(**names) for argument in arguments]) == 1
    said = capsys.readouterr().err
    assert "dlqat: error: " in said and message in said and "Traceback" not in said


def test_help_teaches_and_settings_come_from_a_file(folder, tmp_path, capsys):
    for arguments in (["--help"], ["train", "--help"], ["export", "--help"]):
        with pytest.raises(SystemExit) as status:
            main(arguments)
        assert status.value.code == 0
    said = capsys.readouterr().out
    assert "--to gguf:Q3_K" in said and "--learning_rate" in said and "--lora_alpha" in said
    settings = {"model": str(folder / "base"), "dataset": str(folder / "text.txt"), "bits": 2, "max_steps": 1}
    (tmp_path / "run.yaml").write_text(json.dumps({**settings, "max_length": 32, "use_cpu": True}))  # JSON is YAML
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["bits"] == 2 and not (tmp_path / "out" / "gguf").exists()


def test_a_saved_tokenizer_goes_with_the_adapter(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "out" / "adapter")
    assert tokenizer.chat_template == CHAT
    assert AutoModelForCausalLM.from_pretrained(folder / "base").config.vocab_size >= len(tokenizer)
