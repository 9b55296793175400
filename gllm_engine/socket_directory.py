"""Where sockets of this machine can be: a directory whose path is short enough for them.

Knows nothing of what is put there or who may enter it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Bytes of a socket's path, which Linux keeps in 108 with a zero at the end.
MAX_SOCKET_PATH = 107


def socket_parent(below: int) -> Path:
    """The directory to make a private one in, for sockets whose paths are `below` bytes longer.

    The one for temporary files (TMPDIR) if its path is short enough, else /tmp, else the user's
    XDG_RUNTIME_DIR. Raises OSError with a sentence when none of them can be used.
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
