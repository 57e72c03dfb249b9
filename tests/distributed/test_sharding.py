"""Two processes with a part of the model each train as one does with all of it, and save the whole adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import lm_batches, tiny_model
from launching import launch, load_ranks
from peft import PeftModel, get_peft_model_state_dict
from scripts.sharded_training import BATCH, CASES, make_model, train

from peft_dlqat.running import teacher_logits

# One launch for all of the file.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.xdist_group("sharding")]

SCRIPT = Path(__file__).parents[1] / "scripts" / "sharded_training.py"
TIME_LIMIT = 300


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder to which two ranks wrote what they ended with."""
    return launch(SCRIPT, tmp_path_factory.mktemp("sharded"), TIME_LIMIT)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm().clamp(min=1e-12)).item()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_sharded_training_is_that_of_one_process(case: str, two_processes: Path, tmp_path: Path) -> None:
    ranks, single = load_ranks(two_processes, case), train(case, tmp_path)
    half = CASES[case][1] == torch.bfloat16
    tolerance = 2e-2 if half else 1e-4
    # Each rank had its half of every parameter; rows that do not divide by two are padded.
    for rank in ranks:
        assert rank["bytes"] < 0.51 * single["whole"]
    assert ranks[0]["bytes"] + ranks[1]["bytes"] == single["whole"]
    means = [(first + second) / 2 for first, second in zip(ranks[0]["losses"], ranks[1]["losses"], strict=True)]
    assert means == pytest.approx(single["losses"], rel=1e-2 if half else 1e-4)
    assert single["losses"][0] != single["losses"][-1]
    for rank in ranks:
        assert rank["gradients"].keys() == single["gradients"].keys()
        assert max(relative(rank["gradients"][name], grad) for name, grad in single["gradients"].items()) < tolerance
        moved = {name: relative(tensor, single["adapter"][name]) for name, tensor in rank["adapter"].items()}
        assert moved.keys() == single["adapter"].keys() and max(moved.values()) < tolerance, moved


@pytest.mark.parametrize("case", CASES)
def test_the_adapter_is_saved_whole(case: str, two_processes: Path) -> None:
    loaded = PeftModel.from_pretrained(tiny_model(dtype=CASES[case][1]), two_processes / case)
    expected = load_ranks(two_processes, case)[0]["adapter"]
    found = get_peft_model_state_dict(loaded)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert torch.isfinite(loaded(**lm_batches(1)[0]).loss)


def test_a_teachers_cache_may_lack_in_one_process_what_it_has_in_another(two_processes: Path) -> None:
    model = make_model("full")
    for rank in (0, 1):
        batch = {"input_ids": lm_batches(2, batch=BATCH)[rank]["input_ids"]}
        found = torch.load(two_processes / f"teacher-{rank}.pt")
        assert torch.allclose(found, teacher_logits(model, batch), atol=1e-5)


def test_what_a_sharded_model_refuses(two_processes: Path) -> None:
    for rank in (0, 1):
        messages = torch.load(two_processes / f"refusals-{rank}.pt")
        for name in ("calibrate", "merge", "codes", "cache"):
            assert "sharded by FSDP2" in messages[name]
        assert "load the base model in bfloat16" in messages["half"]
