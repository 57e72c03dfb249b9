"""Configs, adapters, manifests, shards and cache entries that are spoilt at random: loaded as they are, or refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import fuzz

SEED = 0


def test_what_is_spoilt_loads_as_it_is_or_is_refused():
    """A few of the cases below."""
    counts, failures = fuzz.fuzz(2, SEED, limit=False)
    assert not failures, "\n".join(failures)[-5000:]
    assert sum(counts.values()) > 5


@pytest.mark.slow
def test_many_are_spoilt_in_little_memory():
    """In a process of its own, whose memory is limited; see the script for what may be raised."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(Path(fuzz.__file__)), "--seconds", "20", "--seed", str(SEED)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"[-5000:]
    for kind in fuzz.CASES:
        assert f"{kind:<12} refused" in run.stdout and f"{kind:<12} loaded" in run.stdout, run.stdout
