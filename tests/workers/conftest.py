from __future__ import annotations

from collections.abc import Iterator

import pytest
from forked import forked_workers


@pytest.fixture(scope="module")
def quick_starts() -> Iterator[None]:
    with forked_workers():
        yield
