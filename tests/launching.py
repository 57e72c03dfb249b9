"""Scripts in processes of their own, one or several that talk to each other through gloo."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# Port 0: any that is free.
TORCHRUN = [
    *("-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"),
    *("--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
]


def load_ranks(folder: Path, name: str) -> list[dict[str, Any]]:
    """What the two ranks wrote."""
    return [torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)]


def launch(script: Path, folder: Path, time_limit: int, ranks: int = 2, **environment: str) -> Path:
    """Run `script FOLDER` in one process or two ranks, and fail with what it said unless it ends well in time.

    Returns:
        The folder.
    """
    path = os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    process = subprocess.Popen(
        [sys.executable, *(TORCHRUN if ranks == 2 else []), str(script), str(folder)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=time_limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own session: the launcher and both ranks
        output, _ = process.communicate()
        pytest.fail(f"{script.name} did not end within {time_limit} s:\n{output[-5000:]}")
    assert process.returncode == 0, output[-5000:]
    return folder
