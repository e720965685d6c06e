"""An error a user can cause: one of the given kinds exactly, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def refused(*kinds: type[Exception], match: str | None = None) -> Iterator[pytest.ExceptionInfo[Exception]]:
    with pytest.raises(kinds, match=match) as info:
        yield info
    assert type(info.value) in kinds
    assert len(str(info.value).splitlines()) == 1
