"""The command line: flags out of structs, exit statuses, errors in one sentence."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import msgspec
import pytest
from odd_lines import check_odd_lines

from gllm_client import supervisor as serve_module
from gllm_client.__main__ import Asked, Pace, Tiny, main, make_parser
from gllm_client.chat import HINT
from gllm_client.check import num_bytes
from gllm_client.flags import (
    Parser,
    UsageError,
    add_struct,
    dashed,
    field_comments,
    struct_texts,
    struct_values,
)
from gllm_client.openai_server.options import Options
from gllm_client.tritonserver import Serving
from gllm_engine import PATH_KEYS, EngineConfig, SamplingParams, write_tiny_model
from gllm_engine.engine import core


class Sample(msgspec.Struct):
    """A struct with a field of each kind."""

    # what it is
    # called
    name: str
    max_size: int | None = None  # bytes
    share: float = 0.5
    is_on: bool = True
    words: tuple[str, ...] = ()
    extra: dict[int, float] = {}


def parse(*arguments: str) -> argparse.Namespace:
    parser = Parser(prog="x")
    add_struct(parser, "sample", Sample, skip=())
    return parser.parse_args(dashed(list(arguments)))


def test_flags_have_the_types_of_their_fields() -> None:
    options = parse("--name=a_b", "--max_size", "3", "--share=1", "--is-on", "false")
    assert struct_values(options, Sample) == {
        "name": "a_b",
        "max_size": 3,
        "share": 1.0,
        "is_on": False,
    }
    assert struct_values(parse("--is_on"), Sample) == {"is_on": True}
    assert struct_values(parse("--words", "a", "--words", "b"), Sample) == {"words": ("a", "b")}
    assert struct_values(parse(), Sample) == {}
    assert struct_texts(parse("--share", "x"), Sample) == {"share": "x"}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--max-size", "x"], "--max-size: 'x'"),
        (["--is-on=perhaps"], "--is-on: 'perhaps'"),
        (["--max-siz=1"], "unrecognized arguments: --max-siz=1"),
    ],
)
def test_wrong_values_name_the_flag(arguments: list[str], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        struct_values(parse(*arguments), Sample)


def test_help_comes_from_the_fields() -> None:
    assert field_comments(Sample)["name"] == "what it is called"
    assert field_comments(Sample)["max_size"] == "bytes"
    comments = field_comments(EngineConfig)
    assert comments["max_num_seqs"] == (
        "sequences in one step; default: 256, on GPUs 1024; fewer with recurrent layers"
    )
    assert set(comments) == set(EngineConfig.__struct_fields__)


def test_what_follows_two_dashes_is_left_alone() -> None:
    given = ["--a_b=c_d", "e_f", "--", "--g_h"]
    assert dashed(given) == ["--a-b=c_d", "e_f", "--", "--g_h"]


def test_every_engine_and_sampling_field_is_a_flag() -> None:
    serve, generate = help_of("serve"), help_of("generate")
    for name in EngineConfig.__struct_fields__:
        if name != "model":
            assert f"--{name.replace('_', '-')} " in serve
    for name in SamplingParams.__struct_fields__:
        assert f"--{name.replace('_', '-')} " in generate


def help_of(command: str) -> str:
    parser = make_parser()
    (commands,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return commands.choices[command].format_help()


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["chat", "--help"]])
def test_help_ends_well(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0 and "usage: gllm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        ([], 2, "gllm: the following arguments are required: COMMAND (see gllm --help)"),
        (["srve"], 2, "gllm srve: argument COMMAND: invalid choice: 'srve'"),
        (["serve", "/no/such"], 2, "gllm serve: /no/such is not a directory"),
        (["serve", "/", "--max-num-seqs=x"], 2, "gllm serve: --max-num-seqs: 'x'"),
        (["serve", "/", "--http-port=x"], 2, "gllm serve: --http-port: 'x'"),
        (["serve", "/", "--front-ends=0"], 2, "gllm serve: --front-ends: '0'"),
        (["generate", "hi"], 2, "gllm generate: either --model DIRECTORY or --url is needed"),
        (["generate", "hi", "--model=/no"], 2, "gllm generate: model: /no is not a directory"),
        (["generate", "hi", "--model=m", "--top-p=3"], 2, "gllm generate: top_p: 3.0 is outside"),
        (["generate", "hi", "--model=m", "--timeout=3"], 2, "gllm generate: --timeout is for"),
        (["generate", "hi", "--url=x:1", "--page-size=8"], 2, "gllm generate: --page-size is for"),
        (["generate", "hi", "--url=ftp://x", "--model=m"], 1, "gllm generate: url: ftp://x has"),
        (["generate", "hi", "--url=127.0.0.1:9"], 1, "gllm generate: the server cannot be reached"),
        (["chat", "--url=x:1", "--n=2"], 2, "gllm chat: --n: a conversation has one answer"),
        (["chat", "--url=x:1", "--chat-template-kwargs={"], 2, "gllm chat: --chat-template-kwarg"),
        (["generate", "hi", "--url=http://x:y", "--model=m"], 1, "gllm generate: address: 'y' aft"),
        (["generate", "hi", "--url=x:99999", "--model=m"], 1, "gllm generate: address: '99999' a"),
        (["generate", "hi", "--url=x:1", "--logprobs=1"], 2, "gllm generate: --logprobs: only te"),
        (["chat", "--url=x:1", "--prompt-logprobs=0"], 2, "gllm chat: --prompt-logprobs: only te"),
        (["batch", "/no", "/tmp/o", "--concurrency=0"], 2, "gllm batch: --concurrency: '0': Expe"),
        (["batch", "/no", "/no/o", "--url=x:1", "--model=m"], 1, "gllm batch: /no: No such file"),
        (["check", "/no/such"], 2, "gllm check: model: /no/such is not a directory"),
        (["serve", "/", "--dry-run"], 2, "gllm serve: --dry-run: it is for a bare checkpoint"),
        (["warmup", "/no/such"], 2, "gllm warmup: model: /no/such is not a directory"),
        (["warmup", "/", "--device=cpu"], 2, "gllm warmup: device: kernels are compiled on the"),
        (["tiny-model", "/tmp/x", "--set", "a"], 2, "gllm tiny-model: --set: 'a' is not KEY=JSON"),
    ],
)
def test_errors_are_one_sentence(
    arguments: list[str], status: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == status
    printed = capsys.readouterr()
    assert printed.err.startswith(sentence), printed.err
    assert printed.err.count("\n") == 1 and not printed.out


COMMANDS = {  # a command with every flag of these structs
    Serving: ["serve", "/"],
    EngineConfig: ["generate", "hi", "--model=/"],
    SamplingParams: ["generate", "hi", "--model=/"],
    Asked: ["generate", "hi", "--url=x:1", "--model=m"],
    Pace: ["batch", "/no", "/no/o", "--url=x:1", "--model=m"],
    Tiny: ["tiny-model", "/no/such/place"],
    Options: ["openai"],
}
NO_NUMBERS = ["nan", "inf", "-Infinity", "1e400", "9" * 400, "-" + "9" * 400, "9" * 5000, "1_0", ""]


def number_flags() -> list[tuple[Any, str]]:
    """Every flag that takes one number. (A token id's range is the model's vocabulary.)"""
    found = []
    for struct in COMMANDS:
        for name, hint in get_type_hints(struct).items():
            if {int, float} & {hint, *get_args(hint)} and get_origin(hint) not in (dict, tuple):
                found.append((struct, name))
    return found


@pytest.mark.parametrize(("struct", "name"), number_flags())
def test_a_flag_takes_no_number_without_a_range(
    struct: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in NO_NUMBERS:
        assert main([*COMMANDS[struct], f"--{name}={value}"]) == 2
        printed = capsys.readouterr().err
        assert name in printed.replace("-", "_") and printed.count("\n") == 1, printed
        assert len(printed) < 250, printed


def test_every_struct_with_numbers_is_tried() -> None:
    assert len(number_flags()) > 30
    assert {(Serving, "http_port"), (Asked, "timeout"), (Pace, "concurrency")} < {*number_flags()}


def test_the_traceback_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLLM_TRACEBACK", "1")
    with pytest.raises(UsageError):
        main(["generate", "hi"])


def test_serve_is_told_what_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    seen: list[Any] = []
    monkeypatch.setattr(serve_module, "serve", lambda serving: seen.append(serving) or 7)
    arguments = [str(tmp_path), "--grpc-port=5", "--max_num_seqs", "8", "--front-ends=2"]
    assert main(["serve", *arguments, "--", "--log-verbose=1", "--x_y"]) == 7
    (serving,) = seen
    assert (serving.path, serving.grpc_port, serving.http_port) == (tmp_path, 5, 8000)
    assert serving.engine == {"max_num_seqs": 8} and serving.front_ends == 2
    assert serving.arguments == ("--log-verbose=1", "--x_y") and serving.openai == {}
    assert main(["serve", str(tmp_path), "--openai-port=9", "--max-body-size=5"]) == 7
    assert (seen[1].openai_port, seen[1].openai) == (9, {"max_body_size": 5})
    assert main(["serve", str(tmp_path), "--max-body-size=5"]) == 2  # without --openai-port


def test_paths_on_the_command_line_are_the_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server runs in another directory."""
    (tmp_path / "config.json").write_text("{}")
    seen: list[Any] = []
    monkeypatch.setattr(serve_module, "serve", lambda serving: seen.append(serving) or 0)
    monkeypatch.chdir(tmp_path)
    flags = [f"--{key.replace('_', '-')}=." for key in PATH_KEYS]
    assert main(["serve", str(tmp_path), *flags]) == 0
    assert seen[0].engine == dict.fromkeys(PATH_KEYS, str(tmp_path))


def test_warmup_is_told_what_was_given_and_tells_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.json").write_text('{"model": ".", "page_size": 32, "max_num_seqs": 8}')
    (tmp_path / "cache/deep").mkdir(parents=True)
    (tmp_path / "cache/deep/kernel.so").write_bytes(bytes(1_500_000))
    seen: list[Any] = []
    caches = (tmp_path / "cache", tmp_path / "none")
    monkeypatch.setattr(core, "fill_caches", lambda config: seen.append(config) or caches)
    assert main(["warmup", str(tmp_path), "--page-size=64"]) == 0
    assert main(["warmup", str(tmp_path / "model.json"), "--max-num-seqs=4"]) == 0
    first, second = seen
    assert first.model == second.model == str(tmp_path)
    assert (first.page_size, first.max_num_seqs) == (64, 0)
    assert (second.page_size, second.max_num_seqs) == (32, 4)
    told = f"{tmp_path}/cache  1.5 MB\n{tmp_path}/none  0.0 MB\n"
    assert capsys.readouterr().out == told * 2


def test_a_wrong_engine_value_is_said_before_the_server_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["serve", str(tmp_path), "--page-size=3"]) == 2
    assert capsys.readouterr().err == "gllm serve: page_size: 3 is not a power of two\n"


def test_tritonserver_without_a_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_SERVER_DIR", str(tmp_path))
    assert main(["tritonserver", "--help"]) == 1
    assert "has no bin/tritonserver" in capsys.readouterr().err


def openai_line(custom_id: str, path: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": f"/v1/{path}", "body": body}


def check_openai_lines(found: dict[str, Any]) -> None:
    """The answers to the OpenAI lines of the test below: defaults are the command's flags."""
    chat = found["openai"]["body"]
    assert chat["model"] == "tiny" and chat["usage"]["completion_tokens"] == 6
    assert chat["choices"][0]["message"]["content"]
    (choice,) = found["logprobs"]["body"]["choices"]
    assert len(choice["logprobs"]["tokens"]) == 2 and choice["finish_reason"] == "length"
    assert found["logprobs"]["body"]["usage"]["prompt_tokens"] == 2
    for name, param in {"token": "prompt", "top_p": "top_p"}.items():
        assert found[name]["status_code"] == 400, found[name]
        assert found[name]["body"]["error"]["param"] == param


def test_the_commands_work_in_this_process(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """tiny-model, generate, chat and batch, on one small checkpoint."""
    model = str(tmp_path / "tiny")
    assert main(["tiny-model", model, "--set", "num_hidden_layers=1", "--seed", "3"]) == 0
    assert capfd.readouterr().out == f"{model}\n"
    greedy = ["--model", model, "--temperature", "0", "--ignore-eos", "--max_tokens"]
    assert main(["generate", "Once", *greedy, "6"]) == 0
    text = capfd.readouterr().out
    assert text.endswith("\n") and len(text) > 1
    assert main(["generate", "Once", *greedy, "6", "--n", "2"]) == 0
    assert capfd.readouterr().out == f"{text[:-1]}\n---\n{text}"
    keys = iter(["Hi", "/clear", "Hi"])

    def read(prompt: str) -> str:
        for key in keys:
            return key
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    assert main(["chat", *greedy, "5"]) == 0
    answers = capfd.readouterr().out.removeprefix(f"{HINT}\n")[:-1]
    assert answers[: len(answers) // 2] * 2 == answers and len(answers) > 4
    lines = [
        {"id": "same", "prompt": "Once"},
        {"id": "long", "prompt": "Once", "sampling_parameters": {"max_tokens": 9}},
        {"id": "bad", "prompt": "Once", "sampling_parameters": {"top_p": 9}},
        {"id": "two", "prompt": "Once", "sampling_parameters": {"n": 2}},
        {"id": "chat", "messages": [{"role": "user", "content": "a"}]},
        {
            "id": "bare",
            "messages": [{"role": "user", "content": "a"}],
            "chat_template_kwargs": {"add_generation_prompt": False},
        },
        openai_line("openai", "chat/completions", messages=[{"role": "user", "content": "a"}]),
        openai_line("logprobs", "completions", prompt=[[79, 110]], max_tokens=2, logprobs=2),
        openai_line("token", "completions", prompt=[10**30]),
        openai_line("top_p", "completions", prompt="Once", top_p=9),
    ]
    (tmp_path / "in").write_text("\n".join(map(json.dumps, lines)))
    batch = ["batch", str(tmp_path / "in"), str(tmp_path / "out"), "--concurrency", "2"]
    assert main([*batch, *greedy, "6"]) == 1
    answers = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    check_openai_lines({a["custom_id"]: a["response"] for a in answers if "custom_id" in a})
    found = {a["id"]: a for a in answers}
    assert found["same"]["text"] == text[:-1] and found["same"]["num_output_tokens"] == 6
    assert found["bare"]["num_input_tokens"] < found["chat"]["num_input_tokens"]
    assert found["long"]["num_output_tokens"] == 9 and found["long"]["num_input_tokens"] > 0
    assert found["bad"]["error"].startswith("top_p: 9.0 is outside")
    assert [o["text"] for o in found["two"]["outputs"]] == [text[:-1]] * 2


def test_odd_lines_cost_no_other_its_answer_in_this_process(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny", num_hidden_layers=1)
    check_odd_lines(tmp_path, "--model", str(model), "--concurrency=8", "--max-model-len=512")


def test_nothing_heavy_is_imported_without_need() -> None:
    code = (
        "import sys; from gllm_client.__main__ import main\n"
        "try: main(['serve', '--help'])\n"
        "except SystemExit: print({'torch', 'grpc', 'numpy'} & set(sys.modules), file=sys.stderr)\n"
        "import gllm_client.answers, gllm_client.supervisor\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "set()\nFalse\n"


def test_check_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_model(tmp_path, "Gemma2ForCausalLM")
    flags = ["--max-num-seqs=2", "--max-num-batched-tokens=64", "--dtype=bfloat16"]
    gpu = ["--device=cuda", "--gpu-memory", "8GiB"]
    assert main(["check", str(tmp_path), *flags, *gpu]) == 0
    table = capsys.readouterr().out
    assert table.startswith(f"{tmp_path}: loads\n") and "on GPUs of 8.00 GiB\n" in table
    assert re.search(r"^layers +0-1$", table, re.MULTILINE) and "\nleft free " in table
    assert "tokens (max_model_len) fit at once" in table and "a window of" in table
    assert main(["check", str(tmp_path), *flags, *gpu, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    report = json.loads(line)
    assert report["loads"] is True and report["gpu_memory"] == 8 * 2**30
    assert f"{report['num_pages']} pages of 16 tokens" in table
    assert main(["serve", str(tmp_path), "--dry-run", "--device=cpu", *flags]) == 0
    assert "on a CPU\n" in capsys.readouterr().out


def test_check_tells_why_a_model_does_not_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_model(tmp_path)
    sentence = "tensor_parallel_size: 3 does not divide the model's num_attention_heads=4"
    flags = ["--device=cpu", "--tensor-parallel-size=3"]
    assert main(["check", str(tmp_path), *flags]) == 1
    assert capsys.readouterr().err == f"gllm check: {sentence}\n"
    assert main(["serve", str(tmp_path), *flags, "--dry-run"]) == 1
    assert capsys.readouterr().err == f"gllm serve: {sentence}\n"
    assert main(["check", str(tmp_path), *flags, "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"loads": False, "problem": sentence}


@pytest.mark.parametrize("size", ["80", "GiB", "-1GiB", "nanGiB", "80gib", "9" * 99 + "GiB", "0GB"])
def test_a_memory_is_a_number_and_a_unit(
    size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["check", str(tmp_path), f"--gpu-memory={size}"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("gllm check: --gpu-memory: ") and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("size", "expected"), [("80GiB", 80 * 2**30), ("1.5 TB", 1.5e12), ("512MiB", 2**29)]
)
def test_memory_of_a_gpu(size: str, expected: float) -> None:
    assert num_bytes(size) == expected
