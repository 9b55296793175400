"""Grammars that end or block the process that compiles them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from byte_vocabulary import VOCABULARY

from gllm_engine.os_process import wait_end
from gllm_engine.sampling import StructuredOutputs
from gllm_engine.text.grammar import GrammarError
from gllm_engine.text.grammar_trial import Compiler, Trial

HARMLESS = StructuredOutputs(choice=("yes", "no"))
# llguidance's compiler recurses into each of these rules.
CHAIN = "start: r0\n" + "\n".join(f'r{i}: r{i + 1} | "a"' for i in range(20_000)) + '\nr20000: "b"'
# It makes an automaton of a million states for these.
MULTIPLES = json.dumps({"type": "integer", "multipleOf": 999_983})


@pytest.fixture
def trial():
    made = Trial(VOCABULARY)
    yield made
    made.close()


def test_a_grammar_that_ends_its_process_harms_nobody(trial):
    with pytest.raises(GrammarError, match="too complex .it is nested too deeply, or needs more"):
        trial.run(StructuredOutputs(grammar=CHAIN))
    assert "no_forcing" in trial.run(HARMLESS)


def test_a_grammar_that_takes_too_long_is_given_up(trial):
    trial.run(HARMLESS)
    trial._max_compile_s = 0.2
    with pytest.raises(GrammarError, match="too complex .it takes more than 0.2 s to compile"):
        trial.run(StructuredOutputs(json=MULTIPLES))
    trial._max_compile_s = 60.0
    assert "no_forcing" in trial.run(HARMLESS)


def test_problems_are_told_and_the_process_stays(trial):
    trial.run(HARMLESS)
    first = trial._child
    for asked, sentence in (
        (StructuredOutputs(regex="(("), "not usable"),
        (StructuredOutputs(grammar="root ::= x"), "GBNF grammar is not usable .rule root uses x"),
        (StructuredOutputs(grammar='root ::= "a"' + "*" * 100_000), "nested too deeply"),
        (StructuredOutputs(json="[" * 100_000), "json is not JSON"),
        (StructuredOutputs(grammar="root ::= root"), "allows no text at all"),
    ):
        with pytest.raises(GrammarError, match=sentence):
            trial.run(asked)
    trial.run(HARMLESS)
    assert trial._child is first


def test_a_mistake_of_ours_is_not_called_the_grammars(trial):
    trial.run(HARMLESS)
    with pytest.raises(RuntimeError, match="the process that compiles grammars ended"):
        trial.run(StructuredOutputs())  # SamplingParams lets none such through
    assert "no_forcing" in trial.run(HARMLESS)


def test_a_compiler_gives_what_the_trial_allowed():
    compiler = Compiler(VOCABULARY)
    try:
        assert compiler.compile(HARMLESS).compute_bitmask()
        with pytest.raises(GrammarError, match="not usable"):
            compiler.compile(StructuredOutputs(regex="(("))
    finally:
        compiler.close()


def test_a_trial_under_way_can_be_stopped(trial):
    trial.run(HARMLESS)
    with ThreadPoolExecutor(1) as thread:
        under_way = thread.submit(trial.run, StructuredOutputs(json=MULTIPLES))
        trial.stop()  # before it has begun, or on the way
        with pytest.raises(RuntimeError, match="the process that compiles grammars ended"):
            under_way.result(60)


def test_the_process_ends_with_its_owner():
    script = (
        "from test_grammar_trial import *\n"
        "trial = Trial(VOCABULARY); trial.run(HARMLESS)\n"
        "print(trial._child.pid, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as owner:
        pidfd = os.pidfd_open(int(owner.stdout.readline()))
        owner.send_signal(signal.SIGKILL)
        assert wait_end(pidfd, 60)
        os.close(pidfd)
