"""The image without Docker: its RUN lines are run, and a server started from what they make.

A temporary root stands for the image's: paths that the Dockerfile names are below it. NVIDIA's part
of it is the tritonserver of the nvidia-pytriton wheel, laid out as in their image, and a Python
that has the dependencies but nothing of ours. pip installs what COPY brought, without a network.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dockerfile
import pytest
from live import MODEL, WAIT_S, Server
from traces import Launched, Traces

from gllm_client.tritonserver import STUB, find_server

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

PACKAGES = {"gllm_engine": "gllm_engine", "gllm_backend": "backend", "gllm_client": "client"}
KINDS = ("http", "grpc", "metrics")
PATHS = re.compile(r"(?<![\w.])/(?=opt/|models|cache)")
PIP = """\
#!/bin/sh
[ "$1" = install ] || exit 2
shift
exec {python} -m pip --python {image} install --no-deps --no-build-isolation --no-index "$@"
"""


class Image:
    """A root directory with what is in the image once the Dockerfile has been worked through."""

    def __init__(self, root: Path) -> None:
        self.root, self.python = root, root / "usr/bin/python3"
        self._add_tritonserver()
        self._add_python()
        for kind, rest in dockerfile.instructions():
            if kind == "COPY":
                self._copy(*rest.split())
            elif kind == "RUN":
                self.run(rest)

    def inside(self, text: str) -> str:
        """Paths of the image become paths below the root."""
        return PATHS.sub(f"{self.root}/", text)

    @property
    def environment(self) -> dict[str, str]:
        """The image's own, and where the wheel's tritonserver finds what NVIDIA's has at hand."""
        values = {key: self.inside(value) for key, value in dockerfile.environment().items()}
        libraries = (str(path) for path in find_server().libraries)
        return values | {
            "PATH": f"{self.python.parent}:{self.root}/opt/tritonserver/bin:/usr/bin:/bin",
            "LD_LIBRARY_PATH": ":".join(libraries),
            "TRITON_SERVER_DIR": f"{self.root}/opt/tritonserver",
            "HF_HUB_OFFLINE": "1",
        }

    def run(self, script: str) -> str:
        """What a shell in the image prints; AssertionError when it fails."""
        command = ["/bin/sh", "-ec", self.inside(script)]
        done = subprocess.run(
            command, env=self.environment, cwd=self.root, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{script}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def _add_tritonserver(self) -> None:
        wheel, here = find_server(), self.root / "opt/tritonserver"
        backend = here / "backends/python"
        shutil.copytree(wheel.backends / "python", backend)
        shutil.copy(wheel.stub, backend / STUB)
        (here / "bin").mkdir()
        (here / "bin/tritonserver").symlink_to(wheel.binary)

    def _add_python(self) -> None:
        venv = [sys.executable, "-m", "venv", "--without-pip", str(self.root / "usr")]
        subprocess.run(venv, check=True)
        (packages,) = self.root.glob("usr/lib/python3.*/site-packages")
        theirs = [path for path in sys.path if Path(path).name == "site-packages"]
        (packages / "dependencies.pth").write_text("\n".join(theirs))
        pip = self.python.with_name("pip")
        pip.write_text(PIP.format(python=sys.executable, image=self.python))
        pip.chmod(0o755)

    def _copy(self, source: str, target: str) -> None:
        ignored = (dockerfile.ROOT / ".dockerignore").read_text().split()
        names = shutil.ignore_patterns(*(pattern.removeprefix("**/") for pattern in ignored))
        shutil.copytree(dockerfile.ROOT / source, self.inside(target), ignore=names)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return Image(tmp_path_factory.mktemp("image"))


@pytest.fixture
def traces() -> Iterator[Traces]:
    traces = Traces().begin()
    yield traces
    traces.end()


def modules(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*.py")}


def test_all_of_the_product_is_installed(image: Image) -> None:
    (packages,) = image.root.glob("usr/lib/python3.*/site-packages")
    for name, source in PACKAGES.items():
        assert modules(packages / name) == modules(dockerfile.ROOT / source) != set()


def test_the_backend_of_a_plain_tritonserver_is_the_one_installed(image: Image) -> None:
    model = image.root / "opt/tritonserver/backends/gllm/model.py"
    (packages,) = image.root.glob("usr/lib/python3.*/site-packages")
    assert model.is_symlink() and model.resolve() == packages / "gllm_backend/gllm/model.py"
    find = "from importlib.util import find_spec; print(find_spec('triton_python_backend_utils'))"
    assert image.run(f'python3 -c "{find}"') == "None"  # as in the image: only a stub has it


def launched(image: Image, traces: Traces, *command: str, log: Path) -> Launched:
    """A command in the image that becomes a server."""
    program = shutil.which(command[0], path=image.environment["PATH"])
    assert program is not None
    environment = image.environment | traces.variables
    return Launched(*command[1:], log=log, program=[program], env=environment, cwd=image.root)


def answers(server: Server) -> bool:
    with server.client() as client:
        return client.complete("ROMEO:", max_tokens=8, ignore_eos=True).num_output_tokens == 8


def contents(directory: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of all files."""
    paths = {str(path): path.stat() for path in sorted(directory.rglob("*"))}
    return {path: (status.st_size, status.st_mtime_ns) for path, status in paths.items()}


def test_what_a_container_runs_serves(image: Image, traces: Traces, tmp_path: Path) -> None:
    *command, flag, address = (image.inside(word) for word in dockerfile.command())
    assert (flag, address) == ("--host", "0.0.0.0")  # not on the machine that runs tests
    before = contents(image.root / "models")
    server = launched(image, traces, *command, log=tmp_path / "log").wait_ready()
    try:
        assert answers(server)
        ((_, check),) = dockerfile.instructions("HEALTHCHECK")
        check = check.partition("CMD ")[2]
        assert "localhost:8000" in check
        image.run(check.replace("localhost:8000", server.http))
        assert contents(image.root / "models") == before  # it may be mounted read-only
    finally:
        assert server.stop() == 0
    assert not traces.processes()


def test_a_plain_tritonserver_in_it_serves(image: Image, traces: Traces, tmp_path: Path) -> None:
    flags = ["/models", "/opt/tritonserver/backends"]
    repository, backends = (image.inside(path) for path in flags)
    command = [
        "tritonserver",
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
    ]
    command += [f"--{kind}-address=127.0.0.1" for kind in KINDS]
    server = launched(image, traces, *command, log=tmp_path / "log")
    try:
        server.wait_models_ready(MODEL)
        assert answers(server)
    finally:
        server.process.terminate()
        assert server.wait_ended(WAIT_S) == 0
    assert not traces.processes()
