"""Values as errors and warnings show them."""

from __future__ import annotations

from typing import Any


def shown(value: Any) -> str:
    """A value for a message: its repr, or the beginning of a long one."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python writes, or lists in lists in lists
        return f"an object of type {type(value).__name__} that cannot be printed"
    return text if len(text) <= 300 else f"{text[:300]}... ({len(text):,} characters)"
