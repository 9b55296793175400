"""A client of Triton's vLLM backend changes nothing: what that backend's own tests ask and compare.

One server for the module, with a model of the names, files and tensors that such a client knows.
Requests are made as those tests and the backend's sample client make them: numbers as strings, the
same sampling parameters in the tensor and as request parameters, text_output named as the output.
Not asked here: adapters (LoRA) beyond their refusal, embeddings, and the unloading of a model whose
engine failed, since ours comes back by itself.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from asking import GrpcStream, Response, ask, generate, joined, tensor, text_of, to_response
from live import MODEL as SHIPPED_MODEL
from live import SHIPPED, Server, wait_for
from tritonclient.utils import InferenceServerException

from gllm_engine import LLM, SamplingParams

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

MODEL = "vllm_opt"
LOADED = "vllm_load_test"  # comes and goes
PROMPTS = ["The most dangerous animal is", "The capital of France is", "The future of AI is"]
GREEDY = {"temperature": "0", "top_p": "1"}
TEXT_ONLY = [triton.InferRequestedOutput("text_output")]

ADD_SUB = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            a, b = (tensor.as_numpy() for tensor in request.inputs())
            outputs = [pb_utils.Tensor("OUTPUT0", a + b), pb_utils.Tensor("OUTPUT1", a - b)]
            responses.append(pb_utils.InferenceResponse(outputs))
        return responses
"""


def write_python_model(repository: Path) -> None:
    """A model of Triton's plain Python backend, beside ours."""
    (repository / "add_sub/1").mkdir(parents=True)
    (repository / "add_sub/1/model.py").write_text(ADD_SUB)
    ports = [
        f'{kind} [{{ name: "{kind.upper()}{i}" data_type: TYPE_FP32 dims: [4] }}]\n'
        for kind in ("input", "output")
        for i in range(2)
    ]
    (repository / "add_sub/config.pbtxt").write_text('backend: "python"\n' + "".join(ports))


def write_ensemble(repository: Path, name: str, max_batch_size: int, dims: int) -> None:
    """A pipeline of one step, which is MODEL."""
    (repository / name / "1").mkdir(parents=True)
    text = f"data_type: TYPE_STRING dims: [{dims}]"
    maps = " ".join(
        f'{kind}_map {{ key: "text_{kind}" value: "text_{kind}" }}' for kind in ("input", "output")
    )
    (repository / name / "config.pbtxt").write_text(
        f'platform: "ensemble"\nmax_batch_size: {max_batch_size}\n'
        f'input [{{ name: "text_input" {text} }}]\n'
        f'output [{{ name: "text_output" data_type: TYPE_STRING dims: [-1] }}]\n'
        f'ensemble_scheduling {{ step [{{ model_name: "{MODEL}" model_version: -1 {maps} }}] }}\n'
    )


def write_shipped(repository: Path, name: str, **parameters: str) -> Path:
    """The shipped checkpoint as another model; `parameters`: of config.pbtxt."""
    version = repository / name / "1"
    version.mkdir(parents=True, exist_ok=True)
    engine = {"model": str(SHIPPED / SHIPPED_MODEL / "1"), "cpu_threads": 1}
    (version / "model.json").write_text(json.dumps(engine))
    lines = ['backend: "gllm"', "instance_group [{ count: 1 kind: KIND_MODEL }]"]
    for key, value in parameters.items():
        lines.append(f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}')
    (repository / name / "config.pbtxt").write_text("\n".join(lines))
    return version


class Served:
    """The server, its model repository, and a client of each kind that asks for it."""

    def __init__(self, repository: Path, serve: Callable[..., Server]) -> None:
        self.repository = repository
        write_shipped(repository, MODEL)
        # A setting of the Python backend for all its models; ours do not batch through Triton.
        self.server = serve(repository, "--", "--backend-config=python,default-max-batch-size=8")
        self.control = triton.InferenceServerClient(self.server.grpc)

    def send(
        self,
        stream: GrpcStream,
        prompt: str,
        request_id: object,
        sampling: dict[str, Any],
        model: str = MODEL,
        as_tensor: bool = True,
        **flags: bool,
    ) -> None:
        tensors: dict[str, Any] = {"text_input": prompt, "stream": False} | flags
        if as_tensor:
            tensors["sampling_parameters"] = json.dumps(sampling)
        options = {"request_id": str(request_id), "parameters": sampling}
        stream.send(tensors, model, outputs=TEXT_ONLY, **options)

    def answers(self, prompts: list[str], sampling: dict[str, Any], **options: Any) -> list[str]:
        """Not streamed, all on one stream; in the order of their prompts."""
        with GrpcStream(self.server) as stream:
            for i, prompt in enumerate(prompts):
                self.send(stream, prompt, i, sampling, **options)
            found = [stream.take() for _ in prompts]
        assert all(response.outputs.keys() == {"text_output"} for response in found)
        return [r.text for r in sorted(found, key=lambda r: int(r.request_id))]

    def is_ready(self, name: str) -> bool:
        """By both of Triton's ways to ask, which must agree."""
        index = self.control.get_model_repository_index().models
        states = [entry.state for entry in index if entry.name == name]
        ready = bool(self.control.is_model_ready(name))
        assert [state == "READY" for state in states] == [ready]
        return ready

    def samples(self, model: str = MODEL) -> dict[str, float]:
        """What /metrics says of a model, now: by name, and of a histogram's buckets the last."""
        found = {}
        for line in self.page().splitlines():
            if match := re.match(rf'gllm:(\w+){{.*model="{model}".*}} (\S+)$', line):
                found[match[1]] = float(match[2])
        return found

    def page(self) -> str:
        with urllib.request.urlopen(f"http://{self.server.metrics_address}/metrics") as answer:
            return answer.read().decode()


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, serve_for: Callable[[ExitStack], Any]
) -> Iterator[Served]:
    with ExitStack() as stack:
        yield Served(tmp_path_factory.mktemp("vllm"), serve_for(stack))


def expected(offline: LLM, prompts: list[str], **fields: Any) -> list[str]:
    """What the engine says to each prompt when it is called without a server."""
    outputs = offline.generate(prompts, SamplingParams(temperature=0, **fields))
    return [output.outputs[0].text for output in outputs]


@pytest.fixture(scope="module")
def whole(offline: LLM) -> list[str]:
    """PROMPTS, each with what the engine says to it."""
    return [p + text for p, text in zip(PROMPTS, expected(offline, PROMPTS), strict=True)]


# ---------------------------------------------------------------- accuracy


@pytest.mark.parametrize("sampling", [GREEDY, {"temperature": 0, "top_p": 1}], ids=["str", "int"])
@pytest.mark.parametrize("as_tensor", [True, False], ids=["tensor", "parameters only"])
def test_the_answers_are_the_engines(
    served: Served, whole: list[str], sampling: dict[str, Any], as_tensor: bool
) -> None:
    assert served.answers(PROMPTS, sampling, as_tensor=as_tensor) == whole


@pytest.mark.parametrize("as_tensor", [True, False], ids=["tensor", "parameters only"])
def test_a_choice_as_json_in_json(served: Served, as_tensor: bool) -> None:
    prompt = "Classify intent of the sentence: Harry Potter is underrated. "
    choice = json.dumps({"choice": ["Positive", "Negative"]})
    sampling = {"temperature": 0, "top_p": 1, "structured_outputs": choice}
    (answer,) = served.answers([prompt], sampling, as_tensor=as_tensor)
    assert answer.removeprefix(prompt) in ("Positive", "Negative")


def test_the_tensor_counts_where_both_have_a_key(served: Served, whole: list[str]) -> None:
    tensors = {"text_input": PROMPTS[0], "sampling_parameters": json.dumps(GREEDY)}
    (response,) = ask(served.server, tensors, MODEL, parameters={"temperature": "no number"})
    assert response.text == whole[0]
    body = tensors | {"temperature": "no number"}
    assert generate(served.server, body, MODEL)[1]["text_output"] == response.text


# ---------------------------------------------------------------- streaming, prompts given back


async def stream_aio(server: Server, requests: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Texts by request id, from tritonclient's asyncio client; raises the first error."""

    async def iterate() -> Any:
        for request in requests:
            yield request

    found: dict[str, list[str]] = {}
    async with triton_aio.InferenceServerClient(server.grpc) as client:
        async for result, error in client.stream_infer(iterate()):
            if error is not None:
                raise error
            response = to_response(result)
            if response.outputs:
                found.setdefault(response.request_id, []).append(response.text)
    return found


def sample_request(prompt: str, request_id: int, stream: bool, **flags: bool) -> dict[str, Any]:
    """One as the backend's sample client makes it."""
    sampling = {"temperature": "0", "top_p": "0.95", "max_tokens": "20"}
    tensors = {"text_input": prompt, "stream": stream} | flags
    tensors["sampling_parameters"] = json.dumps(sampling)
    return {
        "model_name": MODEL,
        "inputs": [tensor(name, value) for name, value in tensors.items()],
        "outputs": TEXT_ONLY,
        "request_id": str(request_id),
        "parameters": sampling,
    }


@pytest.mark.parametrize(
    ("stream", "flags"),
    [
        (True, {}),
        (True, {"exclude_input_in_output": True}),
        (False, {}),
        (False, {"exclude_input_in_output": False}),
        (False, {"exclude_input_in_output": True}),
    ],
)
def test_the_sample_client(
    served: Served, offline: LLM, stream: bool, flags: dict[str, bool]
) -> None:
    """Streams hold what is new; other answers begin with their prompt unless told not to."""
    requests = [sample_request(p, 10 + i, stream, **flags) for i, p in enumerate(PROMPTS)]
    found = asyncio.run(stream_aio(served.server, requests))
    gives_back = not stream and not flags.get("exclude_input_in_output")
    answers = expected(offline, PROMPTS, max_tokens=20)
    for i, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        texts = found[str(10 + i)]
        assert 1 < len(texts) <= 20 if stream else len(texts) == 1
        assert "".join(texts) == (prompt if gives_back else "") + answer


def test_a_stream_cannot_give_back_its_prompt(served: Served) -> None:
    request = sample_request(PROMPTS[0], 1, True, exclude_input_in_output=False)
    with pytest.raises(InferenceServerException) as error:
        asyncio.run(stream_aio(served.server, [request]))
    assert error.value.message() == (
        "Error generating stream: When streaming, `exclude_input_in_output` = False is not allowed."
    )


# ---------------------------------------------------------------- additional outputs


FLAGS = (
    "finish_reason",
    "cumulative_logprob",
    "logprobs",
    "num_input_tokens",
    "num_output_tokens",
)
Case = tuple[bool, int | None, dict[str, bool]]  # stream, logprobs, flags that are given


def additional_output_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    unset_or = (None, True, False)
    for stream, logprobs in itertools.product((True, False), (None, 0, 2)):
        for values in itertools.product(unset_or, repeat=len(FLAGS)):
            flags = {f: v for f, v in zip(FLAGS, values, strict=True) if v is not None}
            cases[str(len(cases))] = stream, logprobs, flags
    return cases


def test_every_combination_of_additional_outputs(served: Served, offline: LLM) -> None:
    """Each flag unset, true or false; logprobs not asked, 0 or 2; streaming or not."""
    cases = additional_output_cases()
    found: dict[str, list[Response]] = {}
    prompt = "In this example,"
    with GrpcStream(served.server) as stream:
        for request_id, (streaming, logprobs, flags) in cases.items():
            sampling = GREEDY | {"max_tokens": "4"}
            if logprobs is not None:
                sampling["logprobs"] = logprobs
            tensors = {"text_input": prompt, "stream": streaming}
            tensors |= {f"return_{flag}": value for flag, value in flags.items()}
            tensors["sampling_parameters"] = json.dumps(sampling)
            stream.send(tensors, MODEL, request_id=request_id, parameters=sampling)
        left = set(cases)
        while left:
            response = stream.take()
            found.setdefault(response.request_id, []).append(response)
            if response.final:
                left.remove(response.request_id)
    assert len(found) == 2 * 3**6 == 1458
    num_prompt_tokens = len(offline.tokenizer.encode(prompt))
    (answer,) = expected(offline, [prompt], max_tokens=4)
    for request_id, case in cases.items():
        text = answer if case[0] else prompt + answer
        assert text_of(found[request_id]) == text
        check_additional_outputs(found[request_id], case, prompt, num_prompt_tokens)


def check_additional_outputs(
    responses: list[Response], case: Case, prompt: str, num_prompt_tokens: int
) -> None:
    streaming, logprobs, flags = case
    wanted = {flag for flag in FLAGS if flags.get(flag)}
    assert all(response.outputs.keys() == {"text_output"} | wanted for response in responses), case
    if "finish_reason" in wanted:
        reasons = ["None"] * (len(responses) - 1) + ["length"]
        assert joined(responses, "finish_reason") == reasons
    if "cumulative_logprob" in wanted:
        sums = [0.0, *joined(responses, "cumulative_logprob")]
        assert all(earlier > later for earlier, later in itertools.pairwise(sums))
    if "num_input_tokens" in wanted:
        assert set(joined(responses, "num_input_tokens")) == {num_prompt_tokens}
    if "num_output_tokens" in wanted:
        counts = joined(responses, "num_output_tokens")
        assert sum(counts) == 4 and min(counts) > 0
    if "logprobs" in wanted:
        for response in responses:
            begins = "" if streaming else prompt
            check_logprobs(response, logprobs, begins)


def check_logprobs(response: Response, asked: int | None, begins: str) -> None:
    """One entry a new token; the texts of the most likely ones are the response's text."""
    entries = json.loads(response.outputs["logprobs"][0])
    if asked is None:
        assert entries is None
        return
    text = begins
    for entry in entries:
        assert 1 <= len(entry) <= asked + 1
        assert all(e.keys() == {"logprob", "rank", "decoded_token"} for e in entry.values())
        (best,) = [each for each in entry.values() if each["rank"] == 1]
        assert isinstance(best["logprob"], float)
        text += best["decoded_token"]
    assert text == response.text
    if "num_output_tokens" in response.outputs:
        assert response.outputs["num_output_tokens"] == [len(entries)]


# ---------------------------------------------------------------- metrics


def test_metrics_are_exact_when_the_answers_are_there(served: Served, offline: LLM) -> None:
    """Read at once after each round, without waiting: two rounds, in case the first breaks it."""
    served.server.settle(MODEL)
    num_prompt = sum(len(offline.tokenizer.encode(prompt)) for prompt in PROMPTS)
    for _ in range(2):
        before = served.samples()
        served.answers(PROMPTS, GREEDY)
        grown = {name: value - before[name] for name, value in served.samples().items()}
        assert grown["prompt_tokens_total"] == num_prompt
        assert grown["generation_tokens_total"] == 48
        assert grown["request_success_total"] == 3
        for name in (
            "time_to_first_token_seconds",
            "time_per_output_token_seconds",  # one observation a request, the mean of its tokens
            "e2e_request_latency_seconds",
            "request_prompt_tokens",
            "request_generation_tokens",
            "request_params_n",
        ):
            assert grown[f"{name}_count"] == grown[f"{name}_bucket"] == 3
            assert grown[f"{name}_sum"] > 0
        assert grown["request_prompt_tokens_sum"] == num_prompt
        assert grown["request_generation_tokens_sum"] == 48
        assert grown["request_params_n_sum"] == 3


def test_metrics_of_several_answers(served: Served) -> None:
    served.server.settle(MODEL)
    before = served.samples()
    served.answers(PROMPTS, GREEDY | {"n": "2", "temperature": "1", "ignore_eos": "true"})
    grown = {name: value - before[name] for name, value in served.samples().items()}
    assert grown["request_params_n_sum"] == 6 and grown["request_params_n_count"] == 3
    assert grown["request_generation_tokens_sum"] == grown["generation_tokens_total"] == 96


def test_errors_are_on_the_page_when_they_arrive(served: Served) -> None:
    name = "request_errors_total"
    before = served.samples().get(name, 0)
    for count in range(1, 4):
        with pytest.raises(InferenceServerException):
            served.answers(PROMPTS[:1], {"temperature": "-1"})
        assert served.samples()[name] - before == count


# ---------------------------------------------------------------- cancellation, adapters


def test_a_cancelled_request_ends_with_one_error(served: Served) -> None:
    served.server.settle(MODEL)
    before = served.samples()
    stream = GrpcStream(served.server)
    prompt = "Write an original and creative poem of at least 200 words."
    served.send(stream, prompt, 1, GREEDY | {"max_tokens": "900", "ignore_eos": "true"})
    wait_for(
        lambda: served.samples()["generation_tokens_total"] > before["generation_tokens_total"],
        "the request runs",
    )
    stream.close(cancel=True)
    with pytest.raises(InferenceServerException) as error:
        stream.take()
    assert error.value.status() == "StatusCode.CANCELLED"
    assert stream.is_empty()
    served.server.wait_idle(MODEL)
    cancelled = "request_cancellations_total"
    wait_for(lambda: served.samples()[cancelled] == before[cancelled] + 1, "it is counted")


def test_adapters_are_refused_by_name(served: Served) -> None:
    """In that backend's words for a model that has none, over both protocols."""
    prompt = "Instruct: Tell me more about soccer\nOutput:"
    with pytest.raises(InferenceServerException) as error:
        served.answers([prompt], GREEDY | {"lora_name": "doll"})
    assert error.value.message() == "LoRA feature is not enabled."
    fields = {"stream": False, "temperature": 0, "top_p": 1, "exclude_input_in_output": True}
    body = {"text_input": prompt, "parameters": fields | {"lora_name": "doll"}}
    assert generate(served.server, body, MODEL) == (400, {"error": error.value.message()})
    status, answer = generate(served.server, {"text_input": prompt, "parameters": fields}, MODEL)
    assert status == 200 and not answer["text_output"].startswith(prompt)


# ---------------------------------------------------------------- models come and go


def test_load_and_unload_beside_others(served: Served, whole: list[str]) -> None:
    """With the vLLM backend's own parameters, and by both protocols."""
    control = served.control
    write_shipped(
        served.repository, LOADED, REPORT_CUSTOM_METRICS="False", ENABLE_VLLM_HEALTH_CHECK="true"
    )
    write_python_model(served.repository)
    for name in (LOADED, "add_sub"):
        control.load_model(name)
        assert served.is_ready(name)
    control.unload_model(LOADED)
    assert not served.is_ready(LOADED)
    check_add_sub(control)
    load = f"http://{served.server.http}/v2/repository/models/{LOADED}/load"
    with urllib.request.urlopen(load, data=b"") as answer:
        assert answer.status == 200
    control.unload_model("add_sub")
    assert not served.is_ready("add_sub")
    for as_tensor in (True, False):
        for model in (LOADED, MODEL):  # two models of one backend at a time
            assert served.is_ready(model)
            found = served.answers(PROMPTS, GREEDY, model=model, as_tensor=as_tensor)
            assert found == whole
    assert served.samples(MODEL) and not served.samples(LOADED)
    config = control.get_model_config(LOADED, as_json=True)["config"]
    assert int(config.get("max_batch_size", 0)) == 0
    control.unload_model(LOADED)
    assert not served.is_ready(LOADED)
    assert served.is_ready(MODEL)


def check_add_sub(control: triton.InferenceServerClient) -> None:
    a, b = np.random.default_rng(0).random((2, 4), np.float32)
    result = control.infer("add_sub", [tensor("INPUT0", a), tensor("INPUT1", b)])
    assert np.array_equal(result.as_numpy("OUTPUT0"), a + b)
    assert np.array_equal(result.as_numpy("OUTPUT1"), a - b)


@pytest.mark.parametrize(("max_batch_size", "dims"), [(1, -1), (0, 1)])
def test_a_step_of_an_ensemble(
    served: Served, whole: list[str], max_batch_size: int, dims: int
) -> None:
    """The first is declared as that backend's own tests do, which do not ask it anything."""
    name = f"ensemble_{max_batch_size}"
    write_ensemble(served.repository, name, max_batch_size, dims)
    served.control.load_model(name)
    assert served.is_ready(name)
    if max_batch_size == 0:
        sampling = {"parameters": GREEDY}  # Triton hands them on to the step
        (response,) = ask(served.server, {"text_input": PROMPTS[0]}, name, **sampling)
        assert response.text == whole[0]
    served.control.unload_model(name)


@pytest.mark.parametrize(
    ("name", "change"),
    [("vllm_invalid_1", {"invalid_attribute": True}), ("vllm_invalid_2", {"model": "no_model"})],
)
def test_a_bad_model_json_fails_the_load(served: Served, name: str, change: dict[str, Any]) -> None:
    file = write_shipped(served.repository, name) / "model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InferenceServerException, match="no_model|invalid_attribute"):
        served.control.load_model(name)
    assert not served.is_ready(name)
