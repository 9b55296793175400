"""Finds tritonserver and starts it with the gllm backend.

Owns the search, the private backend directory, the environment and the default flags. Knows
nothing of models or of the time after the start (supervisor.py).

tritonserver has three requirements. A backend's library and stub must be real files in the
backend's directory (only model.py and whole directories may be links). The Python stub must be
built for the version of Python that it runs. And that Python is the first `python3` on PATH;
PYTHONPATH does not select it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec

from gllm_engine import owned_prefix, remove_orphans

SHM = Path("/dev/shm")
SHM_BYTES = 16 << 20  # initial size and growth step of a stub's region, which never shrinks
EXIT_TIMEOUT_S = 30
STUB = "triton_python_backend_stub"
_LIBRARY = "libtriton_python.so"
_UTILS = "triton_python_backend_utils.py"


Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
ExitTimeout = Annotated[int, msgspec.Meta(ge=1, le=86400)]  # seconds: at most a day
FrontEnds = Annotated[int, msgspec.Meta(ge=1, le=256)]


class ServerError(RuntimeError):
    """tritonserver cannot be started, or has failed; the message says why."""


@dataclass(frozen=True)
class Installation:
    """The files and directories of an installed tritonserver."""

    binary: Path
    backends: Path  # holds one directory for each backend
    stub: Path  # the Python stub for this Python
    libraries: tuple[Path, ...]  # directories the dynamic linker must know


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `gllm serve`. All fields except the first four are its flags."""

    path: Path  # a model repository, one model of one, or a bare checkpoint
    engine: dict[str, Any] = {}  # EngineConfig fields, for a checkpoint
    arguments: tuple[str, ...] = ()  # for tritonserver itself
    openai: dict[str, Any] = {}  # Options of the OpenAI server, without those that gllm serve sets
    host: str = "127.0.0.1"  # address to listen at
    http_port: Port = 8000
    grpc_port: Port = 8001
    metrics_port: Port = 8002
    # serve OpenAI's API too, at this port; needs the [openai] extra
    openai_port: Port | None = None
    # at a stop, running answers have so long to end
    exit_timeout_s: ExitTimeout = EXIT_TIMEOUT_S
    name: str | None = None  # a checkpoint's name as a model; default: its directory's
    # processes that tokenize and send for a checkpoint's one engine
    front_ends: FrontEnds = 1


def find_server(environ: Mapping[str, str] = os.environ) -> Installation:
    """Find tritonserver: in $TRITON_SERVER_DIR, /opt/tritonserver or the nvidia-pytriton wheel.

    Raises ServerError if none is found, or if it cannot run this Python.
    """
    if chosen := environ.get("TRITON_SERVER_DIR"):
        if not (Path(chosen) / "bin/tritonserver").is_file():
            raise ServerError(f"TRITON_SERVER_DIR: {chosen} has no bin/tritonserver")
        return read_installation(Path(chosen))
    candidates = [Path("/opt/tritonserver")]
    wheel = importlib.util.find_spec("pytriton")
    if wheel is not None and wheel.origin is not None:
        candidates.append(Path(wheel.origin).parent / "tritonserver")
    for directory in candidates:
        if (directory / "bin/tritonserver").is_file():
            return read_installation(directory)
    raise ServerError(
        "tritonserver is not installed: set TRITON_SERVER_DIR, run in Triton's container, or "
        "install the wheel that carries it (pip install 'gllm-triton[server]')"
    )


def read_installation(directory: Path) -> Installation:
    """The tritonserver in `directory`, which has the layout of Triton's container or the wheel."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = directory / "python_backend_stubs" / version / STUB
    if not stub.is_file():
        stub = directory / "backends/python" / STUB
    if not stub.is_file():
        raise ServerError(f"{directory} has no Python backend for Python {version} ({STUB})")
    built_for = re.findall(rb"libpython(3\.\d+)", stub.read_bytes())
    if built_for and version.encode() not in built_for:
        raise ServerError(
            f"the Python backend in {directory} is for Python {built_for[0].decode()}, "
            f"gllm runs on Python {version}; use that Python"
        )
    wheel_libraries = directory.parent.parent / "nvidia_pytriton.libs"
    libpython = Path(str(sysconfig.get_config_var("LIBDIR")))
    return Installation(
        binary=directory / "bin/tritonserver",
        backends=directory / "backends",
        stub=stub,
        libraries=tuple(path for path in (wheel_libraries, libpython) if path.is_dir()),
    )


def assemble_backends(installation: Installation, directory: Path) -> None:
    """Fill `directory` with the server's backends (python with the right stub), and gllm."""
    for backend in sorted(installation.backends.iterdir()):
        if backend.is_dir() and backend.name not in ("python", "gllm"):
            (directory / backend.name).symlink_to(backend)
    package = importlib.util.find_spec("gllm_backend.gllm")
    if package is None or package.origin is None:
        raise ServerError("the gllm_backend package is not installed")
    for name in ("python", "gllm"):
        (directory / name).mkdir()
        shutil.copy(installation.stub, directory / name / STUB)
        for file in (_LIBRARY, _UTILS):
            shutil.copy(installation.backends / "python" / file, directory / name / file)
    (directory / "gllm/model.py").symlink_to(Path(package.origin).parent / "model.py")


def server_environment(
    installation: Installation, environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """tritonserver's environment: this Python first on PATH, its libraries on the linker's path."""
    libraries = [str(path) for path in installation.libraries]
    path = [str(Path(sys.executable).parent)]
    return dict(environ) | {
        "PATH": os.pathsep.join(_first(path, environ.get("PATH"))),
        "LD_LIBRARY_PATH": os.pathsep.join(_first(libraries, environ.get("LD_LIBRARY_PATH"))),
    }


def server_arguments(backends: Path, prefix: str, given: Sequence[str]) -> list[str]:
    """Our default flags, then the given flags. A given flag replaces our default.

    The default addresses are loopback, because Triton has no access control of its own. The names
    of shared-memory regions begin with `prefix`, so that servers on one machine do not collide.
    """
    python = {
        "shm-region-prefix-name": prefix,
        "shm-default-byte-size": SHM_BYTES,
        "shm-growth-byte-size": SHM_BYTES,
    }
    ours = {
        "backend-directory": backends,
        "http-address": "127.0.0.1",
        "grpc-address": "127.0.0.1",
        "metrics-address": "127.0.0.1",
        "exit-timeout-secs": EXIT_TIMEOUT_S,
    }
    names = {argument.removeprefix("--").partition("=")[0] for argument in given}
    settings = re.findall(r"(?:^|=)python,([\w-]+)=", "\n".join(given), re.MULTILINE)
    return [
        *(f"--{name}={value}" for name, value in ours.items() if name not in names),
        *(f"--backend-config=python,{k}={v}" for k, v in python.items() if k not in settings),
        *given,
    ]


def make_directory() -> Path:
    """A private directory of this process; `sweep` removes it once the process has ended."""
    return Path(tempfile.mkdtemp(prefix=owned_prefix(os.getpid())))


def sweep() -> None:
    """Remove directories and shared-memory regions of processes that have ended."""
    for place in (Path(tempfile.gettempdir()), SHM):
        remove_orphans(place)


def exec_server(arguments: Sequence[str]) -> NoReturn:
    """Become tritonserver with the gllm backend; `arguments` are its own. Does not return."""
    installation = find_server()
    sweep()
    directory = make_directory()
    assemble_backends(installation, directory)
    prefix = owned_prefix(os.getpid())
    command = [str(installation.binary), *server_arguments(directory, prefix, arguments)]
    os.execve(installation.binary, command, server_environment(installation))


def _first(ours: list[str], path: str | None) -> list[str]:
    theirs = path.split(os.pathsep) if path else []
    return ours + [entry for entry in theirs if entry not in ours]
