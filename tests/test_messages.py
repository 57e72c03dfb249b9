"""Values as errors and warnings show them."""

from peft_dlqat.messages import shown


def test_a_long_value_is_cut_in_a_message():
    assert shown("x" * 10**6) == "'" + "x" * 299 + "... (1,000,002 characters)"
    assert shown(10**5000) == "an object of type int that cannot be printed"
