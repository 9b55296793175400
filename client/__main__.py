"""The `gllm` command: its command line, and the reporting of errors.

The work of each command is in a module of its own, imported when the command runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from gllm_client.flags import Parser, UsageError, add_struct, dashed, struct_texts, struct_values
from gllm_client.openai_server.options import Options
from gllm_client.protocol import MAX_TIMEOUT_S, asks_for_one, shown
from gllm_client.tritonserver import Serving, exec_server
from gllm_engine import ConfigError, EngineConfig, InvalidField, SamplingParams, parse_sampling

if TYPE_CHECKING:  # its module is imported when a command needs it
    from gllm_client.answers import AnswerSource

CHAT_MAX_TOKENS = 1024
# Options of the OpenAI server that gllm serve has flags of its own for.
SET_BY_SERVE = ("url", "host", "port", "metrics_url", "drain_timeout_s")

_ABOUT = """\
gllm-triton: an LLM inference engine inside NVIDIA Triton Inference Server.

  gllm serve model_repository                  serve a model repository, or one checkpoint
  gllm openai --port 9000                      OpenAI's API in front of a running tritonserver
  gllm chat --url localhost:8001               talk to a served model
  gllm generate --model DIRECTORY "Once upon"  answer one prompt in this process, no server
  gllm batch in.jsonl out.jsonl --url ...      answer a file of prompts; run again to resume
  gllm check MODEL                             tell what serving it would take; needs no GPU
  gllm warmup MODEL                            compile the kernels that serving it on this GPU needs
  gllm tiny-model DIRECTORY                    write a small random checkpoint to try things with
  gllm tritonserver ARGUMENT...                the plain tritonserver with the gllm backend

Errors are one sentence on stderr; exit status 2: wrong usage, 1: failed. With GLLM_TRACEBACK=1
in the environment they show where they come from."""

_SERVE = """\
Start tritonserver with the gllm backend, load the models and watch over them.

PATH is a Triton model repository (NAME/config.pbtxt), one model of one, or a bare checkpoint
directory (config.json), which is served under its directory's name. Once all is ready one line
with the addresses appears on stdout; the server's log goes to stderr. A front end that dies is
noticed and its model loaded anew. SIGTERM and Ctrl-C let running answers end, a second one does
not. What follows `--` goes to tritonserver: gllm serve PATH -- --log-verbose=1

tritonserver is looked for in $TRITON_SERVER_DIR, /opt/tritonserver and the nvidia-pytriton wheel.
"""

_OPENAI = """\
Serve OpenAI's HTTP API in front of a running tritonserver, for all of its models with the gllm
backend: /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages, /v1/models, /tokenize,
/detokenize, /health.

  gllm openai --url grpc://127.0.0.1:8001 --port 9000

Models may be loaded and unloaded meanwhile. After SIGTERM running answers end, and new requests get
status 503. Needs the [openai] extra. Without --api-key-file everybody who reaches it may ask.
"""

_WARMUP = """\
Compile the kernels that serving MODEL on this machine's GPU needs, so that no later start has to.

MODEL is a model.json, or a checkpoint directory, of which only config.json is needed; with that,
give the flags it will be served with. Takes minutes the first time. Prints the directories that
hold what was compiled, and their sizes: keep them (in a volume, an image), and starts are short.
FLASHINFER_WORKSPACE_BASE and TRITON_CACHE_DIR in the environment say where they are to be.
"""

_CHECK = """\
Tell whether MODEL loads, how much memory each GPU takes, how many tokens its KV cache holds and
which kernels it uses. No GPU is needed, and no weights are read: only config.json, the tokenizer's
files and the headers of the safetensors files.

MODEL is a checkpoint directory or a model.json; the flags are those it will be served with.

  gllm check MODEL --tensor-parallel-size 8 --gpu-memory 80GiB

Refusals are those of a start, with the same sentences. Memory besides weights and cache is an
estimate. Exit status 0: the model loads and has room, 1: it does not.
"""

_BATCH = """\
Answer every line of INPUT, one JSON object a line:

  {"id": "a1", "prompt": "Once upon", "sampling_parameters": {"max_tokens": 50}}
  {"id": "a2", "messages": [{"role": "user", "content": "Hello"}]}

With messages go `tools` and `chat_template_kwargs`, such as {"enable_thinking": false}.

OUTPUT gets a line for each, in the order in which they finish:

  {"id": "a1", "text": " a time", "finish_reason": "length", "num_output_tokens": 50, ...}
  {"id": "a2", "error": "messages: ..."}

Lines of OpenAI's batches may stand beside these, for /v1/chat/completions and /v1/completions:

  {"custom_id": "a3", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once"}}
  {"id": ..., "custom_id": "a3", "response": {"status_code": 200, "body": {...}}, "error": null}

With n > 1 the texts are listed under "outputs". logprobs adds "logprobs" and
"cumulative_logprob", prompt_logprobs adds "prompt_logprobs".

`id` (a string or a whole number) is by default the line's number. Sampling flags hold for lines
that do not say otherwise. A line that is no request, or has the id of an earlier one, gets an
error with its number as "line". Broken off, the same command continues: lines with an answer in
OUTPUT, by id or custom_id, are skipped. The exit status is 1 if any line ended in an error.
"""


class Asked(msgspec.Struct, frozen=True):
    """The source of answers: the fields are flags of `generate`, `chat` and `batch`."""

    # a checkpoint directory; with --url, a model's name (needed if there are several)
    model: str | None = None
    # ask a server: HOST:PORT or grpc://HOST:PORT, or http://HOST:PORT. Without it the engine runs
    # in this process
    url: str | None = None
    # seconds, for one answer of a server
    timeout: Annotated[float, msgspec.Meta(gt=0, le=MAX_TIMEOUT_S)] | None = None


class Pace(msgspec.Struct, frozen=True):
    """The concurrency of `batch`: the fields are its flags."""

    concurrency: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 64  # requests under way at a time


class Tiny(msgspec.Struct, frozen=True):
    """The checkpoint that `tiny-model` writes: the fields are its flags."""

    family: str = "LlamaForCausalLM"  # the architecture, as config.json names it
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0  # of the random weights
    set: tuple[str, ...] = ()  # KEY=JSON changes config.json, such as num_hidden_layers=4


class Checked(msgspec.Struct, frozen=True):
    """What `check` checks for, and how it tells the result: the fields are its flags."""

    # memory of each GPU, such as 80GiB or 141GB; default: of this machine's GPU, else the model is
    # checked for a CPU
    gpu_memory: str | None = None
    json: bool = False  # print one JSON object


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given[0] if given and not given[0].startswith("-") else ""
    prefix = f"gllm {name}".strip()
    try:
        if name == "tritonserver":  # its flags are tritonserver's own, --help included
            exec_server(given[1:])
        rest = []
        if name == "serve" and "--" in given:
            end = given.index("--")
            given, rest = given[:end], given[end + 1 :]
        options = make_parser().parse_args(dashed(given), argparse.Namespace(rest=rest))
        return int(options.run(options))
    except (UsageError, ConfigError, InvalidField) as error:
        return _explain(prefix, str(error), 2)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return _explain(prefix, reason, 1)
    except (ValueError, RuntimeError) as error:  # the base classes of all our own errors
        return _explain(prefix, str(error), 1)


def _explain(prefix: str, problem: str, status: int) -> int:
    if os.environ.get("GLLM_TRACEBACK"):
        raise  # noqa: PLE0704  # called while the error is handled
    print(f"{prefix}: {problem}", file=sys.stderr)
    return status


def make_parser() -> Parser:
    """The parser of all commands; `tritonserver` takes its arguments unparsed."""
    parser = Parser(prog="gllm", description=_ABOUT)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    _add_serve(commands)
    _add_openai(commands)
    _add_generate(commands)
    _add_chat(commands)
    _add_batch(commands)
    _add_check(commands)
    _add_warmup(commands)
    _add_tiny_model(commands)
    commands.add_parser("tritonserver", help="the plain tritonserver with the gllm backend")
    return parser


def _command(commands: Any, name: str, run: Callable[[Any], int], brief: str, text: str) -> Any:
    parser = commands.add_parser(name, help=brief, description=text)
    parser.set_defaults(run=run)
    return parser


def _add_serve(commands: Any) -> None:
    parser = _command(commands, "serve", _serve, "start tritonserver and watch over it", _SERVE)
    parser.add_argument("path", metavar="PATH", type=Path, help="what to serve")
    parser.add_argument(
        "--dry-run", action="store_true", help="start nothing: `gllm check` a bare checkpoint"
    )
    add_struct(parser, "server", Serving, skip=("path", "engine", "arguments", "openai"))
    add_struct(parser, "OpenAI server, with --openai-port", Options, skip=SET_BY_SERVE)
    add_struct(parser, "engine, for a bare checkpoint", EngineConfig, skip=("model",))


def _add_openai(commands: Any) -> None:
    brief = "serve OpenAI's API in front of tritonserver"
    parser = _command(commands, "openai", _openai, brief, _OPENAI)
    add_struct(parser, "server", Options, skip=())


def _add_source(parser: Any) -> None:
    add_struct(parser, "who answers", Asked, skip=())
    add_struct(parser, "sampling", SamplingParams, skip=())
    add_struct(parser, "engine, in this process", EngineConfig, skip=("model",))


def _add_generate(commands: Any) -> None:
    brief = "answer one prompt"
    parser = _command(commands, "generate", _generate, brief, "Answer one prompt, as it comes.")
    parser.add_argument("prompt", metavar="PROMPT", help="the text to go on from; - reads stdin")
    _add_source(parser)


def _add_chat(commands: Any) -> None:
    from gllm_client.chat import HINT

    text = f"Talk to a model. {HINT}\n--max-tokens is {CHAT_MAX_TOKENS} unless given."
    parser = _command(commands, "chat", _chat, "talk to a model", text)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        default="{}",
        help="variables of the chat template, such as '{\"enable_thinking\": false}'",
    )
    _add_source(parser)


def _add_batch(commands: Any) -> None:
    parser = _command(commands, "batch", _batch, "answer a file of prompts", _BATCH)
    parser.add_argument("input", metavar="INPUT", type=Path)
    parser.add_argument("output", metavar="OUTPUT", type=Path)
    add_struct(parser, "pace", Pace, skip=())
    parser.add_argument(
        "--retry-errors", action="store_true", help="ask lines again that ended in an error"
    )
    _add_source(parser)


def _add_check(commands: Any) -> None:
    parser = _command(commands, "check", _check, "tell what serving a model would take", _CHECK)
    parser.add_argument("model", metavar="MODEL", type=Path)
    add_struct(parser, "check", Checked, skip=())
    add_struct(parser, "engine", EngineConfig, skip=("model",))


def _add_warmup(commands: Any) -> None:
    parser = _command(commands, "warmup", _warmup, "compile a model's kernels ahead", _WARMUP)
    parser.add_argument("model", metavar="MODEL", type=Path)
    add_struct(parser, "engine", EngineConfig, skip=("model",))


def _add_tiny_model(commands: Any) -> None:
    brief = "write a small random checkpoint"
    text = (
        "Write a complete checkpoint of a few hundred kB: random weights, a tokenizer, a chat\n"
        "template. Nothing is downloaded. What it says is noise, and always the same noise."
    )
    parser = _command(commands, "tiny-model", _tiny_model, brief, text)
    parser.add_argument("directory", metavar="DIRECTORY", type=Path)
    add_struct(parser, "model", Tiny, skip=())


def _serve(options: argparse.Namespace) -> int:
    from gllm_client.supervisor import serve
    from gllm_engine import PATH_KEYS, make_config

    path = options.path
    engine = struct_values(options, EngineConfig)
    given = struct_values(options, Serving)
    if not path.is_dir():
        raise UsageError(f"{path} is not a directory")
    for key in PATH_KEYS:
        if engine.get(key):
            engine[key] = str(Path(engine[key]).resolve())
    if (path / "config.json").is_file():
        # This reports a wrong value before the server starts.
        config = make_config({"model": str(path)} | engine)
        if options.dry_run:
            from gllm_client.check import check

            return check(config)
    elif options.dry_run:
        raise UsageError("--dry-run: it is for a bare checkpoint; `gllm check` takes a model.json")
    openai = struct_values(options, Options)
    if "openai_port" in given:
        _check_openai()
    elif openai:
        flag = next(iter(openai)).replace("_", "-")
        raise UsageError(f"--{flag} is for the OpenAI server, give --openai-port as well")
    given["openai"] = openai
    return serve(Serving(path=path, engine=engine, arguments=tuple(options.rest), **given))


def _openai(options: argparse.Namespace) -> int:
    given = Options(**struct_values(options, Options))
    _check_openai()
    from gllm_client.openai_server.app import serve

    return serve(given)


def _check_openai() -> None:
    """Raise UsageError if the packages of the OpenAI server are not installed."""
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"the OpenAI server needs {' and '.join(missing)}: pip install 'gllm-triton[openai]'"
        )


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    """The given sampling flags as plain values, checked. Raises InvalidField."""
    given = struct_texts(options, SamplingParams)
    checked = parse_sampling(given)
    return {name: msgspec.to_builtins(getattr(checked, name)) for name in given}


def _text_only(sampling: dict[str, Any]) -> None:
    """Raise UsageError for sampling flags that request log probabilities."""
    for name in ("logprobs", "prompt_logprobs"):
        if sampling.get(name) is not None:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag}: only text is shown here; gllm batch writes these too")


def _source(options: argparse.Namespace) -> AnswerSource:
    engine = struct_values(options, EngineConfig)
    asked = Asked(**struct_values(options, Asked))
    if asked.url is None:
        if asked.model is None:
            raise UsageError("either --model DIRECTORY or --url is needed")
        if asked.timeout is not None:
            raise UsageError("--timeout is for a server, give --url as well")
        from gllm_client.local_answers import LocalAnswers

        return LocalAnswers({"model": asked.model} | engine)
    if engine:
        name = next(iter(engine)).replace("_", "-")
        raise UsageError(f"--{name} is for an engine in this process, it cannot go with --url")
    from gllm_client.answers import RemoteAnswers

    return RemoteAnswers(asked.url, asked.model, asked.timeout)


def _generate(options: argparse.Namespace) -> int:
    sampling = _sampling(options)
    _text_only(sampling)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    with closing(_source(options)) as source:
        for chunk in source.stream(prompt, sampling):
            print("\n---\n".join(o.text for o in chunk.outputs), end="", flush=True)
        print()
    return 0


def _chat(options: argparse.Namespace) -> int:
    from gllm_client.chat import Chat

    sampling = {"max_tokens": CHAT_MAX_TOKENS} | _sampling(options)
    _text_only(sampling)
    if not asks_for_one(sampling):
        raise UsageError("--n: a conversation has one answer at a time")
    try:
        variables = json.loads(options.chat_template_kwargs) or None
    except (ValueError, RecursionError):
        raise UsageError("--chat-template-kwargs: not valid JSON") from None
    with suppress(ImportError):
        import readline  # noqa: F401  # gives input() its line editing
    with closing(_source(options)) as source:
        answer = partial(source.stream, sampling=sampling, chat_template_kwargs=variables)
        Chat(answer, options.system, source.refusals).run(input)
    return 0


def _batch(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from gllm_client.batch import AnyItem, Tally, run_batch

    pace = Pace(**struct_values(options, Pace))
    if options.output.exists() and options.output.samefile(options.input):
        raise UsageError("INPUT and OUTPUT are the same file")
    sampling = _sampling(options)
    with closing(_source(options)) as source, tqdm(unit="request", disable=None) as bar:

        def answers(items: Iterable[AnyItem]) -> Iterator[tuple[AnyItem, Any]]:
            return source.answers((item.with_flags(sampling) for item in items), pace.concurrency)

        def show(tally: Tally) -> None:
            bar.total = tally.total
            bar.update(tally.skipped + tally.answered + tally.failed - bar.n)

        tally = run_batch(
            options.input,
            options.output,
            answers,
            retry_errors=options.retry_errors,
            on_progress=show,
        )
    print(
        f"{tally.answered} answered, {tally.failed} failed, {tally.skipped} done before",
        file=sys.stderr,
    )
    return 1 if tally.failed else 0


def _config(options: argparse.Namespace) -> EngineConfig:
    """The configuration of `options.model`, a model.json or a checkpoint directory."""
    from msgspec.structs import replace

    from gllm_engine import make_config, read_config

    given = struct_values(options, EngineConfig)
    path = options.model
    if path.is_file():
        return replace(read_config(path), **given)
    return make_config({"model": str(path)} | given)


def _check(options: argparse.Namespace) -> int:
    from gllm_client.check import check

    checked = Checked(**struct_values(options, Checked))
    return check(_config(options), checked.gpu_memory, checked.json)


def _warmup(options: argparse.Namespace) -> int:
    import logging

    from gllm_engine import fill_caches

    config = _config(options)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for directory in fill_caches(config):
        size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
        print(f"{directory}  {size / 1e6:.1f} MB")
    return 0


def _tiny_model(options: argparse.Namespace) -> int:
    from gllm_engine import write_tiny_model

    tiny = Tiny(**struct_values(options, Tiny))
    over = {}
    for text in tiny.set:
        key, separator, value = text.partition("=")
        try:
            over[key] = json.loads(value)
        except (ValueError, RecursionError):
            raise UsageError(f"--set: {shown(text)} is not KEY=JSON") from None
    write_tiny_model(options.directory, tiny.family, tiny.seed, **over)
    print(options.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
