"""NVIDIA's perf_analyzer drives the server, and its export shows whole, well-formed answers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live import MODEL, Server

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

OLDER = "2.51.0"  # the last that needs no glibc newer than Debian 12's
MEMBER = f"tritonclient-{OLDER}.data/data/bin/perf_analyzer"
LIBRARIES = ("libb64", "libcudart")  # what the binary needs beside it, from the server's wheel


def _link_libraries(directory: Path) -> None:
    wheel = importlib.util.find_spec("pytriton")
    assert wheel is not None and wheel.origin is not None, "the [server] extra is not installed"
    for name in LIBRARIES:
        source, *_ = sorted(
            (Path(wheel.origin).parents[1] / "nvidia_pytriton.libs").glob(f"{name}-*")
        )
        suffix = "so.0d" if name == "libb64" else "so.12"
        link = directory / f"{name}.{suffix}"
        if not link.exists():  # or it points to where the environment was before
            link.unlink(missing_ok=True)
            link.symlink_to(source)


def _runs(binary: Path, libraries: Path) -> bool:
    command = [str(binary), "--version"]
    return binary.is_file() and (
        subprocess.run(command, env=_environment(libraries), capture_output=True).returncode == 0
    )


def _environment(libraries: Path) -> dict[str, str]:
    return os.environ | {"LD_LIBRARY_PATH": str(libraries)}


def _fetch(directory: Path) -> Path:
    """The binary of an older tritonclient wheel, which pip fetches without installing it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, f"--dest={directory}", f"tritonclient=={OLDER}"], check=True)
    (wheel,) = directory.glob("tritonclient-*.whl")
    binary = directory / "perf_analyzer"
    with zipfile.ZipFile(wheel) as archive:
        binary.write_bytes(archive.read(MEMBER))
    binary.chmod(0o755)
    wheel.unlink()
    return binary


@pytest.fixture(scope="session")
def perf_analyzer() -> Iterator[tuple[Path, dict[str, str]]]:
    """A perf_analyzer that runs here, and its environment. Kept beside the virtual environment."""
    directory = Path(sys.prefix) / "perf_analyzer"
    directory.mkdir(exist_ok=True)
    _link_libraries(directory)
    installed, fetched = (
        Path(sys.executable).with_name("perf_analyzer"),
        directory / "perf_analyzer",
    )
    usable = [binary for binary in (installed, fetched) if _runs(binary, directory)]
    yield (usable or [_fetch(directory)])[0], _environment(directory)


def measure(
    perf_analyzer: tuple[Path, dict[str, str]],
    server: Server,
    directory: Path,
    steps: list[dict[str, Any]],
    *flags: str,
) -> list[dict[str, Any]]:
    """Run perf_analyzer; the requests of its profile export. `steps`: tensors of each request."""
    binary, environment = perf_analyzer
    given = directory / "in.json"
    given.write_text(json.dumps({"data": [{k: [v] for k, v in step.items()} for step in steps]}))
    command = [str(binary), "-m", MODEL, "-i", "grpc", "-u", server.grpc, "--async", "--streaming"]
    command += [f"--input-data={given}", f"--profile-export-file={directory / 'out.json'}", *flags]
    result = subprocess.run(
        command, env=environment, cwd=directory, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (experiment,) = json.loads((directory / "out.json").read_text())["experiments"]
    return experiment["requests"]


def step(prompt: str, num_tokens: int) -> dict[str, Any]:
    """The tensors of one request.

    perf_analyzer exports every output that the model declares; for one that a response lacks it
    exports whatever lies in memory. Where that is no finite float, the export ends at once, and
    the file stays empty. So the only output of floats is asked for.
    """
    sampling = {"max_tokens": num_tokens, "ignore_eos": True, "temperature": 0}
    return {
        "text_input": prompt,
        "stream": True,
        "return_num_output_tokens": True,
        "return_finish_reason": True,
        "return_cumulative_logprob": True,
        "sampling_parameters": json.dumps(sampling),
    }


def check(requests: list[dict[str, Any]]) -> None:
    """Each request got its tokens, in responses that all carry some, the last one too."""
    for request in requests:
        wanted = json.loads(request["request_inputs"]["sampling_parameters"])["max_tokens"]
        responses = request["response_outputs"]
        counts = [response["num_output_tokens"] for response in responses]
        assert sum(counts) == wanted and min(counts) > 0
        reasons = [response["finish_reason"] for response in responses]
        assert reasons == ["None"] * (len(responses) - 1) + ["length"]
        assert responses[-1]["text_output"]
        assert all(response["cumulative_logprob"] < 0 for response in responses)
        times = [request["timestamp"], *request["response_timestamps"]]
        assert times == sorted(times) and len(times) == len(responses) + 1


def test_concurrency(
    perf_analyzer: tuple[Path, dict[str, str]], server: Server, tmp_path: Path
) -> None:
    steps = [step("ROMEO:", 12), step("First Citizen:", 7)]
    requests = measure(
        perf_analyzer, server, tmp_path, steps, "--concurrency-range=4", "--request-count=24"
    )
    assert len(requests) == 24
    prompts = Counter(request["request_inputs"]["text_input"] for request in requests)
    assert set(prompts) == {"ROMEO:", "First Citizen:"}
    check(requests)
    texts = {
        (
            r["request_inputs"]["text_input"],
            "".join(o["text_output"] for o in r["response_outputs"]),
        )
        for r in requests
    }
    assert len(texts) == 2  # greedy: the same prompt, the same text, whoever ran beside it
    server.wait_idle()


def test_request_rate(
    perf_analyzer: tuple[Path, dict[str, str]], server: Server, tmp_path: Path
) -> None:
    """Open loop, sampling parameters as request parameters."""
    given = step("ROMEO:", 7)
    given["sampling_parameters"] = json.dumps({"max_tokens": 7, "temperature": 0})
    requests = measure(
        perf_analyzer,
        server,
        tmp_path,
        [given],
        "--request-rate-range=10",
        "--request-count=20",
        "--request-parameter=ignore_eos:true:bool",
    )
    assert len(requests) == 20
    check(requests)
    server.wait_idle()
