"""`gllm batch`: answers the requests of a JSONL file into another JSONL file; can be resumed.

Owns the two files and the lines of our own form; openai_lines.py owns those of OpenAI's batches.
The caller passes the source of answers. An output line is written at once when its answer is
complete. The same command continues an interrupted run. An input line, whatever its content, cannot
affect the answer of another line.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

from gllm_client import openai_lines
from gllm_client.openai_lines import BadLine
from gllm_client.openai_server.body import LENIENT, Body, Json, RepeatedKey, parse
from gllm_client.openai_server.logprobs import finite
from gllm_client.protocol import Chunk, Output, shorten, shown

# Arguments of the chat template, for a line with messages, and their JSON types.
TEMPLATE_KEYS = {"tools": list, "chat_template_kwargs": dict}
KEYS = ("id", "prompt", "messages", *TEMPLATE_KEYS, "sampling_parameters")
# Identifies an input line in all runs: its id, by default its number; ("custom_id", id) in OpenAI's
# form; ("line", number) for a line whose id is unreadable or repeated.
Key = str | int | tuple[Literal["line"], int] | tuple[Literal["custom_id"], str]
# Text, chat messages (a list) or token ids (a tuple).
Prompt = str | list[Json] | tuple[int, ...]
Line = Json  # of the output, without its key


class BatchError(RuntimeError):
    """The batch cannot be run; the message names the file and the line."""


@dataclass(frozen=True)
class Item:
    """One request, read from an input line."""

    id: str | int
    prompt: Prompt
    sampling: Json
    template: Json = field(default_factory=dict)  # the given keys of TEMPLATE_KEYS

    @property
    def key(self) -> Key:
        return self.id

    def with_flags(self, sampling: Json) -> Item:
        """The item with all its sampling parameters; `sampling`: those of the command line."""
        return replace(self, sampling=sampling | self.sampling)


@dataclass(frozen=True)
class OpenAIItem:
    """One request, read from an input line in OpenAI's form."""

    id: str
    url: str
    body: Body
    sampling: Json = field(default_factory=dict)  # of the command line

    @property
    def key(self) -> Key:
        return ("custom_id", self.id)

    def with_flags(self, sampling: Json) -> OpenAIItem:
        return replace(self, sampling=sampling)


@dataclass(frozen=True)
class Failed:
    """The reason why an item has no answer."""

    message: str
    openai: Line | None = None  # for an item in OpenAI's form


AnyItem = Item | OpenAIItem
Answer = Chunk | Line | Failed  # a Line for an item in OpenAI's form
Answers = Callable[[Iterable[AnyItem]], Iterator[tuple[AnyItem, Answer]]]


@dataclass
class Tally:
    """The counts of a batch, in items."""

    total: int
    skipped: int = 0  # items that an earlier run answered
    answered: int = 0
    failed: int = 0


def run_batch(
    source: Path,
    target: Path,
    answers: Answers,
    *,
    retry_errors: bool = False,
    on_progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Answer every line of `source` that has no answer in `target`, in any order.

    `retry_errors`: also answer the lines that have an error in `target`. Raises BatchError if
    `target` is not an output of gllm batch. A bad line of `source` gets an error in `target`.
    """
    lines = read_source(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    file, finished = open_target(target, retry_errors)
    with file:
        tally = Tally(total=len(lines), skipped=len(finished & set(lines)))
        on_progress(tally)
        waiting = {key: line for key, line in lines.items() if key not in finished}
        bad = [(key, line) for key, line in waiting.items() if isinstance(line, Failed)]
        for key, failed in bad:
            _record(file, tally, key, failed)
            on_progress(tally)
        items = [line for line in waiting.values() if not isinstance(line, Failed)]
        for item, answer in answers(items):
            _record(file, tally, item.key, answer)
            on_progress(tally)
    return tally


def read_source(path: Path) -> dict[Key, AnyItem | Failed]:
    """All lines, in order, by key. The default id of a line is its number, from 1.

    If two lines have the same id, the later line is an error, and its key is its line number.
    """
    items: dict[Key, AnyItem | Failed] = {}
    numbers: dict[Key, int] = {}
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            key, item = parse_line(number, raw)
            first = numbers.setdefault(key, number)
            if first != number:
                item = _repeated(key, first)
                key = ("line", number)
            items[key] = item
    return items


def _repeated(key: Key, first: int) -> Failed:
    """The error of a line whose key is that of line `first`."""
    if isinstance(key, tuple):
        return _no_request(f"custom_id: {shown(key[1])} is the custom_id of line {first} already")
    return Failed(f"id: {shown(key)} is the id of line {first} already")


def _no_request(message: str) -> Failed:
    """The error of a line in OpenAI's form that is no request."""
    return Failed(message, openai_lines.no_request(message))


def parse_line(number: int, raw: bytes) -> tuple[Key, AnyItem | Failed]:
    """The key of one input line, and its request, or Failed for an invalid line."""
    try:
        line = _parse_json(raw)
        if not isinstance(line, dict):
            raise BadLine("a JSON object is expected")
    except ValueError as error:
        message = f"line {number}: {error}"
        has_openai_form = b'"custom_id"' in raw
        return ("line", number), _no_request(message) if has_openai_form else Failed(message)
    if openai_lines.is_openai(line):
        return _parse_openai(number, line)
    id = line.get("id", number)
    if isinstance(id, bool) or not isinstance(id, str | int):
        what = "a list or an object" if isinstance(id, list | dict) else json.dumps(id)
        return ("line", number), Failed(f"id: {what} is not a string or a whole number")
    try:
        return id, _item(id, line)
    except BadLine as error:
        return id, Failed(str(error))


def _parse_openai(number: int, line: Json) -> tuple[Key, AnyItem | Failed]:
    id = line.get("custom_id")
    if not isinstance(id, str):
        return ("line", number), _no_request("custom_id: a string is needed")
    key: Key = ("custom_id", id)
    try:
        return key, OpenAIItem(id, *openai_lines.read(line))
    except BadLine as error:
        return key, _no_request(str(error))


def _parse_json(raw: bytes) -> Any:
    """The JSON value of a line. Raises BadLine for invalid JSON or a repeated key.

    A body with numbers or texts that a server would refuse stays JSON.
    """
    try:
        try:
            return parse(raw)
        except RepeatedKey:
            raise
        except ValueError:
            line = LENIENT.decode(raw.decode("utf-8-sig"))
            if isinstance(line, dict) and isinstance(line.get("body"), dict):
                line["body"] = json.dumps(line["body"]).encode()
            return line
    except RecursionError:
        raise BadLine("nested too deeply") from None
    except RepeatedKey as error:
        raise BadLine(str(error)) from None
    except ValueError as error:
        raise BadLine(f"not valid JSON ({error})") from None


def _item(id: str | int, line: Json) -> Item:
    if unknown := sorted(set(line) - set(KEYS)):
        raise BadLine(f"{shorten(unknown[0])}: unknown key; known are {', '.join(KEYS)}")
    sampling = line.get("sampling_parameters", {})
    if not isinstance(sampling, dict):
        raise BadLine("sampling_parameters: a JSON object is expected")
    if ("prompt" in line) == ("messages" in line):
        raise BadLine("prompt: exactly one of prompt and messages is needed")
    kind = str if "prompt" in line else list
    prompt = line.get("prompt", line.get("messages"))
    if not isinstance(prompt, kind):
        raise BadLine("prompt: a string is expected (or messages: a list)")
    template = {key: line[key] for key in TEMPLATE_KEYS if line.get(key) is not None}
    for key, value in template.items():
        expected = TEMPLATE_KEYS[key]
        if not isinstance(value, expected):
            raise BadLine(f"{key}: {'a list' if expected is list else 'an object'} is expected")
        if kind is str:
            raise BadLine(f"{key}: it is for the chat template, so it goes with messages")
    return Item(id, prompt, sampling, template)


def open_target(path: Path, retry_errors: bool) -> tuple[IO[bytes], set[Key]]:
    """Open and lock the output for appending. Returns the file and the keys of its answers.

    Removes an incomplete last line; with `retry_errors`, also the lines with an error. Raises
    BatchError for any other line that is not an answer: the file may be another program's.
    """
    file = _lock(path.open("a+b"), path)
    try:
        finished, errors = _repair(file, path, retry_errors)
        return (_without_errors(file, path) if errors else file), finished
    except BatchError:
        file.close()
        raise


def _repair(file: IO[bytes], path: Path, retry_errors: bool) -> tuple[set[Key], bool]:
    """The keys to skip, and whether the output has lines with an error to remove."""
    file.seek(0)
    finished: set[Key] = set()
    errors = False
    # The length of all whole lines in bytes, and the last whole line.
    end = 0
    last = b"\n"
    for number, line in enumerate(file, 1):
        answer = _parse_answer(line)
        if answer is None and line.endswith(b"\n"):
            raise BatchError(f"{path}: line {number} is not an answer of gllm batch")
        if answer is None:
            break
        end = end + len(line)
        last = line
        if retry_errors and _has_failed(answer):
            errors = True
        else:
            finished.add(_answered_key(answer))
    file.truncate(end)
    if not last.endswith(b"\n"):
        file.write(b"\n")
        file.flush()
    return finished, errors


def _without_errors(file: IO[bytes], path: Path) -> IO[bytes]:
    """Replace the output atomically by a file without errors. Returns the new file, locked."""
    fresh_path = path.with_name(path.name + ".new")
    fresh_path.unlink(missing_ok=True)
    fresh = _lock(fresh_path.open("a+b"), fresh_path)
    file.seek(0)
    fresh.writelines(line for line in file if not _has_failed(json.loads(line)))
    fresh.flush()
    fresh_path.replace(path)
    file.close()
    return fresh


def _parse_answer(raw: bytes) -> Json | None:
    try:
        answer = _parse_json(raw)
    except BadLine:
        return None
    whole = (
        isinstance(answer, dict)
        and isinstance(answer.get("id"), str | int)
        and isinstance(answer.get("line", 0), int)
        and not {"error", "text", "outputs"}.isdisjoint(answer)
        and isinstance(answer.get("custom_id"), str | None)
        and isinstance(answer.get("response"), dict | None)
    )
    return answer if whole else None


def _answered_key(answer: Json) -> Key:
    """The key of the input line that an output line answers."""
    if "line" in answer:
        return ("line", answer["line"])
    return ("custom_id", answer["custom_id"]) if "custom_id" in answer else answer["id"]


def _has_failed(answer: Json) -> bool:
    response = answer.get("response")
    if response is not None:
        return bool(response.get("status_code") != 200)
    return "error" in answer


def _record(file: IO[bytes], tally: Tally, key: Key, answer: Answer) -> None:
    """Write an output line, and count it."""
    if isinstance(answer, Failed):
        tally.failed += 1
        line = answer.openai or {"error": answer.message}
    else:
        tally.answered += 1
        line = to_line(answer) if isinstance(answer, Chunk) else answer
    if not isinstance(key, tuple):
        line = {"id": key} | line
    elif key[0] == "custom_id":
        line = {"id": line["id"], "custom_id": key[1]} | line
    else:  # "line" tells this line from a line that has this number as its id
        known = {"custom_id": None} if "response" in line else {"id": key[1]}
        line = known | {"line": key[1]} | line
    file.write(json.dumps(line).encode("ascii") + b"\n")
    file.flush()


def to_line(answer: Chunk) -> Json:
    """An output line without its id. With n > 1 the answers are a list under "outputs".

    Log probabilities of the output and of the prompt are included if they were requested.
    """
    answer = finite(answer)
    outputs = [_output(output) for output in answer.outputs]
    line: Line = outputs[0] if len(outputs) == 1 else {"outputs": outputs}
    line["num_input_tokens"] = answer.num_input_tokens
    if answer.prompt_logprobs is not None:
        line["prompt_logprobs"] = answer.prompt_logprobs
    return line


def _output(output: Output) -> Json:
    fields: Json = {
        "text": output.text,
        "finish_reason": output.finish_reason,
        "num_output_tokens": output.num_tokens,
    }
    if output.logprobs is not None:
        fields["logprobs"] = output.logprobs
    if output.cumulative_logprob is not None:
        fields["cumulative_logprob"] = output.cumulative_logprob
    return fields


def _lock(file: IO[bytes], path: Path) -> IO[bytes]:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise BatchError(f"{path}: another gllm batch is writing to it") from None
    return file
