from __future__ import annotations
from serving import Served
USER = [{"role": "user", "content": "Hello"}]

def test_whole(served: Served) -> None:
    answer = served.sdk.chat.completions.create(model="m", messages=USER)
    assert answer.choices[0].message.content == "Hello!"
    print(answer)

def test_stream(served: Served) -> None:
    for c in served.sdk.chat.completions.create(model="m", messages=USER, stream=True, stream_options={"include_usage": True}): print(c)

def test_completion(served: Served) -> None:
    print(served.sdk.completions.create(model="m", prompt="abc", echo=True, logprobs=1))
    print(served.sdk.models.list())
    print(served.http.get("/health"), served.http.get("/nothing").json())
    print(served.refused("/v1/chat/completions", messages=USER, n="a"))
