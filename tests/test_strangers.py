"""Configs, adapters, manifests, shards and cache entries that are spoilt at random: loaded as they are, or refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "scripts" / "fuzz.py"


@pytest.mark.parametrize("seconds", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_what_is_spoilt_loads_as_it_is_or_is_refused(seconds):
    """In a process whose time and memory are limited; see the script for what may be raised."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(SCRIPT), "--seconds", str(seconds), "--seed", "0"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"[-5000:]
    assert " refused" in run.stdout and " loaded" in run.stdout and "constructor" in run.stdout
