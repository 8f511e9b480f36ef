"""How the tests look at bad input: one line that names the things."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from modeconn.errors import ModeconnError


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """A ModeconnError of one line that has all the words."""
    with pytest.raises(ModeconnError) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text
    assert [word for word in words if word not in text] == [], text
