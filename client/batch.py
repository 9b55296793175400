"""`gllm batch`: answers the requests of a JSONL file into another JSONL file; can be resumed.

Owns the two files; the caller passes the source of answers. An output line is written at once when
its answer is complete. The same command continues an interrupted run. An input line, whatever its
content, cannot affect the answer of another line.
"""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal

from gllm_client.protocol import Chunk, Output, shorten, shown

# Arguments of the chat template, for a line with messages, and their JSON types.
TEMPLATE_KEYS = {"tools": list, "chat_template_kwargs": dict}
KEYS = ("id", "prompt", "messages", *TEMPLATE_KEYS, "sampling_parameters")
# Identifies an input line in all runs: its id, by default its number; ("line", number) for a line
# whose id is unreadable or repeated.
Key = str | int | tuple[Literal["line"], int]
LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have


class BatchError(RuntimeError):
    """The batch cannot be run; the message names the file and the line."""


@dataclass(frozen=True)
class Item:
    """One request, read from an input line."""

    id: str | int
    prompt: str | list[dict[str, Any]]  # text, or chat messages
    sampling: dict[str, Any]
    template: dict[str, Any] = field(default_factory=dict)  # the given keys of TEMPLATE_KEYS


@dataclass(frozen=True)
class Failed:
    """The reason why an item has no answer."""

    message: str


class BadLine(ValueError):
    """An input line that is not a valid request; the message says why."""


Answers = Callable[[Iterable[Item]], Iterator[tuple[Item, Chunk | Failed]]]


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
        items = [line for line in waiting.values() if isinstance(line, Item)]
        for key, answer in chain(bad, ((item.id, answer) for item, answer in answers(items))):
            _record(file, tally, key, answer)
            on_progress(tally)
    return tally


def read_source(path: Path) -> dict[Key, Item | Failed]:
    """All lines, in order, by key. The default id of a line is its number, from 1.

    If two lines have the same id, the later line is an error, and its key is its line number.
    """
    items: dict[Key, Item | Failed] = {}
    numbers: dict[Key, int] = {}
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            key, item = parse_line(number, raw)
            first = numbers.setdefault(key, number)
            if first != number:
                item = Failed(f"id: {shown(key)} is the id of line {first} already")
                key = ("line", number)
            items[key] = item
    return items


def parse_line(number: int, raw: bytes) -> tuple[Key, Item | Failed]:
    """The key of one input line, and its request, or Failed for an invalid line."""
    try:
        line = _parse_json(raw)
        if not isinstance(line, dict):
            raise BadLine("a JSON object is expected")
    except ValueError as error:
        return ("line", number), Failed(f"line {number}: {error}")
    id = line.get("id", number)
    if isinstance(id, bool) or not isinstance(id, str | int):
        what = "a list or an object" if isinstance(id, list | dict) else json.dumps(id)
        return ("line", number), Failed(f"id: {what} is not a string or a whole number")
    try:
        return id, _item(id, line)
    except BadLine as error:
        return id, Failed(str(error))


def _parse_json(raw: bytes) -> Any:
    """The JSON value of a line. Raises BadLine for invalid JSON or a repeated key."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise BadLine(f"key {shown(twice)} comes twice")
        return values

    try:
        return json.loads(raw, object_pairs_hook=once)
    except BadLine:
        raise
    except RecursionError:
        raise BadLine("nested too deeply") from None
    except ValueError as error:
        raise BadLine(f"not valid JSON ({error})") from None


def _item(id: str | int, line: dict[str, Any]) -> Item:
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
        if retry_errors and "error" in answer:
            errors = True
        else:
            finished.add(("line", answer["line"]) if "line" in answer else answer["id"])
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
    fresh.writelines(line for line in file if "error" not in json.loads(line))
    fresh.flush()
    fresh_path.replace(path)
    file.close()
    return fresh


def _parse_answer(raw: bytes) -> dict[str, Any] | None:
    try:
        answer = _parse_json(raw)
    except BadLine:
        return None
    whole = (
        isinstance(answer, dict)
        and isinstance(answer.get("id"), str | int)
        and isinstance(answer.get("line", 0), int)
        and not {"error", "text", "outputs"}.isdisjoint(answer)
    )
    return answer if whole else None


def _record(file: IO[bytes], tally: Tally, key: Key, answer: Chunk | Failed) -> None:
    known: dict[str, Any] = {"id": key}
    if isinstance(key, tuple):  # "line" tells this line from a line that has this number as its id
        known = {"id": key[1], "line": key[1]}
    if isinstance(answer, Failed):
        tally.failed += 1
        line = known | {"error": answer.message}
    else:
        tally.answered += 1
        line = known | to_line(answer)
    file.write(json.dumps(line).encode("ascii") + b"\n")
    file.flush()


def to_line(answer: Chunk) -> dict[str, Any]:
    """An output line without its id. With n > 1 the answers are a list under "outputs".

    Log probabilities of the output and of the prompt are included if they were requested.
    """
    outputs = [_output(output) for output in answer.outputs]
    line: dict[str, Any] = outputs[0] if len(outputs) == 1 else {"outputs": outputs}
    line["num_input_tokens"] = answer.num_input_tokens
    if answer.prompt_logprobs is not None:
        line["prompt_logprobs"] = _finite(answer.prompt_logprobs)
    return line


def _output(output: Output) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "text": output.text,
        "finish_reason": output.finish_reason,
        "num_output_tokens": output.num_tokens,
    }
    if output.logprobs is not None:
        fields["logprobs"] = _finite(output.logprobs)
    if output.cumulative_logprob is not None:
        fields["cumulative_logprob"] = max(output.cumulative_logprob, LEAST_LOGPROB)
    return fields


def _finite(entries: list[Any]) -> list[Any]:
    """Replace minus infinity in the log probabilities of all positions; None stays None."""
    return [
        entry and {id: t | {"logprob": max(t["logprob"], LEAST_LOGPROB)} for id, t in entry.items()}
        for entry in entries
    ]


def _lock(file: IO[bytes], path: Path) -> IO[bytes]:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise BatchError(f"{path}: another gllm batch is writing to it") from None
    return file
