"""Requests as users of Triton make them: tritonclient and plain HTTP, nothing of gllm's own client.

Owns tensors in and out of each transport. An answer is a list of `Response`.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import queue
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from live import MODEL, Server

LIMIT_S = 100.0  # for a whole answer
Tensors = Mapping[str, Any]
ALL_FLAGS = {
    "return_finish_reason": True,
    "return_num_input_tokens": True,
    "return_num_output_tokens": True,
    "return_token_ids": True,
}


def sampled(**fields: Any) -> dict[str, str]:
    """The sampling_parameters tensor."""
    return {"sampling_parameters": json.dumps(fields)}


@dataclass(frozen=True)
class Response:
    """`outputs`: elements by name, BYTES as str. `final`: None over HTTP, which hides it."""

    outputs: dict[str, list[Any]]
    final: bool | None = None
    request_id: str = ""

    @property
    def text(self) -> str:
        return self.outputs["text_output"][0]


def joined(responses: Iterable[Response], name: str) -> list[Any]:
    """All elements of an output, one response after another."""
    return [element for response in responses for element in response.outputs.get(name, [])]


def text_of(responses: Iterable[Response]) -> str:
    return "".join(joined(responses, "text_output"))


# ---------------------------------------------------------------- gRPC


def tensor(name: str, value: Any) -> triton.InferInput:
    """str and bytes: BYTES; bool: BOOL; a list: INT32 or BYTES; an array: as it is."""
    if isinstance(value, np.ndarray):
        array = value
    else:
        values = value if isinstance(value, list) else [value]
        kinds = {str: np.object_, bytes: np.object_, bool: np.bool_}
        array = np.array(values, dtype=kinds.get(type(values[0]) if values else int, np.int32))
    types = {"O": "BYTES", "b": "BOOL", "i": f"INT{array.itemsize * 8}", "f": "FP32"}
    result = triton.InferInput(name, list(array.shape), types[array.dtype.kind])
    return result.set_data_from_numpy(array)


def to_response(result: triton.InferResult) -> Response:
    message = result.get_response()
    outputs = {}
    for output in message.outputs:
        array = result.as_numpy(output.name)
        texts = output.datatype == "BYTES"
        outputs[output.name] = [e.decode() if texts else e.item() for e in array.reshape(-1)]
    return Response(outputs, message.parameters["triton_final_response"].bool_param, message.id)


class GrpcStream:
    """A stream of tritonclient's blocking client: any number of requests, answers in a queue."""

    def __init__(self, server: Server, *, with_status: bool = False) -> None:
        self.client = triton.InferenceServerClient(server.grpc)
        self._answers: queue.Queue[Response | Exception] = queue.Queue()
        headers = {"triton_grpc_error": "true"} if with_status else None
        self.client.start_stream(self._take, headers=headers)

    def _take(self, result: Any, error: Exception | None) -> None:
        self._answers.put(error if error is not None else to_response(result))

    def send(self, tensors: Tensors, model: str = MODEL, **options: Any) -> None:
        """`options`: those of async_stream_infer, such as request_id, parameters, timeout."""
        inputs = [tensor(name, value) for name, value in tensors.items()]
        self.client.async_stream_infer(model, inputs, **options)

    def take(self, timeout_s: float = LIMIT_S) -> Response:
        """The next response of whichever request; raises the error that came instead of one."""
        answer = self._answers.get(timeout=timeout_s)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def is_empty(self) -> bool:
        """Whether all that has come was taken."""
        return self._answers.empty()

    def close(self, *, cancel: bool = False) -> None:
        self.client.stop_stream(cancel_requests=cancel)
        self.client.close()

    def __enter__(self) -> GrpcStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close(cancel=exc[0] is not None)


def ask(server: Server, tensors: Tensors, model: str = MODEL, **options: Any) -> list[Response]:
    """All responses to one request over a gRPC stream of its own."""
    with GrpcStream(server) as stream:
        stream.send(tensors, model, **options)
        responses = [stream.take()]
        while not responses[-1].final:
            responses.append(stream.take())
    return responses


async def ask_aio(server: Server, tensors: Tensors, model: str = MODEL) -> list[Response]:
    """The same with tritonclient's asyncio client."""

    async def requests() -> Any:
        inputs = [tensor(name, value) for name, value in tensors.items()]
        yield {"model_name": model, "inputs": inputs}

    async with triton_aio.InferenceServerClient(server.grpc) as client:
        responses = []
        async for result, error in client.stream_infer(requests()):
            if error is not None:
                raise error
            responses.append(to_response(result))
    return responses


# ---------------------------------------------------------------- HTTP


@contextmanager
def posted(
    server: Server, body: Any, kind: str = "generate", model: str = MODEL
) -> Iterator[http.client.HTTPResponse]:
    """A POST whose connection is closed at the end. `body`: JSON, or text to be sent as it is."""
    connection = http.client.HTTPConnection(server.http, timeout=LIMIT_S)
    try:
        raw = body if isinstance(body, str | bytes) else json.dumps(body)
        connection.request("POST", f"/v2/models/{model}/{kind}", raw)
        with connection.getresponse() as answer:
            yield answer
    finally:
        connection.close()


def generate(server: Server, body: Any, model: str = MODEL) -> tuple[int, dict[str, Any]]:
    """Status and JSON of /generate."""
    with posted(server, body, "generate", model) as answer:
        return answer.status, json.loads(answer.read())


def generate_stream(server: Server, body: Any, model: str = MODEL) -> list[Response]:
    """All events of /generate_stream. Raises AssertionError on an error."""
    responses = []
    with posted(server, body, "generate_stream", model) as answer:
        assert answer.status == 200, answer.read()
        for line in answer:
            if line.startswith(b"data: "):
                responses.append(from_json(json.loads(line.removeprefix(b"data: "))))
    return responses


def from_json(answer: dict[str, Any]) -> Response:
    """One JSON answer; a single element comes without its list."""
    assert "error" not in answer, answer
    values = {k: v for k, v in answer.items() if k not in ("model_name", "model_version")}
    return Response({k: v if isinstance(v, list) else [v] for k, v in values.items()})


def generate_once(server: Server, body: Any, model: str = MODEL) -> list[Response]:
    status, answer = generate(server, body, model)
    assert status == 200, answer
    return [from_json(answer)]


ONE_SHOT = {"grpc": ask, "generate": generate_once}
STREAMING = {
    "grpc": ask,
    "grpc aio": lambda *arguments: asyncio.run(asyncio.wait_for(ask_aio(*arguments), LIMIT_S)),
    "generate_stream": generate_stream,
}
