"""examples/finetune.py: the demo, the user's own model and text, and what is said about mistakes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import datasets
import pytest
import torch
from hub_server import Hub
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parents[2] / "examples"
PARAGRAPHS = [f"Paragraph {i} says that {i} and {i + 1} make {2 * i + 1}, as numbers do." for i in range(120)]
EQUAL = "logits of the trained, the reloaded and the merged model are equal (torch.equal)"
SHORT = ["--length", "16", "--steps", "6", "--calibration_steps", "2", "--batch_size", "4", "--eval_blocks", "8"]
QUANTIZED = (
    "round-to-nearest",
    "LoRA, then round-to-nearest",
    "LoRA, then rounded, clipping outliers",
    "DL-QAT",
)
METRIC = """
import datasets
import evaluate


class {name}(evaluate.Metric):
    def _info(self):
        kind = datasets.Value("{kind}")
        features = datasets.Features({{"predictions": kind, "references": kind}})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {{"agreement": sum(p == r for p, r in zip(predictions, references)) / len(references)}}
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model, texts in every kind of file, and two metric scripts."""
    folder = tmp_path_factory.mktemp("given")
    rows = datasets.Dataset.from_dict({"text": PARAGRAPHS, "number": list(range(len(PARAGRAPHS)))})
    (folder / "text.txt").write_text("\n\n".join(PARAGRAPHS), encoding="utf-8")
    (folder / "short.txt").write_text(PARAGRAPHS[0], encoding="utf-8")
    rows.to_json(folder / "text.jsonl")
    rows.to_csv(folder / "text.csv", index=False)
    rows.to_parquet(folder / "text.parquet")
    rows.save_to_disk(folder / "saved")
    datasets.DatasetDict(train=rows, other=rows.select(range(60))).save_to_disk(folder / "saved_splits")
    (folder / "of_files").mkdir()
    rows.to_json(folder / "of_files" / "train.jsonl")
    for name, kind in {"agreement": "int32", "of_text": "string"}.items():
        (folder / f"{name}.py").write_text(METRIC.format(name=name.title().replace("_", ""), kind=kind))

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(PARAGRAPHS, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder / "model"
    )
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder


@pytest.fixture
def finetune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The script as a module. Its helpers' short names are forgotten again afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield importlib.import_module("finetune")
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(EXAMPLES)):
            del sys.modules[name]


def run(*args: str, folder: Path, **environment: str) -> str:
    """Run the script in a process of its own, as a user does; returns what it printed."""
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    env = {**os.environ, **env, **environment}
    command = [sys.executable, str(EXAMPLES / "finetune.py"), *args]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def rows_of(folder: Path) -> dict[tuple[str, int | None], dict]:
    """The rows of results.json, by method and bits."""
    results = json.loads((folder / "results.json").read_text())["results"]
    return {(row["method"], row["bits"]): row for row in results}


def steps_of(folder: Path, curve: str) -> int:
    """Optimiser steps of one training, without its calibration."""
    return max(entry["step"] for entry in json.loads((folder / "results.json").read_text())["curves"][curve])


@pytest.mark.slow
def test_demo_runs_offline_and_leaves_table_pictures_and_adapters(tmp_path: Path) -> None:
    """`--demo --smoke`: every row is there and filled, and both adapters come back from the disk to the bit."""
    printed = run("--demo", "--smoke", folder=tmp_path)

    out = tmp_path / "outputs" / "demo"
    rows = rows_of(out)
    assert list(rows) == [
        ("full precision, not fine-tuned", None),
        ("LoRA in full precision", None),
        *((method, bits) for bits in (3, 2) for method in QUANTIZED),
    ]
    assert f"3 bits: {EQUAL}" in printed and f"2 bits: {EQUAL}" in printed
    table = printed[printed.index("=====") :]
    for (method, _), row in rows.items():
        assert method in table and f"{row['perplexity']:.2f}" in table
        assert 1 < row["perplexity"] < 2048 and 0 < row["accuracy"] < 1
    base, lora = rows["full precision, not fine-tuned", None], rows["LoRA in full precision", None]
    assert lora["perplexity"] < base["perplexity"]
    assert rows["round-to-nearest", 2]["perplexity"] > rows["round-to-nearest", 3]["perplexity"]
    assert base["bits_per_weight"] == 16 and base["trained_share"] == 0
    # A row of 256 or 768 weights has a 16-bit scale and a zero point of as many bits as a code.
    for bits in (2, 3):
        row = rows["DL-QAT", bits]
        assert bits + (16 + bits) / 768 < row["bits_per_weight"] < bits + (16 + bits) / 256
        assert {rows[method, bits]["bits_per_weight"] for method in QUANTIZED} == {row["bits_per_weight"]}
        assert lora["trained_share"] < row["trained_share"] < 0.06
        names = {path.name for path in (out / f"dlqat-{bits}bit").iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= names
        config = json.loads((out / f"dlqat-{bits}bit" / "adapter_config.json").read_text())
        assert config["bits"] == bits
        assert steps_of(out, f"DL-QAT, {bits} bits") <= 6
    assert steps_of(out, "LoRA in full precision") == 6
    for picture in ("curves.png", "perplexity.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert (out / "results.md").read_text().count("| DL-QAT |") == 2


@pytest.mark.slow
def test_own_model_text_and_metric_script(given: Path, tmp_path: Path) -> None:
    """A model folder, a text file and a script for `evaluate`, by path: DL-QAT learns the text, and is pushed."""
    with Hub() as hub:
        printed = run(
            *("--model", str(given / "model"), "--dataset", str(given / "text.txt"), "--output_dir", "out"),
            *("--metric", str(given / "agreement.py"), "--bits", "4", "--group_size", "16", "--zero_point", "none"),
            *("--steps", "40", "--calibration_steps", "5", "--batch_size", "4", "--length", "32", "--seed", "1"),
            *("--dtype", "bfloat16", "--r", "4", "--lr", "2e-2", "--push_to_hub", "somebody/small"),
            folder=tmp_path,
            **hub.environment(tmp_path / "hf"),
        )
        pushed = hub.files("somebody/small")
    rows = rows_of(tmp_path / "out")
    assert list(rows) == [
        ("full precision, not fine-tuned", None),
        ("round-to-nearest", 4),
        ("DL-QAT", 4),
    ]
    assert f"4 bits: {EQUAL}" in printed
    assert "agreement" in printed[printed.index("=====") :]
    for row in rows.values():
        assert row["metrics"]["agreement"] == pytest.approx(row["accuracy"])
    assert rows["DL-QAT", 4]["perplexity"] < 0.9 * rows["full precision, not fine-tuned", None]["perplexity"]
    assert rows["DL-QAT", 4]["bits_per_weight"] == 4 + 16 / 16
    weights = load_file(tmp_path / "out" / "dlqat-4bit" / "adapter_model.safetensors")
    assert pushed["adapter_model.safetensors"] == (tmp_path / "out/dlqat-4bit/adapter_model.safetensors").read_bytes()
    assert {"adapter_config.json", "tokenizer.json", "README.md"} <= pushed.keys()
    assert {tensor.shape[0] for name, tensor in weights.items() if name.endswith("dlqat_A.weight")} == {4}


def test_an_adapter_that_comes_back_changed_is_found(
    finetune: ModuleType, given: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If one scale is off after loading, the script says that the logits differ, and fails."""
    load = finetune.PeftModel.from_pretrained

    def load_changed(*args: object, **kwargs: object) -> torch.nn.Module:
        model = load(*args, **kwargs)
        next(p for name, p in model.named_parameters() if "dlqat_scale" in name).data[0] *= 1.05
        return model

    monkeypatch.setattr(finetune.PeftModel, "from_pretrained", load_changed)
    own = ["--model", str(given / "model"), "--dataset", str(given / "text.txt"), "--output_dir", "out"]
    settings = ["--set", "scale_dtype=float16", "storage=int4", 'export=["compressed-tensors"]', "lora_alpha=16"]
    assert finetune.main([*own, *SHORT, "--bits", "3", "--group_size", "32", *settings]) == 1
    assert "DIFFER" in capsys.readouterr().out
    saved = json.loads(Path("out/dlqat-3bit/adapter_config.json").read_text())
    found = [saved[name] for name in ("scale_dtype", "storage", "export", "lora_alpha", "r")]
    assert found == ["float16", "int4", ["compressed-tensors"], 16, 8]


@pytest.mark.parametrize(
    "name", ["text.txt", "text.jsonl", "text.csv", "text.parquet", "saved", "saved_splits", "of_files"]
)
def test_every_kind_of_local_dataset_gives_the_same_blocks(finetune: ModuleType, given: Path, name: str) -> None:
    """Files of each format and folders of each kind hold the same text, so they give the same blocks of tokens."""
    from data import dataset_blocks
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given / "model")
    train, held_out = dataset_blocks(str(given / name), None, "train", None, "text", tokenizer, 32)
    expected = [token for text in PARAGRAPHS for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    blocks = torch.cat([train["input_ids"][:], held_out["input_ids"][:]])
    assert blocks.flatten().tolist() == expected[: len(expected) // 32 * 32]
    assert len(held_out) == len(blocks) // 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--demo", "--model", "MODEL"], "--demo is the embedded model and text"),
        (["--model", "MODEL"], "--model needs a --dataset"),
        (["--steps", "5", "--calibration_steps", "5"], "--calibration_steps 5 are taken out of --steps 5"),
        (["--steps", "0"], "0 is not positive"),
        (["OWN", "--bits", "9"], "bits=9 must be an integer from 2 to 8"),
        (["OWN", "--group_size", "0"], "group_size=0 must be an integer of at least 1"),
        (["--model", "MODEL", "--dataset", "nowhere.txt"], "cannot load the dataset 'nowhere.txt'"),
        (["--model", "MODEL", "--dataset", "GIVEN/agreement.py"], "none of the known kinds of file: .txt, .jsonl"),
        (["--model", "nowhere/model", "--dataset", "GIVEN/text.txt"], "cannot fine-tune 'nowhere/model'"),
        (["OWN", "--split", "test"], "cannot load the dataset"),
        (["--model", "MODEL", "--dataset", "GIVEN/saved_splits", "--split", "test"], "splits ['train', 'other']"),
        (["--model", "MODEL", "--dataset", "GIVEN/text.csv", "--text_column", "body"], "one of ['text', 'number']"),
        (["--model", "MODEL", "--dataset", "GIVEN/text.csv", "--text_column", "number"], "holds int, not text"),
        (["OWN", "--length", "65"], "--length 65 is more than the 64 positions"),
        (
            ["--model", "MODEL", "--dataset", "GIVEN/short.txt", "--length", "64"],
            "shorter than one block of 64 tokens",
        ),
        (["OWN", "--group_size", "48"], "group_size=48 is larger than in_features=32"),
        (["OWN", "--set", "bits=3"], "bits has an argument of its own, --bits"),
        (
            ["OWN", "--set", "scales=float16"],
            "must be NAME=VALUE, with a name among alpha_pattern, bias, bits_pattern",
        ),
        (["OWN", "--set", "storage"], "--set storage must be NAME=VALUE"),
        (["OWN", "--set", 'export=["mlx"]', "storage=int3"], "storage='int3' must be one of"),
        (
            ["OWN", "--zero_point", "float", "--set", 'export=["gptq"]'],
            "gptq cannot hold bits=3",
        ),
        (["OWN", "--metric", "nowhere"], "cannot load the metric 'nowhere'"),
        (["OWN", "--metric", "GIVEN/of_text.py"], "but is given the predicted and the true next tokens"),
    ],
)
def test_a_mistake_in_the_arguments_is_named(
    finetune: ModuleType, given: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    """The script ends with argparse's status 2 and one message that says what to do, not with a traceback."""
    words = ["--length", "16"]
    for word in arguments:
        own = ["--model", "MODEL", "--dataset", "GIVEN/text.txt"] if word == "OWN" else [word]
        words += [w.replace("MODEL", str(given / "model")).replace("GIVEN", str(given)) for w in own]
    with pytest.raises(SystemExit) as stopped:
        finetune.main(words)
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
