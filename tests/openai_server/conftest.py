"""The server that the tests of one process share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scripted_triton import FakeModel, FakeTriton
from serving import Served, serve


@pytest.fixture(scope="session")
def session_served() -> Iterator[Served]:
    with FakeTriton(m=FakeModel()) as triton, serve(triton) as served:
        yield served


@pytest.fixture
def served(session_served: Served) -> Iterator[Served]:
    """The server with one fresh model, "m"."""
    session_served.triton.models.clear()
    session_served.triton.models["m"] = FakeModel()
    session_served.forget()
    yield session_served
