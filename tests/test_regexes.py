"""Regexes of a config: those that are none, and those that would never come to an end."""

from __future__ import annotations

import time

import pytest
from conftest import tiny_model
from peft import get_peft_model
from refusals import refused, small_config

from peft_dlqat import regexes
from peft_dlqat.layer import adapter_layers

# Each cuts a name into pieces in all ways, of which there are 2**n, or n**12.
ENDLESS = {
    "nested": "([a-z_.0-9]+)+!",
    "of alternatives": "(.|[a-z])*!",
    "in a row": ".*" * 12 + "!",
    "optional": "(?:.?)" * 25 + "!",
    "alternatives in a row": "(?:.|[a-z_.])" * 25 + "!",
    "looking ahead": "(?=(.+)+!)q_proj",
}


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(regexes, "_SECONDS", 0.5)


def targets(**settings):
    model = get_peft_model(tiny_model(), small_config(**settings))
    return {name.split("layers.")[1] for name in adapter_layers(model)[1]}


@pytest.mark.product
@pytest.mark.parametrize("regex", ENDLESS)
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "modules_to_save", "bits_pattern", "rank_pattern"]
)
def test_a_regex_without_an_end_is_refused(field, regex, impatient):
    """Before the model is touched, and in the time that is allowed; PEFT itself would match until it is killed."""
    value = ENDLESS[regex]
    given = {value: 3} if field.endswith("_pattern") else [value] if field == "modules_to_save" else value
    model, start = tiny_model(), time.monotonic()
    with refused(ValueError, field, value[:100], "more than 0.5 seconds", "list the names", model=model):
        get_peft_model(model, small_config(**{"target_modules": ["q_proj"], field: given}))
    assert time.monotonic() - start < 30


def test_layers_pattern_too(impatient):
    settings = {"target_modules": ["q_proj"], "layers_to_transform": 1}
    with refused(ValueError, "layers_pattern", "list the names", draws=True):
        targets(**settings, layers_pattern="(.|[a-z])*!")
    assert targets(**settings, layers_pattern="layers") == {"1.self_attn.q_proj"}


USUAL = {
    r".*\.(q|v)_proj": {"self_attn.q_proj", "self_attn.v_proj"},
    r".*layers\.[01]\.mlp\..*_proj": {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    r"(?!.*mlp).*_proj": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"},
}
# More choices, which are tried.
LONGER = {
    r"(\w+\.)*(q|v)_proj": {"self_attn.q_proj", "self_attn.v_proj"},
    r".*?(?:layers|text).*?(?:attn|attention).*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?": {
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    },
}  # fmt: skip


@pytest.mark.parametrize("regex, selected", [*USUAL.items(), *LONGER.items()])
def test_usual_regexes_select_what_they_say(regex, selected, monkeypatch):
    """The simpler ones without another process."""
    started = []
    run = regexes.subprocess.run
    monkeypatch.setattr(regexes.subprocess, "run", lambda *a, **k: started.append(a) or run(*a, **k))
    assert targets(target_modules=regex) == {f"{layer}.{name}" for layer in (0, 1) for name in selected}
    assert bool(started) == (regex in LONGER)


NONE = {
    "(": "unterminated",
    "(" * 5000: "recursion",
    "a{99999999999}": "too large",
    "x" * 20_000: "10,000 characters",
}


@pytest.mark.parametrize("regex", NONE, ids=lambda regex: regex[:20])
def test_what_is_no_regex_is_refused(regex):
    for given in ({"target_modules": regex}, {"bits_pattern": {regex: 3}}, {"modules_to_save": [regex]}):
        with refused(ValueError, next(iter(given)), NONE[regex]):
            small_config(**given)


def test_what_is_none_where_peft_puts_it_is_refused():
    """PEFT matches a key of a pattern, but not a target, inside a longer regex."""
    assert small_config(target_modules="(?i).*Q_PROJ").target_modules == "(?i).*Q_PROJ"
    for given in ({"bits_pattern": {"(?i)Q_PROJ": 3}}, {"layers_pattern": "(?P<idx>l)", "layers_to_transform": 1}):
        with refused(ValueError, next(iter(given)), "neither a module name nor a regex"):
            small_config(**given)
