"""The OpenAI server in front of the real tritonserver, asked by the real SDK."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from live import MODEL, Server, wait_for
from serving import Served, serve

from gllm_client import SyncClient

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]
PROMPT = "ROMEO:"
GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def gateway(server: Server) -> Iterator[Served]:
    triton: Any = SimpleNamespace(address=server.grpc)
    with serve(triton) as served:
        yield served


def test_models_and_health(gateway: Served) -> None:
    (model,) = gateway.sdk.models.list().data
    assert model.id == MODEL
    assert gateway.http.get("/health").status_code == 200


def test_a_completion_is_what_triton_answers(gateway: Served, server: Server) -> None:
    with SyncClient(server.grpc, MODEL) as client:
        expected = client.complete(PROMPT, **GREEDY)
    whole = gateway.sdk.completions.create(model=MODEL, prompt=PROMPT, **GREEDY)
    assert whole.choices[0].text == expected.text
    assert whole.usage is not None and whole.usage.completion_tokens == expected.num_output_tokens
    stream = gateway.sdk.completions.create(model=MODEL, prompt=PROMPT, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected.text


def test_chat_streamed_and_whole(gateway: Served) -> None:
    messages: Any = [{"role": "user", "content": "Speak."}]
    whole = gateway.sdk.chat.completions.create(model=MODEL, messages=messages, **GREEDY)
    stream = gateway.sdk.chat.completions.create(
        model=MODEL, messages=messages, stream=True, **GREEDY
    )
    parts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(parts) == whole.choices[0].message.content != ""
    assert whole.choices[0].finish_reason == "length"


def test_log_probabilities_of_a_prompt(gateway: Served, server: Server) -> None:
    """As lm-eval's loglikelihood asks for them."""
    ids = gateway.post("/tokenize", prompt="To be, or not to be").json()["tokens"]
    answer = gateway.sdk.completions.create(
        model=MODEL, prompt=ids, max_tokens=1, echo=True, logprobs=1, temperature=0
    )
    assert answer.choices[0].logprobs is not None
    first, *others = answer.choices[0].logprobs.token_logprobs or ()
    with SyncClient(server.grpc, MODEL) as client:
        scores = client.complete(input_ids=ids, prompt_logprobs=1, max_tokens=1).prompt_logprobs
    assert first is None and scores is not None
    for token, score, told in zip(ids[1:], scores[1:], others, strict=False):
        assert told == pytest.approx(score[str(token)]["logprob"], abs=1e-4)


def test_a_request_id_reaches_the_log_of_the_engine(gateway: Served, server: Server) -> None:
    start = server.log_size()
    body = {"model": MODEL, "max_tokens": 2}
    messages = [{"role": "user", "content": "Speak."}]
    asked = {
        "/v1/completions": {"prompt": ["a", "b"]},
        "/v1/chat/completions": {"messages": messages},
        "/v1/messages": {"messages": messages},
        "/v1/responses": {"input": "Speak.", "max_output_tokens": 16},
    }
    wanted = []
    for number, (path, more) in enumerate(asked.items()):
        limit = {} if path == "/v1/responses" else body
        headers = {"x-request-id": f"here-{number}"}
        answer = gateway.http.post(path, json={"model": MODEL} | limit | more, headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-request-id"] == f"here-{number}"
        ids = [f"here-{number}-0", f"here-{number}-1"] if number == 0 else [f"here-{number}"]
        wanted += [f"request {id!r}: " for id in ids]
    wait_for(lambda: all(each in server.log(start) for each in wanted), f"lines of {wanted}")


def test_a_refusal_names_the_field(gateway: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        gateway.sdk.completions.create(model=MODEL, prompt=PROMPT, temperature=-1)
    with pytest.raises(openai.NotFoundError):
        gateway.sdk.completions.create(model="nobody", prompt=PROMPT)
