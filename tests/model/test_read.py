"""Weights read by threads, in pieces, are what a simple reading gives; what fails ends them all."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path

import pytest
import torch
from loaded import load_model
from safetensors.torch import load_file, save_file
from stored_weights import weights_in
from tiny_models import CPU, load
from torch import Tensor

from gllm_engine.arch import Model, Shard, read_arch
from gllm_engine.arch.names import checkpoint_tensors
from gllm_engine.model import Decoder, LoadError, filling, open_checkpoint, read
from gllm_engine.model.tiny import write_tiny_model

# Qwen3: a norm that is stored for every head; Glm, ChatGLM: several weights in one tensor.
FAMILIES = ["LlamaForCausalLM", "Qwen3ForCausalLM", "GlmForCausalLM", "ChatGLMModel"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def simply_read(path: Path, arch: Model, dtype: torch.dtype) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = {}
    for file in path.glob("*.safetensors"):
        stored |= load_file(file)
    weights: dict[str, Tensor] = {}
    for name in checkpoint_tensors(arch):
        weights |= weights_in(arch, name, stored[name].to(dtype))
    return weights


def assert_same_weights(decoder: Decoder, path: Path) -> None:
    expected = simply_read(path, decoder.arch, decoder.dtype)
    found = decoder.weights()
    assert found.keys() == expected.keys()
    for name, view in found.items():
        assert torch.equal(view.cpu(), expected[name].expand_as(view)), name


def no_reader_is_left() -> bool:
    return not any(thread.name.startswith("weights") for thread in threading.enumerate())


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor fits in one piece, and few are a multiple of it."""
    monkeypatch.setattr(read, "_PIECE_BYTES", 72)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_over_many_pieces(
    tmp_path: Path, family: str, device: str, small_pieces: None
) -> None:
    write_tiny_model(tmp_path, family, num_hidden_layers=1, vocab_size=263)
    decoder = load_model(
        tmp_path,
        read_arch(tmp_path),
        dtype=torch.float32,
        device=torch.device(device),
        max_model_len=64,
    )
    assert_same_weights(decoder, tmp_path)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("family", "piece_bytes"), [("GPT2LMHeadModel", 1000), ("GPTNeoXForCausalLM", 13_000)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposed_matrices_and_parts_by_heads_over_many_pieces(
    tmp_path: Path,
    family: str,
    piece_bytes: int,
    device: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`piece_bytes`: enough for one row of the widest matrix, or one head's block of rows."""
    monkeypatch.setattr(read, "_PIECE_BYTES", piece_bytes)
    write_tiny_model(tmp_path, family)
    decoder = load_model(
        tmp_path,
        read_arch(tmp_path),
        dtype=dtype,
        device=torch.device(device),
        max_model_len=64,
    )
    assert_same_weights(decoder, tmp_path)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_number(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype, device: str
) -> None:
    write_tiny_model(tmp_path, "Qwen3ForCausalLM")
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.to(stored) for name, tensor in load_file(file).items()}, file)
    decoder = load_model(
        tmp_path,
        read_arch(tmp_path),
        dtype=dtype,
        device=torch.device(device),
        max_model_len=64,
    )
    assert_same_weights(decoder, tmp_path)


def test_many_files(tmp_path: Path, small_pieces: None) -> None:
    write_tiny_model(tmp_path)
    whole = tmp_path / "model.safetensors"
    weight_map = {}
    for i, (name, tensor) in enumerate(load_file(whole).items()):
        weight_map[name] = f"{i}.safetensors"
        save_file({name: tensor.clone()}, tmp_path / weight_map[name])
    whole.unlink()
    index = str({"weight_map": weight_map}).replace("'", '"')
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert_same_weights(load(tmp_path), tmp_path)


def test_tied_output_projection_over_many_pieces(tmp_path: Path, small_pieces: None) -> None:
    write_tiny_model(tmp_path, tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    assert_same_weights(load(tmp_path), tmp_path)
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, file)
    with pytest.raises(LoadError, match="differs from the embedding"):
        load(tmp_path)


def test_memory_is_bounded(
    tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_model(tmp_path)
    readers, sizes, preadv = set(), set(), os.preadv

    def watched(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        readers.add(threading.get_ident())
        sizes.add(len(buffers[0]))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", watched)
    load(tmp_path)
    assert len(readers) <= 16 and max(sizes) <= 72


def test_reads_that_come_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model(tmp_path)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: preadv(fd, [into[0][:1001]], at))
    assert_same_weights(load(tmp_path), tmp_path)


def test_file_cut_short_while_it_is_read(
    tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_model(tmp_path)
    file = tmp_path / "model.safetensors"
    preadv = os.preadv

    def cut_then_read(descriptor: int, into: list[memoryview], offset: int) -> int:
        os.truncate(file, 20_000)
        return preadv(descriptor, into, offset)

    monkeypatch.setattr(os, "preadv", cut_then_read)
    with pytest.raises(LoadError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{file}: not a complete safetensors file (it ends at byte ")
    assert no_reader_is_left()


def test_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model(tmp_path)

    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(LoadError) as caught:
        load(tmp_path)
    file = tmp_path / "model.safetensors"
    assert str(caught.value) == f"{file}: cannot be read (Input/output error)"
    assert no_reader_is_left()


@contextmanager
def filled(path: Path) -> Iterator[Decoder]:
    """While the block runs, a decoder is filled from the checkpoint."""
    arch = read_arch(path)
    with open_checkpoint(arch, path) as checkpoint:
        decoder = Decoder(arch, dtype=torch.float32, device=CPU, max_model_len=64)
        with filling(decoder, checkpoint):
            yield decoder


def test_reads_while_the_block_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_tiny_model(tmp_path)
    in_block, begun, preadv = threading.Event(), threading.Event(), os.preadv

    def waiting(descriptor: int, into: list[memoryview], offset: int) -> int:
        begun.set()
        assert in_block.wait(10)
        return preadv(descriptor, into, offset)

    monkeypatch.setattr(os, "preadv", waiting)
    with caplog.at_level(logging.INFO), filled(tmp_path) as decoder:
        assert begun.wait(10)
        in_block.set()
    assert_same_weights(decoder, tmp_path)
    assert "GB of weights in" in caplog.text
    assert no_reader_is_left()


def test_a_block_that_fails_ends_the_reading(
    tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_model(tmp_path)
    failing, preadv, count = threading.Event(), os.preadv, [0]

    def waiting(descriptor: int, into: list[memoryview], offset: int) -> int:
        assert failing.wait(10)
        count[0] += 1
        return preadv(descriptor, into, offset)

    monkeypatch.setattr(os, "preadv", waiting)
    with pytest.raises(RuntimeError, match="no memory"), filled(tmp_path):
        threading.Timer(0.2, failing.set).start()
        raise RuntimeError("no memory")
    assert no_reader_is_left()
    assert count[0] <= 16  # the piece each reader had in hand


def test_headers_are_checked_before_a_decoder_is_made(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    arch = read_arch(tmp_path)
    with pytest.raises(LoadError, match="not a complete"), open_checkpoint(arch, tmp_path):
        raise AssertionError("the block ran")


class Asked:
    """What a rank reads of each file: the ranges of its calls of preadv."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ranges: list[tuple[int, int]] = []
        self._preadv = os.preadv
        monkeypatch.setattr(os, "preadv", self._watched)

    def _watched(self, descriptor: int, into: list[memoryview], offset: int) -> int:
        self.ranges.append((offset, offset + len(into[0])))
        return self._preadv(descriptor, into, offset)


def shards(arch: Model, tp: int, pp: int) -> list[Shard]:
    """Of all ranks of a mesh."""
    each = len(arch.layers) // pp
    stages = [(stage * each, (stage + 1) * each) for stage in range(pp)]
    return [Shard(first, end, rank, tp) for first, end in stages for rank in range(tp)]


def load_shard(path: Path, arch: Model, shard: Shard) -> Decoder:
    return load_model(path, arch, dtype=torch.float32, device=CPU, max_model_len=64, shard=shard)


def test_a_rank_reads_its_share_once_and_in_the_order_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several ranks read only what is split along columns, or held by each of them."""
    write_tiny_model(tmp_path, "Qwen3MoeForCausalLM", num_hidden_layers=2)
    arch = read_arch(tmp_path)
    monkeypatch.setattr(read, "_NUM_READERS", 1)
    readers = Counter[int]()
    for shard in shards(arch, tp=2, pp=2):
        asked = Asked(monkeypatch)
        decoder = load_shard(tmp_path, arch, shard)
        assert asked.ranges == sorted(asked.ranges)
        places = [place for begin, end in asked.ranges for place in range(begin, end)]
        assert len(places) == len(set(places))
        readers.update(places)
        own = sum(prod(shape) for shape in shard.weights(arch).values())
        whole = {
            name: prod(arch.weights()[name])
            for name, shape in shard.weights(arch).items()
            if shape[1:] != arch.weights()[name][1:]
        }
        cut = sum(prod(shard.weights(arch)[name]) for name in whole)
        assert len(places) == 4 * (own - cut + sum(whole.values())), decoder
    file = tmp_path / "model.safetensors"
    data_start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert readers.keys() == set(range(data_start, file.stat().st_size))
    assert max(readers.values()) == 2


def read_from_disk() -> int:
    """Bytes that this process has caused to be read from a disk."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def forget(file: Path) -> int:
    """Drop a file from the page cache; returns the bytes that reading it takes from the disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = read_from_disk()
        os.pread(opened.fileno(), 1, 0)
        took = read_from_disk() - before
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return took


def test_a_node_reads_each_byte_from_its_disk_once(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, num_hidden_layers=4, hidden_size=256, intermediate_size=1024)
    file = tmp_path / "model.safetensors"
    arch = read_arch(tmp_path)
    load_shard(tmp_path, arch, shards(arch, tp=4, pp=1)[0])  # code that is read at its first use
    if not forget(file):
        pytest.skip("no disk under this directory, or its reads are not counted")
    before = read_from_disk()
    with ThreadPoolExecutor(4) as ranks:
        list(ranks.map(lambda shard: load_shard(tmp_path, arch, shard), shards(arch, tp=4, pp=1)))
    assert read_from_disk() - before <= 1.1 * file.stat().st_size


def test_progress_is_told_in_the_log(
    tmp_path: Path,
    small_pieces: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_tiny_model(tmp_path)
    monkeypatch.setattr(read, "_TELL_S", 0.0)
    with caplog.at_level(logging.INFO):
        load(tmp_path)
    *lines, last = [record.getMessage() for record in caplog.records]
    told = [
        re.fullmatch(r"(\d+)% of 0\.00 GB of weights read, .* GB/s, about \d+ s left", line)
        for line in lines
    ]
    shares = [int(match[1]) for match in told if match]
    assert len(shares) == len(lines) > 100 and shares == sorted(shares) and shares[-1] >= 99
    assert last.startswith("read 0.00 GB of weights in ")


def test_few_lines_tell_of_the_progress(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tiny_model(tmp_path)
    with caplog.at_level(logging.INFO):
        load(tmp_path)
    assert len(caplog.records) == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal(
    tmp_path: Path,
    small_pieces: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_tiny_model(tmp_path)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(read, "_TELL_S", 0.0)
    with caplog.at_level(logging.INFO):
        load(tmp_path)
    assert "weights:" in terminal.getvalue() and "B/s]" in terminal.getvalue()
    assert len(caplog.records) == 1


def test_only_one_rank_of_a_node_shows_the_progress(
    tmp_path: Path,
    small_pieces: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_tiny_model(tmp_path)
    monkeypatch.setattr(read, "_TELL_S", 0.0)
    arch = read_arch(tmp_path)
    with caplog.at_level(logging.INFO), open_checkpoint(arch, tmp_path) as checkpoint:
        decoder = Decoder(arch, dtype=torch.float32, device=CPU, max_model_len=64)
        with filling(decoder, checkpoint, shows=False):
            assert decoder.weights()
    assert len(caplog.records) == 1
