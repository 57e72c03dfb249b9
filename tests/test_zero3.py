"""DeepSpeed's ZeRO-3: partitioned as it is loaded, adapted, and trained as in one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPT = Path(__file__).parent / "scripts" / "zero3_training.py"
TIME_LIMIT = 300


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    path = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    address = ["--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    for before in ([], [*launcher, *address]):
        process = subprocess.Popen(
            [sys.executable, *before, str(SCRIPT), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: the launcher and both ranks
            output, _ = process.communicate()
            pytest.fail(f"not done within {TIME_LIMIT} s:\n{output[-5000:]}")
        assert process.returncode == 0, output[-5000:]
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
