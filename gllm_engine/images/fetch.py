"""Reads images and videos from where clients say they are, within what the configuration allows.

Nothing but data: URLs is allowed unless the configuration names hosts or a directory. A host's
addresses are resolved once and checked, and the connection goes to the one that was checked: a name
that later leads elsewhere leads nowhere. Proxies of the environment are not used.
"""

from __future__ import annotations

import io
import os
import re
import socket
import ssl
import string
from base64 import b64decode
from collections.abc import Callable
from functools import cached_property
from http.client import HTTPConnection, HTTPException, HTTPResponse
from ipaddress import ip_address, ip_network
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

from gllm_engine.config import EngineConfig
from gllm_engine.files import open_file, read_opened, shown
from gllm_engine.sampling import InvalidField

MAX_REDIRECTS = 3
# Site-local addresses, and 6to4, which may lead to any address of IPv4 (RFC 3879, RFC 7526).
DEPRECATED = [ip_network("fec0::/10"), ip_network("2002::/16")]
_TYPES = {"image": r"image/[\w.+-]+", "video": r"video/[\w.+-]+|image/gif"}
_Reserve = Callable[[int], None]
LOOK_S = 0.1  # between two looks whether anybody still waits


class ImageSources:
    """Threads may share it."""

    def __init__(self, config: EngineConfig, kind: str) -> None:
        """`kind`: of what is read, "image" or "video".

        `config.media_timeout_s` is for one of these with its redirects; the resolver of names has
        its own limit. A host that is an IP address may be a private one.
        """
        self._hosts = frozenset(host.lower() for host in config.allowed_media_hosts)
        directory = config.allowed_media_directory
        self._directory = directory and Path(os.path.realpath(directory))
        self._kind = kind
        most = {"image": config.max_image_mib, "video": config.max_video_mib}
        self._max_bytes = most[kind] << 20
        self._timeout_s = config.media_timeout_s

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        """Made when needed: reading all certificates takes longer than loading a small model."""
        return ssl.create_default_context()

    def read(
        self,
        source: str,
        number: int = 1,
        is_over: Callable[[], bool] = lambda: False,
        reserve: _Reserve = lambda size: None,
    ) -> bytes:
        """The bytes at a data:, http(s): or file: URL. Errors call it by kind and `number`.

        `is_over`: whether nobody waits for them any more, asked while bytes are awaited. `reserve`:
        gets the number of bytes before they take memory, the most allowed if a server does not tell
        it. Raises what `reserve` raises, and InvalidField for a source that is not allowed,
        missing, too slow or too large.
        """
        scheme = source[:8].partition(":")[0].lower()
        try:
            if scheme == "data":
                return self._data(source, reserve)
            if scheme == "file":
                return self._file(source, reserve)
            if scheme in ("http", "https"):
                return self._get(source, is_over, reserve)
            raise ValueError(f"{shown(source)} is no data:, http:, https: or file: URL")
        except ValueError as error:
            problem = f"{self._kind} {number}: {shown(str(error), 300)}"
            raise InvalidField(self._kind, problem) from None

    def _data(self, source: str, reserve: _Reserve) -> bytes:
        header, _, text = source.partition(",")
        types = _TYPES[self._kind]
        if not re.fullmatch(rf"data:({types});base64", header, re.IGNORECASE):
            raise ValueError(f"{shown(header)} is not data:{self._kind}/...;base64")
        size = len(text) // 4 * 3 - text[-2:].count("=")
        self._check_size(size)
        reserve(size)
        try:
            return b64decode(text, validate=True)
        except ValueError as error:
            raise ValueError(f"its data: URL is not valid base64 ({error})") from None

    def _file(self, source: str, reserve: _Reserve) -> bytes:
        if self._directory is None:
            raise ValueError("files are not allowed without allowed_media_directory")
        parts = urlsplit(source)
        path = Path(os.path.realpath(unquote(parts.path)))
        if parts.netloc not in ("", "localhost") or not path.is_relative_to(self._directory):
            raise ValueError(f"{shown(source)} is not in allowed_media_directory")
        with open_file(path, ValueError) as file:
            reserve(min(os.fstat(file.fileno()).st_size, self._max_bytes))
            return read_opened(file, path, ValueError, self._max_bytes)

    def _get(self, url: str, is_over: Callable[[], bool], reserve: _Reserve) -> bytes:
        deadline = monotonic() + self._timeout_s

        def left() -> float:
            seconds = deadline - monotonic()
            if seconds <= 0 or is_over():
                raise TimeoutError("timed out")
            return seconds

        for _ in range(MAX_REDIRECTS + 1):
            try:
                answer = self._ask(url, left, reserve)
            except (OSError, HTTPException) as error:
                limit = f"within {self._timeout_s:g} s"
                raise ValueError(f"{shown(url)} cannot be fetched {limit} ({error})") from None
            if isinstance(answer, bytes):
                return answer
            url = urljoin(url, answer)
        raise ValueError(f"{shown(url)} is the target of more than {MAX_REDIRECTS} redirects")

    def _ask(self, url: str, left: Callable[[], float], reserve: _Reserve) -> bytes | str:
        """The body that a URL has, or the URL to which it redirects."""
        parts = urlsplit(url)
        host = parts.hostname or ""
        secure = parts.scheme == "https"
        if parts.scheme not in ("http", "https") or host not in self._hosts:
            raise ValueError(f"{shown(url)} is not at one of allowed_media_hosts")
        port = parts.port or (443 if secure else 80)
        with socket.create_connection((_address(host, port), port), left()) as raw:
            raw.settimeout(left())
            sock = self._tls.wrap_socket(raw, server_hostname=host) if secure else raw
            with sock:
                connection = HTTPConnection(host)
                connection.sock = sock
                target = urlunsplit(("", "", parts.path or "/", parts.query, ""))
                headers = {
                    "Accept": f"{self._kind}/*",
                    "User-Agent": "gllm-triton",
                    "Host": parts.netloc.rpartition("@")[2],
                }
                connection.request("GET", quote(target, safe=string.punctuation), headers=headers)
                response = HTTPResponse(sock, method="GET")
                response.fp.close()
                response.fp = io.BufferedReader(_Timed(sock, left))
                response.begin()
                return self._body(response, url, reserve)

    def _body(self, response: HTTPResponse, url: str, reserve: _Reserve) -> bytes | str:
        target = response.getheader("Location")
        if 300 < response.status < 400 and target:
            return target
        if response.status != 200:
            raise ValueError(f"{shown(url)} answers with status {response.status}")
        self._check_size(response.length or 0)
        reserve(self._max_bytes if response.length is None else response.length)
        body = response.read(self._max_bytes + 1)
        self._check_size(len(body))
        if response.length:
            raise ValueError(f"{shown(url)} ends {response.length} bytes too early")
        return body

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise ValueError(f"it has more than the {self._max_bytes >> 20} MiB that are allowed")


class _Timed(io.RawIOBase):
    """Reads from a socket for as long as `left` says, in all.

    The socket's own limit begins again with each byte that a slow server sends.
    """

    def __init__(self, sock: socket.socket, left: Callable[[], float]) -> None:
        self._sock = sock
        self._left = left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            self._sock.settimeout(min(self._left(), LOOK_S))
            try:
                return self._sock.recv_into(buffer)
            except TimeoutError:  # `left` knows whether that was all of the time
                continue


def _address(host: str, port: int) -> str:
    """The address to connect to. Raises ValueError if one of a name's addresses is not public."""
    found = [info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if found[0] != host and not all(map(is_public, found)):
        raise ValueError(f"the host {host} has an address that is not public")
    return str(found[0])


def is_public(address: str | int) -> bool:
    """Whether an IP address belongs to one machine of the internet."""
    parsed = ip_address(address)
    is_odd = parsed.is_multicast or parsed.is_reserved or any(parsed in n for n in DEPRECATED)
    return parsed.is_global and not is_odd
