"""Every command and every piece of code in README and docs runs, or is marked as needing a GPU.

A page's blocks run in their order, in a directory that looks like the repository: its `bash` blocks
command by command, then its `python` blocks as one program. `gllm serve ... &` serves on free ports
until the page's end; the ports that the page names are replaced. The session's server stands for
`gllm serve model_repository &`, which is how it was started. Blocks marked `bash gpu` and
`bash kubernetes` do not run here: their commands are parsed.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from live import SHIPPED, Server

from gllm_client.__main__ import make_parser
from gllm_engine.workers import encoder, worker

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(["README.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))])
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUNNING, PARSED = ("bash", "python"), ("bash gpu", "bash kubernetes")
COMMAND = re.compile(r"(gllm|scripts/\w+|python|pip|curl|torchrun|docker|kubectl) \S")
SUITE = "scripts/test"  # is what runs this test
# A page's commands that run some of this suite's tests only collect them.
COLLECT = {"PYTEST_ADDOPTS": "--collect-only"}


def blocks(page: str) -> list[tuple[str, str]]:
    """(marker, text) of each fenced block of a page."""
    return BLOCK.findall((ROOT / page).read_text())


def commands(text: str) -> list[str]:
    """The commands of a bash block: lines, with those that a backslash joins as one."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [line for line in joined.splitlines() if line.strip()]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A directory with links to what the repository holds."""
    for path in ROOT.iterdir():
        if not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


class Serving:
    """Servers that a page starts, those of its own and the session's."""

    def __init__(self, shared: pytest.FixtureRequest, directory: Path) -> None:
        self._shared = shared
        self._directory = directory
        self.own: list[Server] = []
        self.all: list[Server] = []

    def start(self, repository: str, *flags: str) -> None:
        """`gllm serve REPOSITORY FLAGS`, ready."""
        path = self._directory / repository
        if path.resolve() == SHIPPED and not flags:
            self.all.append(self._shared.getfixturevalue("server"))
            return
        server = Server(path, *flags, log=self._directory / f"{len(self.own)}.log")
        self.own.append(server)
        self.all.append(server.wait_ready())


@pytest.fixture
def serving(copy: Path, request: pytest.FixtureRequest) -> Iterator[Serving]:
    """The page's own servers are stopped at the end."""
    serving = Serving(request, copy)
    yield serving
    for server in serving.own:
        server.stop()


def environment(copy: Path) -> dict[str, str]:
    binaries = str(Path(sys.executable).parent)
    there = {"TMPDIR": str(copy), "GLLM_VENV": str(Path(sys.executable).parents[1])}
    return os.environ | there | COLLECT | {"PATH": f"{binaries}:{os.environ['PATH']}"}


def run(command: list[str], text: str, copy: Path) -> str:
    made = subprocess.run(
        command, input=text, cwd=copy, env=environment(copy), text=True, capture_output=True
    )
    assert made.returncode == 0, f"{text}\n{made.stdout[-4000:]}\n{made.stderr[-4000:]}"
    return made.stdout


def with_ports(text: str, servers: list[Server]) -> str:
    for server in servers:
        text = text.replace("localhost:8000", server.http).replace("localhost:8001", server.grpc)
        text = text.replace("localhost:8002", server.metrics_address)
    return text


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(page: str, copy: Path, serving: Serving) -> None:
    program = ""
    for marker, text in blocks(page):
        if marker == "python":
            program += text
        for command in commands(text) if marker == "bash" else ():
            if command.split()[0] == SUITE:
                continue
            serve = re.match(r"gllm serve (\S+)(.*?)\s*&", command)
            if serve:
                serving.start(serve[1], *shlex.split(serve[2]))
            else:
                run(["bash", "-euo", "pipefail"], with_ports(command, serving.all), copy)
    if program:
        run([sys.executable, "-"], with_ports(program, serving.all), copy)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_marked(page: str) -> None:
    """Commands stand in blocks that run or are parsed; other blocks show pictures and extracts."""
    for marker, text in blocks(page):
        assert marker in (*RUNNING, *PARSED, ""), f"{page}: a block is marked {marker!r}"
        if not marker:
            assert not [line for line in text.splitlines() if COMMAND.match(line)], text


def check(command: str) -> None:
    """Raise where a command that cannot run here is not one of ours, or its flags are wrong."""
    words = shlex.split(command, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):  # environment variables
        del words[0]
    name, *arguments = words
    if name == "gllm":
        make_parser().parse_args(arguments)
    elif name == "scripts/bench":
        module = import_module(f"gllm_benchmarks.{arguments[0]}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["bench", *arguments[1:]])
            module.parse_arguments()
    elif name == "torchrun":
        worker._parser().parse_args(arguments[arguments.index("gllm_engine.worker") + 1 :])
    elif arguments[:2] == ["-m", "gllm_engine.encoder"]:
        encoder._parser().parse_args(arguments[2:])
    elif name == "pip":
        extras = re.search(r"\[([\w,]+)\]", command)
        assert extras is not None
        for extra in extras[1].split(","):
            assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
    elif name == "kubectl" and "-f" in arguments:
        assert (ROOT / arguments[arguments.index("-f") + 1]).is_file()
    else:
        assert name in ("curl", "kubectl", "head"), f"nobody checks {command!r}"


@pytest.mark.parametrize("page", PAGES)
def test_what_needs_a_gpu_is_spelled_right(page: str) -> None:
    for marker, text in blocks(page):
        for command in commands(text) if marker in PARSED else ():
            check(command)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text()):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"
