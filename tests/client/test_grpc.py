"""Both gRPC clients, against a KServe servicer in this process."""

from __future__ import annotations

import asyncio
import json
import queue
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from patience import SOON_S
from tritonclient.grpc import model_config_pb2, service_pb2_grpc
from tritonclient.grpc import service_pb2 as pb

from gllm_client import Chunk, Client, GenerateError, HttpClient, SyncClient, connect


def answer(text: str, ids: list[int], reason: str) -> pb.ModelStreamInferResponse:
    response = pb.ModelInferResponse(id="r")
    for name, kind, raw in (
        ("text_output", "BYTES", struct.pack("<I", len(text.encode())) + text.encode()),
        ("finish_reason", "BYTES", struct.pack("<I", len(reason)) + reason.encode()),
        ("token_ids", "INT32", struct.pack(f"<{len(ids)}i", *ids)),
        ("num_output_tokens", "UINT32", struct.pack("<I", len(ids))),
        ("num_input_tokens", "UINT32", struct.pack("<I", 7)),
        ("cumulative_logprob", "FP32", struct.pack("<f", -0.5)),
    ):
        response.outputs.add(name=name, datatype=kind, shape=[1])
        response.raw_output_contents.append(raw)
    return pb.ModelStreamInferResponse(infer_response=response)


class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers by prompt: "refuse", "slow" (until cancelled), "empty", "odd", else two chunks."""

    def __init__(self) -> None:
        self.requests: list[pb.ModelInferRequest] = []
        self.metadata: list[dict[str, str]] = []
        self.cancelled = threading.Event()
        self.calls: list[tuple[str, str]] = []

    def ModelStreamInfer(self, requests: Any, context: Any) -> Iterator[Any]:
        (request,) = requests  # one request a stream
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        prompt = request.inputs[0].contents.bytes_contents
        kind = prompt[0].decode() if prompt else ""
        if kind == "refuse" and "triton_grpc_error" in self.metadata[-1]:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "seed: no")
        elif kind == "refuse":
            yield pb.ModelStreamInferResponse(error_message="seed: no")
        elif kind == "slow":
            context.add_callback(self.cancelled.set)
            while context.is_active():
                yield answer("x", [1], "None")
                time.sleep(0.01)
        elif kind == "odd":
            response = answer("x", [1], "stop")
            response.infer_response.outputs[0].datatype = "FP64"
            yield response
        elif kind == "describe":
            yield answer('{"max_model_len": 5}', [], "None")
        elif kind != "empty":
            yield answer("é ", [3], "None")
            yield answer("two", [4, 5], "stop")

    def ServerLive(self, request: Any, context: Any) -> Any:
        return pb.ServerLiveResponse(live=True)

    def ServerReady(self, request: Any, context: Any) -> Any:
        return pb.ServerReadyResponse(ready=True)

    def ModelReady(self, request: Any, context: Any) -> Any:
        return pb.ModelReadyResponse(ready=request.name == "m")

    def RepositoryIndex(self, request: Any, context: Any) -> Any:
        entry = pb.RepositoryIndexResponse.ModelIndex(name="m", version="1", state="READY")
        return pb.RepositoryIndexResponse(models=[entry])

    def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        self.calls.append(("load", request.model_name))
        if request.model_name == "broken":
            context.abort(grpc.StatusCode.INTERNAL, "failed to load 'broken'")
        return pb.RepositoryModelLoadResponse()

    def RepositoryModelUnload(self, request: Any, context: Any) -> Any:
        self.calls.append(("unload", request.model_name))
        return pb.RepositoryModelUnloadResponse()

    def ModelConfig(self, request: Any, context: Any) -> Any:
        groups = [
            model_config_pb2.ModelInstanceGroup(count=2, gpus=[0, 1]),
            model_config_pb2.ModelInstanceGroup(count=3),
        ]
        backend = {"m": ("gllm", "model.py"), "p": ("python", "")}.get(
            request.name, ("onnx", "x.so")
        )
        config = model_config_pb2.ModelConfig(
            name=request.name, backend=backend[0], runtime=backend[1], instance_group=groups
        )
        return pb.ModelConfigResponse(config=config)


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Servicer]]:
    server = grpc.server(ThreadPoolExecutor(4))
    servicer = Servicer()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", servicer
    server.stop(None).wait()


def ask(kind: str, address: str, prompt: str | None = None, **options: Any) -> list[Chunk]:
    """All chunks of one request, from the client of that kind."""
    status = options.pop("with_status", False)
    if kind == "sync":
        with SyncClient(address, "m", with_status=status) as client:
            return list(client.generate(prompt, **options))

    async def collect() -> list[Chunk]:
        async with Client(address, "m", with_status=status) as client:
            return [chunk async for chunk in client.generate(prompt, **options)]

    return asyncio.run(collect())


both = pytest.mark.parametrize("kind", ["sync", "async"])


@both
def test_chunks_and_the_request_they_answer(kind: str, served: tuple[str, Servicer]) -> None:
    address, servicer = served
    chunks = ask(kind, address, messages=[{"role": "user"}], max_tokens=3, request_id="r")
    assert [c.text for c in chunks] == ["é ", "two"]
    assert [c.token_ids for c in chunks] == [(3,), (4, 5)]
    assert [c.finish_reason for c in chunks] == [None, "stop"]
    assert chunks[1].num_output_tokens == 2 and chunks[0].num_input_tokens == 7
    assert chunks[0].cumulative_logprob == -0.5 and chunks[0].request_id == "r"
    request = servicer.requests[-1]
    assert (request.model_name, request.id) == ("m", "r")
    assert not request.parameters
    tensors = {tensor.name: tensor for tensor in request.inputs}
    assert tensors["messages"].datatype == "BYTES" and tensors["messages"].shape == [1]
    assert tensors["messages"].contents.bytes_contents == [b'[{"role": "user"}]']
    assert tensors["stream"].datatype == "BOOL" and tensors["stream"].contents.bool_contents[0]
    assert "triton_grpc_error" not in servicer.metadata[-1]


def test_what_goes_to_the_chat_template_is_sent_as_json(served: tuple[str, Servicer]) -> None:
    address, servicer = served
    tools, variables = [{"type": "function"}], {"enable_thinking": False}
    ask(
        "sync",
        address,
        messages=[{"role": "user"}],
        tools=tools,
        chat_template_kwargs=variables,
        max_tokens=3,
    )
    tensors = {tensor.name: tensor for tensor in servicer.requests[-1].inputs}
    assert json.loads(tensors["tools"].contents.bytes_contents[0]) == tools
    assert json.loads(tensors["chat_template_kwargs"].contents.bytes_contents[0]) == variables


def test_token_ids_are_sent_as_int32(served: tuple[str, Servicer]) -> None:
    address, servicer = served
    ask("sync", address, input_ids=[1, 2, 300000])
    tensor = servicer.requests[-1].inputs[0]
    assert (tensor.name, tensor.datatype, list(tensor.shape)) == ("input_ids", "INT32", [3])
    assert list(tensor.contents.int_contents) == [1, 2, 300000]


@both
def test_a_refusal_carries_the_message(kind: str, served: tuple[str, Servicer]) -> None:
    with pytest.raises(GenerateError, match="^seed: no$") as caught:
        ask(kind, served[0], "refuse")
    assert caught.value.status is None


@both
def test_a_refusal_carries_the_status_when_asked(kind: str, served: tuple[str, Servicer]) -> None:
    with pytest.raises(GenerateError, match="^seed: no$") as caught:
        ask(kind, served[0], "refuse", with_status=True)
    assert caught.value.status == "INVALID_ARGUMENT"


@both
def test_the_timeout(kind: str, served: tuple[str, Servicer]) -> None:
    with pytest.raises(GenerateError, match=r"timeout of 0\.3 s") as caught:
        ask(kind, served[0], "slow", timeout=0.3)
    assert caught.value.status == "DEADLINE_EXCEEDED"


@both
def test_a_tensor_of_an_unknown_type_is_an_error(kind: str, served: tuple[str, Servicer]) -> None:
    with pytest.raises(GenerateError, match="FP64"):
        ask(kind, served[0], "odd")


@both
def test_no_server(kind: str) -> None:
    with pytest.raises(GenerateError) as caught:
        ask(kind, "127.0.0.1:9", "x", timeout=5)
    assert caught.value.status == "UNAVAILABLE"


def test_closing_the_iterator_cancels(served: tuple[str, Servicer]) -> None:
    address, servicer = served
    servicer.cancelled.clear()
    with SyncClient(address, "m") as client:
        chunks = client.generate("slow")
        next(chunks)
        chunks.close()
        assert servicer.cancelled.wait(SOON_S)


@pytest.mark.parametrize("how", ["break", "task"])
def test_leaving_an_async_iteration_cancels(how: str, served: tuple[str, Servicer]) -> None:
    address, servicer = served
    servicer.cancelled.clear()

    begun: queue.Queue[bool] = queue.Queue()

    async def leave() -> None:
        async with Client(address, "m") as client:

            async def forever() -> None:
                async for _ in client.generate("slow"):
                    begun.put(True)
                    if how == "break":
                        return

            task = asyncio.create_task(forever())
            if how == "break":
                await task
            else:
                await asyncio.to_thread(begun.get, timeout=SOON_S)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert await asyncio.to_thread(servicer.cancelled.wait, SOON_S)

    asyncio.run(leave())


def test_a_whole_answer(served: tuple[str, Servicer]) -> None:
    async def complete() -> Chunk:
        async with Client(served[0]) as client:
            assert await client.is_ready() and await client.is_ready("m")
            assert not await client.is_ready("other")
            return await client.complete("x", model="m")

    whole = asyncio.run(complete())
    assert (whole.text, whole.token_ids) == ("é two", (3, 4, 5))
    stream = {tensor.name: tensor for tensor in served[1].requests[-1].inputs}["stream"]
    assert stream.contents.bool_contents == [False]
    with SyncClient(served[0], "m") as client:
        assert client.complete("x") == whole
        with pytest.raises(GenerateError, match="ended before it began"):
            client.complete("empty")


def test_tokenize_detokenize_and_describe(served: tuple[str, Servicer]) -> None:
    async def ask_all() -> list[Any]:
        async with Client(served[0], "m") as client:
            tokens = await client.tokenize("x", request_id="q")
            return [tokens, await client.detokenize([5]), await client.describe(model="m")]

    found = asyncio.run(ask_all())
    tokens = found[0]
    assert (tokens.text, tokens.token_ids, tokens.num_input_tokens) == ("é two", (3, 4, 5), 7)
    assert found[1:] == ["é two", {"max_model_len": 5}]
    with SyncClient(served[0], "m") as client:
        assert [client.tokenize("x"), client.detokenize([5]), client.describe()] == found
        with pytest.raises(ValueError, match="^model: none given"):
            SyncClient(served[0]).describe()
    names = [[tensor.name for tensor in request.inputs] for request in served[1].requests[-6:]]
    assert names == [["operation", "text_input"], ["operation", "input_ids"], ["operation"]] * 2
    assert served[1].requests[-6].id == "q"


def test_the_repository(served: tuple[str, Servicer]) -> None:
    address, servicer = served
    with SyncClient(address) as client:
        assert client.is_live() and client.is_ready() and client.is_ready("m")
        assert not client.is_ready("other")
        assert client.index() == [{"name": "m", "version": "1", "state": "READY", "reason": ""}]
        assert [client.num_stubs(name) for name in ("m", "p", "other")] == [7, 7, 0]
        client.load("m")
        client.unload("m")
        with pytest.raises(GenerateError, match="failed to load 'broken'") as caught:
            client.load("broken")
    assert caught.value.status == "INTERNAL"
    assert servicer.calls[-3:] == [("load", "m"), ("unload", "m"), ("load", "broken")]


def test_a_timeout_that_cannot_be_waited_is_an_error_at_once(served: tuple[str, Servicer]) -> None:
    async def ask_async(timeout: object) -> None:
        async with Client(served[0], "m") as client:
            with pytest.raises(ValueError, match="^timeout: "):
                client.generate("x", timeout=timeout)
            with pytest.raises(ValueError, match="^timeout: "):
                await client.is_ready(timeout=timeout)

    with SyncClient(served[0], "m") as client:
        for timeout in (float("nan"), float("inf"), -1, 0, 10**400, "3"):
            for call in (client.generate, client.complete, client.load, client.num_stubs):
                with pytest.raises(ValueError, match="^timeout: "):
                    call("x", timeout=timeout)
            for ask in (client.is_live, client.is_ready, client.index):
                with pytest.raises(ValueError, match="^timeout: "):
                    ask(timeout=timeout)
            asyncio.run(ask_async(timeout))


@both
@pytest.mark.parametrize("field", ["prompt", "model", "request_id"])
def test_what_is_not_text_is_an_error(kind: str, served: tuple[str, Servicer], field: str) -> None:
    with pytest.raises(
        ValueError, match=f"^{field.replace('prompt', 'text_input')}: not text that"
    ):
        ask(kind, served[0], **{"prompt": "x", field: "\ud800"})


def test_urls() -> None:
    for url, kind in (
        ("localhost:1", SyncClient),
        ("grpc://localhost:1", SyncClient),
        ("http://localhost:1", HttpClient),
    ):
        with connect(url) as client:
            assert type(client) is kind
    with pytest.raises(ValueError, match="'99999' after localhost is not a port"):
        connect("grpc://localhost:99999")
    with pytest.raises(ValueError, match="scheme ftp"):
        connect("ftp://localhost")
