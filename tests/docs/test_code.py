"""The code of README and docs. Python runs, page by page, on a tiny model; commands name what there is.

A block after `<!-- not run: why -->` is compiled, and its calls are held against the signatures of what they call.
"""

from __future__ import annotations

import ast
import configparser
import inspect
import re
import shlex
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from conftest import lm_batches, perturb, say_calibrated, tiny_model
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments
from trl import TrlParser
from trl_trainers import data as trl_data
from word_tokenizer import word_tokenizer

import peft_dlqat
from peft_dlqat import DLQATConfig, export_model
from peft_dlqat.cli.main import main, make_parser
from peft_dlqat.cli.train import TrainArguments, TrainingSettings
from peft_dlqat.formats import FORMATS
from peft_dlqat.methods import METHODS

ROOT = Path(__file__).parents[2]
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
BLOCK = re.compile(r"^(<!-- not run: .+ -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [(page, *match) for page, text in PAGES.items() for match in BLOCK.findall(text)]

QUIET = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False, "save_strategy": "no"}
# What stands for something large is small here.
SMALLER = {
    r'"(meta-llama/Llama-3.2-1B|Qwen/Qwen3-0.6B|folder or hub id)"': '"base"',
    r'"you/llama-3bit-adapter"': '"llama-3bit-adapter"',
    r'"cuda"': '"cpu"',
    r"max_steps=\d+": "max_steps=1, **QUIET",
    r"_batch_size=\d+": "_batch_size=2",
    r"_accumulation_steps=\d+": "_accumulation_steps=1",
    r'by="blocks"': 'by="blocks", steps=1',
    r"(calibrate_from_disk\(.*)\)$": r"\1, steps=1)",
    r"steps=100": "steps=1",
    r"2000, length=512": "4, length=16",
    r'(?<!all-linear", )task_type="CAUSAL_LM"': 'task_type="CAUSAL_LM", init="minmax"',  # which is no LoraConfig's
    r"beta=0.04": "beta=0.04, num_generations=2, max_completion_length=4",
}


def blocks(language: str) -> list[tuple[str, str, str]]:
    """Page, mark and text."""
    return [(page, mark, text) for page, mark, found, text in BLOCKS if found == language]


def of_python(run: bool) -> dict[str, list[str]]:
    pages: dict[str, list[str]] = {}
    for page, mark, text in blocks("python"):
        if bool(mark) is not run:
            pages.setdefault(page, []).append(text)
    return pages


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model and adapters, by the names that the pages give them."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("base", "FOLDER"):
        tiny_model("wide llama", torch.bfloat16).save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = "base"
    for name in ("llama-3bit-adapter", "chat-3bit-adapter"):
        model.save_pretrained(folder / name)
    return folder


def adapted() -> PeftModel:
    """What a reader has trained."""
    config = DLQATConfig.for_engine("llama.cpp", "Q4_0", task_type="CAUSAL_LM", init="minmax")
    model = get_peft_model(tiny_model("wide llama", torch.bfloat16), config)
    say_calibrated(model)
    perturb(model)
    return model


@pytest.fixture
def reader(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a reader has by then, by the names that the pages give it."""
    shutil.copytree(disk, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    ids = [batch["input_ids"][0].tolist() for batch in lm_batches(8)]
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    return {
        **{name: getattr(peft_dlqat, name) for name in peft_dlqat.__all__},
        "QUIET": QUIET,
        "get_peft_model": get_peft_model,
        "Trainer": Trainer,
        "model": adapted(),
        "tokenizer": word_tokenizer(),
        "arguments": TrainingArguments("trained", max_steps=1, **QUIET),
        "config": DLQATConfig(bits=3, storage="int4", task_type="CAUSAL_LM"),
        "data": rows,
        "train_dataset": rows,
        "held_out": lm_batches(2),
        "dataloader": lm_batches(2),
        "batches": lm_batches(2),
        "batch": lm_batches(1)[0],
        "texts": ["w1 w2 w3 w4", "w5 w6 w7 w8"],
        "dataset": Dataset.from_dict({"prompt": ["w1 w2"] * 8, "completion": ["w3 w4"] * 8}),
        "preferences": trl_data("dpo"),
        "prompts": trl_data("grpo"),
        "reward": lambda completions, **_: [float(len(text)) for text in completions],
    }


@pytest.mark.parametrize("page", of_python(run=True))
@pytest.mark.filterwarnings("ignore:left out of the LoRA config")
def test_python_runs(page: str, reader: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if page == "README":
        reader["model"] = tiny_model("wide llama", torch.bfloat16)
    # llama.cpp runs in a process of its own, which takes seconds.
    asked = [engine for engine in FORMATS["gguf"].engines if engine.name == "transformers"]
    monkeypatch.setattr(FORMATS["gguf"], "engines", asked)
    with patch.dict(METHODS), patch.dict(FORMATS):  # to which a page adds
        for text in of_python(run=True)[page]:
            for large, small in SMALLER.items():
                text = re.sub(large, small, text, flags=re.MULTILINE)
            exec(compile(text, f"{page}.md", "exec"), reader)


@pytest.mark.filterwarnings("ignore:adapter 'default' was never")
def test_the_method_and_the_format_of_design_work(tmp_path: Path) -> None:
    with patch.dict(METHODS), patch.dict(FORMATS):
        for text in of_python(run=True)["design"]:
            exec(compile(text, "design.md", "exec"), {})
        settings = {"method": "gain", "magnitude": "none", "zero_point": "none", "group_size": 64, "init": "minmax"}
        model = get_peft_model(tiny_model(), DLQATConfig(bits=3, export=["bytes"], **settings))
        export_model(model, tmp_path / "out", "bytes")
        (file,) = (tmp_path / "out").glob("*.safetensors")
        layer = model.base_model.model.get_submodule(name := "model.layers.0.mlp.up_proj")
        assert torch.equal(load_file(file)[f"{name}.codes"], layer.quantized_weight().codes)
        assert set(layer.trained("default")) >= {"gain"}


@pytest.mark.parametrize(("page", "texts"), of_python(run=False).items())
def test_calls_have_arguments_that_there_are(page: str, texts: list[str]) -> None:
    names: dict[str, Any] = {}
    for text in of_python(run=True).get(page, []) + texts:
        tree = ast.parse(text)
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), page, "exec"), names)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[0] in names:
                called = eval(ast.unparse(node.func), names)
                keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
                inspect.signature(called).bind(*node.args, **keywords)


def test_commands_have_options_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    train = TrlParser([TrainArguments, TrainingSettings])
    lines = [line for _, _, text in blocks("bash") for line in text.replace("\\\n", " ").splitlines()]
    found = [line for line in lines if line.startswith("dlqat ")]
    assert found
    for line in found:
        _, command, *arguments = shlex.split(line, comments=True)
        if command == "train":
            train.parse_args_and_config([*arguments, "--use_cpu", "--report_to=none"])
        else:
            make_parser().parse_args([command, *arguments])


def test_targets_scripts_and_extras_are_there() -> None:
    targets = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1).split())
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for text in PAGES.values():
        assert targets >= {*re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)}
        for path in re.findall(r"(?:python|bash) ((?:benchmarks|examples|tests)/[\w/.]+)", text):
            assert (ROOT / path).is_file(), path
        for names in re.findall(r"'\.\[([\w,-]+)\]'", text):
            assert {*names.split(",")} <= {*setup["options.extras_require"]}, names


def test_files_of_settings_are_yaml() -> None:
    assert all(yaml.safe_load(text) for _, _, text in blocks("yaml"))


def test_what_plan_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    ((text,),) = [[text for page, _, text in blocks("text") if page == "choose"]]
    command = re.search(r"`dlqat (plan examples.*?)`", PAGES["choose"]).group(1)
    assert main(command.split()) == 0
    printed = capsys.readouterr()
    assert text in printed.out + printed.err


def test_the_table_of_presets_is_theirs() -> None:
    rows = [
        row.strip("| \n").split(" | ") for row in re.findall(r"^\|.*`\"[\w.]+\", .*$", PAGES["choose"], re.MULTILINE)
    ]
    assert len(rows) > 10
    for *_, call, bits, group, zero, dtype, format, width, storage in rows:
        config = eval(f"DLQATConfig.for_engine({call.strip('`')}, storage={storage})")
        assert [config.bits, config.group_size, config.zero_point, config.scale_dtype, config.export] == [
            *(int(bits), int(group), eval(zero), eval(dtype), [eval(format)])
        ]
        (grid,) = config.grids()
        assert f"{FORMATS[eval(format)].stored_as(grid)[1] + 1e-6:.2f}" == width, call


def test_messages_are_those_of_the_package() -> None:
    """What stands in troubleshooting as printed is in the source; `...` there is a value."""
    known = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = getattr(node, "values", [node]) if isinstance(node, ast.JoinedStr | ast.Constant) else []
            known.append("".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in parts))
    tables = PAGES["troubleshooting"].split("## Nothing is printed")[0]
    printed = [
        text for row in re.findall(r"^\| (`.*?`) \| ", tables, re.MULTILINE) for text in re.findall(r"`(.*?)`", row)
    ]
    assert len(printed) > 25
    lost = []
    for text in printed:
        pattern = re.compile(".*".join(map(re.escape, text.split("..."))), re.DOTALL)
        if text != "KeyError: 'DLQAT'" and not any(pattern.search(message) for message in known):
            lost.append(text)
    assert not lost


@pytest.mark.parametrize("page", ["README", "choose", "compare", "methods"])
def test_losses_are_those_of_the_benchmarks(page: str) -> None:
    measured = set(re.findall(r"\d\.\d{3}", PAGES["benchmarks"] + PAGES["speed"]))
    assert set(re.findall(r"\b\d\.\d{3}\b", PAGES[page])) <= measured
