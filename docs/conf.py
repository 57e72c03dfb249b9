"""The site: `make docs` builds it by Sphinx from the pages beside this file, and fails at the first broken link."""

import json
import re

project = "peft-dlqat"
html_title = project
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
smartquotes = False  # what stands in quotes is to be copied
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
autodoc_typehints = "none"  # the signature has none: the text says what each argument is
default_role = "code"
myst_heading_anchors = 3
source_suffix = {".md": "markdown", ".ipynb": "markdown"}


def cell_as_markdown(cell):
    """Of a notebook's cell; a code cell with what it printed."""
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return text
    printed = "".join(line for output in cell["outputs"] for line in output["text"])
    return f"```python\n{text}\n```" + (f"\n\n```text\n{printed.rstrip()}\n```" if printed else "")


def read_notebook(app, name, source):
    """A notebook, which is JSON, becomes a page."""
    if source[0].startswith("{"):
        source[0] = "\n\n".join(map(cell_as_markdown, json.loads(source[0])["cells"]))


def plain(app, what, name, thing, options, lines):
    """Docstrings fence their examples, and put names in brackets, as transformers' do."""
    lines[:] = [re.sub(r"\[(`\w+`)\]", r"\1", line) for line in lines if not line.strip().startswith("```")]


def setup(app):
    app.connect("autodoc-process-docstring", plain)
    app.connect("source-read", read_notebook)
