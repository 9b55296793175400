"""Each command as its user runs it: a process, what it prints, its exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from live import MODEL, SHIPPED, WAIT_S, Server, wait_for
from patience import SCRIPT_S

from gllm_client.__main__ import main
from gllm_client.chat import HINT
from gllm_engine.arch import FAMILIES

pytestmark = pytest.mark.server

GLLM = [sys.executable, "-m", "gllm_client"]
PROMPT = "ROMEO:"


def gllm(*arguments: str, stdin: str = "") -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run(
        [*GLLM, *arguments], input=stdin, capture_output=True, text=True, timeout=SCRIPT_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_generate_says_the_same_with_and_without_a_server(server: Server) -> None:
    """Greedy; also over both transports, and with the prompt on standard input."""
    sampling = ["--max-tokens=24", "--temperature=0"]
    at_server = gllm("generate", PROMPT, "--url", server.grpc, *sampling)
    assert len(at_server) > 24 and at_server.endswith("\n")
    assert gllm("generate", PROMPT, "--url", f"http://{server.http}", *sampling) == at_server
    assert gllm("generate", "-", "--url", server.grpc, *sampling, stdin=PROMPT) == at_server
    here = ["--model", str(SHIPPED / MODEL / "1"), "--cpu-threads=1"]
    assert gllm("generate", PROMPT, *here, *sampling) == at_server


def test_generate_says_what_is_wrong(server: Server) -> None:
    for arguments, status, problem in (
        (["--url", server.grpc, "--max-tokens=-1"], 2, "max_tokens"),
        (["--url", server.grpc, "--model=nobody"], 1, "nobody"),
        (["--url", "127.0.0.1:1"], 1, "cannot be reached"),
    ):
        done = subprocess.run(
            [*GLLM, "generate", PROMPT, *arguments], capture_output=True, text=True, timeout=WAIT_S
        )
        assert done.returncode == status
        assert done.stderr.startswith("gllm generate: ") and problem in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_chat_is_a_conversation(server: Server) -> None:
    """Scripted: an answer depends on the seed and the history, which /clear empties."""
    sampling = {"temperature": 1.0, "seed": 5, "max_tokens": 40}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in sampling.items()]
    script = "Who goes there?\n/clear\nWho goes there?\nAnd then?\n"
    printed = gllm("chat", "--url", server.grpc, *flags, stdin=script)
    assert printed.startswith(f"{HINT}\n> ") and printed.endswith("\n> \n")
    first, second = {"role": "user", "content": "Who goes there?"}, {"role": "user"}
    with server.client() as client:
        answer = client.complete(messages=[first], **sampling).text
        history = [first, {"role": "assistant", "content": answer}]
        second["content"] = "And then?"
        later = client.complete(messages=[*history, second], **sampling).text
        assert later != client.complete(messages=[second], **sampling).text
    assert printed == f"{HINT}\n> {answer}\n> > {answer}\n> {later}\n> \n"


def write_batch(path: Path, num: int, max_tokens: int) -> list[dict[str, Any]]:
    lines = [
        {
            "id": f"a{i}",
            "prompt": f"{PROMPT} {i}",
            "sampling_parameters": {"max_tokens": max_tokens},
        }
        for i in range(num)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def answered(path: Path) -> list[dict[str, Any]]:
    """The whole lines of an output file; the last may be cut."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def test_a_killed_batch_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = write_batch(source, num=32, max_tokens=40)
    command = ["batch", str(source), str(target), "--url", server.grpc, "--temperature=0"]
    command += ["--ignore-eos", "--concurrency=4"]
    with subprocess.Popen([*GLLM, *command], stderr=subprocess.DEVNULL) as running:
        wait_for(lambda: len(answered(target)) >= 8, "some lines are answered")
        running.kill()
    before = answered(target)
    assert 8 <= len(before) < len(lines)
    server.wait_idle()  # what the killed one had asked is cancelled
    done = subprocess.run([*GLLM, *command], capture_output=True, text=True, timeout=SCRIPT_S)
    assert done.returncode == 0, done.stderr
    left = len(lines) - len(before)
    assert f"{left} answered, 0 failed, {len(before)} done before" in done.stderr
    after = answered(target)
    assert after[: len(before)] == before
    assert sorted(line["id"] for line in after) == sorted(line["id"] for line in lines)
    assert {line["num_output_tokens"] for line in after} == {40}


OPENAI_BODIES: dict[str, dict[str, Any]] = {
    "good": {"model": MODEL, "max_tokens": 3, "ignore_eos": True},
    "model": {"model": "gpt"},
    "seed": {"seed": "x"},
}


def test_a_batch_with_bad_lines_answers_the_others(server: Server, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_batch(source, num=2, max_tokens=4)
    with source.open("a") as file:
        file.write('{"id": "bad", "prompt": "x", "sampling_parameters": {"top_p": 7}}\nnot JSON\n')
        file.write('{"id": "chat", "messages": [{"role": "user", "content": "Hello"}]}\n')
        for custom_id, fields in OPENAI_BODIES.items():
            body = fields | {"messages": [{"role": "user", "content": "Hello"}]}
            told = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions"}
            file.write(json.dumps(told | {"body": body}) + "\n")
    done = subprocess.run(
        [*GLLM, "batch", str(source), str(target), "--url", server.grpc],
        capture_output=True,
        text=True,
        timeout=SCRIPT_S,
    )
    assert done.returncode == 1 and "4 answered, 4 failed" in done.stderr
    found = {a["custom_id"]: a["response"] for a in answered(target) if "custom_id" in a}
    statuses = {custom_id: response["status_code"] for custom_id, response in found.items()}
    assert statuses == {"good": 200, "model": 404, "seed": 400}
    answer = found["good"]["body"]
    assert answer["model"] == MODEL and answer["usage"]["completion_tokens"] == 3
    errors = {
        line["id"]: line["error"]
        for line in answered(target)
        if "error" in line and "custom_id" not in line
    }
    assert errors.keys() == {"bad", 4} and "top_p" in errors["bad"] and "JSON" in errors[4]


def test_ctrl_c_ends_a_command_quietly(server: Server) -> None:
    command = ["generate", PROMPT, "--url", server.grpc, "--max-tokens=1000", "--ignore-eos"]
    # A test run in a shell's background has SIGINT ignored, and its children with it.
    foreground = ["env", "--default-signal=INT"]
    with subprocess.Popen(
        [*foreground, *GLLM, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout is not None and running.stderr is not None
        assert running.stdout.read(1)
        running.send_signal(signal.SIGINT)
        assert running.wait(WAIT_S) == 130
        assert not running.stderr.read()
    server.wait_idle()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model_of_every_family_generates(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = str(tmp_path / "tiny")
    assert main(["tiny-model", directory, "--family", family]) == 0
    assert capsys.readouterr().out == f"{directory}\n"
    command = ["generate", "Once upon", "--model", directory, "--max-tokens=32", "--ignore-eos"]
    assert main([*command, "--seed=1", "--cpu-threads=1", "--kv-cache-gib=0.05"]) == 0
    assert len(capsys.readouterr().out) > 4


def test_a_bare_checkpoint_is_served(
    serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Engine options and front ends come from the command line then."""
    checkpoint = tmp_path / "my-model"
    assert main(["tiny-model", str(checkpoint), "--family=MistralForCausalLM", "--seed=3"]) == 0
    here = os.listdir(checkpoint)
    server = serve(checkpoint, "--front-ends=2", "--max-model-len=48", "--cpu-threads=1")
    assert [len(rows) for rows in server.stubs().values()] == [2]
    with server.client("my-model") as client:
        answer = client.complete("Once", max_tokens=1000, ignore_eos=True, temperature=0)
        assert (answer.num_input_tokens or 0) + answer.num_output_tokens == 48
    local = ["--model", str(checkpoint), "--cpu-threads=1", "--temperature=0", "--ignore-eos"]
    capsys.readouterr()
    assert main(["generate", "Once", *local, "--max-tokens=46"]) == 0
    assert capsys.readouterr().out == answer.text + "\n"
    assert os.listdir(checkpoint) == here  # nothing is written into it
    assert server.stop() == 0
