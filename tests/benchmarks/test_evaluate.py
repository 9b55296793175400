"""Evaluations: RULER's samples and scores, perplexity in several ways, and others' harnesses."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_openai import MODEL, FakeOpenAI, told
from transformers import AutoModelForCausalLM, AutoTokenizer

from gllm_benchmarks import evaluate
from gllm_benchmarks.evaluate import harness, perplexity
from gllm_benchmarks.evaluate.ruler import CHAIN_LEN, NUM_NEEDLES, TASKS, Sample, make_sample, score
from gllm_benchmarks.report import PAGES, render
from gllm_engine import LLM

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "model_repository/shakespeare/1"
TRAINING = json.loads((SHIPPED / "training.json").read_text())
# Both compute in float32 on a CPU, in different orders; some 3e-6 for one token were seen.
TOLERANCE = 1e-4  # nats a token


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> dict[str, Any]:
    """The figures that `scripts/bench evaluate` records."""
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    evaluate.main()
    line: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    name = line["benchmark"]
    assert name.startswith(f"evaluate-{arguments[0]}-")
    told = render(PAGES["docs/benchmarks.md"], {name: line})
    assert told.startswith("## How well models answer") and all(
        key in told for key in line["figures"]
    )
    figures: dict[str, Any] = line["figures"]
    return figures


# ---------------------------------------------------------------- RULER


@pytest.mark.parametrize("task", TASKS)
def test_samples(task: str) -> None:
    sample = make_sample(task, 50, 3)
    assert sample == make_sample(task, 50, 3) != make_sample(task, 50, 4)
    expected = {"single": 1, "multikey": 1, "multivalue": NUM_NEEDLES, "tracking": CHAIN_LEN}
    assert len(sample.answers) == expected[task]
    introduction, text, question = sample.prompt.split("\n\n")
    needles = re.findall(r"A secret code of \S+ is \w+\.|The variable \w+ is set to [^.]*\.", text)
    assert len(re.findall(r"[^.]+\.", text)) == 50 + len(needles)
    told = {"single": 1, "multikey": NUM_NEEDLES, "multivalue": NUM_NEEDLES, "tracking": 10}
    assert len(needles) == told[task]
    assert not sample.answers & set(re.findall(r"\w+", question + introduction))
    assert solve(sample.prompt) == sample.answers


def solve(prompt: str) -> set[str]:
    """What a perfect reader answers."""
    _, text, question = prompt.split("\n\n")
    if key := re.search(r"secret codes of (\S+) in", question):
        return set(re.findall(rf"A secret code of {key[1]} is (\w+)\.", text))
    (value,) = re.findall(r"\d{5}", question)
    found: set[str] = set()
    for name, source in re.findall(r"The variable (\w+) is set to ([^.]*)\.", text):
        if source == value or source.rpartition(" ")[2] in found:  # sources come first
            found.add(name)
    return found


def test_needles_lie_everywhere() -> None:
    places = []
    for seed in range(40):
        _, text, _ = make_sample("single", 100, seed).prompt.split("\n\n")
        places.append(text.index("A secret code") / len(text))
    assert min(places) < 0.1 and max(places) > 0.9 and 0.35 < sum(places) / 40 < 0.65
    assert solve(make_sample("multivalue", 0, 1).prompt) == make_sample("multivalue", 0, 1).answers


def test_scores() -> None:
    sample = Sample("", {"ABCDE", "FGHIJ"})
    assert score(sample, "They are ABCDE and FGHIJ.") == {"exact": 1, "recall": 1}
    assert score(sample, "ABCDE") == {"exact": 0, "recall": 0.5}
    assert score(sample, "ABCDE, FGHIJ, KLMNO") == {"exact": 0, "recall": 1}
    assert score(sample, "ABCDEFGHIJ abcde") == score(sample, "") == {"exact": 0, "recall": 0}


def words(path: str, body: dict[str, Any]) -> tuple[int, list[bytes]]:
    """A server with a perfect reader, whose tokens are words and single marks."""
    (message,) = body["messages"]
    prompt = message["content"]
    assert path == "/v1/chat/completions" and body["temperature"] == 0
    tokens = len(re.findall(r"\w+|[^\w\s]", prompt))
    assert tokens + body["max_tokens"] <= 1000
    return told(
        choices=[{"message": {"content": " ".join(solve(prompt))}}], usage={"prompt_tokens": tokens}
    )


def test_a_perfect_reader_and_the_length(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeOpenAI(words) as server:
        flags = ("--url", server.url, "--model", MODEL, "--length", "1000", "--samples", "4")
        figures = run(monkeypatch, capsys, "ruler", *flags, "--max-tokens", "100")
        assert len(server.asked) == 4 * (2 + 4)
        with pytest.raises(SystemExit, match="--length: 300 tokens leave no room"):
            run(monkeypatch, capsys, "ruler", *flags[:4], "--length=300", "--max-tokens=299")
    assert list(figures) == list(TASKS)
    for about in figures.values():
        assert about["exact"] == about["recall"] == 1
        assert 800 < about["prompt_tokens"] <= 900


def test_a_reader_who_finds_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def silent(path: str, body: dict[str, Any]) -> tuple[int, list[bytes]]:
        length = len(body["messages"][0]["content"]) // 4
        return told(choices=[{"message": {"content": None}}], usage={"prompt_tokens": length})

    with FakeOpenAI(silent) as server:
        figures = run(
            monkeypatch, capsys, "ruler", "--url", server.url, "--model", MODEL, "--samples", "1"
        )
    assert all(about["exact"] == about["recall"] == 0 for about in figures.values())


# ---------------------------------------------------------------- perplexity


def by_transformers(texts: list[str]) -> perplexity.Scores:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    scores = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)
        scores.append(logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist())
    return scores


def test_the_engine_predicts_as_transformers_does() -> None:
    texts = perplexity.paragraphs()
    with LLM(model=str(SHIPPED)) as llm:
        scores = perplexity.by_engine(llm, texts)
        with pytest.raises(SystemExit, match="1024"):
            perplexity.by_engine(llm, [texts[0] * 9])
    known = by_transformers(texts)
    assert [len(each) for each in scores] == [len(each) for each in known]
    ours = perplexity.summarize(scores, texts)
    theirs = perplexity.summarize(known, texts)
    assert ours["tokens"] == theirs["tokens"] > 500
    assert ours["nats_per_token"] == pytest.approx(theirs["nats_per_token"], abs=TOLERANCE)
    for mine, other in zip(scores, known, strict=True):
        assert mine == pytest.approx(other, abs=1e-3)
    # The checkpoint is the one that was trained: verse costs it more than the plays, not much more.
    trained = TRAINING["held_out_nats_per_token"]
    assert trained < ours["nats_per_token"] < trained + 1
    assert ours["perplexity"] == pytest.approx(math.exp(ours["nats_per_token"]))


def test_perplexity_by_the_echo_of_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def echo(path: str, body: dict[str, Any]) -> tuple[int, list[bytes]]:
        assert path == "/v1/completions" and body["model"] == MODEL
        assert (body["echo"], body["logprobs"], body["max_tokens"]) == (True, 1, 1)
        scores = [None, *(-float(len(word)) for word in body["prompt"].split()[1:]), -99.0]
        return told(choices=[{"logprobs": {"token_logprobs": scores}}])

    text = tmp_path / "text"
    text.write_text("one two\nfour\n\n\n\nfive sixes\n")
    with FakeOpenAI(echo) as server:
        where = ("--url", server.url, "--model", MODEL, "--data", str(text))
        (about,) = run(monkeypatch, capsys, "perplexity", *where).values()
        text.write_text("\n\n")
        with pytest.raises(SystemExit, match="holds no paragraph"):
            run(monkeypatch, capsys, "perplexity", *where)
    assert about["tokens"] == 3 and about["nats_per_token"] == 4
    assert about["nats_per_character"] == pytest.approx(12 / 22, rel=1e-4)


# ---------------------------------------------------------------- the harnesses of others

# Notes how it was started, and leaves a result where the real one does.
PROGRAM = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
name = Path(sys.argv[0]).name
names = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "NLTK_DATA", "OPENAI_BASE_URL", "OPENAI_API_KEY")
about = {{"arguments": sys.argv[1:], "cwd": os.getcwd(), "env": [os.environ[n] for n in names]}}
with open(os.environ["NOTES"], "a") as notes:
    notes.write(json.dumps(about) + "\\n")
if name == "bfcl":
    score = Path(os.environ["BFCL_PROJECT_ROOT"], "score")
    score.mkdir(exist_ok=True)
    (score / "data_non_live.csv").write_text("Rank,Model,AST Summary\\n1,m,85.00%\\n")
else:
    out = Path(sys.argv[sys.argv.index("--output_path") + 1], "m")
    out.mkdir()
    result = {{"results": {{"gsm8k": {{"exact_match,strict-match": 0.5}}}}}}
    (out / "results_2026.json").write_text(json.dumps(result))
sys.exit(int(os.environ.get("STATUS", 0)))
"""
PROGRAMS = {"gsm8k": "lm_eval", "mmlu_pro": "lm_eval", "ifeval": "lm_eval"}
PROGRAMS |= {"mmmu": "lmms-eval", "bfcl": "bfcl"}


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where programs of the harnesses' names, the only ones on PATH, note their runs."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    (tmp_path / "bin").mkdir()
    for name in PROGRAMS.values():
        path = tmp_path / "bin" / name
        path.write_text(PROGRAM)
        path.chmod(0o755)
    for task in harness.TASKS.values():
        for part in task.data:
            (tmp_path / "data" / part).mkdir(parents=True, exist_ok=True)
    return tmp_path / "notes"


WHERE = ("--url", "http://localhost:9000", "--model", "org/m", "--concurrency", "4")


def test_lm_eval_runs_in_the_data(
    notes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = notes.with_name("data")
    key = notes.with_name("key")
    key.write_text("sk-1\n")
    flags = ("--data", str(data), "--api-key-file", str(key), "--harness-args=--limit 5")
    figures = run(monkeypatch, capsys, "gsm8k", *WHERE, *flags)
    assert figures == {"gsm8k": {"exact_match,strict-match": 0.5}}
    (about,) = map(json.loads, notes.read_text().splitlines())
    given = about["arguments"]
    pairs = dict(zip(given, given[1:], strict=False))
    assert pairs["--model"] == "local-chat-completions" and "--apply_chat_template" in given
    assert pairs["--tasks"] == "gsm8k" and pairs["--limit"] == "5"
    assert dict(each.split("=") for each in pairs["--model_args"].split(",")) == {
        "model": "org/m",
        "base_url": "http://localhost:9000/v1/chat/completions",
        "num_concurrent": "4",
        "timeout": "600",
    }
    url = "http://localhost:9000/v1"
    assert about["cwd"] == str(data)
    assert about["env"] == ["1", "1", str(data / "nltk_data"), url, "sk-1"]
    assert not any("sk-1" in each for each in given)


def test_bfcl_generates_and_then_scores(
    notes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = run(monkeypatch, capsys, "bfcl", *WHERE)
    assert figures == {"data_non_live": {"Rank": "1", "Model": "m", "AST Summary": "85.00%"}}
    first, second = map(json.loads, notes.read_text().splitlines())
    assert first["arguments"][0] == "generate" and "--skip-server-setup" in first["arguments"]
    assert second["arguments"] == [
        "evaluate", "--model", "org/m", "--test-category", "single_turn",
    ]  # fmt: skip


@pytest.mark.parametrize("task", harness.TASKS)
def test_what_is_missing_is_told(
    task: str, notes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = notes.with_name("data")
    for part in harness.TASKS[task].data:
        for flags in ((), ("--data", str(notes.parent))):
            with pytest.raises(SystemExit, match=f"{task}: --data must be .* holds {part}|holds "):
                run(monkeypatch, capsys, task, *WHERE, *flags)
    monkeypatch.setenv("STATUS", "3")
    with pytest.raises(SystemExit, match=f"{task}: {PROGRAMS[task]} .* failed: 3"):
        run(monkeypatch, capsys, task, *WHERE, "--data", str(data))
    notes.parent.joinpath("bin", PROGRAMS[task]).unlink()
    with pytest.raises(SystemExit, match=f"program {PROGRAMS[task]} is not installed; pip install"):
        run(monkeypatch, capsys, task, *WHERE, "--data", str(data))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("ruler --offline x", "--offline: ruler needs a server, --url"),
        ("ruler --url x", "--url: --model is needed too"),
        ("ruler --url x --model m --length 10", "outside"),
        ("arc --url x --model m", "invalid choice"),
    ],
)
def test_flags(
    flags: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", *flags.split()])
    with pytest.raises(SystemExit):
        evaluate.parse_arguments()
    assert sentence in capsys.readouterr().err


def test_a_server_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="the server fails: ClientConnectorError"):
        run(monkeypatch, capsys, "ruler", "--url", "http://127.0.0.1:9", "--model", MODEL)
