"""Lists of module names in few words."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")
# So many kinds of module are named.
_MOST = 6


def folded(names: Iterable[str]) -> str:
    """Names of modules, those that differ in one layer's number only counted: "gate_proj, up_proj in 30 layers".

    Of names in several places the first is given in full, so that it can be looked for.
    """
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(_NUMBER.sub("*", name), []).append(name)
    by_count: dict[int, list[str]] = {}
    for kind, found in kinds.items():
        leaf = ".".join(kind.split(".")[-2 if kind.endswith("*") else -1 :])
        by_count.setdefault(len(found), []).append(leaf if len(found) > 1 else found[0])
    parts = []
    for count, of_count in by_count.items():
        shown = ", ".join(dict.fromkeys(of_count[:_MOST])) + (", ..." if len(of_count) > _MOST else "")
        parts.append(f"{shown} in {count} layers" if count > 1 else shown)
    return "; ".join(parts)
