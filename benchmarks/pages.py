"""Tables of results in Markdown pages, between marks: `<!-- name -->` and `<!-- /name -->`."""

from __future__ import annotations

from pathlib import Path


def filled(text: str, tables: dict[str, str]) -> str:
    """The page's text with the tables in their places."""
    for name, table in tables.items():
        before, rest = text.split(f"<!-- {name} -->", 1)
        after = rest.split(f"<!-- /{name} -->", 1)[1]
        text = f"{before}<!-- {name} -->\n{table}\n<!-- /{name} -->{after}"
    return text


def fill(page: Path, tables: dict[str, str]) -> None:
    """Put the tables into a page."""
    page.write_text(filled(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
