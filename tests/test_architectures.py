"""Trained is reloaded is merged is saved, on each architecture of docs/architectures.md."""

from __future__ import annotations

from importlib.metadata import version

import architecture_table as table
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, Architecture
from torch import nn

TABLE = table.PAGE.read_text(encoding="utf-8").split("<!-- table -->")[1].split("<!-- /table -->")[0]
LINES = [line for line in TABLE.splitlines() if line.startswith("| ")][1:]


@pytest.fixture(autouse=True)
def _as_the_page_was_made(monkeypatch):
    table.prepare()
    yield
    torch.backends.mha.set_fastpath_enabled(True)
    transformers.logging.set_verbosity_warning()


# Every third: all of them take minutes, and `python tests/architecture_table.py` tries them when it writes the page.
@pytest.mark.product(every=12)
@pytest.mark.parametrize("architecture", ARCHITECTURES[::3], ids=lambda architecture: architecture.name)
def test_no_cell_is_wrong(architecture):
    cells = table.examine(architecture)
    assert table.faults(cells) == {}
    if version("transformers") in TABLE:
        assert table.line(architecture, cells) in LINES, "write the page anew: python tests/architecture_table.py"


def test_the_page_has_the_architectures_of_the_list():
    assert [line.split(" | ")[1] for line in LINES] == [f"`{architecture.name}`" for architecture in ARCHITECTURES]
    assert len(LINES) >= 60 and "differs" not in TABLE


class Counting(nn.Module):
    """Gives something else at each call."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(32, 32), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x) + self.calls


class Detached(nn.Module):
    """Its layer computes, and no gradient reaches it where an adapter is."""

    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        y = self.layer(x)
        return self.other(x) + (y if type(self.layer) is nn.Linear else y.detach())


@pytest.mark.parametrize(
    "net, wrong",
    [(Counting, {"merge", "unmerge", "base_untouched", "packed"}), (Detached, {"gradient"})],
)
def test_a_wrong_cell_is_seen(net, wrong, monkeypatch):
    monkeypatch.setattr(Architecture, "make", lambda self: torch.manual_seed(0) and net().requires_grad_(False))
    cells = table.examine(ARCHITECTURES[0])
    assert table.faults(cells).keys() == wrong
