"""`gllm batch`: many requests from a JSONL file, their answers into another, resumable.

Owns the two files. Where answers come from is handed in. An output line is written whole once its
answer is; a run that was broken off is continued by running it again.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any

from gllm_client.protocol import Chunk

# For the chat template of a line with messages: a list, an object.
TEMPLATE_KEYS = {"tools": list, "chat_template_kwargs": dict}
KEYS = ("id", "prompt", "messages", *TEMPLATE_KEYS, "sampling_parameters")


class BatchError(RuntimeError):
    """The batch cannot be run; the message names the file and the line."""


@dataclass(frozen=True)
class Item:
    """One request. Filled from an input line."""

    id: str | int
    prompt: str | list[dict[str, Any]]  # text, or chat messages
    sampling: dict[str, Any]
    template: dict[str, Any] = field(default_factory=dict)  # by TEMPLATE_KEYS, what was given


@dataclass(frozen=True)
class Failed:
    """Why an item has no answer."""

    message: str


Answers = Callable[[Iterable[Item]], Iterator[tuple[Item, Chunk | Failed]]]


@dataclass
class Tally:
    """How a batch went, in items."""

    total: int
    skipped: int = 0  # had an answer already
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
    """Answer every line of `source` that `target` has no answer to; in any order.

    `retry_errors`: lines that ended in an error last time are asked again. Raises BatchError when
    either file is not what it should be; a bad line of `source` is an error in `target`.
    """
    lines = read_source(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    file, finished = open_target(target, retry_errors)
    with file:
        tally = Tally(total=len(lines), skipped=len(finished & set(lines)))
        on_progress(tally)
        waiting = {id: line for id, line in lines.items() if id not in finished}
        bad = [(id, line) for id, line in waiting.items() if isinstance(line, Failed)]
        items = [line for line in waiting.values() if isinstance(line, Item)]
        for id, answer in chain(bad, ((item.id, answer) for item, answer in answers(items))):
            _record(file, tally, id, answer)
            on_progress(tally)
    return tally


def read_source(path: Path) -> dict[str | int, Item | Failed]:
    """Every line by its id, in order. A line without an id has its number, from 1, as one.

    Raises BatchError for an id that comes twice.
    """
    items: dict[str | int, Item | Failed] = {}
    numbers: dict[str | int, int] = {}
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            id, item = parse_line(number, raw)
            first = numbers.setdefault(id, number)
            if first != number:
                raise BatchError(f"{path}: lines {first} and {number} have the same id {id!r}")
            items[id] = item
    return items


def parse_line(number: int, raw: bytes) -> tuple[str | int, Item | Failed]:
    """The id and the request of one input line, or what is wrong with it."""
    try:
        line = json.loads(raw)
    except ValueError as error:
        return number, Failed(f"line {number}: not valid JSON ({error})")
    if not isinstance(line, dict):
        return number, Failed(f"line {number}: a JSON object is expected")
    id = line.get("id", number)
    if isinstance(id, bool) or not isinstance(id, str | int):
        return number, Failed(f"id: {json.dumps(id)} is not a string or a whole number")
    return id, _item(id, line)


def _item(id: str | int, line: dict[str, Any]) -> Item | Failed:
    if unknown := sorted(set(line) - set(KEYS)):
        return Failed(f"{unknown[0]}: unknown key; known are {', '.join(KEYS)}")
    sampling = line.get("sampling_parameters", {})
    if not isinstance(sampling, dict):
        return Failed("sampling_parameters: a JSON object is expected")
    if ("prompt" in line) == ("messages" in line):
        return Failed("prompt: exactly one of prompt and messages is needed")
    kind = str if "prompt" in line else list
    prompt = line.get("prompt", line.get("messages"))
    if not isinstance(prompt, kind):
        return Failed("prompt: a string is expected (or messages: a list)")
    template = {key: line[key] for key in TEMPLATE_KEYS if line.get(key) is not None}
    for key, value in template.items():
        expected = TEMPLATE_KEYS[key]
        if not isinstance(value, expected):
            return Failed(f"{key}: {'a list' if expected is list else 'an object'} is expected")
        if kind is str:
            return Failed(f"{key}: it is for the chat template, so it goes with messages")
    return Item(id, prompt, sampling, template)


def open_target(path: Path, retry_errors: bool) -> tuple[IO[bytes], set[str | int]]:
    """The output, locked and ready for another line, and the ids that it has answers to.

    A half-written last line is cut off; with `retry_errors` lines with an error are taken out.
    Raises BatchError for any other line that is no answer: it is not ours to overwrite.
    """
    file = _lock(path.open("a+b"), path)
    try:
        finished, errors = _repair(file, path, retry_errors)
        return (_without_errors(file, path) if errors else file), finished
    except BatchError:
        file.close()
        raise


def _repair(file: IO[bytes], path: Path, retry_errors: bool) -> tuple[set[str | int], bool]:
    """The ids to skip, and whether there are lines to take out."""
    file.seek(0)
    finished: set[str | int] = set()
    errors = False
    end, last = 0, b"\n"  # bytes of whole lines; the last of them
    for number, line in enumerate(file, 1):
        answer = _parse_answer(line)
        if answer is None and line.endswith(b"\n"):
            raise BatchError(f"{path}: line {number} is not an answer of gllm batch")
        if answer is None:
            break
        end, last = end + len(line), line
        if retry_errors and "error" in answer:
            errors = True
        else:
            finished.add(answer["id"])
    file.truncate(end)
    if not last.endswith(b"\n"):
        file.write(b"\n")
        file.flush()
    return finished, errors


def _without_errors(file: IO[bytes], path: Path) -> IO[bytes]:
    """Replace the output in one step by one that has only the answers; the new one is locked."""
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
        answer = json.loads(raw)
    except ValueError:
        return None
    whole = (
        isinstance(answer, dict)
        and isinstance(answer.get("id"), str | int)
        and not {"error", "text", "outputs"}.isdisjoint(answer)
    )
    return answer if whole else None


def _record(file: IO[bytes], tally: Tally, id: str | int, answer: Chunk | Failed) -> None:
    if isinstance(answer, Failed):
        tally.failed += 1
        line: dict[str, Any] = {"id": id, "error": answer.message}
    else:
        tally.answered += 1
        line = {"id": id} | to_line(answer)
    file.write(json.dumps(line).encode("ascii") + b"\n")
    file.flush()


def to_line(answer: Chunk) -> dict[str, Any]:
    """An output line without its id; with n > 1 the answers are listed under "outputs"."""
    outputs = [
        {"text": o.text, "finish_reason": o.finish_reason, "num_output_tokens": o.num_tokens}
        for o in answer.outputs
    ]
    first = outputs[0] if len(outputs) == 1 else {"outputs": outputs}
    return first | {"num_input_tokens": answer.num_input_tokens}


def _lock(file: IO[bytes], path: Path) -> IO[bytes]:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise BatchError(f"{path}: another gllm batch is writing to it") from None
    return file
