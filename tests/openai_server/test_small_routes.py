"""Models, tokens, health, metrics; models that come and go."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest
from metrics_page import metrics_page
from patience import WAIT_S
from scripted_triton import Asked, FakeModel, FakeTriton, Refused
from serving import Served, serve


def test_models_are_listed_and_shown(served: Served) -> None:
    served.triton.models["other"] = FakeModel(max_model_len=77)
    served.triton.models["foreign"] = FakeModel(is_ours=False)
    assert served.sdk.models.retrieve("other").id == "other"
    listed = served.sdk.models.list().data
    assert [model.id for model in listed] == ["m", "other"]
    assert served.http.get("/v1/models/other").json()["max_model_len"] == 77
    assert served.http.get("/v1/models/foreign").status_code == 404


def test_models_are_listed_before_the_first_look_has_ended() -> None:
    asked_for = threading.Event()

    class Slow(FakeModel):
        def facts(self) -> dict[str, Any]:
            asked_for.wait(WAIT_S)
            return super().facts()

    with FakeTriton(m=Slow()) as triton, serve(triton) as served, ThreadPoolExecutor(1) as pool:
        listed = pool.submit(served.sdk.models.list)
        wait([listed], timeout=0.2)  # it answers nothing yet
        asked_for.set()
        assert [model.id for model in listed.result().data] == ["m"]


def test_a_model_loaded_later_is_found_and_an_unloaded_one_is_not(served: Served) -> None:
    assert served.sdk.models.retrieve("m").id == "m"
    served.triton.models["later"] = served.triton.models.pop("m")
    served.app.state.models._refreshed = 0.0  # as if the last look were long ago
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    assert served.post("/v1/chat/completions", model="later", **body).status_code == 200
    assert served.post("/v1/chat/completions", model="m", **body).status_code == 404
    assert served.post("/v1/chat/completions", **body).json()["model"] == "later"


def test_without_a_name_there_must_be_one_model(served: Served) -> None:
    served.triton.models["other"] = FakeModel()
    status, field, message = served.refused("/v1/completions", prompt="a")
    assert (status, field) == (400, "model") and "m, other" in message


def test_tokens(served: Served) -> None:
    answer = served.post("/tokenize", prompt="ab", return_token_strs=True).json()
    assert answer == {
        "count": 2,
        "max_model_len": 4096,
        "tokens": [97, 98],
        "token_strs": ["a", "b"],
    }
    operations = [asked.inputs.get("operation") for asked in served.model.asked]
    assert [*filter("describe".__ne__, operations)] == ["tokenize", "token_texts"]
    chat = served.post("/tokenize", messages=[{"role": "user", "content": "a"}]).json()
    assert "".join(map(chr, chat["tokens"])) == "<|user|>\na\n<|assistant|>"
    assert served.post("/detokenize", tokens=[97, 98]).json() == {"prompt": "ab"}
    assert served.refused("/detokenize", tokens="a")[:2] == (400, "tokens")
    assert served.refused("/tokenize", prompt="a", frobnicate=1)[:2] == (400, "frobnicate")


class Small(FakeModel):
    """A model of few tokens."""

    def respond(self, asked: Asked) -> Iterator[dict[str, list[Any]]]:
        if asked.inputs.get("operation") == "detokenize":
            raise Refused("input_ids: token 9 is outside the vocabulary [0, 9)")
        yield from super().respond(asked)


def test_tokens_that_the_model_does_not_have(served: Served) -> None:
    served.triton.models["m"] = Small()
    status, field, message = served.refused("/detokenize", tokens=[9])
    assert (status, field, message[:18]) == (400, "tokens", "tokens: token 9 is")


def test_health_follows_the_models(served: Served) -> None:
    assert served.http.get("/health").status_code == 200
    model = served.triton.models.pop("m")
    assert served.http.get("/health").status_code == 503
    served.triton.models["m"] = model
    served.forget()
    assert served.http.get("/health").status_code == 200
    assert served.http.get("/version").json()["version"]


def test_health_describes_a_model_once(served: Served) -> None:
    for path in ("/v1/models/m", "/health", "/health"):
        served.forget()
        served.model.asked.clear()
        assert served.http.get(path).status_code == 200
        assert [asked.inputs["operation"] for asked in served.model.asked] == ["describe"]


def test_health_without_tritonserver() -> None:
    with FakeTriton(m=FakeModel()) as triton:
        gone = triton.address
    triton.address_of_the_dead = gone  # type: ignore[attr-defined]
    with serve(triton) as served:
        assert served.http.get("/health").status_code == 503
        listed = served.http.get("/v1/models")
        assert listed.status_code == 503 and "cannot be reached" in listed.text
        status, _, message = served.refused("/v1/completions", prompt="a")
        assert status == 503 and "cannot be reached" in message


@pytest.fixture
def page() -> Iterator[str]:
    with metrics_page(lambda: b"gllm:running 1\n") as address:
        yield address


def test_metrics_are_passed_on(served: Served, page: str) -> None:
    own = served.http.get("/metrics").text
    assert own.startswith("# HELP gllm:malformed_tool_calls_total ")
    with serve(served.triton, metrics_url=page) as other:
        assert other.http.get("/metrics").text.startswith("gllm:running 1\n# HELP gllm:malformed")
    with serve(served.triton, metrics_url="http://127.0.0.1:1/metrics") as other:
        assert other.http.get("/metrics").status_code == 503


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
BROKEN = '<tool_call>{"name": 7}</tool_call>'


@pytest.mark.parametrize("stream", [True, False])
def test_malformed_calls_are_text_and_counted(served: Served, stream: bool) -> None:
    """Of every answer, under the model's name and format; sound calls count for nothing."""
    answers = [CALL, BROKEN, f"{BROKEN} and {BROKEN}"]
    served.triton.models["other"] = FakeModel()
    served.triton.models["m"] = FakeModel(answer=lambda asked, choice: answers[choice])
    with serve(served.triton, tool_format="hermes") as server:

        def counted() -> dict[str, float]:
            found = re.findall(
                r'^gllm:malformed_tool_calls_total{model="(.*)",format="hermes",process="\d+"} '
                r"(\d+)$",
                server.http.get("/metrics").text,
                re.MULTILINE,
            )
            return {name: int(number) for name, number in found}

        messages = [{"role": "user", "content": "Hello"}]
        body = {"model": "m", "messages": messages, "tools": TOOLS, "n": 3, "stream": stream}
        assert server.http.get("/health").status_code == 200
        assert counted() == {"m": 0, "other": 0}
        answer = server.post("/v1/chat/completions", **body)
        assert answer.status_code == 200 and '\\"name\\": 7' in answer.text
        assert counted() == {"m": 3, "other": 0}
        server.triton.models["m"].max_model_len = 999  # another model now, as after a reload
        server.app.state.models._refreshed = 0.0  # as if the last look were long ago
        assert server.http.get("/v1/models/nobody").status_code == 404
        assert server.http.get("/v1/models/m").json()["max_model_len"] == 999
        assert counted() == {"m": 3, "other": 0}
