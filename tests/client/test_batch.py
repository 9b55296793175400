"""`gllm batch`: its files, and that a batch broken off anywhere can be continued."""

from __future__ import annotations

import contextlib
import fcntl
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_client.batch import BatchError, Failed, Item, parse_line, run_batch, to_line
from gllm_client.protocol import Chunk, Output


class Stop(Exception):
    """The machine is switched off."""


class Answers:
    """Echoes prompts; "fail" fails; stops dead after `limit` answers."""

    def __init__(self, limit: int = 1 << 30) -> None:
        self.limit, self.asked = limit, Counter[str | int]()

    def __call__(self, items: Iterable[Item]) -> Iterator[tuple[Item, Chunk | Failed]]:
        for item in items:
            if self.asked.total() == self.limit:
                raise Stop
            self.asked[item.id] += 1
            if item.prompt == "fail":
                yield item, Failed("it failed")
            else:
                yield item, Chunk((Output(f"é {item.prompt}", "stop", num_tokens=2),), 5)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return path


def test_each_line_gets_its_answer(tmp_path: Path) -> None:
    source = write(
        tmp_path / "in",
        {"prompt": "a"},
        "",
        {"id": "x", "messages": [{"role": "user", "content": "b"}]},
        {"id": 9, "prompt": "fail"},
        "not json",
        {"id": "u", "promt": "typo"},
    )
    tally = run_batch(source, tmp_path / "deep/out", Answers())
    found = {line["id"]: line for line in lines_of(tmp_path / "deep/out")}
    assert found[1] == {
        "id": 1,
        "text": "é a",
        "finish_reason": "stop",
        "num_input_tokens": 5,
        "num_output_tokens": 2,
    }
    assert "'content': 'b'" in found["x"]["text"]
    assert found[9] == {"id": 9, "error": "it failed"}
    assert found[5]["error"].startswith("line 5: not valid JSON")
    assert found["u"]["error"].startswith("promt: unknown key; known are id, prompt")
    assert (tally.total, tally.answered, tally.failed, tally.skipped) == (5, 2, 3, 0)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("[1]", "line 4: a JSON object is expected"),
        ('{"id": 1.5, "prompt": "a"}', "id: 1.5 is not a string or a whole number"),
        ('{"id": true, "prompt": "a"}', "id: true is not"),
        ('{"id": "a"}', "exactly one of prompt and messages"),
        ('{"prompt": "a", "messages": []}', "exactly one of prompt and messages"),
        ('{"prompt": 3}', "a string is expected"),
        ('{"messages": "x"}', "a string is expected (or messages: a list)"),
        ('{"messages": [], "tools": {}}', "tools: a list is expected"),
        ('{"messages": [], "chat_template_kwargs": 1}', "chat_template_kwargs: an object is expe"),
        ('{"prompt": "a", "tools": []}', "tools: it is for the chat template, so it goes with me"),
        ('{"prompt": "a", "sampling_parameters": "x"}', "sampling_parameters: a JSON object"),
        ("\xff\xfe", "line 4: not valid JSON"),
        ('{"id": null, "prompt": "a"}', "id: null is not a string or a whole number"),
        ('{"id": [1], "prompt": "a"}', "id: a list or an object is not"),
        ('{"prompt": "a", "prompt": "b"}', "line 4: key 'prompt' comes twice"),
        (f'{{"prompt": "a", "{"k" * 900}": 1}}', f"{'k' * 57}...: unknown key"),
        ("[" * 100_000, "line 4: nested too deeply"),
        (f'{{"id": {"9" * 5000}}}', "line 4: not valid JSON (Exceeds the limit"),
    ],
)
def test_a_bad_line_says_what_is_wrong(line: str, problem: str) -> None:
    _, item = parse_line(4, line.encode("latin-1"))
    assert isinstance(item, Failed) and problem in item.message


def test_what_is_for_the_chat_template_reaches_the_item() -> None:
    line = {"messages": [{"role": "user"}], "tools": [1], "chat_template_kwargs": None}
    _, item = parse_line(4, json.dumps(line).encode())
    assert item == Item(4, [{"role": "user"}], {}, {"tools": [1]})


def test_sampling_parameters_reach_the_item() -> None:
    id, item = parse_line(4, b'{"prompt": "a", "sampling_parameters": {"seed": 1}}')
    assert (id, item) == (4, Item(4, "a", {"seed": 1}))


def test_several_answers_are_listed() -> None:
    line = to_line(Chunk((Output("a", "stop", num_tokens=1), Output("b", "length")), 3))
    assert [o["text"] for o in line["outputs"]] == ["a", "b"]
    assert line["num_input_tokens"] == 3 and "text" not in line


def test_lines_with_no_id_of_their_own_cost_no_other_its_answer(tmp_path: Path) -> None:
    """The number of a bad line may be another's id; an id may come twice; a run may end between."""
    source = write(
        tmp_path / "in",
        *({"id": 2, "prompt": "a"}, "not JSON", {"id": 3, "prompt": "b"}, "[]"),
        *({"id": "x", "prompt": "c"}, {"id": "x", "prompt": "d"}, {"id": 4, "prompt": "e"}),
    )
    target = tmp_path / "out"
    with pytest.raises(Stop):
        run_batch(source, target, Answers(limit=2))
    assert run_batch(source, target, Answers()).answered == 2
    found = lines_of(target)
    assert {line["id"]: line["text"] for line in found if "text" in line} == {
        2: "é a",
        3: "é b",
        "x": "é c",
        4: "é e",
    }
    errors = {line["line"]: line for line in found if "error" in line}
    assert errors.keys() == {2, 4, 6} and all(line["id"] == n for n, line in errors.items())
    assert errors[6]["error"] == "id: 'x' is the id of line 5 already"
    again = Answers()
    assert run_batch(source, target, again).skipped == len(found) == 7 and not again.asked
    write(source, *[""] * 5, {"prompt": "mended"})  # line 6: its number is its id now
    run_batch(source, target, again)
    assert lines_of(target)[-1]["text"] == "é mended"


def test_what_was_asked_for_is_written() -> None:
    top = {7: {"logprob": -0.5, "rank": 1}, 8: {"logprob": float("-inf"), "rank": 9}}
    output = Output("a", "stop", logprobs=[top], cumulative_logprob=-0.5, num_tokens=1)
    line = to_line(Chunk((output,), 3, prompt_logprobs=[None, top]))
    written = json.loads(json.dumps(line, allow_nan=False))
    entry = {"7": {"logprob": -0.5, "rank": 1}, "8": {"logprob": -9999.0, "rank": 9}}
    assert written["logprobs"] == [entry] and written["cumulative_logprob"] == -0.5
    assert written["prompt_logprobs"] == [None, entry]
    several = to_line(Chunk((output, output), 3, prompt_logprobs=[None]))
    assert [len(o["logprobs"]) for o in several["outputs"]] == [1, 1]
    assert several["prompt_logprobs"] == [None]
    plain = to_line(Chunk((Output("a", "stop", num_tokens=1),), 3))
    assert plain.keys() == {"text", "finish_reason", "num_output_tokens", "num_input_tokens"}


def test_1_and_the_text_1_are_different_ids(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"id": 1, "prompt": "a"}, {"id": "1", "prompt": "b"})
    run_batch(source, tmp_path / "out", Answers(limit=2))
    assert [line["id"] for line in lines_of(tmp_path / "out")] == [1, "1"]


@given(st.data())
def test_a_batch_broken_off_anywhere_is_continued(data: st.DataObject) -> None:
    """Stop after any number of answers, lose any tail of the last write, run again; repeat."""
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory) / "in", Path(directory) / "out"
        size = data.draw(st.integers(0, 6))
        prompts = [data.draw(st.sampled_from(["a", "fail", "é\n"])) for _ in range(size)]
        write(source, *({"id": f"i{k}", "prompt": p} for k, p in enumerate(prompts)))
        kept: list[dict] = []
        for _ in range(data.draw(st.integers(0, 3))):
            answers = Answers(data.draw(st.integers(0, size)))
            with contextlib.suppress(Stop):
                run_batch(source, target, answers)
            assert not answers.asked.keys() & {line["id"] for line in kept}
            *whole, last = target.read_bytes().splitlines(keepends=True) or [b""]
            target.write_bytes(b"".join(whole) + last[: data.draw(st.integers(0, len(last)))])
            kept = [json.loads(line) for line in whole]
        tally = run_batch(source, target, Answers())
        found = lines_of(target)
        assert sorted(line["id"] for line in found) == sorted(f"i{k}" for k in range(size))
        for line in found:
            prompt = prompts[int(line["id"][1:])]
            assert line.get("text") == (None if prompt == "fail" else f"é {prompt}")
        assert tally.answered + tally.failed + tally.skipped == tally.total == size
        before = target.read_bytes()
        again = Answers()
        run_batch(source, target, again)
        assert target.read_bytes() == before and not again.asked


def test_errors_are_kept_unless_they_are_to_be_tried_again(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"id": 1, "prompt": "a"}, {"id": 2, "prompt": "b"})
    target = write(tmp_path / "out", {"id": 2, "error": "busy"}, {"id": 1, "text": "kept"})
    answers = Answers()
    run_batch(source, target, answers)
    assert not answers.asked
    tally = run_batch(source, target, answers, retry_errors=True)
    assert answers.asked == {2: 1} and (tally.answered, tally.skipped) == (1, 1)
    assert [(line["id"], line["text"]) for line in lines_of(target)] == [(1, "kept"), (2, "é b")]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in", "out"]


def test_a_file_that_is_something_else_is_not_touched(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"id": 1, "prompt": "a"})
    target = write(tmp_path / "out", {"id": 7, "text": "x"}, "my diary", {"id": 8, "text": "x"})
    before = target.read_bytes()
    with pytest.raises(BatchError, match="line 2 is not an answer"):
        run_batch(source, target, Answers())
    assert target.read_bytes() == before


def test_two_batches_cannot_write_to_one_file(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"id": 1, "prompt": "a"})
    with (tmp_path / "out").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BatchError, match="another gllm batch"):
            run_batch(source, tmp_path / "out", Answers())


def test_progress_is_told_after_each_answer(tmp_path: Path) -> None:
    source = write(tmp_path / "in", *({"prompt": "a"} for _ in range(3)))
    seen: list[int] = []
    run_batch(source, tmp_path / "out", Answers(), on_progress=lambda t: seen.append(t.answered))
    assert seen == [0, 1, 2, 3]


def test_a_byte_order_mark_is_no_part_of_the_first_line() -> None:
    for line in ({"prompt": "a"}, {"custom_id": "a", "method": "POST", "url": "/v1/completions"}):
        raw = b"\xef\xbb\xbf" + json.dumps(line | {"body": {}} if len(line) > 1 else line).encode()
        _, item = parse_line(1, raw)
        assert not isinstance(item, Failed)
