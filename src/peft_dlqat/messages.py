"""Values as errors and warnings show them."""

from __future__ import annotations

from typing import Any

_MOST = 300  # characters


def shown(value: Any) -> str:
    """A value for a message: its repr, or the beginning of a long one."""
    try:
        return cut(repr(value))
    except (ValueError, RecursionError):  # an integer of more digits than Python writes, or lists in lists in lists
        return f"an object of type {type(value).__name__} that cannot be printed"


def cut(text: object) -> str:
    """A text for a message, such as another error: the beginning of a long one."""
    text = str(text)
    return text if len(text) <= _MOST else f"{text[:_MOST]}... ({len(text):,} characters)"
