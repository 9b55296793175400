"""Finds a directory for Unix sockets whose path is short enough.

This module does not create anything in it and does not set its permissions.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Longest path of a socket in bytes. Linux stores paths in 108 bytes, with a zero at the end.
MAX_SOCKET_PATH = 107


def socket_parent(below: int) -> Path:
    """The directory in which to create a private directory for sockets.

    `below`: bytes by which the sockets' paths are longer than this directory's path. The result is
    TMPDIR if its path is short enough, else /tmp, else the user's XDG_RUNTIME_DIR. Raises OSError
    with a sentence if none of them can be used.
    """
    temporary = tempfile.gettempdir()
    for place in (temporary, "/tmp", os.environ.get("XDG_RUNTIME_DIR", "")):
        is_short = len(os.fsencode(place)) + below <= MAX_SOCKET_PATH
        if is_short and os.path.isabs(place) and os.access(place, os.W_OK | os.X_OK):
            return Path(place)
    raise OSError(
        f"TMPDIR: {temporary} cannot hold sockets, whose paths are limited: it may have "
        f"{MAX_SOCKET_PATH - below} bytes and has {len(os.fsencode(temporary))}; neither /tmp nor "
        "XDG_RUNTIME_DIR can be used instead"
    )
