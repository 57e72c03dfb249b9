"""What is printed, and what keeps it from being printed."""

import pytest
from transformers.utils import logging

from peft_dlqat import console


def test_only_the_main_process_speaks(monkeypatch, capsys):
    console.say("here")
    monkeypatch.setenv("RANK", "1")
    console.say("not here")
    assert capsys.readouterr() == ("", "here\n")


def test_transformers_own_switches_hold(monkeypatch, capsys):
    monkeypatch.setattr(console, "_DELAY", 0.0)
    before = logging.get_verbosity()
    try:
        logging.set_verbosity_error()
        console.say("nothing")
        logging.disable_progress_bar()
        assert list(console.progress_bar(range(3), desc="counting")) == [0, 1, 2]
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
    assert capsys.readouterr() == ("", "")
    list(console.progress_bar(range(3), desc="counting"))
    assert "counting" in capsys.readouterr().err


@pytest.mark.parametrize("shown", [True, False])
def test_what_is_quick_has_no_bar(shown, capsys):
    assert sum(console.progress_bar(range(3), desc="counting", shown=shown)) == 3
    assert "counting" not in capsys.readouterr().err
