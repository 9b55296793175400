"""Where tritonserver is found, and what it is started with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gllm_client import tritonserver as module
from gllm_client.tritonserver import (
    ServerError,
    assemble_backends,
    find_server,
    make_directory,
    read_installation,
    server_arguments,
    server_environment,
    sweep,
)
from gllm_engine import discard, owned_prefix

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


def make_installation(root: Path, kind: str, version: str = VERSION) -> Path:
    """A tritonserver as in the wheel (a stub for each Python) or as in the container (one)."""
    server = root / "pytriton/tritonserver"
    for directory in ("bin", "backends/python", "backends/onnxruntime"):
        (server / directory).mkdir(parents=True)
    (server / "bin/tritonserver").touch()
    (server / "backends/python/libtriton_python.so").write_text("library")
    (server / "backends/python/triton_python_backend_utils.py").write_text("utils")
    where = f"python_backend_stubs/{version}" if kind == "wheel" else "backends/python"
    (server / where).mkdir(parents=True, exist_ok=True)
    stub = server / where / "triton_python_backend_stub"
    stub.write_bytes(b"\x7fELF\0libpython" + version.encode() + b".so.1.0\0")
    stub.chmod(0o755)
    if kind == "wheel":
        (root / "nvidia_pytriton.libs").mkdir()
    return server


@pytest.mark.parametrize("kind", ["wheel", "container"])
def test_the_chosen_server_is_taken(tmp_path: Path, kind: str) -> None:
    server = make_installation(tmp_path, kind)
    installation = find_server({"TRITON_SERVER_DIR": str(server)})
    assert installation.binary == server / "bin/tritonserver"
    assert installation.stub.is_file() and installation.stub.is_relative_to(server)
    assert (tmp_path / "nvidia_pytriton.libs" in installation.libraries) == (kind == "wheel")


def test_a_chosen_directory_without_a_server_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"TRITON_SERVER_DIR: .* has no bin/tritonserver"):
        find_server({"TRITON_SERVER_DIR": str(tmp_path)})


def test_no_server_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    if not Path("/opt/tritonserver").exists():
        with pytest.raises(ServerError, match="tritonserver is not installed: set TRITON"):
            find_server({})


@pytest.mark.parametrize("kind", ["wheel", "container"])
def test_a_stub_for_another_python_is_refused(tmp_path: Path, kind: str) -> None:
    server = make_installation(tmp_path, kind, "3.8")
    with pytest.raises(ServerError, match=f"Python {VERSION}"):
        read_installation(server)


def test_backends_are_assembled(tmp_path: Path) -> None:
    installation = read_installation(make_installation(tmp_path / "server", "wheel"))
    backends = tmp_path / "backends"
    backends.mkdir()
    assemble_backends(installation, backends)
    assert sorted(p.name for p in backends.iterdir()) == ["gllm", "onnxruntime", "python"]
    assert (backends / "onnxruntime").resolve() == installation.backends / "onnxruntime"
    for name in ("gllm", "python"):
        stub = backends / name / "triton_python_backend_stub"
        assert os.access(stub, os.X_OK)
        for file in backends.joinpath(name).iterdir():
            # tritonserver refuses a library that is a link to somewhere else
            assert file.name == "model.py" or not file.is_symlink()
    model = backends / "gllm/model.py"
    assert model.is_symlink() and model.resolve().parts[-3:] == ("backend", "gllm", "model.py")


def test_this_python_is_the_first_on_the_path(tmp_path: Path) -> None:
    installation = read_installation(make_installation(tmp_path, "wheel"))
    here = str(Path(sys.executable).parent)
    given = {"PATH": f"/usr/bin:{here}:/bin", "LD_LIBRARY_PATH": "/mine", "HOME": "/h"}
    environment = server_environment(installation, given)
    assert environment["PATH"].split(":") == [here, "/usr/bin", "/bin"]
    libraries = environment["LD_LIBRARY_PATH"].split(":")
    assert libraries[0] == str(tmp_path / "nvidia_pytriton.libs") and libraries[-1] == "/mine"
    assert environment["HOME"] == "/h"
    assert "" not in server_environment(installation, {})["LD_LIBRARY_PATH"].split(":")


def test_our_flags_give_way_to_those_given() -> None:
    ours = server_arguments(Path("/b"), "p-", [])
    assert "--backend-directory=/b" in ours
    assert "--backend-config=python,shm-region-prefix-name=p-" in ours
    for kind in ("http", "grpc", "metrics"):
        assert f"--{kind}-address=127.0.0.1" in ours
    given = [
        "--http-address=0.0.0.0",
        "--exit-timeout-secs",
        "5",
        "--backend-config=python,shm-default-byte-size=1048576",
        "--backend-directory=/mine",
    ]
    both = server_arguments(Path("/b"), "p-", given)
    assert both[-len(given) :] == given
    for name in ("http-address", "exit-timeout-secs", "shm-default-byte-size", "backend-directory"):
        assert sum(name in argument for argument in both) == 1
    assert "--grpc-address=127.0.0.1" in both
    assert any("shm-growth-byte-size" in argument for argument in both)


def test_what_ended_processes_left_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "SHM", tmp_path / "shm")
    (tmp_path / "shm").mkdir()
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays as a zombie
    mine = make_directory()
    assert mine.name.startswith(owned_prefix(os.getpid())) and mine.stat().st_mode & 0o77 == 0
    gone = tmp_path / f"{owned_prefix(child.pid)}x"
    (gone / "backends").mkdir(parents=True)
    region = tmp_path / f"shm/{owned_prefix(child.pid)}region"
    region.touch()
    others = [tmp_path / f"gllm-1-{child.pid}-x", tmp_path / "gllm-0", tmp_path / "shm/other"]
    for path in others:
        path.touch()
    sweep()
    assert not gone.exists() and not region.exists()
    assert mine.is_dir() and all(path.exists() for path in others)
    child.wait()


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    discard(tmp_path / "link")
    discard(tmp_path / "never was")
    assert (tmp_path / "kept").is_dir() and not (tmp_path / "link").is_symlink()
