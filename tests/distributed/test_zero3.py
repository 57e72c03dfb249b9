"""DeepSpeed's ZeRO-3: partitioned as it is loaded, adapted, and trained as in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from launching import launch

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPT = Path(__file__).parents[1] / "scripts" / "zero3_training.py"
TIME_LIMIT = 300


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    for ranks in (1, 2):
        launch(SCRIPT, tmp_path, TIME_LIMIT, ranks, DS_ACCELERATOR="cpu")
    for storage in ("full", "int8"):
        single = torch.load(tmp_path / f"{storage}-single.pt")
        ranks = [torch.load(tmp_path / f"{storage}-{rank}.pt") for rank in (0, 1)]
        for rank in ranks:
            assert rank["numbers"] < 0.55 * single["numbers"]
            assert rank["grid"].keys() == single["grid"].keys()
            assert all(torch.equal(tensor, single["grid"][name]) for name, tensor in rank["grid"].items())
            for name, tensor in single["adapter"].items():
                assert (rank["adapter"][name] - tensor).norm() <= 1e-4 * tensor.norm().clamp(min=1e-6), name
        means = [(first + second) / 2 for first, second in zip(ranks[0]["losses"], ranks[1]["losses"], strict=True)]
        assert means == pytest.approx(single["losses"], rel=1e-4) and means[0] != means[-1]
