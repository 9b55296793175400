"""`gllm chat`: a conversation at the terminal.

Owns the history and the handling of keys. The caller passes the source of answers, the input and
the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gllm_client.protocol import Chunk, GenerateError

Message = dict[str, str]
# Takes a conversation, yields the chunks of the next message. Closing the iterator cancels it.
Answer = Callable[[list[Message]], Iterator[Chunk]]

HINT = "Ctrl-C stops an answer, /clear forgets the conversation, Ctrl-D leaves."


class Chat:
    """A conversation. `refusals`: errors that fail one question but not the conversation."""

    def __init__(
        self,
        answer: Answer,
        system: str | None = None,
        refusals: tuple[type[Exception], ...] = (GenerateError,),
        write: Callable[[str], None] = lambda text: print(text, end="", flush=True),
    ) -> None:
        self._answer = answer
        self._refusals = refusals
        self._write = write
        self._start: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._start)

    def run(self, read: Callable[[str], str]) -> None:
        """Read questions and write answers until the input ends."""
        self._write(f"{HINT}\n")
        while True:
            try:
                line = read("> ").strip()
            except KeyboardInterrupt:
                self._write(f"\n{HINT}\n")
                continue
            except EOFError:
                self._write("\n")
                return
            if line == "/clear":
                self.messages = list(self._start)
            elif line:
                self.ask(line)

    def ask(self, question: str) -> None:
        """Ask one question and write its answer as it arrives. The history keeps the text of a
        stopped answer, and drops a refused question."""
        self.messages.append({"role": "user", "content": question})
        text = ""
        chunks = self._answer(list(self.messages))
        try:
            for chunk in chunks:
                text += chunk.text
                self._write(chunk.text)
        except KeyboardInterrupt:
            self._write(" [stopped]")
        except self._refusals as error:
            self.messages.pop()
            self._write(f"[{error}]\n")
            return
        finally:
            chunks.close()  # type: ignore[attr-defined]  # a generator: this cancels
        self._write("\n")
        self.messages.append({"role": "assistant", "content": text})
