"""Keys, limits, request ids, clients that leave, the drain."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from patience import SOON_S, WAIT_S
from scripted_triton import FakeModel
from serving import Served, serve

from gllm_client.openai_server.gate import Keys

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def wait_for(true: Any) -> None:
    limit = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_keys(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nalpha\n\nbeta\n")
    with serve(served.triton, api_key_file=str(file)) as guarded:
        for headers in (bearer("alpha"), bearer("beta"), {"x-api-key": "beta"}):
            assert guarded.http.post(CHAT, json=BODY, headers=headers).status_code == 200
        for headers in ({}, bearer("gamma"), bearer("# ours"), {"authorization": "Basic alpha"}):
            answer = guarded.http.post(CHAT, json=BODY, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert guarded.http.get("/health").status_code == 200
        assert guarded.http.get("/v1/models").status_code == 401
        file.write_text("gamma\n")
        assert guarded.http.post(CHAT, json=BODY, headers=bearer("gamma")).status_code == 200
        assert guarded.http.post(CHAT, json=BODY, headers=bearer("alpha")).status_code == 401
        file.unlink()
        assert guarded.http.post(CHAT, json=BODY, headers=bearer("gamma")).status_code == 200


def asked_for(served: Served) -> str | None:
    """The tenant of the last answer that Triton was asked for."""
    generations = [a for a in served.model.asked if "operation" not in a.inputs]
    tenant: str | None = generations[-1].sampling.get("tenant")
    return tenant


def test_a_key_names_its_tenant(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("alpha  team one\nbeta\n")
    with serve(served.triton, api_key_file=str(file)) as guarded:
        for key, tenant in (("alpha", "team one"), ("beta", None)):
            assert guarded.http.post(CHAT, json=BODY, headers=bearer(key)).status_code == 200
            assert asked_for(served) == tenant
        claimed = bearer("beta") | {"x-tenant": "team one"}
        answer = guarded.http.post(CHAT, json=BODY, headers=claimed)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-tenant")


def test_stored_answers_are_those_of_a_key_or_its_tenant(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("alpha one\nbeta one\ngamma\ndelta\n")
    with serve(served.triton, api_key_file=str(file)) as guarded:

        def status(key: str, method: str, path: str, **body: Any) -> int:
            answer = guarded.http.request(
                method, f"/v1/responses{path}", headers=bearer(key), json=body or None
            )
            return answer.status_code

        for owner, others, friend in (
            ("alpha", "gamma", "beta"),
            ("gamma", "alpha delta", "gamma"),
        ):
            answer = guarded.http.post("/v1/responses", json={"input": "a"}, headers=bearer(owner))
            path = f"/{answer.json()['id']}"
            more = {"input": "b", "previous_response_id": answer.json()["id"]}
            for other in others.split():
                assert status(other, "GET", path) == status(other, "GET", "/none") == 404
                assert status(other, "GET", f"{path}/input_items") == 404
                assert status(other, "DELETE", path) == 404
                assert status(other, "POST", "", **more) == 400
            assert status(friend, "POST", "", **more) == status(friend, "GET", path) == 200
            assert status(friend, "DELETE", path) == 200 and status(owner, "GET", path) == 404


def test_without_keys_a_header_names_the_tenant(served: Served) -> None:
    assert served.http.post(CHAT, json=BODY, headers={"x-tenant": "blue"}).status_code == 200
    assert asked_for(served) == "blue"


def test_a_key_file_without_keys_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--api-key-file: .* No such file"):
        Keys(tmp_path / "none")
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no key"):
        Keys(tmp_path / "empty")


@contextmanager
def streaming(served: Served, **headers: str) -> Iterator[httpx.Response]:
    with served.http.stream("POST", CHAT, json=BODY | {"stream": True}, headers=headers) as answer:
        yield answer


def test_concurrency_is_limited(served: Served) -> None:
    served.model.pause = threading.Event()
    with serve(served.triton, max_concurrency=1) as limited, streaming(limited) as first:
        pieces = first.iter_text()
        assert "Hel" in next(pieces)
        answer = limited.post(CHAT, **BODY)
        assert answer.status_code == 429 and answer.headers["retry-after"]
        assert limited.http.get("/v1/models").status_code == 200
        served.model.pause.set()
        assert "[DONE]" in "".join(pieces)
        wait_for(lambda: limited.app.state.door.running == 0)
        assert limited.post(CHAT, **BODY).status_code == 200


def test_a_body_limit(served: Served) -> None:
    with serve(served.triton, max_body_size=100) as limited:
        assert limited.post(CHAT, **BODY).status_code == 200
        assert limited.post(CHAT, **BODY, user="x" * 100).status_code == 413
        chunked = iter([b" " * 60, b" " * 60])
        headers = {"content-type": "application/json"}
        assert limited.http.post(CHAT, content=chunked, headers=headers).status_code == 413


def test_the_request_id_goes_in_and_out(served: Served) -> None:
    answer = served.http.post(CHAT, json=BODY, headers={"x-request-id": "req-7"})
    assert answer.headers["x-request-id"] == "req-7" and answer.json()["id"] == "chatcmpl-req-7"
    assert answer.headers["request-id"] == "req-7"  # Anthropic's
    assert {asked.id for asked in served.model.asked[-2:]} == {"req-7"}
    odd = served.http.post(CHAT, json=BODY, headers={"x-request-id": "a b" * 100})
    assert odd.status_code == 200 and len(odd.headers["x-request-id"]) == 32
    assert served.http.get("/v1/nothing").headers["x-request-id"]


def test_no_page_of_another_origin_may_ask_by_default(served: Served) -> None:
    origin = {"origin": "https://a.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in served.http.options(CHAT, headers=origin).headers
    with serve(served.triton, allow_origin=("https://a.example",)) as open_one:
        allowed = open_one.http.options(CHAT, headers=origin)
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        other = {**origin, "origin": "https://b.example"}
        assert (
            "access-control-allow-origin" not in open_one.http.options(CHAT, headers=other).headers
        )


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_client_that_leaves_cancels_its_request(served: Served, path: str, stream: bool) -> None:
    served.model.pause = threading.Event()
    prompt: dict[str, Any] = BODY if path == CHAT else {"prompt": ["abcdef", "ghijkl"]}
    with (
        httpx.Client(base_url=served.url, trust_env=False) as client,
        pytest.raises(httpx.TimeoutException),
    ):
        with client.stream("POST", path, json=prompt | {"stream": stream}, timeout=0.3) as answer:
            for _ in answer.iter_bytes():
                continue
    left = [asked for asked in served.model.asked if "operation" not in asked.inputs]
    assert len(left) == (1 if path == CHAT else 2)
    for asked in left:
        assert asked.cancelled.wait(SOON_S)
    wait_for(lambda: served.app.state.door.running == 0)
    served.model.pause.set()


def test_a_client_that_never_reads_holds_nothing_up(served: Served) -> None:
    served.triton.models["m"] = FakeModel(
        answer=lambda asked, choice: "x" * 3_000_000 if "big" in asked.prompt else "ok",
        tokens_per_chunk=100_000,
        max_model_len=10_000_000,
    )
    body = b'{"prompt": "big", "stream": true, "max_tokens": 3000000}'
    address = ("127.0.0.1", int(served.url.rpartition(":")[2]))
    with socket.create_connection(address) as slow:
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(body), body)
        )
        wait_for(lambda: any("operation" not in a.inputs for a in served.model.asked))
        assert served.post("/v1/completions", prompt="a").json()["choices"][0]["text"] == "ok"
    wait_for(lambda: served.app.state.door.running == 0)


def test_the_drain(served: Served) -> None:
    """The command itself: after SIGTERM its stream ends, new requests get 503, then it ends."""
    served.model.pause = threading.Event()
    command = [sys.executable, "-m", "gllm_client", "openai", "--port", "0"]
    command += ["--url", f"grpc://{served.triton.address}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[4]
        with httpx.Client(base_url=url, timeout=SOON_S, trust_env=False) as client:
            assert client.get("/health").status_code == 200
            with client.stream("POST", CHAT, json=BODY | {"stream": True}) as answer:
                pieces = answer.iter_text()
                assert "Hel" in next(pieces)
                os.kill(process.pid, signal.SIGTERM)
                wait_for(lambda: client.get("/health").status_code == 503)
                assert client.post(CHAT, json=BODY).status_code == 503
                served.model.pause.set()
                assert "".join(pieces).endswith("data: [DONE]\n\n")
        assert process.wait(WAIT_S) == 0
