"""Clients over gRPC, the primary transport: asyncio (`Client`) and blocking (`SyncClient`).

Owns the KServe messages. A client has one channel, and every request has its own gRPC stream: on a
shared stream an error names no request, and cancelling a request would cancel all of them. Knows
nothing of models or text.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from gllm_client.http import HttpClient, check_port
from gllm_client.protocol import (
    DESCRIBE,
    Asking,
    BlockingAsking,
    Chunk,
    GenerateError,
    Inputs,
    check_timeout,
    detokenize_inputs,
    merge,
    to_chunk,
    to_description,
    tokenize_inputs,
)

_CHANNEL = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a new client does not share another's back-off
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
)
_FORMATS = {"INT32": "i", "UINT32": "I", "FP32": "f"}
# With this key Triton ends a failed stream with its status code; without it, only with a message.
_STATUS_METADATA = (("triton_grpc_error", "true"),)


def connect(url: str, model: str | None = None) -> SyncClient | HttpClient:
    """A blocking client for `grpc://host:port`, `http://host:port` or `host:port` (gRPC).

    Raises ValueError for any other scheme, and for an invalid port.
    """
    scheme, separator, address = url.rpartition("://")
    check_port(address)
    if scheme == "http":
        return HttpClient(address, model)
    if scheme == "grpc" or not separator:
        return SyncClient(address, model)
    raise ValueError(f"url: {url} has scheme {scheme}; known are grpc and http")


class _Connected:
    """A channel and the requests on it; `model`, `with_status`, `metadata`: see `SyncClient`."""

    _open: Callable[..., Any]  # the channel, blocking or not
    _chunks: Callable[[pb.ModelInferRequest, float | None], Any]

    def __init__(
        self,
        address: str = "127.0.0.1:8001",
        model: str | None = None,
        *,
        with_status: bool = False,
        metadata: Callable[[], Iterable[tuple[str, str]]] = tuple,
    ) -> None:
        self._model = model
        self._channel = self._open(address, options=_CHANNEL)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._status = _STATUS_METADATA if with_status else ()
        self._more_metadata = metadata

    @property
    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (*self._status, *self._more_metadata())

    def _stream(self, model: str, inputs: Inputs, request_id: str, timeout: float | None) -> Any:
        return self._chunks(_request(model, request_id, inputs), timeout)


class SyncClient(_Connected, BlockingAsking):
    """A blocking gRPC client; its methods may be called from any thread.

    `model`: the default model of calls that name none.
    `with_status`: GenerateError.status holds the gRPC status of a failed request. Off by default,
    because servers before 26.03 can crash on an error in that mode.
    `metadata`: gives the gRPC metadata of a further request; it is called for each.
    """

    _open = staticmethod(grpc.insecure_channel)

    def close(self) -> None:
        """Close the channel; running requests are cancelled."""
        self._channel.close()

    def _chunks(self, request: pb.ModelInferRequest, timeout: float | None) -> Iterator[Chunk]:
        call = self._stub.ModelStreamInfer(
            iter([request]), timeout=timeout, metadata=self._metadata
        )
        try:
            for response in call:
                if _is_last(response):
                    for _ in call:  # to the stream's own end, see _is_last
                        continue
                yield _chunk(response)
        except grpc.RpcError as error:
            raise _refusal(error, timeout) from None
        finally:
            call.cancel()

    def is_live(self, timeout: float = 5.0) -> bool:
        """Whether a server answers."""
        return self._is("ServerLive", pb.ServerLiveRequest(), "live", timeout)

    def is_ready(self, model: str | None = None, timeout: float = 5.0) -> bool:
        """Whether the server, or one of its models, takes requests."""
        return self._is(*_readiness(model), "ready", timeout)

    def load(self, model: str, timeout: float | None = None) -> None:
        """Load a model, or reload it if its files have changed; returns when it is ready."""
        self._call("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name=model), timeout)

    def unload(self, model: str, timeout: float | None = None) -> None:
        """Take a model out of service; returns before its running requests end."""
        request = pb.RepositoryModelUnloadRequest(model_name=model)
        self._call("RepositoryModelUnload", request, timeout)

    def index(self, timeout: float | None = 5.0) -> list[dict[str, str]]:
        """The models in the repository: name, version, state ("READY", ...) and reason."""
        return _entries(self._call("RepositoryIndex", pb.RepositoryIndexRequest(), timeout))

    def num_stubs(self, model: str, timeout: float | None = 5.0) -> int:
        """The number of stubs of a loaded model; 0 if it does not use the Python backend."""
        config = self._call("ModelConfig", pb.ModelConfigRequest(name=model), timeout).config
        if config.backend != "python" and not config.runtime.endswith(".py"):
            return 0
        return sum(group.count * max(1, len(group.gpus)) for group in config.instance_group)

    def _is(self, method: str, request: Any, field: str, timeout: float) -> bool:
        try:
            return bool(getattr(self._call(method, request, timeout), field))
        except GenerateError:
            return False

    def _call(self, method: str, request: Any, timeout: float | None) -> Any:
        timeout = check_timeout(timeout)
        try:
            return getattr(self._stub, method)(request, timeout=timeout)
        except grpc.RpcError as error:
            raise _refusal(error, timeout) from None


class Client(_Connected, Asking[AsyncIterator[Chunk]]):
    """An asyncio gRPC client; make and use it within one running event loop.

    `model`, `with_status` and `metadata`: see `SyncClient`.
    """

    _open = staticmethod(grpc.aio.insecure_channel)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel; running requests are cancelled."""
        await self._channel.close()

    async def complete(self, prompt: str | None = None, **options: Any) -> Chunk:
        """The whole answer as one chunk; options as `generate`'s."""
        options = {"stream": False} | options
        return merge([chunk async for chunk in self.generate(prompt, **options)])

    async def tokenize(
        self,
        prompt: str | None = None,
        *,
        model: str | None = None,
        timeout: float | None = None,
        request_id: str = "",
        **options: Any,
    ) -> Chunk:
        """A prompt's tokens; see `SyncClient.tokenize`."""
        inputs = tokenize_inputs(prompt, **options)
        return merge([chunk async for chunk in self._send(inputs, model, timeout, request_id)])

    async def detokenize(
        self, token_ids: Sequence[int], *, operation: str = "detokenize", **call: Any
    ) -> str:
        """The text of tokens, special tokens included; with "token_texts" a JSON list of the text
        of each. `call`: model, timeout and request_id.
        """
        inputs = detokenize_inputs(token_ids, operation)
        return merge([chunk async for chunk in self._send(inputs, **call)]).text

    async def describe(self, **call: Any) -> dict[str, Any]:
        """Facts of a model: see docs/requests.md. `call`: model, timeout and request_id."""
        return to_description(merge([chunk async for chunk in self._send(DESCRIBE, **call)]))

    async def _chunks(
        self, request: pb.ModelInferRequest, timeout: float | None
    ) -> AsyncIterator[Chunk]:
        call = self._stub.ModelStreamInfer([request], timeout=timeout, metadata=self._metadata)
        try:
            async for response in call:
                if _is_last(response):
                    async for _ in call:  # to the stream's own end, see _is_last
                        continue
                yield _chunk(response)
        except grpc.RpcError as error:
            raise _refusal(error, timeout) from None
        finally:
            call.cancel()

    async def index(self, timeout: float | None = 5.0) -> list[dict[str, str]]:
        """The models in the repository: name, version, state ("READY", ...) and reason."""
        return _entries(await self._call("RepositoryIndex", pb.RepositoryIndexRequest(), timeout))

    async def is_ready(self, model: str | None = None, timeout: float = 5.0) -> bool:
        """Whether the server, or one of its models, takes requests."""
        try:
            return bool((await self._call(*_readiness(model), timeout)).ready)
        except GenerateError:
            return False

    async def _call(self, method: str, request: Any, timeout: float | None) -> Any:
        timeout = check_timeout(timeout)
        try:
            return await getattr(self._stub, method)(request, timeout=timeout)
        except grpc.RpcError as error:
            raise _refusal(error, timeout) from None


def _entries(answer: pb.RepositoryIndexResponse) -> list[dict[str, str]]:
    keys = ("name", "version", "state", "reason")
    return [{key: getattr(entry, key) for key in keys} for entry in answer.models]


def _readiness(model: str | None) -> tuple[str, Any]:
    """The gRPC method and the request that check whether the server, or a model, is ready."""
    if model is None:
        return "ServerReady", pb.ServerReadyRequest()
    return "ModelReady", pb.ModelReadyRequest(name=model)


def _utf8(name: str, text: Any) -> bytes:
    try:
        encoded: bytes = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: not text that UTF-8 can say ({error.reason})") from None
    return encoded


def _request(model: str, request_id: str, inputs: Inputs) -> pb.ModelInferRequest:
    """The message of one request; every tensor has one dimension."""
    request = pb.ModelInferRequest(
        model_name=_utf8("model", model), id=_utf8("request_id", request_id)
    )
    for name, value in inputs.items():
        values = value if isinstance(value, list) else [value]
        tensor = request.inputs.add(name=name, shape=[len(values)])
        if values and isinstance(values[0], str):
            tensor.datatype = "BYTES"
            tensor.contents.bytes_contents.extend(_utf8(name, text) for text in values)
        elif isinstance(value, bool):
            tensor.datatype = "BOOL"
            tensor.contents.bool_contents.append(value)
        else:
            tensor.datatype = "INT32"
            tensor.contents.int_contents.extend(values)
    return request


def _is_last(response: pb.ModelStreamInferResponse) -> bool:
    """Whether this is the last response of a stream; Triton then ends the stream by itself.

    The clients wait for that end. If a stream is cancelled between its last response and its end,
    tritonserver (2.51) may never free the request. The model can then not be unloaded, and the
    server stops only after its exit timeout.
    """
    if response.error_message:
        return True
    return bool(response.infer_response.parameters["triton_final_response"].bool_param)


def _chunk(response: pb.ModelStreamInferResponse) -> Chunk:
    if response.error_message:
        raise GenerateError(response.error_message)
    answer = response.infer_response
    pairs = zip(answer.outputs, answer.raw_output_contents, strict=True)
    tensors = {output.name: _decode(output.datatype, raw) for output, raw in pairs}
    return to_chunk(tensors, answer.id)


def _decode(datatype: str, raw: bytes) -> tuple[Any, ...]:
    if datatype == "BYTES":
        return _texts(raw)
    if datatype not in _FORMATS:
        raise GenerateError(f"the server sent a tensor of type {datatype}, which has no meaning")
    return struct.unpack(f"<{len(raw) // 4}{_FORMATS[datatype]}", raw)


def _texts(raw: bytes) -> tuple[str, ...]:
    """The texts of a BYTES tensor: each comes after its length in four bytes."""
    texts = []
    at = 0
    while at < len(raw):
        start = at + 4
        at = start + int.from_bytes(raw[at:start], "little")
        texts.append(raw[start:at].decode("utf-8"))
    if at != len(raw):
        raise GenerateError("the server sent a tensor of texts that is cut off")
    return tuple(texts)


def _refusal(error: grpc.RpcError, timeout: float | None) -> GenerateError:
    status = error.code().name
    if status == "DEADLINE_EXCEEDED" and timeout is not None:
        return GenerateError(f"no whole answer within the timeout of {timeout:g} s", status)
    details = error.details() or status
    if status == "UNAVAILABLE" and "onnect" in details:
        details = f"the server cannot be reached ({details.rpartition('error: ')[2]})"
    return GenerateError(details, status)
