"""A run that was killed goes on where its last checkpoint is, and ends with the adapter of an unbroken run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scripts.resumable_training import (
    CALIBRATION_STEPS,
    REACHED,
    SAVE_STEPS,
    TRAINING_STEPS,
    make_trainer,
)
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

import peft_dlqat.train.callback
from peft_dlqat import DLQATCallback
from peft_dlqat.train.recipe import RECIPE

SCRIPT = Path(__file__).parents[1] / "scripts" / "resumable_training.py"
TIME_LIMIT = 120


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that nothing disturbed; its checkpoints are not to be changed."""
    folder = tmp_path_factory.mktemp("unbroken")
    make_trainer(folder).train()
    return folder


@pytest.fixture
def calibrations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list to which the steps of every calibration by the callback are added."""
    steps: list[int] = []
    calibrate = peft_dlqat.train.callback.calibrate

    def counting(*args: Any, **kwargs: Any) -> Any:
        steps.append(kwargs["steps"])
        return calibrate(*args, **kwargs)

    monkeypatch.setattr(peft_dlqat.train.callback, "calibrate", counting)
    return steps


class Counter(TrainerCallback):
    """Counts what a Trainer does."""

    begun = 0
    steps = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun += 1

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps += 1


def run_and_kill(folder: Path, where: str) -> Path:
    """Start a run in a process of its own and kill it when it is there.

    Returns:
        The run's output folder.
    """
    # As many threads as here: sums are split by threads, and their last bits depend on it.
    path = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    threads = str(torch.get_num_threads())
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), where],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + TIME_LIMIT
        while not (folder / REACHED).exists():
            said = (folder / "output.txt").read_text()[-5000:]
            assert process.poll() is None, f"the run ended by itself:\n{said}"
            assert time.monotonic() < end, f"the run was not {where} after {TIME_LIMIT} s:\n{said}"
            time.sleep(0.05)
    finally:
        process.kill()  # SIGKILL
        process.wait()
    assert process.returncode == -signal.SIGKILL
    return folder / "run"


def final(folder: Path) -> Path:
    """The checkpoint of the last step."""
    return folder / f"checkpoint-{TRAINING_STEPS}"


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "adapter_model.safetensors")


def assert_same_adapter(one: Path, other: Path) -> None:
    """The saved tensors are equal to the bit, records among them."""
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    assert [name for name, tensor in first.items() if not torch.equal(tensor, second[name])] == []


def digest(folder: Path) -> dict[str, str]:
    """A hash of every file under a folder, by path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def live_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(trainer.model).items()}


def test_unbroken_run_changes_grid_and_adapter(unbroken: Path, tmp_path: Path) -> None:
    """What the tests below compare is not the adapter that a run starts with, and changes up to the end."""
    start, end = live_state(make_trainer(tmp_path)), tensors(final(unbroken))
    early = tensors(unbroken / f"checkpoint-{SAVE_STEPS}")
    for kind in ("dlqat_A", "dlqat_B", "dlqat_magnitude", "dlqat_scale"):
        names = [name for name in end if kind in name]
        assert names
        assert all(not torch.equal(start[name], end[name]) for name in names)
        assert any(not torch.equal(early[name], end[name]) for name in names) == (kind != "dlqat_scale")


@pytest.mark.slow
def test_run_killed_while_training_is_resumed(unbroken: Path, tmp_path: Path, calibrations: list[int]) -> None:
    """SIGKILL between the two batches of step 8, in the second epoch; the last checkpoint is of the first epoch."""
    folder = run_and_kill(tmp_path, "8")
    assert [path.name for path in folder.iterdir()] == [f"checkpoint-{SAVE_STEPS}"]
    counter = Counter()
    trainer = make_trainer(folder, [counter])
    trainer.train(resume_from_checkpoint=True)
    assert counter.steps == TRAINING_STEPS - SAVE_STEPS
    assert calibrations == [], "the resumed run calibrated again"
    assert_same_adapter(final(folder), final(unbroken))


@pytest.mark.parametrize("step", [SAVE_STEPS, 2 * SAVE_STEPS])
def test_log_of_resumed_run_is_that_of_unbroken_run(unbroken: Path, tmp_path: Path, step: int) -> None:
    """Losses, learning rates and the grid's figures, in order, from every checkpoint."""
    shutil.copytree(unbroken / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    make_trainer(tmp_path).train(resume_from_checkpoint=True)
    assert_same_adapter(final(tmp_path), final(unbroken))
    one, other = (json.loads((final(folder) / "trainer_state.json").read_text()) for folder in (tmp_path, unbroken))
    assert one["log_history"] == other["log_history"]
    assert [entry["step"] for entry in one["log_history"] if "grid/clipped" in entry] == [3, 6, 9, 10]
    # Step 6 logs both: a report of the grid must not take the place of the Trainer's own entry.
    assert [entry["step"] for entry in one["log_history"] if "loss" in entry] == [2, 4, 6, 8, 10]
    assert any("calibration/loss" in entry for entry in one["log_history"])


@pytest.mark.slow
def test_run_killed_while_calibrating_starts_again(unbroken: Path, tmp_path: Path, calibrations: list[int]) -> None:
    """No checkpoint of a half-calibrated adapter exists, and a new start is a clean one."""
    folder = run_and_kill(tmp_path, "calibrating")
    assert not folder.exists() or get_last_checkpoint(str(folder)) is None
    assert not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        make_trainer(folder).train(resume_from_checkpoint=True)
    make_trainer(folder).train()
    assert calibrations == [CALIBRATION_STEPS]
    assert_same_adapter(final(folder), final(unbroken))


# What differs from the run that made the checkpoint, and what the refusal says of it.
CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"bits": 4}, "bits: 3 in the file, 4 here"),
    ({"bits_pattern": {"q_proj": 2}}, "bits: 3 in the file, 2 here"),
    ({"lora_alpha": 16}, "lora scaling: 2 in the file, 4 here"),
    ({"use_rslora": True}, "lora scaling: 2 in the file, 4 here"),
    ({"zero_point": "integer"}, "missing .*dlqat_zero_point"),
    ({"zero_point": "float"}, "missing .*dlqat_offset"),
    ({"scale_dtype": "float16"}, "scale_dtype: 'bfloat16' in the file, 'float16' here"),
    ({"r": 8}, r"is \[4, \d+\], not \[8, \d+\]"),
    ({"r": 8, "lora_alpha": 16}, r"is \[4, \d+\], not \[8, \d+\]"),
    ({"group_size": 32}, "other shapes than this model and config"),
    ({"group_size": -1}, "other shapes than this model and config"),
    ({"target_modules": ["q_proj", "v_proj"]}, "unexpected"),
]


@pytest.mark.product(every=3)
@pytest.mark.parametrize(("change", "said"), CHANGES, ids=[json.dumps(change) for change, _ in CHANGES])
def test_resuming_with_another_config_is_refused(
    unbroken: Path, calibrations: list[int], change: dict[str, Any], said: str
) -> None:
    """Before a step is made or a tensor changed; the message names the difference, and no file is touched."""
    before = digest(unbroken)
    counter = Counter()
    trainer = make_trainer(unbroken, [counter], **change)
    state = live_state(trainer)
    with pytest.raises(ValueError, match=said):
        trainer.train(resume_from_checkpoint=True)
    assert digest(unbroken) == before
    assert (counter.begun, counter.steps, calibrations) == (0, 0, [])
    assert all(torch.equal(tensor, state[name]) for name, tensor in live_state(trainer).items())


@pytest.mark.parametrize("share", [0.999, 0.5, 0.001, 0.0])
def test_truncated_adapter_is_refused(unbroken: Path, tmp_path: Path, calibrations: list[int], share: float) -> None:
    """A checkpoint whose tensors were cut short (by a full disk, say) is an error, not a start from something else."""
    checkpoint = tmp_path / final(unbroken).name
    shutil.copytree(final(unbroken), checkpoint)
    file = checkpoint / "adapter_model.safetensors"
    os.truncate(file, int(share * file.stat().st_size))
    before = digest(tmp_path)
    counter = Counter()
    trainer = make_trainer(tmp_path, [counter], max_steps=TRAINING_STEPS + 2)
    state = live_state(trainer)
    # The error is safetensors' own: PEFT reads the file before any method sees it.
    with pytest.raises(SafetensorError, match=r"header|incomplete|not fully covered|too small"):
        trainer.train(resume_from_checkpoint=True)
    assert digest(tmp_path) == before
    assert (counter.begun, counter.steps, calibrations) == (0, 0, [])
    assert all(torch.equal(tensor, state[name]) for name, tensor in live_state(trainer).items())


def test_adapter_of_nonsense_is_refused(unbroken: Path, tmp_path: Path) -> None:
    """A checkpoint whose file is whole, but holds NaN, is refused with the tensor's name."""
    checkpoint = tmp_path / final(unbroken).name
    shutil.copytree(final(unbroken), checkpoint)
    broken = tensors(checkpoint)
    name = next(name for name in broken if "dlqat_scale" in name)
    broken[name][0, 0] = torch.nan
    save_file(broken, checkpoint / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="dlqat_scale of the saved adapter holds NaN"):
        make_trainer(tmp_path, max_steps=TRAINING_STEPS + 2).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("by, steps", [("model", RECIPE.calibration_steps), ("blocks", RECIPE.block_steps)])
def test_default_steps_are_those_of_calibrate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str, steps: int
) -> None:
    """One rule for both."""

    def look(*args: Any, **kwargs: Any) -> Any:
        assert (kwargs["by"], kwargs["steps"]) == (by, steps)
        raise InterruptedError

    monkeypatch.setattr(peft_dlqat.train.callback, "calibrate", look)
    trainer = make_trainer(tmp_path)
    trainer.remove_callback(DLQATCallback)
    trainer.add_callback(DLQATCallback(calibration_by=by))  # type: ignore[arg-type]
    with pytest.raises(InterruptedError):
        trainer.train()


def test_steps_by_blocks_are_logged(tmp_path: Path) -> None:
    """They count on over the two decoder layers; the last of each is logged, and those that logging_steps (2) says."""
    trainer = make_trainer(tmp_path)
    trainer.remove_callback(DLQATCallback)
    trainer.add_callback(DLQATCallback(3, calibration_by="blocks", calibration_lr=0.01))
    trainer.train()
    steps = [entry["calibration_step"] for entry in trainer.state.log_history if "calibration/lr" in entry]
    assert steps == [2, 3, 4, 6]
