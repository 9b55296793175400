"""Which software this is: told apart by what its files say, whatever its version is called.

Read when it is first asked for; what is on disk may change later, what runs does not.
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
