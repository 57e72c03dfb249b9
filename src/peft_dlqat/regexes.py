"""Regexes of a config, which may come from anybody: whether they are any, and whether matching comes to an end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from .messages import shown

LONGEST = 10_000  # characters
_SECONDS = 10.0

# As PEFT matches them against a module's name: how, and the regex with the user's in the place of {}.
_TARGETS = ("fullmatch", "{}")
_PATTERN_KEYS = ("match", r"(.*\.)?({})$")
_FIELDS = {
    "target_modules": _TARGETS,
    "exclude_modules": _TARGETS,
    "modules_to_save": ("match", r"(^|.*\.){}($|\..*)"),
    "layers_pattern": ("match", r"(?:^|.*?\.){}\.(?P<idx>\d+)\."),
}

# Python's re can't be interrupted from within, so that it is tried in a process of its own.
_TRY = """
import json, re, sys, warnings
warnings.simplefilter("ignore")
regexes, names = json.load(sys.stdin)
for number, (how, regex) in enumerate(regexes):
    print(number, flush=True)
    match = getattr(re.compile(regex), how)
    for name in names:
        match(name)
"""


def check_regex(name: str, value: Any, field: str) -> None:
    """Refuse what is no regex, by itself or as PEFT uses it.

    Args:
        name: of the value, for the message.
        value: what was given.
        field: of the config, in which it was given.

    Raises:
        ValueError: says why.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name}={shown(value)} must be a module name (suffix) or a regex.")
    if len(value) > LONGEST:
        raise ValueError(f"{name}={shown(value)} must have at most {LONGEST:,} characters; use a list of names.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a later Python may understand otherwise
            re.compile(value)
            re.compile(_as_used(field, value)[1])
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{name}={shown(value)} is neither a module name nor a regex: {error}.") from error


def check_matching_ends(settings: dict[str, Any], names: Iterable[str]) -> None:
    """Refuse regexes that take very long to match, as (a+)+ can: it tries all ways to cut a name into pieces.

    Args:
        settings: a config's values by field.
        names: of a model's modules.

    Raises:
        ValueError: names the first of them.
    """
    slow = [(field, regex) for field, regex in _regexes(settings) if not _surely_quick(regex)]
    if not slow or not sys.executable:  # inside another program there may be no interpreter to try them with
        return
    tried = json.dumps([[_as_used(*entry) for entry in slow], list(names)])
    command = [sys.executable, "-I", "-S", "-c", _TRY]
    try:
        subprocess.run(command, input=tried.encode(), capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as late:
        field, regex = slow[int((late.stdout or b"0").split()[-1])]
        raise ValueError(
            f"{field}: to match {shown(regex)} with the names of this model's modules takes more than {_SECONDS:g} "
            "seconds; leave out repeats of what has repeats or alternatives in it, or list the names instead."
        ) from None


def _regexes(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The fields and their regexes; names in a list of targets are compared as they are."""
    for field, value in settings.items():
        if isinstance(value, dict) and field.endswith("_pattern"):
            yield from ((field, key) for key in value)
        elif field in _FIELDS and isinstance(value, str):
            yield field, value
        elif field in _FIELDS and _FIELDS[field] is not _TARGETS:
            yield from ((field, entry) for entry in value or ())


def _as_used(field: str, regex: str) -> tuple[str, str]:
    how, place = _FIELDS.get(field, _PATTERN_KEYS)
    return how, place.replace("{}", regex)


def _surely_quick(regex: str) -> bool:
    """Whether so few choices are in it that all of them can be tried for every name, as in .*(q|v)_proj."""
    repeats = len(re.findall(r"(?<!\()[*+?{]\??", regex))
    return repeats <= 2 and repeats + regex.count("|") <= 8 and not re.search(r"\)[*+{]", regex)
