"""Where images may be read from: data: URLs, allowed hosts, and files in an allowed directory."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from base64 import b64encode
from contextlib import contextmanager
from pathlib import Path

import pytest
from pictures import encoded, noise

from gllm_engine.config import EngineConfig
from gllm_engine.images import fetch
from gllm_engine.images.fetch import ImageSources, is_public
from gllm_engine.sampling import InvalidField

PICTURE = encoded(noise(20, 10))
MIB = 1 << 20


class Server:
    """An HTTP server on 127.0.0.1 that answers each path with bytes as they are.

    `answers`: by path, what to send; a function gets the connection instead. `seen`: the requests.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.answers = {}
        self.seen: list[str] = []
        self.ended = threading.Event()
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def answer(self, path: str, body: bytes, status: str = "200 OK", *headers: str) -> None:
        lines = [f"HTTP/1.1 {status}", *headers, "", ""]
        self.answers[path] = "\r\n".join(lines).encode() + body

    def redirect(self, path: str, target: str, status: str = "302 Found") -> None:
        self.answer(path, b"", status, f"Location: {target}", "Content-Length: 0")

    def close(self) -> None:
        self.ended.set()
        # accept() does not notice that its socket is closed.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while not self.ended.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                try:
                    self._answer(connection)
                except OSError:  # the client has left, or refuses the certificate
                    pass

    def _answer(self, connection: socket.socket) -> None:
        if self._tls:
            connection = self._tls.wrap_socket(connection, server_side=True)
        with connection:
            request = b""
            while b"\r\n\r\n" not in request:
                part = connection.recv(65536)
                if not part:
                    return
                request += part
            self.seen.append(request.decode())
            answer = self.answers[request.split()[1].decode()]
            if callable(answer):
                answer(connection)
            else:
                connection.sendall(answer)


@contextmanager
def serving(tls: ssl.SSLContext | None = None):
    server = Server(tls)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def server():
    with serving() as found:
        yield found


def sources_of(
    hosts: tuple[str, ...] = (),
    directory: str | None = None,
    kind: str = "image",
    max_mib: int = 32,
    timeout_s: float = 10.0,
) -> ImageSources:
    limits = {"max_image_mib": max_mib, "max_video_mib": max_mib, "media_timeout_s": timeout_s}
    config = EngineConfig(
        model="", allowed_media_hosts=hosts, allowed_media_directory=directory, **limits
    )
    return ImageSources(config, kind)


def local(**options: object) -> ImageSources:
    return sources_of(("127.0.0.1",), max_mib=1, **options)


def refused(sources: ImageSources, source: str) -> str:
    with pytest.raises(InvalidField, match="^image: image 4: ") as caught:
        sources.read(source, 4)
    assert len(str(caught.value)) < 400
    return str(caught.value)


# ---------------------------------------------------------------- data: URLs and others


def test_a_data_url_needs_no_permission() -> None:
    text = b64encode(PICTURE).decode()
    for kind in ("image/png", "IMAGE/svg+xml", "image/x-y.z"):
        assert sources_of().read(f"data:{kind};base64,{text}") == PICTURE
    for kind in ("video/mp4", "image/gif"):  # a GIF is a video too
        found = sources_of(kind="video").read(f"data:{kind};base64,{text}")
        assert found == PICTURE
    with pytest.raises(InvalidField, match="^video: video 1: data:image/png;base64 is not"):
        sources_of(kind="video").read(f"data:image/png;base64,{text}")


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("short", [0, 1, 2])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_file_may_have_exactly_the_limit(
    server: Server, tmp_path: Path, kind: str, short: int, more: int
) -> None:
    """Through every door, with each number of base64's padding."""
    body = bytes(MIB + more) if more else bytes(MIB - short)
    (tmp_path / "file").write_bytes(body)
    server.answers["/"] = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    sources = sources_of(("127.0.0.1",), str(tmp_path), kind=kind, max_mib=1)
    data = f"data:{kind}/x;base64,{b64encode(body).decode()}"
    for source in (data, server.url + "/", f"file://{tmp_path}/file"):
        reserved: list[int] = []
        if more:
            with pytest.raises(InvalidField, match="than"):
                sources.read(source, reserve=reserved.append)
        else:
            assert sources.read(source, reserve=reserved.append) == body
            assert reserved == [len(body)]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("data:text/html;base64,AAAA", "data:text/html;base64 is not data:image/...;base64"),
        ("data:image/png,AAAA", "is not data:image/...;base64"),
        ("data:image/png;base64,A", "its data: URL is not valid base64"),
        ("data:image/png;base64,AA-_", "its data: URL is not valid base64"),
        ("data:image/png;base64,\u20ac", "its data: URL is not valid base64"),
        ("data:image/png;base64," + "A" * (2 * MIB), "more than the 1 MiB that are allowed"),
        ("ftp://127.0.0.1/x", "ftp://127.0.0.1/x is no data:, http:, https: or file: URL"),
        ("/etc/passwd", "/etc/passwd is no data:"),
        ("", " is no data:"),
        ("http", "http is not at one of allowed_media_hosts"),
        ("http://", "is not at one of allowed_media_hosts"),
        ("http://[::1", "Invalid IPv6 URL"),
        ("http://127.0.0.1:99999/", "Port out of range"),
        ("http://localhost/", "is not at one of allowed_media_hosts"),
        ("http://127.0.0.1.evil.example/", "is not at one of allowed_media_hosts"),
        ("http://127.0.0.1@evil.example/", "is not at one of allowed_media_hosts"),
        ("http://evil.example#@127.0.0.1/", "is not at one of allowed_media_hosts"),
        ("http://evil.example\\@127.0.0.1/", "is not at|cannot be fetched"),
        ("http://2130706433/", "is not at one of allowed_media_hosts"),
        ("http://127.1/", "is not at one of allowed_media_hosts"),
    ],
)
def test_other_sources_are_refused_by_name(source: str, problem: str) -> None:
    with pytest.raises(InvalidField, match=problem):
        local(timeout_s=0.5).read(source)


# ---------------------------------------------------------------- files


def test_files_are_read_in_the_allowed_directory(tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    (allowed / "in ner").mkdir(parents=True)
    (allowed / "in ner/a.png").write_bytes(PICTURE)
    (allowed / "link.png").symlink_to(allowed / "in ner/a.png")
    (tmp_path / "elsewhere").symlink_to(allowed)
    for directory in (allowed, tmp_path / "elsewhere"):
        sources = sources_of((), str(directory))
        assert sources.read(f"file://{directory}/in%20ner/a.png") == PICTURE
        assert sources.read(f"file://localhost{directory}/link.png") == PICTURE


def test_other_files_are_refused(tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    secret = tmp_path / "secret"
    secret.write_bytes(PICTURE)
    (allowed / "out").symlink_to(secret)
    (allowed / "loop").symlink_to(allowed / "loop")
    os.mkfifo(allowed / "fifo")
    (allowed / "null").symlink_to("/dev/zero")
    (allowed / "large").write_bytes(bytes(MIB + 1))
    (allowed / "empty").touch()
    (tmp_path / "allowed2").mkdir()
    (tmp_path / "allowed2/x").write_bytes(PICTURE)
    sources = sources_of((), str(allowed), max_mib=1)
    outside = "is not in allowed_media_directory"
    for path, problem in {
        f"{allowed}/out": outside,
        f"{allowed}/../secret": outside,
        f"{allowed}/%2e%2e/secret": outside,
        f"{allowed}2/x": outside,
        f"{allowed}/null": outside,
        "/etc/passwd": outside,
        "/dev/zero": outside,
        "etc/passwd": outside,
        f"example.com{allowed}/large": outside,
        f"{allowed}/fifo": "it is a FIFO, not a file",
        f"{allowed}": "it is a directory",
        f"{allowed}/large": "is larger than the 1 MiB",
        f"{allowed}/empty": "is empty",
        f"{allowed}/missing": "No such file",
        f"{allowed}/loop": "cannot be read",
        f"{allowed}/{'x' * 5000}": "File name too long",
        f"{allowed}/a%00b": "null byte",
    }.items():
        assert problem in refused(sources, f"file://{path}"), path
    problem = refused(sources_of(), f"file://{secret}")
    assert "files are not allowed without allowed_media_directory" in problem


# ---------------------------------------------------------------- hosts


def test_an_image_is_fetched_from_an_allowed_host(server: Server) -> None:
    for path, *headers in (
        ("/a%20b.png?x=1&y=%C3%BC", f"Content-Length: {len(PICTURE)}"),
        ("/until-it-closes",),
    ):
        server.answer(path, PICTURE, "200 OK", *headers)
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(PICTURE), PICTURE)
    server.answer("/chunked", chunks, "200 OK", "Transfer-Encoding: chunked")
    sources = local()
    assert sources.read(f"{server.url}/a b.png?x=1&y=\u00fc#part") == PICTURE
    assert sources.read(f"{server.url.upper()}/until-it-closes") == PICTURE
    assert sources.read(f"{server.url}/chunked") == PICTURE
    assert f"\r\nHost: 127.0.0.1:{server.port}\r\n" in server.seen[0]


def test_the_environments_proxy_is_not_used(server: Server, monkeypatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    server.answer("/", PICTURE)
    assert local().read(server.url) == PICTURE


def test_redirects_are_followed_and_counted(server: Server) -> None:
    server.answer("/end", PICTURE)
    server.redirect("/1", "end")
    server.redirect("/2", f"{server.url}/1", "301 Moved Permanently")
    server.redirect("/3", f"//127.0.0.1:{server.port}/2", "307 Temporary Redirect")
    server.redirect("/4", "/3", "308 Permanent Redirect")
    server.redirect("/loop", "/loop")
    sources = local()
    assert sources.read(f"{server.url}/3") == PICTURE
    assert len(server.seen) == 4
    for path in ("/4", "/loop"):
        assert "is the target of more than 3 redirects" in refused(sources, server.url + path)


def test_each_redirect_is_checked(server: Server) -> None:
    """Also one to a name that is allowed and leads to a private address."""
    sources = sources_of(("127.0.0.1", "localhost"), "/", timeout_s=5)
    for target, problem in {
        f"http://localhost:{server.port}/": "the host localhost has an address that is not public",
        "http://169.254.169.254/latest/meta-data": "is not at one of allowed_media_hosts",
        f"http://[::1]:{server.port}/": "is not at one of allowed_media_hosts",
        "file:///etc/passwd": "is not at one of allowed_media_hosts",
        "data:image/png;base64,AAAA": "is not at one of allowed_media_hosts",
        "//[": "Invalid IPv6 URL",
    }.items():
        server.redirect("/", target)
        assert problem in refused(sources, server.url)
    assert len(server.seen) == 6


PRIVATE = [
    "127.0.0.1",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",
    "224.0.1.1",
    "240.0.0.1",
    "255.255.255.255",
    "::1",
    "::",
    "fe80::1",
    "fd00::1",
    "ff02::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "2002:7f00:1::",
    "fec0::1",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public_are_refused(monkeypatch, address: str) -> None:
    assert not is_public(address)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    found = [(socket.AF_INET, 1, 6, "", ("93.184.215.14", 80)), (family, 1, 6, "", (address, 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    problem = refused(sources_of(("images.example",)), "http://images.example/")
    assert "the host images.example has an address that is not public" in problem


def test_public_addresses_are_allowed() -> None:
    assert is_public("93.184.215.14")
    assert is_public("2606:2800:21f:cb07:6820:80da:af6b:8b2c")


def resolve_to_here(monkeypatch, names: list[str]) -> None:
    """Names lead to 127.0.0.1, which counts as public; asking for one twice fails."""

    def resolve(name: str, port: int, *_: object, **__: object) -> list[object]:
        if name != "127.0.0.1":  # by the library, of the address that was found
            names.append(name)
        assert len(names) == 1
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(fetch, "is_public", lambda _: True)


def test_a_name_is_resolved_once(server: Server, monkeypatch) -> None:
    names: list[str] = []
    resolve_to_here(monkeypatch, names)
    server.answer("/", PICTURE)
    sources = sources_of(("Images.Example",))
    assert sources.read(f"http://images.example:{server.port}") == PICTURE
    assert names == ["images.example"]
    assert f"\r\nHost: images.example:{server.port}\r\n" in server.seen[0]


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes a certificate with openssl")
def test_certificates_are_checked(tmp_path: Path, monkeypatch) -> None:
    key = tmp_path / "key.pem"
    certificate = tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    names = ["-subj", "/CN=x", "-addext", "subjectAltName=DNS:images.example"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *names, *files], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    with serving(tls) as server:
        server.answer("/", PICTURE)
        monkeypatch.setattr(fetch, "_address", lambda host, port: "127.0.0.1")
        url = f"https://images.example:{server.port}/"
        hosts = ("images.example", "other.example")
        assert "CERTIFICATE_VERIFY_FAILED" in refused(sources_of(hosts), url)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        sources = sources_of(hosts)
        assert sources.read(url) == PICTURE
        problem = refused(sources, url.replace("images.", "other."))
        assert "CERTIFICATE_VERIFY_FAILED" in problem


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "answers with status 404"),
        (b"HTTP/1.1 302 Found\r\n\r\n", "answers with status 302"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "answers with status 204"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", "ends 7 bytes too early"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n", "more than the 1 MiB"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + bytes(MIB + 1), "more than the 1 MiB"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc",
            "cannot be fetched within 10 s (IncompleteRead",
        ),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", "cannot be fetched"),
        (b"SSH-2.0-server\r\n", "cannot be fetched"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n", "cannot be fetched"),
        (b"HTTP/1.1 200 OK\r\nA: " + b"b" * 99999, "cannot be fetched"),
        (b"", "cannot be fetched"),
    ],
)
def test_wrong_answers_are_refused(server: Server, answer: bytes, problem: str) -> None:
    server.answers["/"] = answer
    assert problem in refused(local(), f"{server.url}/")


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert "cannot be fetched within 10 s (" in refused(local(), f"http://127.0.0.1:{port}/")
    assert "cannot be fetched within 10 s (" in refused(local(), f"https://127.0.0.1:{port}/")


HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize("beginning", [b"", HEAD, HEAD + b"X: ", HEAD + b"\r\n"])
def test_a_slow_server_has_one_limit_for_all(server: Server, beginning: bytes) -> None:
    """It sends a byte before each wait for one would end."""

    def drip(connection: socket.socket) -> None:
        connection.sendall(beginning)
        while not server.ended.wait(0.05):
            connection.sendall(b"x")

    server.answers["/"] = drip
    server.redirect("/first", "/")
    started = time.monotonic()
    problem = refused(local(timeout_s=0.3), f"{server.url}/first")
    assert "cannot be fetched within 0.3 s (timed out)" in problem
    assert time.monotonic() - started < 5


def test_an_endless_body_ends_at_the_limit(server: Server) -> None:
    sent = []

    def pour(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not server.ended.is_set():
            connection.sendall(b"10000\r\n" + bytes(65536) + b"\r\n")
            sent.append(65536)

    server.answers["/"] = pour
    assert "more than the 1 MiB that are allowed" in refused(local(timeout_s=60), server.url + "/")
    assert sum(sent) < 16 * MIB  # the rest waited in the sockets' buffers


def test_memory_is_reserved_before_it_is_taken(server: Server, tmp_path: Path) -> None:
    """As much as a server tells, or the most allowed; of files and data: URLs the file's."""
    for path, size in (("/told", "Content-Length: 700"), ("/not", "A: b")):
        # No byte of the body follows.
        server.answer(path, b"", "200 OK", size)
    (tmp_path / "file.png").write_bytes(bytes(30))
    reserved: list[int] = []

    def reserve(size: int) -> None:
        reserved.append(size)
        raise RuntimeError("there is no room")

    sources = sources_of(("127.0.0.1",), str(tmp_path), max_mib=1)
    data = f"data:image/png;base64,{b64encode(bytes(60)).decode()}"
    for source in (
        f"{server.url}/told",
        f"{server.url}/not",
        f"file://{tmp_path}/file.png",
        data,
    ):
        with pytest.raises(RuntimeError, match="there is no room"):
            sources.read(source, 1, lambda: False, reserve)
    assert reserved == [700, MIB, 30, 60]


@pytest.mark.parametrize("sends", [b"x", b""])
def test_a_fetch_ends_when_nobody_waits(server: Server, sends: bytes) -> None:
    """Whether bytes come or not."""
    over = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.sendall(HEAD + b"\r\n")
        over.set()
        while not server.ended.wait(0.01):
            connection.sendall(sends)

    server.answers["/"] = drip
    started = time.monotonic()
    with pytest.raises(InvalidField, match="cannot be fetched"):
        local(timeout_s=60).read(f"{server.url}/", 1, over.is_set)
    assert time.monotonic() - started < 30
