"""The program that renders chat templates in a process of its own, which may be killed safely.

A chat template is a program from a checkpoint, and its input comes from a user. It may loop or
allocate without bound, and Python cannot stop it from within. So it runs in a process with one
request at a time. The kernel kills this process at a limit of processor time and refuses it memory
above another limit. The process is a fork of a parent that has loaded all libraries and runs no
template, so that the parent can replace it at once.

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

from gllm_engine.os_process import end_with_parent
from gllm_engine.text.template_source import Template

MAX_PROBLEM_LEN = 300  # characters of a template's error message
KWARGS = "chat_template_kwargs"
_SWITCHES = ("add_generation_prompt", "continue_final_message")  # always accepted as kwargs
_RESERVED = ("messages", "tools")  # fields of the request, refused as kwargs
# Names of the reasoning text before an answer, in templates and clients.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Marks the end of a message that the model continues, while the template renders.
_MARK = "\ue000continue here\ue001"

Message = dict[str, Any]


class Unusable(ValueError):
    """The request cannot be rendered. `field`: the field of the request that is invalid."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field


class Renderer:
    """Renders with the templates of one checkpoint, by name, and its special tokens' texts."""

    def __init__(
        self, templates: dict[str, str], special_tokens: dict[str, str], memory_limit: int
    ) -> None:
        """`memory_limit`: in bytes, for the message of a MemoryError."""
        self._templates = {name: Template(source) for name, source in templates.items()}
        self._special_tokens = special_tokens
        self._memory_limit = memory_limit

    def answer(self, line: bytes) -> dict[str, Any]:
        """The reply to one request. Never raises."""
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
        except Exception as error:  # a template may raise any error about the messages
            return _refusal(f"the chat template refused them ({error!s:.{MAX_PROBLEM_LEN}})")
        return {"text": text} if len(text) <= request["max_chars"] else {"num_chars": len(text)}

    def render(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, kwargs: dict[str, Any]
    ) -> str:
        """The text of a conversation. Raises Unusable, and any error of the template."""
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
        """The template for a request. Some checkpoints have an extra template for tools."""
        template = self._templates.get("tool_use") if tools else None
        template = template or self._templates.get("default")
        if template is None:
            have = ", ".join(self._templates)
            raise Unusable("messages", f"this model has no default chat template, only {have}")
        if tools and "tools" not in template.names:
            raise Unusable("tools", "this model's chat template takes no tools")
        return template

    def _check_kwargs(self, template: Template, kwargs: dict[str, Any]) -> None:
        """Refuse a variable that the template never reads: it would be silently ignored."""
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
    """The message with its reasoning under every name that templates use, as in transformers."""
    found = [message[key] for key in _REASONING if key in message]
    if not found:
        return message
    return {"thinking": found[0]} | message | {"reasoning_content": found[0]}


def _marked(message: Message) -> Message:
    """The message with a mark and a blank after its text. Trimming templates drop the blank."""
    mark = f"{_MARK} "
    content = message.get("content")
    if isinstance(content, str):
        return message | {"content": content + mark}
    if not content:
        raise Unusable(KWARGS, "continue_final_message: the last message has no content")
    if "text" not in content[-1]:
        raise Unusable(KWARGS, "continue_final_message: the last message ends with an image")
    last = content[-1] | {"text": content[-1]["text"] + mark}
    return message | {"content": [*content[:-1], last]}


def _cut(text: str) -> str:
    """A rendered conversation up to the mark; trimmed if the template trims."""
    text, found, rest = text.rpartition(_MARK)
    if not found:
        problem = "continue_final_message: the chat template leaves the last message out"
        raise Unusable(KWARGS, problem)
    return text if rest.startswith(" ") else text.rstrip()


def _in_format(template: Template, message: Message) -> Message:
    """The message with content in the template's format: a string, or a list of parts."""
    content = message.get("content")
    if isinstance(content, list) and not template.takes_parts:
        return message | {"content": "\n".join(part["text"] for part in content)}
    if isinstance(content, list):  # the text of an image is only for templates of texts
        parts = [part if part["type"] == "text" else {"type": part["type"]} for part in content]
        return message | {"content": parts}
    if isinstance(content, str) and template.takes_parts and not template.tells_strings:
        return message | {"content": [{"type": "text", "text": content}]}
    return message


def limit_memory(limit: int) -> None:
    """Limit this process to `limit` more bytes; beyond, allocations raise MemoryError."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def serve(connection: socket.socket, renderer: Renderer, cpu_limit_s: float) -> None:
    """Answer requests until the other end is closed, or the kernel kills this process."""
    for line in connection.makefile("rb", buffering=1 << 20):
        signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)  # counts processor time
        reply = json.dumps(renderer.answer(line), ensure_ascii=False) + "\n"
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.sendall(reply.encode("utf-8", "surrogatepass"))  # json.loads decodes it


def read_setup(connection: socket.socket) -> bytes:
    """Read exactly the setup: the bytes after it are for the forked process."""
    size = connection.recv(8, socket.MSG_WAITALL)
    if not size:  # the other end was closed before it sent the setup
        sys.exit(0)
    return connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)


def main() -> None:
    """Fork a process that serves, and fork again when the kernel kills it for its time limit."""
    end_with_parent()
    # Reset inherited signal handling: SIGPROF from the timer must kill the process, and Ctrl-C at
    # the terminal must not.
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
            end_with_parent()
            limit_memory(memory_limit)
            serve(connection, renderer, cpu_limit_s)
            os._exit(0)
        _, status = os.wait()
        # The timer runs only after a request is read and before its reply is written. So after
        # SIGPROF the whole reply is still due, and this process can send it.
        if os.waitstatus_to_exitcode(status) != -signal.SIGPROF:
            sys.exit(os.waitstatus_to_exitcode(status))
        connection.sendall(overdue.encode() + b"\n")


if __name__ == "__main__":
    main()
