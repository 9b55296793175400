"""The program that renders chat templates: processes of their own, which may come to any end.

A template is a program from a checkpoint and its input comes from a user. It may loop or grow
without bound, and no part of Python can stop that from within. So it runs in a process that the
kernel ends at a limit of processor time and refuses memory at another, and nobody else's request
is in there. To have a successor at once, that process is a fork of one that has all libraries
loaded and runs no template itself.

    chat_template.py --- socket ---+--- this program: reads the setup, forks, waits
                                   +--- its fork: a line with a request in, a line with a reply out

    setup    templates, special_tokens and limits, as JSON after its length in 8 bytes; once
    request  messages, tools, chat_template_kwargs, max_chars
    reply    text, or field and problem, or num_chars
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
from typing import Any

from gllm_engine.text.template_source import Template

MAX_PROBLEM_LEN = 300  # characters of what a template complains of
KWARGS = "chat_template_kwargs"
_SWITCHES = ("add_generation_prompt", "continue_final_message")  # beside a template's variables
_RESERVED = ("messages", "tools")  # have a place of their own in a request
# Names under which templates and clients know what was thought before an answer.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Stands after the text of a message that is to be continued, while it is rendered.
_MARK = "\ue000continue here\ue001"

Message = dict[str, Any]


class Unusable(ValueError):
    """The request cannot be rendered. `field`: the part of it that is to blame."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field


class Renderer:
    """The templates of one checkpoint, by name, and the texts of its special tokens."""

    def __init__(
        self, templates: dict[str, str], special_tokens: dict[str, str], memory_limit: int
    ) -> None:
        """`memory_limit`: bytes, for what is said of a MemoryError."""
        self._templates = {name: Template(source) for name, source in templates.items()}
        self._special_tokens = special_tokens
        self._memory_limit = memory_limit

    def answer(self, line: bytes) -> dict[str, Any]:
        """The reply to one request; never raises."""
        try:
            request = json.loads(line)
            text = self.render(
                request["messages"], request["tools"], request["chat_template_kwargs"]
            )
        except Unusable as error:
            return {"field": error.field, "problem": str(error)}
        except MemoryError:
            limit = f"{self._memory_limit >> 20} MiB of memory"
            return _refusal(f"the chat template takes more than {limit} for them")
        except Exception as error:  # the template is a program; what it raises is about them
            return _refusal(f"the chat template refused them ({error!s:.{MAX_PROBLEM_LEN}})")
        return {"text": text} if len(text) <= request["max_chars"] else {"num_chars": len(text)}

    def render(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, kwargs: dict[str, Any]
    ) -> str:
        """The text of a conversation. Raises Unusable, and whatever the template raises."""
        template = self._choose(tools)
        self._check_kwargs(template, kwargs)
        messages = [_in_format(template, _with_reasoning(message)) for message in messages]
        continued = kwargs.get("continue_final_message", False)
        given = {"add_generation_prompt": not continued} | kwargs
        variables = self._special_tokens | given | {"messages": messages, "tools": tools}
        if not continued:
            return template.render(variables)
        if given["add_generation_prompt"]:
            problem = "continue_final_message and add_generation_prompt exclude each other"
            raise Unusable(KWARGS, problem)
        variables["messages"] = [*messages[:-1], _marked(messages[-1])]
        return _cut(template.render(variables))

    def _choose(self, tools: list[dict[str, Any]] | None) -> Template:
        """Some checkpoints have a template of its own for requests with tools."""
        template = self._templates.get("tool_use") if tools else None
        template = template or self._templates.get("default")
        if template is None:
            have = ", ".join(self._templates)
            raise Unusable("messages", f"this model has no default chat template, only {have}")
        if tools and "tools" not in template.names:
            raise Unusable("tools", "this model's chat template takes no tools")
        return template

    def _check_kwargs(self, template: Template, kwargs: dict[str, Any]) -> None:
        """A variable that the template never reads would be ignored in silence."""
        for key, value in kwargs.items():
            if key in _SWITCHES:
                if not isinstance(value, bool):
                    shown = f"{value!r:.40}"
                    raise Unusable(KWARGS, f"{key} is {shown}, but true or false is expected")
            elif key in _RESERVED:
                raise Unusable(KWARGS, f"{key} cannot be given here")
            elif key not in template.names:
                own = template.variables - self._special_tokens.keys() - {*_SWITCHES, *_RESERVED}
                known = [*_SWITCHES, *sorted(own)]
                problem = f"{key!r:.40} means nothing to this model's chat template"
                raise Unusable(KWARGS, f"{problem}; it knows {', '.join(known)}")


def _refusal(problem: str) -> dict[str, Any]:
    return {"field": "messages", "problem": problem}


def _with_reasoning(message: Message) -> Message:
    """A message whose reasoning has all names that templates know it by, as in transformers."""
    found = [message[key] for key in _REASONING if key in message]
    if not found:
        return message
    return {"thinking": found[0]} | message | {"reasoning_content": found[0]}


def _marked(message: Message) -> Message:
    """A message with a mark after its text. A blank follows, to see whether a template trims."""
    mark = f"{_MARK} "
    content = message.get("content")
    if isinstance(content, str):
        return message | {"content": content + mark}
    if not content:
        raise Unusable(KWARGS, "continue_final_message: the last message has no content")
    last = content[-1] | {"text": content[-1]["text"] + mark}
    return message | {"content": [*content[:-1], last]}


def _cut(text: str) -> str:
    """A rendered conversation up to the mark."""
    text, found, rest = text.rpartition(_MARK)
    if not found:
        problem = "continue_final_message: the chat template leaves the last message out"
        raise Unusable(KWARGS, problem)
    return text if rest.startswith(" ") else text.rstrip()


def _in_format(template: Template, message: Message) -> Message:
    """A message with its content as the template expects it: a string, or a list of parts."""
    content = message.get("content")
    if isinstance(content, list) and not template.takes_parts:
        return message | {"content": "\n".join(part["text"] for part in content)}
    if isinstance(content, str) and template.takes_parts and not template.tells_strings:
        return message | {"content": [{"type": "text", "text": content}]}
    return message


def limit_memory(limit: int) -> None:
    """From now on this process gets `limit` bytes more, and a MemoryError beyond."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def serve(connection: socket.socket, renderer: Renderer, cpu_limit_s: float) -> None:
    """Answer requests until the other end is closed, or the kernel ends this process."""
    for line in connection.makefile("rb", buffering=1 << 20):
        signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)  # counts processor time
        reply = json.dumps(renderer.answer(line), ensure_ascii=False) + "\n"
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.sendall(reply.encode("utf-8", "surrogatepass"))  # which json.loads takes


def read_setup(connection: socket.socket) -> bytes:
    """Not a byte more: what follows is for the process that serves."""
    size = connection.recv(8, socket.MSG_WAITALL)
    if not size:  # never used
        sys.exit(0)
    return connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)


def main() -> None:
    """Fork a process that serves; another one when that has met its limit of processor time."""
    # Whatever the parent does with signals: here the timer's ends a process, and Ctrl-C at a
    # terminal is not for it.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    connection = socket.socket(fileno=0)
    setup = json.loads(read_setup(connection))
    cpu_limit_s = setup.pop("cpu_limit_s")
    memory_limit = setup["memory_limit"]
    renderer = Renderer(**setup)
    limit = f"{cpu_limit_s:g} s of processor time"
    overdue = json.dumps(_refusal(f"the chat template takes more than {limit} for them"))
    while True:
        if os.fork() == 0:
            limit_memory(memory_limit)
            serve(connection, renderer, cpu_limit_s)
            os._exit(0)
        _, status = os.wait()
        # The timer runs when a request has been read and none of its reply is written: only then
        # is it clear what comes next in the socket.
        if os.waitstatus_to_exitcode(status) != -signal.SIGPROF:
            sys.exit(os.waitstatus_to_exitcode(status))
        connection.sendall(overdue.encode() + b"\n")


if __name__ == "__main__":
    main()
