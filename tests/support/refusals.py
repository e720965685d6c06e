"""Assert that a block raises an error that a user can cause: exactly one of the given types, with a message of one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def refused(*kinds: type[Exception], match: str | None = None) -> Iterator[pytest.ExceptionInfo[Exception]]:
    with pytest.raises(kinds, match=match) as info:
        yield info
    assert type(info.value) in kinds
    assert len(str(info.value).splitlines()) == 1
