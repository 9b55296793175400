"""Puts a fake of Triton's stub in place before any backend module is imported."""

from __future__ import annotations

import sys

import fake_triton
import pytest

sys.modules.setdefault("triton_python_backend_utils", fake_triton.module())


@pytest.fixture
def server() -> fake_triton.Server:
    return fake_triton.new_server()
