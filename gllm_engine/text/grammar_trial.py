"""Compiles every grammar first in a trial process, which may take too long, grow, or crash.

Owns the trial process and its messages. llguidance's compiler cannot be interrupted, and recurses
without a limit: a chain of 3,000 rules ends the process that compiles it.

    engine process                         trial process
    vocabulary           -- pipe -->       makes a tokenizer, then limits its memory
    structured_outputs   -- pipe -->       translates and compiles the grammar
    compiles it too      <-- pipe --       Translated(grammar), or Rejected(problem)
"""

from __future__ import annotations

import contextlib
import os
import resource
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

import msgspec
from llguidance import LLMatcher

from gllm_engine.os_process import Process, end_with
from gllm_engine.sampling import StructuredOutputs
from gllm_engine.text.grammar import (
    GrammarError,
    Vocabulary,
    compile_grammar,
    ll_tokenizer,
    translate,
)

MAX_COMPILE_S = 10.0  # of the wall clock
MAX_START_S = 60.0
_TRIES = 2  # a new process, in case the memory of earlier grammars caused the first failure
_LENGTH = struct.Struct("!I")
# Bytes that trials may need on top of the vocabulary. Compiled grammars are kept.
MAX_MEMORY = 256 * 2**20
# Stack bytes of the compiling thread: a quarter of an engine thread's stack, so a grammar that
# passes the trial cannot overflow the engine's stack.
STACK = 2 * 2**20


class Translated(msgspec.Struct, frozen=True, tag="grammar"):
    """A grammar that has passed the trial, for compile_grammar."""

    grammar: str


class Rejected(msgspec.Struct, frozen=True, tag="rejected"):
    """A grammar that is not usable, and the reason."""

    problem: str


class Trial:
    """The trial process, started by the first run() and again after its death."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._max_compile_s = MAX_COMPILE_S
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def run(self, asked: StructuredOutputs) -> str:
        """Translate and compile in the trial process; returns the translated grammar.

        Raises GrammarError, or RuntimeError for a failure that the grammar did not cause.
        """
        for _ in range(_TRIES):
            try:
                child = self._child or self._start()
                frame = _exchange(child, msgspec.msgpack.encode(asked), self._max_compile_s)
            except TimeoutError:
                self.close()
                took = f"it takes more than {self._max_compile_s:g} s to compile"
                raise GrammarError(f"the grammar is too complex ({took})") from None
            except _Died:
                if self.close() >= 0 or self._stopped:  # no signal ended it: a bug of ours
                    raise
                continue
            answer = msgspec.msgpack.decode(frame, type=Translated | Rejected)
            if isinstance(answer, Rejected):
                raise GrammarError(answer.problem)
            return answer.grammar
        raise GrammarError(
            "the grammar is too complex (it is nested too deeply, or needs more than "
            f"{MAX_MEMORY >> 20} MiB to compile)"
        )

    def stop(self) -> None:
        """Make the running trial and all later ones fail. Any thread."""
        self._stopped = True
        if (child := self._child) is not None:
            child.kill()

    def close(self) -> int:
        """End the trial process; a later run() starts a new one. Returns the exit status, or 0."""
        child = self._child
        self._child = None
        if child is None:
            return 0
        with contextlib.suppress(BrokenPipeError), child:  # closes the pipes, waits for the end
            pass
        return child.returncode

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "gllm_engine.text.grammar_trial", str(os.getpid())]
        # A new session: the engine alone handles Ctrl-C at the terminal.
        child = self._child = subprocess.Popen(
            command, start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            _exchange(child, msgspec.msgpack.encode(self._vocabulary), MAX_START_S)
        except TimeoutError:
            raise RuntimeError("the process that compiles grammars does not start") from None
        return child


class Compiler(Trial):
    """Compiles grammars for a vocabulary: first in the trial process, then in this process."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self._tokenizer = ll_tokenizer(vocabulary)

    def compile(self, asked: StructuredOutputs) -> LLMatcher:
        """A matcher at the start of the grammar. Raises the errors of Trial.run."""
        return compile_grammar(self._tokenizer, self.run(asked))


class _Died(RuntimeError):
    """The process has ended before it answered."""


def _exchange(child: subprocess.Popen[bytes], message: bytes, max_s: float) -> bytes:
    """Send a message and wait for the answer, at most `max_s` seconds.

    Raises _Died if the process ended, TimeoutError if it was killed for being late.
    """
    assert child.stdin is not None and child.stdout is not None
    late = threading.Event()

    def end() -> None:
        late.set()
        child.kill()

    timer = threading.Timer(max_s, end)
    timer.start()
    try:
        _write(child.stdin, message)
        return _read(child.stdout)
    except (OSError, EOFError):
        if late.is_set():
            raise TimeoutError from None
        raise _Died("the process that compiles grammars ended") from None
    finally:
        timer.cancel()


def _write(pipe: IO[bytes], message: bytes) -> None:
    pipe.write(_LENGTH.pack(len(message)) + message)
    pipe.flush()


def _read(pipe: IO[bytes]) -> bytes:
    """Read one message. Raises EOFError at the end of the pipe."""
    length = pipe.read(_LENGTH.size)
    if len(length) < _LENGTH.size:
        raise EOFError
    message = pipe.read(*_LENGTH.unpack(length))
    if len(message) < _LENGTH.unpack(length)[0]:
        raise EOFError
    return message


def main() -> None:
    """The trial process: answers the first message, a vocabulary, and then one for each grammar."""
    end_with(Process.of(int(sys.argv[1])))
    # Output that a library prints must not mix with the answers on stdout.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    threading.stack_size(STACK)
    thread = threading.Thread(target=_serve, args=(sys.stdin.buffer, answers))
    thread.start()
    thread.join()


def _serve(messages: IO[bytes], answers: IO[bytes]) -> None:
    vocabulary = msgspec.msgpack.decode(_read(messages), type=Vocabulary)
    tokenizer = ll_tokenizer(vocabulary)
    _limit_memory()
    _write(answers, b"")
    while True:
        try:
            message = _read(messages)
        except EOFError:
            return
        asked = msgspec.msgpack.decode(message, type=StructuredOutputs)
        answer: Translated | Rejected
        try:
            grammar = translate(asked, vocabulary)
            compile_grammar(tokenizer, grammar)
            answer = Translated(grammar)
        except GrammarError as error:
            answer = Rejected(str(error))
        except MemoryError:
            answer = Rejected("the grammar needs too much memory to compile")
        _write(answers, msgspec.msgpack.encode(answer))


def _limit_memory() -> None:
    status = Path("/proc/self/status").read_text()
    kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData:"))
    limit = kib * 1024 + MAX_MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    main()
