"""Renders a conversation to the model's prompt text: checks messages, runs the renderer process.

Owns the format of messages. The chat template itself runs in the process of template_renderer.py,
because a process can be stopped.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gllm_engine.sampling import InvalidField

Message = dict[str, Any]

# Processor time of the renderer for one conversation; most take a thousandth of this.
CPU_LIMIT_S = 2.0
MEMORY_LIMIT = 1 << 30  # bytes, on top of the renderer's libraries
# Seconds of the wall clock, in case the renderer gets no processor time at all.
PATIENCE_S = 60.0
BUFFER = 1 << 20  # bytes read at a time
MAX_CHARS = 1 << 26  # of a conversation, as JSON and as text


class ChatTemplate:
    """The chat template of a checkpoint. Threads may share it; a lock makes them take turns.

    The renderer process starts with the first conversation or start(). It ends with this object or
    this process.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """`templates`: Jinja sources by name: "default", and "tool_use" for requests with tools;
        kept as `sources`.

        `special_tokens`: token texts by their names in templates, such as bos_token.
        """
        self.sources = dict(templates)
        setup = {
            "templates": self.sources,
            "special_tokens": dict(special_tokens),
            "cpu_limit_s": CPU_LIMIT_S,
            "memory_limit": MEMORY_LIMIT,
        }
        self._setup = json.dumps(setup).encode()
        self._turn = threading.Lock()
        self._renderer: _Renderer | None = None

    def start(self) -> None:
        """Start the renderer process if none runs. Does not wait for it."""
        with self._turn:
            self._running()

    def warm_up(self) -> None:
        """Render a first message, so that no request waits for the start or the compilation."""
        with suppress(InvalidField):  # the template may require other roles
            self.render([{"role": "user", "content": "Hello"}])

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        max_chars: int = MAX_CHARS,
    ) -> str:
        """The text of a conversation, ready for the assistant's answer.

        `messages`: as OpenAI's clients send them. `tools`: functions that the model may call.
        `kwargs`: variables of the template, such as enable_thinking; and add_generation_prompt
        (default true) and continue_final_message (default false). Raises InvalidField, also for a
        text of more than `max_chars` characters and for a template that exceeds another limit.
        """
        max_chars = min(max_chars, MAX_CHARS)
        request = {
            "messages": check_messages(messages),
            "tools": _check_tools(tools),
            "chat_template_kwargs": _check_kwargs(kwargs),
            "max_chars": max_chars,
        }
        line = _to_line(request)
        with self._turn:
            reply = self._ask(line)
        if "num_chars" in reply:
            problem = f"its {reply['num_chars']} characters are more than {max_chars}"
            raise InvalidField("prompt", f"{problem}, the most that this model can read")
        if "problem" in reply:
            raise InvalidField(reply["field"], reply["problem"])
        return str(reply["text"])

    def _ask(self, line: bytes) -> dict[str, Any]:
        try:
            return self._running().ask(line)
        except _RendererEnded as error:
            self._renderer = _Renderer(self._setup)  # started now, before the next request
            raise InvalidField("messages", str(error)) from None

    def _running(self) -> _Renderer:
        if self._renderer is None or not self._renderer.is_alive():
            self._renderer = _Renderer(self._setup)
        return self._renderer


def check_messages(messages: Any) -> list[Message]:
    """Convert messages of OpenAI's clients to the format of chat templates.

    Removes keys whose value is None, as transformers does, and parses the arguments of tool calls
    to objects. Images must be as `take_media` leaves them. Raises InvalidField.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InvalidField("messages", "expected a non-empty list of {role, content} objects")
    return [_check_message(f"message {index}", message) for index, message in enumerate(messages)]


def _check_message(where: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise InvalidField("messages", f"{where} is not an object with role and content")
    role = message.get("role")
    content = message.get("content")
    if not isinstance(role, str) or not role:
        raise InvalidField("messages", f"{where} has no role (a string such as 'user')")
    calls = message.get("tool_calls")
    checked = {key: value for key, value in message.items() if value is not None}
    if calls is not None:
        checked["tool_calls"] = _check_calls(where, calls)
    if isinstance(content, list):
        checked["content"] = [_check_part(where, part) for part in content]
    elif not (isinstance(content, str) or (content is None and calls)):
        raise InvalidField("messages", f"{where} has no content (a string)")
    return checked


def _check_part(where: str, part: Any) -> dict[str, Any]:
    is_known = isinstance(part, dict) and part.get("type") in ("text", "image", "video")
    if not is_known or not isinstance(part.get("text"), str):
        raise InvalidField("messages", f"{where} has a content part that is not text")
    checked: dict[str, Any] = part
    return checked


def _check_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InvalidField("messages", f"{where}: tool_calls is not a list of objects")
    checked = []
    for index, call in enumerate(calls):
        function = call.get("function")
        if isinstance(function, dict):
            arguments = _arguments(f"{where}: tool_calls[{index}]", function.get("arguments"))
            call = call | {"function": function | {"arguments": arguments}}
        checked.append(call)
    return checked


def _arguments(where: str, arguments: Any) -> dict[str, Any]:
    """The arguments of a tool call as an object; OpenAI's API sends them as JSON text."""
    if not arguments:
        return {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            problem = f"{where}: function.arguments is not JSON"
            raise InvalidField("messages", problem) from None
    if not isinstance(arguments, dict):
        raise InvalidField("messages", f"{where}: function.arguments is not an object")
    return arguments


def _check_tools(tools: Any) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, dict) for tool in tools):
        raise InvalidField("tools", "expected a list of {type, function} objects")
    return list(tools) or None


def _check_kwargs(kwargs: Any) -> dict[str, Any]:
    if kwargs is None:
        return {}
    if not isinstance(kwargs, dict) or not all(isinstance(key, str) for key in kwargs):
        raise InvalidField("chat_template_kwargs", "expected an object")
    return kwargs


def _to_line(request: dict[str, Any]) -> bytes:
    """The request as one line of JSON. Raises InvalidField for a value that JSON does not have."""
    parts = []
    for field, value in request.items():
        try:
            parts.append(f'"{field}": {json.dumps(value)}')
        except RecursionError:
            raise InvalidField(field, "nested too deeply") from None
        except (TypeError, ValueError) as error:
            raise InvalidField(field, f"not expressible as JSON ({error})") from None
    line = "{" + ", ".join(parts) + "}\n"
    if len(line) > MAX_CHARS:
        problem = f"they and what comes with them take {len(line)} characters of JSON"
        raise InvalidField("messages", f"{problem}, at most {MAX_CHARS}")
    return line.encode()


class _RendererEnded(RuntimeError):
    """The renderer process ended or was killed before it replied; the message says why."""


class _Renderer:
    """The renderer process and the socket to it. Used by one thread at a time."""

    def __init__(self, setup: bytes) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(PATIENCE_S)
        # The renderer imports from its working directory first. This process's working directory
        # may hold any code, so the renderer's is the directory that holds this package.
        home = Path(__file__).parents[2]
        command = [sys.executable, "-W", "ignore", "-m", "gllm_engine.text.template_renderer"]
        with theirs:
            self._process = subprocess.Popen(command, stdin=theirs.fileno(), cwd=home)
        self._socket = ours
        self._replies = ours.makefile("rb", buffering=BUFFER)
        self._end = weakref.finalize(self, _end, self._process, ours)
        with suppress(OSError):  # the process has ended; ask() will raise _RendererEnded
            ours.sendall(len(setup).to_bytes(8, "big") + setup)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, line: bytes) -> dict[str, Any]:
        """Send a request and wait for the reply. Raises _RendererEnded."""
        try:
            self._socket.sendall(line)
            reply = self._replies.readline()
        except TimeoutError:
            self._end()
            raise _RendererEnded(f"the chat template gave nothing in {PATIENCE_S:g} s") from None
        except OSError:  # the process has ended
            reply = b""
        if not reply.endswith(b"\n"):
            status = self._process.wait()
            self._end()
            problem = "the process that renders the chat template ended at them"
            raise _RendererEnded(f"{problem} (exit status {status})")
        answer: dict[str, Any] = json.loads(reply)
        return answer


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()
