"""A tritonserver in the test's own process: the KServe calls that the clients use, and no model.

A token is a character: its id is the character's code point. A FakeModel says what it answers, so a
test chooses the text, the pace and the errors.
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

_FORMATS = {"INT32": "i", "UINT32": "I", "FP32": "f"}
TENSORS = {
    "text_output": "BYTES",
    "finish_reason": "BYTES",
    "stop_reason": "BYTES",
    "logprobs": "BYTES",
    "prompt_logprobs": "BYTES",
    "token_ids": "INT32",
    "num_output_tokens": "UINT32",
    "num_input_tokens": "UINT32",
    "num_cached_tokens": "UINT32",
    "cumulative_logprob": "FP32",
    "request_times": "FP32",
}


class Refused(Exception):
    """The request fails with this sentence."""


@dataclass
class Asked:
    """A request as a FakeModel sees it. `done` is set when it has ended in any way."""

    id: str
    inputs: dict[str, Any]
    metadata: dict[str, Any] = field(default_factory=dict)  # of the gRPC call
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def sampling(self) -> dict[str, Any]:
        return dict(json.loads(self.inputs.get("sampling_parameters", "{}")))

    @property
    def prompt(self) -> str:
        return "".join(map(chr, self.inputs.get("input_ids", ())))


def echo(asked: Asked, choice: int) -> str:
    """The default answer: the last line of the prompt before the answer's own, then "!"."""
    lines = [line for line in asked.prompt.split("\n") if not line.startswith("<|")]
    return f"{lines[-1] if lines else ''}!"


@dataclass
class FakeModel:
    """A model. `tokens_per_chunk`: of one choice, in one response."""

    answer: Callable[[Asked, int], str] = echo
    tokens_per_chunk: int = 3
    max_model_len: int = 4096
    generation_config: dict[str, Any] = field(default_factory=dict)
    chat_template: str = "<|role|> enable_thinking reasoning_effort"
    generation_prompt: str = "<|assistant|>"
    num_cached_tokens: int = 0
    request_times: tuple[float, ...] = (0.25, 0.5, 1.0)
    pause: threading.Event | None = (
        None  # if set, the answer stops after its first chunk until it is
    )
    refusal: str | None = None  # the sentence with which generations fail
    refuse_after: int = 0  # this many chunks
    modalities: tuple[str, ...] = ("text",)
    is_ours: bool = True  # else a model of another backend, which refuses our inputs
    asked: list[Asked] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        return {
            "max_model_len": self.max_model_len,
            "chat_template": {"default": self.chat_template},
            "generation_config": self.generation_config,
            "architectures": ["FakeForCausalLM"],
            "special_tokens": {"<|assistant|>": 7},
            "vocab_size": 0x110000,
            "input_modalities": list(self.modalities),
        }

    def respond(self, asked: Asked) -> Iterator[dict[str, list[Any]]]:
        """The output tensors of each response."""
        if not self.is_ours:
            raise Refused("unexpected inference input 'operation' for model")
        self.asked.append(asked)
        operation = asked.inputs.get("operation", "generate")
        if operation == "describe":
            yield {"text_output": [json.dumps(self.facts())]}
        elif operation == "tokenize":
            text = self.render(asked)
            yield {"text_output": [text], "token_ids": [ord(char) for char in text]}
        elif operation == "token_texts":
            yield {"text_output": [json.dumps([*asked.prompt])]}
        elif operation == "detokenize":
            yield {"text_output": [asked.prompt]}
        else:
            yield from self.generate(asked)

    def render(self, asked: Asked) -> str:
        if "text_input" in asked.inputs:
            return str(asked.inputs["text_input"])
        text = ""
        if tools := json.loads(asked.inputs.get("tools", "[]")):
            text += "<|tools|>" + ",".join(tool["function"]["name"] for tool in tools) + "\n"
        for message in json.loads(asked.inputs["messages"]):
            content = message["content"]
            if isinstance(content, list):
                content = "\n".join(map(_part_text, content))
            text += f"<|{message['role']}|>\n{content}\n"
        return text + self.generation_prompt

    def generate(self, asked: Asked) -> Iterator[dict[str, list[Any]]]:
        sampling = asked.sampling
        n = sampling.get("n", 1)
        stops = sampling.get("stop", [])
        stops = [stops] if isinstance(stops, str) else stops
        cut = [_cut(self.answer(asked, i), stops, sampling["max_tokens"]) for i in range(n)]
        step = self.tokens_per_chunk
        num_chunks = max(1, max(-(-len(text) // step) for text, _, _ in cut))
        for number in range(num_chunks):
            if self.refusal is not None and number >= self.refuse_after:
                raise Refused(self.refusal)
            if number == 1 and self.pause is not None:
                while not self.pause.wait(0.01):
                    if asked.cancelled.is_set():
                        return
            parts = [text[number * step : (number + 1) * step] for text, _, _ in cut]
            ended = [(number + 1) * step >= len(text) for text, _, _ in cut]
            tensors: dict[str, list[Any]] = {
                "text_output": parts,
                "finish_reason": [
                    r if e else "None" for (_, r, _), e in zip(cut, ended, strict=True)
                ],
                "stop_reason": [
                    str(stop if e else None) for (_, _, stop), e in zip(cut, ended, strict=True)
                ],
                "token_ids": [ord(char) for part in parts for char in part],
                "num_output_tokens": [len(part) for part in parts],
            }
            if asked.inputs.get("return_num_input_tokens"):
                media = [*asked.inputs.get("image", ()), *asked.inputs.get("video", ())]
                tensors["num_input_tokens"] = [len(asked.prompt) + 9 * len(media)]
            if number == 0:
                tensors["num_cached_tokens"] = [self.num_cached_tokens]
            if number in (0, num_chunks - 1) and asked.inputs.get("return_request_times"):
                tensors["request_times"] = list(self.request_times)
            if sampling.get("logprobs") is not None:
                top = sampling["logprobs"]
                tensors["logprobs"] = [
                    json.dumps([scored(char, top) for char in part]) for part in parts
                ]
            if number == 0 and sampling.get("prompt_logprobs") is not None:
                rest = [scored(char, sampling["prompt_logprobs"]) for char in asked.prompt[1:]]
                tensors["prompt_logprobs"] = [json.dumps([None, *rest])]
            yield tensors


def _part_text(part: dict[str, Any]) -> str:
    """An image or a video is one token, ten when it is loaded."""
    kind = part["type"]
    return "@" * (10 if kind in part else 1) if kind in ("image", "video") else part["text"]


def scored(char: str, top: int) -> dict[str, Any]:
    """The logprobs of a token: itself, of rank 2, and the `top` most likely."""
    entries = {ord(char): {"logprob": -2.0, "rank": 2, "decoded_token": char}}
    for rank in (1, *range(3, top + 2)):
        if len(entries) <= top:
            token = chr(0x100 + rank)
            entries[ord(token)] = {"logprob": -float(rank), "rank": rank, "decoded_token": token}
    return {str(id): entry for id, entry in entries.items()}


def _cut(text: str, stops: list[str], max_tokens: int | None) -> tuple[str, str, str | None]:
    """The text up to a stop string or the limit; the finish reason; the stop string."""
    found = [(text.index(stop), stop) for stop in stops if stop in text]
    at, stop = min(found) if found else (len(text), None)
    if max_tokens is not None and at > max_tokens:
        return text[:max_tokens], "length", None
    return text[:at], "stop", stop


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """The server; `models` by name may change at any time."""

    def __init__(self, **models: FakeModel) -> None:
        self.models = models
        self._server = grpc.server(ThreadPoolExecutor(32))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> FakeTriton:
        self._server.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.stop(None).wait()

    def ModelStreamInfer(self, requests: Any, context: Any) -> Iterator[Any]:
        (request,) = requests
        inputs = {tensor.name: _value(tensor) for tensor in request.inputs}
        asked = Asked(request.id, inputs, dict(context.invocation_metadata()))
        context.add_callback(asked.cancelled.set)
        model = self.models.get(request.model_name)
        if model is None:
            problem = f"Request for unknown model: '{request.model_name}' is not found"
            yield pb.ModelStreamInferResponse(error_message=problem)
            return
        try:
            waiting = None
            for tensors in model.respond(asked):
                if waiting is not None:
                    yield _message(request.id, waiting, False)
                waiting = tensors
                if model.pause is not None and "operation" not in asked.inputs:
                    yield _message(request.id, waiting, False)  # held back, it could not be seen
                    waiting = None
            if waiting is not None:
                yield _message(request.id, waiting, True)
            else:
                yield _message(request.id, {}, True)
        except Refused as refused:
            if waiting is not None:
                yield _message(request.id, waiting, False)
            yield pb.ModelStreamInferResponse(error_message=str(refused))

    def ServerLive(self, request: Any, context: Any) -> Any:
        return pb.ServerLiveResponse(live=True)

    def ServerReady(self, request: Any, context: Any) -> Any:
        return pb.ServerReadyResponse(ready=True)

    def ModelReady(self, request: Any, context: Any) -> Any:
        return pb.ModelReadyResponse(ready=request.name in self.models)

    def RepositoryIndex(self, request: Any, context: Any) -> Any:
        make = pb.RepositoryIndexResponse.ModelIndex
        entries = [make(name=name, version="1", state="READY") for name in self.models]
        return pb.RepositoryIndexResponse(models=entries)


def _value(tensor: Any) -> Any:
    contents = tensor.contents
    if tensor.name in ("image", "video"):
        return [image.decode() for image in contents.bytes_contents]
    if tensor.datatype == "BYTES":
        return contents.bytes_contents[0].decode()
    if tensor.datatype == "BOOL":
        return contents.bool_contents[0]
    return list(contents.int_contents)


def _message(id: str, tensors: dict[str, list[Any]], final: bool) -> Any:
    response = pb.ModelInferResponse(id=id)
    for name, values in tensors.items():
        kind = TENSORS[name]
        if kind == "BYTES":
            encoded = [value.encode() for value in values]
            raw = b"".join(struct.pack("<I", len(text)) + text for text in encoded)
        else:
            raw = struct.pack(f"<{len(values)}{_FORMATS[kind]}", *values)
        response.outputs.add(name=name, datatype=kind, shape=[len(values)])
        response.raw_output_contents.append(raw)
    response.parameters["triton_final_response"].bool_param = final
    return pb.ModelStreamInferResponse(infer_response=response)
