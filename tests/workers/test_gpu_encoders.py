"""Encoders on GPUs of their own: what lands by CUDA IPC, an encoder killed in traffic, bandwidth.

Run as a program, this file is a process that opens a landing and writes it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import torch

from gllm_engine import write_tiny_model
from gllm_engine.os_process import Process
from gllm_engine.runner import Landing, kv_sizing
from gllm_engine.types import LandingHandle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed"),
]
TOKENS, NUMBERS = 16384, 4096
TIMES = 20


def write(body: bytes) -> subprocess.CompletedProcess[str]:
    """By another process, on another GPU."""
    command = [sys.executable, __file__, body.hex()]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_bandwidth_into_the_memory_of_another_process(capsys: pytest.CaptureFixture[str]) -> None:
    landing = Landing.make(2 * TOKENS, NUMBERS, torch.bfloat16, torch.device("cuda", 0))
    done = write(msgspec.msgpack.encode(landing.handle))
    assert done.returncode == 0, done.stderr[-3000:]
    with capsys.disabled():
        print(f"\nfrom GPU to GPU, between processes: {done.stdout.strip()} GB/s")
    found = landing.read(TOKENS, (TOKENS, NUMBERS))
    expected = torch.arange(TOKENS, device="cuda:0").remainder(251).to(torch.bfloat16)
    assert torch.equal(found, expected[:, None].expand_as(found))
    assert not landing.read(0, (TOKENS, NUMBERS)).any()
    # Torch's own way to share has one, which is left if this process is killed.
    assert not [*Path("/dev/shm").glob(f"torch_{os.getpid()}_*")]
    odd = msgspec.structs.replace(landing.handle, tokens=TOKENS)
    assert "the handle is not that of this memory" in write(msgspec.msgpack.encode(odd)).stderr


def test_memory_is_free_again_although_a_writer_was_killed() -> None:
    """Torch would keep it for a process that is gone."""
    landing = Landing.make(2 * TOKENS, NUMBERS, torch.bfloat16, torch.device("cuda", 0))
    body = msgspec.msgpack.encode(landing.handle)
    command = [sys.executable, __file__, body.hex(), "stay"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline()
        writer.kill()
    before = torch.cuda.memory_allocated(0)
    del landing
    assert before - torch.cuda.memory_allocated(0) >= 2 * TOKENS * NUMBERS * 2


@pytest.mark.whole_gpu
def test_what_a_writer_takes_of_the_gpu_is_left_free_for_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its CUDA context, on the GPU of the landing."""
    landing = Landing.make(2 * TOKENS, NUMBERS, torch.bfloat16, torch.device("cuda", 0))
    torch.cuda.synchronize(0)
    command = [sys.executable, __file__, msgspec.msgpack.encode(landing.handle).hex(), "stay"]
    before = torch.cuda.mem_get_info(0)[0]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline()
        taken = before - torch.cuda.mem_get_info(0)[0]
        writer.kill()
    with capsys.disabled():
        print(f"\na writer takes {taken / 2**20:.0f} MiB of the GPU that it writes")
    assert 0 <= taken <= kv_sizing._CONTEXT_BYTES


@pytest.mark.parametrize(
    "family", ["Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration"]
)
def test_encoders_fill_the_landing_also_if_one_is_killed(family: str, tmp_path: Path) -> None:
    from hall import Hall  # a process runs this file too

    model = write_tiny_model(tmp_path, family, seed=4)
    encoders = min(2, torch.cuda.device_count() - 1)
    start = time.monotonic()
    with Hall(model, torch.device("cuda", 0), num_ranks=1, encoder_workers=encoders) as here:
        print(f"{encoders} encoders are ready after {time.monotonic() - start:.1f} s")
        for number in range(20):
            here.submit(number, 1 + number, 30)
        here.wait_done()
        pids = here.pids()
        assert len(pids) == encoders
        for number in range(20, 420):
            here.submit(number, 20, 1 + number % 30)
        here.wait(lambda: len(here.taken) > 100, "traffic")
        assert here.encoders.stats().encoding
        os.kill(pids[0], signal.SIGKILL)
        here.wait_done()
        assert here.taken == set(range(420)) and not here.refused
        here.wait(lambda: here.encoders.stats().encoders == encoders, "another one is started")
        assert Process.of(pids[0]) is None
        pids = here.pids()
    assert not any(Process.of(pid) for pid in pids)


def _write(handle: LandingHandle, stays: bool) -> None:
    torch.cuda.set_device(1)
    landing = Landing.open(handle)
    numbers = torch.arange(TOKENS, device="cuda:1").remainder(251).to(torch.bfloat16)
    numbers = numbers[:, None].expand(-1, NUMBERS).contiguous()
    landing.write(TOKENS, numbers)  # the first copy enables the way between the GPUs
    torch.cuda.synchronize(1)
    start = time.perf_counter()
    for _ in range(TIMES):
        landing.write(TOKENS, numbers)
    torch.cuda.synchronize(1)
    seconds = time.perf_counter() - start
    print(f"{TIMES * numbers.nbytes / seconds / 1e9:.0f}", flush=True)
    if stays:
        signal.pause()


if __name__ == "__main__":
    _write(
        msgspec.msgpack.decode(bytes.fromhex(sys.argv[1]), type=LandingHandle), len(sys.argv) > 2
    )
