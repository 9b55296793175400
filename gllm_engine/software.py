"""Identifies this software by a digest of its code, because versions of one name may differ.

The digest is computed once, at the first call: files on disk may change later, running code does
not.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from gllm_engine import __version__


@functools.cache
def software() -> str:
    """The version of the package and a digest of its code, as in "gllm 0.1.0 (code 1f0d0591)"."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package)} {len(content)}\n".encode() + content)
    return f"gllm {__version__} (code {digest.hexdigest()[:8]})"
