"""Reads the files of a checkpoint, which is untrusted.

This module opens every file of a checkpoint, or checks it for a library that opens it. It opens
regular files only, so that no FIFO or device blocks the start, and limits the bytes read. A
symbolic link may lead out of the checkpoint's directory, as links in Hugging Face's cache do; its
target must be a regular file. Every error message is one sentence that names the file. This module
does not interpret contents except JSON.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

# The index of a checkpoint with 150,000 tensors takes 15 MB.
MAX_JSON_BYTES = 64 << 20
# Far below Python's recursion limit, also for later code that walks the values.
MAX_JSON_DEPTH = 100

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_file(path: Path, wrong: type[Exception]) -> BinaryIO:
    """Open a regular file that is not empty. Raises `wrong` with a sentence for anything else."""
    try:
        status = path.stat()
        kinds = [kind for is_kind, kind in _KINDS if is_kind(status.st_mode)]
        if kinds:
            raise wrong(f"{path}: cannot be read (it is {kinds[0]}, not a file)")
        # Files in /proc have size 0 too, and reading some of them blocks.
        if not status.st_size:
            raise wrong(f"{path}: is empty")
        # O_NONBLOCK: open() does not block even if a FIFO replaces the file after the check.
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
    except OSError as error:
        raise wrong(f"{path}: cannot be read ({error.strerror})") from None


def read_file(path: Path, wrong: type[Exception], max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """All bytes of a regular file of at most `max_bytes`. Raises `wrong` with a sentence."""
    with open_file(path, wrong) as file:
        return read_opened(file, path, wrong, max_bytes)


def read_opened(file: BinaryIO, path: Path, wrong: type[Exception], max_bytes: int) -> bytes:
    """As read_file, of a file from open_file."""
    try:
        data = file.read(max_bytes + 1)
    except OSError as error:
        raise wrong(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > max_bytes:
        raise _too_large(path, wrong, max_bytes)
    return data


def check_file(path: Path, wrong: type[Exception], max_bytes: int) -> None:
    """Refuse what `read_file` refuses, without reading: for a file that a library will read."""
    with open_file(path, wrong) as file:
        if os.fstat(file.fileno()).st_size > max_bytes:
            raise _too_large(path, wrong, max_bytes)


def _too_large(path: Path, wrong: type[Exception], max_bytes: int) -> Exception:
    return wrong(f"{path}: is larger than the {max_bytes >> 20} MiB that such a file may have")


def read_object(path: Path, wrong: type[Exception]) -> dict[str, Any]:
    """The JSON object in a file. Raises `wrong` with a sentence for any other content."""
    return parse_object(path, read_file(path, wrong), wrong)


def parse_object(path: Path, data: bytes, wrong: type[Exception]) -> dict[str, Any]:
    """Parse `data`, the content of the file at `path`, as a JSON object.

    Raises `wrong` if it is not JSON in UTF-8, is nested deeper than MAX_JSON_DEPTH, or repeats a
    key, because JSON readers differ in which value they take. NaN and Infinity, which Python
    writes, are accepted; callers check numbers.
    """
    try:
        values = json.loads(data.decode(), object_pairs_hook=_without_repetition)
        deep = _is_deeper(values, MAX_JSON_DEPTH)
    except ValueError as error:
        raise wrong(f"{path}: not valid JSON ({error})") from None
    except RecursionError:
        deep = True
    if deep:
        raise wrong(f"{path}: its JSON is nested deeper than {MAX_JSON_DEPTH} levels")
    if not isinstance(values, dict):
        raise wrong(f"{path}: a JSON object is expected")
    return values


def shown(value: object, most: int = 100) -> str:
    """Format a file's value for a message: one line of at most `most` printable characters.

    The middle of a longer value is cut out.
    """
    try:
        text = value if isinstance(value, str) and value.isprintable() else ascii(value)
    except (ValueError, RecursionError):  # too many digits, or nested too deeply
        return f"this {type(value).__name__}"
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {shown(repr(key))} comes twice")
            seen.add(key)
    return values


def _is_deeper(value: Any, levels: int) -> bool:
    level = [value]
    for _ in range(levels):
        level = [child for each in level for child in _children(each)]
    return bool(level)


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
