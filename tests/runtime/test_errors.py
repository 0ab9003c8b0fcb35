"""The sentence that a user gets: what others say in many lines, said in one."""

import pytest

from resprune.runtime.errors import one_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\n  b\tc"), "a b c"),
        (KeyError(), "KeyError"),
        (RuntimeError(" \n"), "RuntimeError"),
        ("", ""),
        (ValueError("x" * 300), "x" * 300),
        (ValueError("x" * 301), "x" * 297 + "..."),
    ],
)
def test_an_error_in_one_line(error: object, line: str) -> None:
    assert one_line(error) == line
