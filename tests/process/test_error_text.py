import pytest

from megabert.process.error_text import first_line


@pytest.mark.parametrize(
    ("message", "expected"), [("full\nat 3", "full"), ("\n late\n", "late"), ("", "OSError"), (" \n", "OSError")]
)
def test_the_first_line_of_a_message_is_never_empty(message, expected):
    assert first_line(OSError(message)) == expected
