"""Answers for the commands from a server, and how errors of one request stay with it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from patience import SOON_S

from gllm_client import answers as module
from gllm_client.answers import RemoteAnswers, SourceLost
from gllm_client.batch import Failed, Item
from gllm_client.protocol import Chunk, GenerateError, Output


class FakeClient:
    """Echoes; knows how many requests were under way at a time."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.requests = names, list[dict[str, Any]]()
        self.lock, self.now, self.most = threading.Lock(), 0, 0
        self.together = threading.Barrier(3)
        self.live = True

    def index(self) -> list[dict[str, str]]:
        unready = {"name": "loading", "state": "LOADING"}
        return [unready, *({"name": name, "state": "READY"} for name in self.names)]

    def generate(self, prompt: str | None = None, **options: Any) -> Iterator[Chunk]:
        with self.lock:
            self.requests.append({"prompt": prompt} | options)
            self.now += 1
            self.most = max(self.most, self.now)
        if prompt in ("a", "b", "c"):
            self.together.wait(SOON_S)
        with self.lock:
            self.now -= 1
        if prompt == "bad":
            raise GenerateError("seed: no")
        if prompt == "gone":
            self.live = False
            raise GenerateError("connection refused", "UNAVAILABLE")
        if prompt == "huge":
            raise GenerateError("connection reset", "UNAVAILABLE")
        if prompt == "odd":
            raise KeyError("bug")
        yield Chunk((Output(str(prompt)),))

    def is_live(self) -> bool:
        return self.live

    def close(self) -> None: ...


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    client = FakeClient(["m"])
    monkeypatch.setattr(module, "connect", lambda url: client)
    return client


def test_the_only_model_is_found(client: FakeClient) -> None:
    list(RemoteAnswers("u", None).stream("x", {}))
    assert client.requests[-1]["model"] == "m"
    client.names = ["m", "n"]
    with pytest.raises(GenerateError, match="choose among the models at u: m, n"):
        RemoteAnswers("u", None)
    list(RemoteAnswers("u", "n").stream("x", {}))
    assert client.requests[-1]["model"] == "n"


def test_text_and_messages_are_told_apart(client: FakeClient) -> None:
    remote = RemoteAnswers("u", "m", timeout=3)
    list(remote.stream("x", {"seed": 1}))
    list(remote.stream([{"role": "user", "content": "x"}], {"n": 2}))
    first, second = client.requests
    assert (first["prompt"], first["stream"], first["timeout"]) == ("x", True, 3)
    assert first["sampling"] == {"seed": 1}
    assert second["messages"][0]["content"] == "x" and second["stream"] is False


def test_token_ids_are_a_prompt_too(client: FakeClient) -> None:
    list(RemoteAnswers("u", "m").stream((5, 6), {}))
    assert client.requests[-1]["input_ids"] == (5, 6) and client.requests[-1]["prompt"] is None


def test_what_goes_to_the_chat_template_is_passed_on(client: FakeClient) -> None:
    remote, messages = RemoteAnswers("u", "m"), [{"role": "user", "content": "x"}]
    template = {"tools": [{"type": "function"}], "chat_template_kwargs": {"thinking": False}}
    list(remote.stream(messages, {}, **template))
    list(remote.answers([Item(1, messages, {}, template)], 1))
    for request in client.requests:
        assert {key: request[key] for key in template} == template


def items(*prompts: str) -> Iterator[Item]:
    return (Item(i, prompt, {}) for i, prompt in enumerate(prompts))


def test_a_batch_is_answered_so_many_at_a_time(client: FakeClient) -> None:
    answers = RemoteAnswers("u", "m").answers(items("a", "b", "c", "d", "e", "f"), 3)
    found = {item.id: answer.text for item, answer in answers}
    assert found == dict(enumerate("abcdef"))
    assert client.most == 3  # the barrier proves three at once, this that there were no more


def test_a_refused_item_fails_alone(client: FakeClient) -> None:
    asked = items("x", "bad", "huge", "odd", "y")
    answers = {item.id: a for item, a in RemoteAnswers("u", "m").answers(asked, 2)}
    assert answers[1] == Failed("seed: no") and answers[0].text == "x" and answers[4].text == "y"
    assert answers[2] == Failed("connection reset") and answers[3] == Failed("'bug'")


@pytest.mark.parametrize("n", ["abc", 10**400, [1], None, 1, "1", float("inf")])
def test_any_n_can_be_asked_for(client: FakeClient, n: Any) -> None:
    """Whether it makes sense the server says."""
    list(RemoteAnswers("u", "m").stream("x", {"n": n}))
    assert client.requests[-1]["sampling"] == {"n": n}
    assert client.requests[-1]["stream"] is (n in (None, 1, "1"))


def test_log_probabilities_are_asked_for_as_a_whole(client: FakeClient) -> None:
    list(RemoteAnswers("u", "m").stream("x", {"logprobs": 0}))
    list(RemoteAnswers("u", "m").stream("x", {}))
    assert [r["return_cumulative_logprob"] for r in client.requests] == [True, False]


def test_a_server_that_is_gone_ends_the_batch(client: FakeClient) -> None:
    with pytest.raises(SourceLost, match="refused"):
        list(RemoteAnswers("u", "m").answers(items("x", "gone", "y"), 1))


def test_answers_that_came_before_the_server_went_are_given_first(
    client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = asyncio.wait
    monkeypatch.setattr(asyncio, "wait", lambda pending, return_when: wait(pending))
    found = []
    with pytest.raises(SourceLost, match="refused"):
        for item, _ in RemoteAnswers("u", "m").answers(items("w", "x", "gone", "y", "z"), 5):
            found.append(item.prompt)
    assert sorted(found) == ["w", "x", "y", "z"]
