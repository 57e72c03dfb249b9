"""docs/notebook.ipynb runs as it is, offline, and prints what it says."""

from __future__ import annotations

import json
import re

import pytest
from docs.notebook import NOTEBOOK, code_cells, kept, printed


@pytest.mark.slow
def test_the_notebook_prints_what_it_says():
    """But for the figures, which another processor moves, and the text that the model writes."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    found, said = printed(notebook), [kept(cell) for cell in code_cells(notebook)]
    varies = ["varies" in cell["metadata"].get("tags", ()) for cell in code_cells(notebook)]
    assert [text for text, free in zip(map(shape, found), varies, strict=True) if not free] == [
        text for text, free in zip(map(shape, said), varies, strict=True) if not free
    ]


def shape(text: str) -> str:
    """With a sign in the place of each number, and of spaces before it."""
    return re.sub(r" *\d[\d.e+-]*", " #", text)
