"""Adapters by way of the Hub: pushed from one process, loaded in a fresh one, over HTTP on this machine.

huggingface_hub reads its endpoint when it is imported, so everything that talks to the server is a function here that
runs in a process of its own (`run_client`), and imports what it needs inside: this module must be importable without
peft_dlqat, which `load` does without at first, on purpose.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hub_server import TOKEN, Hub

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, Trainer

BASE = "tester/base"
ADAPTER = "tester/adapter"
INJECTED = "tester/injected"
TRAINER = "tester/by-trainer"
TRAINER_INJECTED = "tester/by-trainer-injected"
SFT = "tester/by-sft"
EXPORTED, EXPORTED_BY_ID = "tester/exported", "tester/exported-by-id"
PUSHED = (ADAPTER, INJECTED, TRAINER, TRAINER_INJECTED, SFT)
NOTE = "Trained by hand; do not feed after midnight."
CONFIG = {"bits": 3, "group_size": 32, "zero_point": "integer", "scale_dtype": "float16", "r": 4, "lora_alpha": 4}
GRID_ROW = "3 bits, groups of 32 input channels, zero point: integer, scales in float16"
HAS_TRL = importlib.util.find_spec("trl") is not None


# One Hub, and one run of each client, for all of the file. What needs them is slow.
pytestmark = pytest.mark.xdist_group("hub")


# ----- Clients: each runs in a process of its own -----------------------------------------------------------


@cache
def token_ids() -> torch.Tensor:
    from conftest import tokens

    return tokens(batch=2, seed=100)


def logits(model: torch.nn.Module) -> torch.Tensor:
    import torch

    model.eval()
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def base_model() -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BASE)


def calibrate_and_train(model: torch.nn.Module) -> dict[str, Any]:
    """A few steps of both; the calibration as it was returned."""
    import torch
    from conftest import lm_batches

    from peft_dlqat import calibrate

    calibration = calibrate(model, lm_batches(2), steps=4, progress=False)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=0.0)
    for batch in lm_batches(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return asdict(calibration)


def trainer_for(model: torch.nn.Module, repo: str, folder: Path) -> Trainer:
    """A Trainer (or, for SFT, TRL's) that calibrates, trains two steps and pushes to `repo`."""
    from conftest import tokens
    from transformers import Trainer, TrainingArguments

    from peft_dlqat import DLQATCallback, DLQATConfig

    settings = {
        "output_dir": str(folder / repo),
        "hub_model_id": repo,
        "push_to_hub": True,
        "max_steps": 2,
        "learning_rate": 2e-4,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "weight_decay": 0.0,
    }
    examples = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in tokens(8)]
    callbacks = [DLQATCallback(calibration_steps=3)]
    if repo != SFT:
        return Trainer(model, TrainingArguments(**settings), train_dataset=examples, callbacks=callbacks)

    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    args = SFTConfig(
        **settings, dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=False, bf16=False
    )
    return SFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_list(examples),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>"),
        peft_config=DLQATConfig(**CONFIG, task_type="CAUSAL_LM"),
        callbacks=callbacks,
    )


def publish(folder: Path) -> None:
    """Push adapters by every way there is; leave in `folder` what was pushed and what it computes."""
    import torch
    from conftest import tiny_model
    from huggingface_hub import HfApi
    from peft import get_peft_model

    from peft_dlqat import DLQATConfig, export_model

    outputs: dict[str, torch.Tensor] = {}
    report: dict[str, Any] = {}
    tiny_model("llama").push_to_hub(BASE)
    outputs[BASE] = logits(base_model())

    model = get_peft_model(base_model(), DLQATConfig(**CONFIG, task_type="CAUSAL_LM"))
    report[ADAPTER] = calibrate_and_train(model)
    report["parameters"], _ = model.get_nb_trainable_parameters()
    outputs[ADAPTER + "@first"] = logits(model)
    report["first"] = model.push_to_hub(ADAPTER).oid
    # Somebody writes on the Hub's web page, then more training is pushed.
    api = HfApi()
    card = Path(api.hf_hub_download(ADAPTER, "README.md")).read_text(encoding="utf-8")
    api.upload_file(path_or_fileobj=f"{card}\n{NOTE}\n".encode(), path_in_repo="README.md", repo_id=ADAPTER)
    report[ADAPTER] = calibrate_and_train(model)
    model.push_to_hub(ADAPTER, tags=["fed-at-noon"])
    outputs[ADAPTER] = logits(model)
    model.save_pretrained(folder / ADAPTER)
    export_model(model, folder / "live", "dense", push_to_hub=True, repo_id=EXPORTED)
    export_model(ADAPTER, folder / "by id", "compressed-tensors", base=BASE, push_to_hub=True, repo_id=EXPORTED_BY_ID)

    injected = base_model()
    injected.add_adapter(DLQATConfig(**CONFIG))
    report[INJECTED] = calibrate_and_train(injected)
    injected.push_to_hub(INJECTED)
    outputs[INJECTED] = logits(injected)
    injected.save_pretrained(folder / INJECTED)

    for repo in (TRAINER, TRAINER_INJECTED, *([SFT] if HAS_TRL else [])):
        model = base_model()
        if repo == TRAINER:
            model = get_peft_model(model, DLQATConfig(**CONFIG, task_type="CAUSAL_LM"))
        elif repo == TRAINER_INJECTED:
            model.add_adapter(DLQATConfig(**CONFIG))
        trainer = trainer_for(model, repo, folder)
        trainer.train()
        trainer.push_to_hub()
        outputs[repo] = logits(trainer.model)
        (entry,) = (entry for entry in trainer.state.log_history if "calibration/loss_before" in entry)
        report[repo] = {name.removeprefix("calibration/"): value for name, value in entry.items()}

    torch.save(outputs, folder / "logits.pt")
    (folder / "report.json").write_text(json.dumps(report))


def load(folder: Path) -> None:
    """In a fresh process: as somebody who has not read the card, then by the card, then by every other way."""
    import torch
    from huggingface_hub import ModelCard
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    errors = {}
    for name, attempt in {
        "PeftModel": lambda: PeftModel.from_pretrained(base_model(), TRAINER),
        "load_adapter": lambda: base_model().load_adapter(TRAINER),
    }.items():
        try:
            attempt()
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
    assert "peft_dlqat" not in sys.modules, "this client must begin without the package"
    (folder / "errors.json").write_text(json.dumps(errors))

    # The first block of code of the card that was saved, pasted, with the repository's name filled in.
    names: dict[str, Any] = {}
    code = code_block(ModelCard.load(folder / ADAPTER / "README.md").text).replace("THIS_REPOSITORY", ADAPTER)
    exec(compile(code, "README.md", "exec"), names)
    layers = {type(module).__name__ for module in names["model"].modules()}
    (folder / "layers.json").write_text(json.dumps(sorted(layers)))

    injected = base_model()
    injected.load_adapter(INJECTED)
    first = json.loads((folder / "report.json").read_text())["first"]
    outputs = {
        "the card's code": logits(names["model"]),
        "PeftModel": logits(PeftModel.from_pretrained(base_model(), ADAPTER)),
        "AutoPeftModel": logits(AutoPeftModelForCausalLM.from_pretrained(ADAPTER)),
        "merged": logits(PeftModel.from_pretrained(base_model(), ADAPTER).merge_and_unload()),
        "low_cpu_mem_usage": logits(PeftModel.from_pretrained(base_model(), ADAPTER, low_cpu_mem_usage=True)),
        "first revision": logits(PeftModel.from_pretrained(base_model(), ADAPTER, revision=first)),
        "transformers": logits(AutoModelForCausalLM.from_pretrained(ADAPTER)),
        "load_adapter of injected": logits(injected),
        "transformers of injected": logits(AutoModelForCausalLM.from_pretrained(INJECTED)),
        "PeftModel of injected": logits(PeftModel.from_pretrained(base_model(), INJECTED)),
        "exported": logits(AutoModelForCausalLM.from_pretrained(EXPORTED)),
        "exported by id": logits(AutoModelForCausalLM.from_pretrained(EXPORTED_BY_ID)),
    }
    for repo in (TRAINER, TRAINER_INJECTED, *([SFT] if HAS_TRL else [])):
        outputs[repo] = logits(PeftModel.from_pretrained(base_model(), repo))
    torch.save(outputs, folder / "loaded.pt")


# ----- Fixtures ---------------------------------------------------------------------------------------------


def run_client(name: str, hub: Hub, folder: Path) -> None:
    """Run a client of this module in a process of its own, with an empty cache; a UserWarning in it is an error."""
    environment = {
        **os.environ,
        **hub.environment(home=folder / f"home of {name}"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    code = f"import pathlib, sys, test_hub; test_hub.{name}(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-W", "error::UserWarning", "-c", code, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"client {name} failed:\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def published(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the process that pushed everything."""
    folder = tmp_path_factory.mktemp("hub")
    run_client("publish", hub, folder)
    return folder


@pytest.fixture(scope="module")
def expected(published: Path) -> dict[str, torch.Tensor]:
    """Logits of each model where it was trained."""
    import torch

    return torch.load(published / "logits.pt")


@pytest.fixture(scope="module")
def report(published: Path) -> dict[str, Any]:
    return json.loads((published / "report.json").read_text())


@pytest.fixture(scope="module")
def loaded(hub: Hub, published: Path) -> dict[str, torch.Tensor]:
    """Logits of each model as a fresh process loaded it."""
    import torch

    run_client("load", hub, published)
    return torch.load(published / "loaded.pt")


def card_of(hub: Hub, repo: str) -> str:
    return hub.files(repo)["README.md"].decode()


def code_block(text: str) -> str:
    """The first block of Python in a card."""
    match = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert match, "the card has no code"
    return match[1]


def table(text: str) -> dict[str, str]:
    """Rows of the section's table."""
    section = re.search(r"<!-- peft_dlqat -->\n(.*?)\n<!-- /peft_dlqat -->", text, flags=re.DOTALL)
    assert section, "the card has no section of this package"
    return dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", section[1], flags=re.MULTILINE))


def skip_without_trl(repo: str) -> None:
    if repo == SFT and not HAS_TRL:
        pytest.skip("TRL is not installed")


# ----- What is loaded is what was trained -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "repo"),
    [
        ("PeftModel", ADAPTER),
        ("AutoPeftModel", ADAPTER),
        ("merged", ADAPTER),
        ("low_cpu_mem_usage", ADAPTER),
        ("transformers", ADAPTER),
        ("first revision", ADAPTER + "@first"),
        ("load_adapter of injected", INJECTED),
        ("transformers of injected", INJECTED),
        ("PeftModel of injected", INJECTED),
        ("exported", ADAPTER),
        ("exported by id", ADAPTER),
    ],
)
@pytest.mark.slow
def test_loading_from_the_hub_gives_equal_logits(
    way: str, repo: str, loaded: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    """To the bit, whether PEFT or transformers loads, whichever of them pushed, and from a pinned revision."""
    assert loaded[way].isfinite().all()
    assert loaded[way].equal(expected[repo])


@pytest.mark.slow
@pytest.mark.parametrize("repo", [TRAINER, TRAINER_INJECTED, SFT])
def test_loading_what_a_trainer_pushed_gives_equal_logits(
    repo: str, loaded: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    skip_without_trl(repo)
    assert loaded[repo].equal(expected[repo])


@pytest.mark.slow
def test_the_adapters_differ(expected: dict[str, torch.Tensor]) -> None:
    """Else equal logits would show nothing: each adapter moved the base, and each its own way."""
    outputs = list(expected.values())
    assert len(outputs) == (7 if HAS_TRL else 6)
    for i, output in enumerate(outputs):
        assert not any(output.equal(other) for other in outputs[:i])


# ----- What the server holds --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("repo", [ADAPTER, INJECTED])
def test_the_server_holds_the_bytes_that_save_pretrained_writes(repo: str, hub: Hub, published: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert hub.files(repo)[name] == (published / repo / name).read_bytes()
    weights = {name for name in hub.files(repo) if name.endswith((".safetensors", ".bin", ".pt"))}
    assert weights == {"adapter_model.safetensors"}, "an adapter is pushed without its base model"


@pytest.mark.slow
@pytest.mark.parametrize("repo", [TRAINER, TRAINER_INJECTED, SFT])
def test_the_server_holds_the_bytes_of_the_trainers_folder(repo: str, hub: Hub, published: Path) -> None:
    skip_without_trl(repo)
    folder = {path.name: path.read_bytes() for path in (published / repo).iterdir() if path.is_file()}
    pushed = {name: content for name, content in hub.files(repo).items() if name != ".gitattributes"}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= pushed.keys()
    assert pushed == folder


@pytest.mark.slow
def test_the_server_saw_nothing_it_would_refuse(hub: Hub, published: Path, loaded: dict[str, torch.Tensor]) -> None:
    """No unknown endpoint, no bad metadata, no token where it does not belong."""
    assert hub.refused == []
    assert any(request.startswith("PUT /upload/") for request in hub.requests)
    assert any(request.startswith("GET /download/") for request in hub.requests)


@pytest.mark.slow
@pytest.mark.parametrize("repo", PUSHED)
def test_nothing_private_is_pushed(repo: str, hub: Hub, published: Path) -> None:
    """Neither the token nor a path of this machine; training_args.bin, which the Trainer adds, is its own matter."""
    skip_without_trl(repo)
    for name, content in hub.files(repo).items():
        assert TOKEN.encode() not in content, name
        assert name == "training_args.bin" or str(published).encode() not in content, name


# ----- The card ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("repo", PUSHED)
def test_pushed_tensors_remember_what_was_done(repo: str, hub: Hub) -> None:
    """The card that transformers pushes is its own, without this package's section; the tensors tell."""
    skip_without_trl(repo)
    from safetensors.torch import load

    from peft_dlqat.record import Record

    saved = load(hub.files(repo)["adapter_model.safetensors"])
    records = [Record.decode(value) for key, value in saved.items() if key.endswith(".dlqat_record")]
    assert len(records) == 14 and all(record.calibrated and record.checksum for record in records)


@pytest.mark.slow
def test_saved_card_says_how_to_load_and_what_was_done(published: Path, report: dict[str, Any]) -> None:
    """The import comes first in the code; grid, trained share and whether it was calibrated are in the table."""
    text = (published / ADAPTER / "README.md").read_text(encoding="utf-8")
    assert text.count("<!-- peft_dlqat -->") == text.count("<!-- /peft_dlqat -->") == 1
    code = code_block(text).splitlines()
    assert code[0].startswith("import peft_dlqat")
    assert f'from_pretrained("{BASE}")' in "".join(code)
    rows = table(text)
    assert rows["grid"] == GRID_ROW
    assert rows["parameters"].startswith(f"{report['parameters']:,} beside scales and zeros, ")
    assert rows["calibration"] == "done"


@pytest.mark.slow
def test_text_written_on_the_hub_survives_the_next_push(hub: Hub, published: Path) -> None:
    assert card_of(hub, ADAPTER).count(NOTE) == 1


@pytest.mark.slow
def test_the_cards_code_runs(
    published: Path, loaded: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    """Pasted into a process it loads, merges to plain layers, and gives the trained model's logits to the bit."""
    assert loaded["the card's code"].equal(expected[ADAPTER])
    layers = json.loads((published / "layers.json").read_text())
    assert "Linear" in layers and "DLQATLinear" not in layers


@pytest.mark.slow
def test_loading_without_the_import_fails_as_the_card_says(published: Path, loaded: dict[str, torch.Tensor]) -> None:
    """PEFT's error is bare; the card names that very error beside the line that avoids it."""
    errors = json.loads((published / "errors.json").read_text())
    assert errors == {"PeftModel": "KeyError: 'DLQAT'", "load_adapter": "KeyError: 'DLQAT'"}
    first_line = code_block((published / ADAPTER / "README.md").read_text(encoding="utf-8")).splitlines()[0]
    assert first_line.startswith("import peft_dlqat") and errors["PeftModel"] in first_line


# ----- The card on disk: no server needed -------------------------------------------------------------------


def local_model(kind: str = "llama", **settings: Any) -> Any:
    """A model in this process, whose base has a name."""
    from conftest import tiny_model
    from peft import get_peft_model

    from peft_dlqat import DLQATConfig

    base = tiny_model(kind)
    base.config._name_or_path = BASE
    return get_peft_model(base, DLQATConfig(**{**CONFIG, "task_type": "CAUSAL_LM", **settings}))


def test_saving_again_replaces_the_section_and_nothing_else(tmp_path: Path) -> None:
    """Text before, beside and after the section stays as it was; the section tells of the newest calibration."""
    model = local_model()
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    first = card.read_text(encoding="utf-8")
    assert table(first)["calibration"] == "none: trained on the initial scales and zeros"
    written = first.replace("<!-- peft_dlqat -->", "Before: \\1 café\n\n<!-- peft_dlqat -->")
    written = written.replace(
        "<!-- /peft_dlqat -->", "<!-- /peft_dlqat -->\n\nBeside, with a line:\n\n---\n\nof dashes"
    )
    written += f"\n\nAfter: {NOTE}\n"
    card.write_text(written, encoding="utf-8")

    calibrate_and_train(model)
    model.save_pretrained(tmp_path)
    second = card.read_text(encoding="utf-8")
    assert table(second)["calibration"] == "done"
    assert without_section(second).rstrip() == without_section(written).rstrip()
    model.save_pretrained(tmp_path)
    assert card.read_text(encoding="utf-8").rstrip() == second.rstrip()


def test_a_loaded_adapter_keeps_what_its_card_says(tmp_path: Path) -> None:
    """What was done to an adapter travels in its tensors: loaded and saved again, the section is the same."""
    from conftest import tiny_model
    from peft import PeftModel

    model = local_model()
    calibrate_and_train(model)
    model.save_pretrained(tmp_path / "first")
    for name, trainable in (("frozen", False), ("trainable", True)):
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "first", is_trainable=trainable)
        loaded.save_pretrained(tmp_path / name)
        rows = table((tmp_path / name / "README.md").read_text(encoding="utf-8"))
        assert rows == table((tmp_path / "first" / "README.md").read_text(encoding="utf-8"))
        assert rows["calibration"] == "done"


def without_section(text: str) -> str:
    rest, count = re.subn(r"<!-- peft_dlqat -->.*?<!-- /peft_dlqat -->", "SECTION", text, flags=re.DOTALL)
    assert count == 1
    return rest


@pytest.mark.parametrize(
    ("settings", "row"),
    [
        (
            {"bits": 2, "group_size": -1, "zero_point": "none"},
            "2 bits, one scale a row, zero point: none, scales in float16",
        ),
        (
            {"bits": 8, "group_size": 16, "zero_point": "float", "scale_dtype": "bfloat16"},
            "8 bits, groups of 16 input channels, zero point: float, scales in bfloat16",
        ),
    ],
)
def test_card_states_the_grid(settings: dict[str, Any], row: str, tmp_path: Path) -> None:
    local_model(**settings).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert table(text)["grid"] == row
    assert f"# {settings['bits']}-bit" in text


def test_card_states_exceptions_by_module(tmp_path: Path) -> None:
    local_model(bits_pattern={"o_proj": 8}, rank_pattern={"q_proj": 2}).save_pretrained(tmp_path)
    rows = table((tmp_path / "README.md").read_text(encoding="utf-8"))
    assert rows["bits_pattern"] == "{'o_proj': 8}"
    assert rows["rank_pattern"] == "{'q_proj': 2}"


def test_card_of_a_second_model_from_the_same_config_tells_nothing_of_the_first(tmp_path: Path) -> None:
    from conftest import lm_batches, tiny_model
    from peft import get_peft_model

    from peft_dlqat import DLQATConfig, calibrate

    config = DLQATConfig(**CONFIG, task_type="CAUSAL_LM")
    first, second = (get_peft_model(tiny_model(), config) for _ in range(2))
    calibrate(first, lm_batches(2), steps=2, progress=False)
    third = get_peft_model(tiny_model(), config)
    rows = []
    for name, model in (("first", first), ("second", second), ("third", third)):
        model.save_pretrained(tmp_path / name)
        rows.append(table((tmp_path / name / "README.md").read_text(encoding="utf-8"))["calibration"])
    untold = "none: trained on the initial scales and zeros"
    assert rows == ["done", untold, untold]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["q_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 2}},
        {"modules_to_save": ["lm_head"]},
        {"kind": "opt", "bias": "all"},
        {"kind": "opt", "bias": "dlqat_only"},
    ],
    ids=["plain", "some layers", "modules_to_save", "all biases", "own biases"],
)
def test_card_counts_what_trains(settings: dict[str, Any], tmp_path: Path) -> None:
    """The same numbers as PEFT's own `print_trainable_parameters`, also after loading and saving once more."""
    from conftest import tiny_model
    from peft import PeftModel

    model = local_model(**settings)
    trained, _ = model.get_nb_trainable_parameters()
    model.save_pretrained(tmp_path / "first")
    loaded = PeftModel.from_pretrained(tiny_model(settings.get("kind", "llama")), tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    for folder in ("first", "second"):
        row = table((tmp_path / folder / "README.md").read_text(encoding="utf-8"))["parameters"]
        assert row.startswith(f"{trained:,} beside scales and zeros, ")


def test_registering_again_changes_nothing_and_pefts_own_method_stays() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    from peft_dlqat import DLQATConfig, DLQATModel
    from peft_dlqat.hub import extend_peft_type, register

    before = dict(PEFT_TYPE_TO_CONFIG_MAPPING), list(PeftType)
    extend_peft_type()
    register(DLQATConfig, DLQATModel)
    with pytest.warns(UserWarning, match=r"PEFT already has a method named 'dlqat'.*from peft import DLQATConfig"):
        register(object, object)
    assert (dict(PEFT_TYPE_TO_CONFIG_MAPPING), list(PeftType)) == before
