"""Runs docs/notebook.ipynb without Jupyter. As a script it keeps in the notebook what each cell prints."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(notebook: dict[str, Any]) -> list[str]:
    """What each code cell prints, run one after the other in one namespace, in the notebook's folder."""
    names: dict[str, Any] = {"__name__": "__main__"}
    found, before = [], os.getcwd()
    os.chdir(NOTEBOOK.parent)
    try:
        for number, cell in enumerate(code_cells(notebook), 1):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
            found.append(out.getvalue())
    finally:
        os.chdir(before)
    return found


def kept(cell: dict[str, Any]) -> str:
    """What the notebook says that a cell prints."""
    return "".join(line for output in cell["outputs"] for line in output["text"])


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    for number, (cell, text) in enumerate(zip(code_cells(notebook), printed(notebook), strict=True), 1):
        cell["execution_count"] = number
        output = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
        cell["outputs"] = [output] if text else []
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
