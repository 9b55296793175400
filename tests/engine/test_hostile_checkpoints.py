"""A checkpoint may come from anybody: whatever its files are, a start ends soon, with a sentence.

Every case goes the way of a start: model.json, the fingerprint that front ends compare, the digest
that ranks compare, config.json, the weights.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gllm_engine import ConfigError, read_config
from gllm_engine.arch import ArchError, read_arch
from gllm_engine.engine import attach
from gllm_engine.files import MAX_JSON_BYTES
from gllm_engine.model import Decoder, LoadError, filling, open_checkpoint, read
from gllm_engine.model.tiny import write_tiny_model
from gllm_engine.text.tokenizer import TextError, Tokenizer
from gllm_engine.workers.channel import digest

pytestmark = pytest.mark.timeout(120)

MOST_WORK_S = 5.0  # of a processor: time on the clock depends on what else the machine does
MODEL, CONFIG, GENERATION = "model.json", "config.json", "generation_config.json"
INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
JSON_FILES = [MODEL, CONFIG, GENERATION, INDEX]
FILES = [*JSON_FILES, WEIGHTS]
DOWN = "model.layers.1.mlp.down_proj.weight"  # [64, 96]
Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "whole"
    write_tiny_model(path)
    (path / MODEL).write_text('{"model": "."}')
    header, _ = parts(path / WEIGHTS)
    names = [name for name in header if name != "__metadata__"]
    (path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, WEIGHTS)}))
    return path


@pytest.fixture
def checkpoint(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "checkpoint"))


def start(path: Path) -> None:
    """What every start does with a checkpoint, in its order."""
    config = read_config(path / MODEL)
    model = Path(config.model)
    attach._fingerprint(config)
    digest(model)
    arch = read_arch(model)
    with open_checkpoint(arch, model) as checkpoint:
        options = {"dtype": torch.float32, "device": torch.device("cpu")}
        decoder = Decoder(arch, max_model_len=64, **options)
        with filling(decoder, checkpoint):
            pass


def refusal(path: Path) -> str:
    """The sentence with which a start ends."""
    begin = time.process_time()
    with pytest.raises((ConfigError, ArchError, LoadError, attach.EngineError)) as caught:
        start(path)
    assert time.process_time() - begin < MOST_WORK_S
    sentence = str(caught.value)
    assert sentence.isprintable() and len(sentence.replace(str(path), "")) < 1500
    sentence.encode()
    return sentence


# ------------------------------------------------------------ what is no file that can be read


def _socket(file: Path) -> None:
    here = Path.cwd()
    os.chdir(file.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(file.name)
    finally:
        os.chdir(here)


def _fifo_elsewhere(file: Path) -> None:
    os.mkfifo(file.parent.parent / "fifo")
    file.symlink_to("../fifo")


def _sparse(file: Path) -> None:
    file.touch()
    os.truncate(file, 1 << 40)


NO_FILES: dict[str, tuple[Spoil, str]] = {
    "fifo": (os.mkfifo, "it is a FIFO"),
    "link to a fifo": (_fifo_elsewhere, "it is a FIFO"),
    "socket": (_socket, "it is a socket"),
    "directory": (os.mkdir, "it is a directory"),
    "endless device": (lambda file: file.symlink_to("/dev/zero"), "it is a device"),
    "random device": (lambda file: file.symlink_to("/dev/urandom"), "it is a device"),
    "silent device": (lambda file: file.symlink_to("/dev/null"), "it is a device"),
    "terminal": (lambda file: file.symlink_to("/dev/ptmx"), "it is a device"),
    "of the kernel": (lambda file: file.symlink_to("/proc/kmsg"), "is empty"),
    "memory": (lambda file: file.symlink_to("/proc/self/mem"), "is empty"),
    "dangling link": (lambda file: file.symlink_to("nowhere"), "No such file or directory"),
    "link to itself": (lambda file: file.symlink_to(file.name), "Too many levels of symbolic"),
    "link through a file": (lambda file: file.symlink_to("tokenizer.json/x"), "Not a directory"),
    "empty": (Path.touch, "is empty"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file(checkpoint: Path, name: str, kind: str) -> None:
    make, problem = NO_FILES[kind]
    (checkpoint / name).unlink()
    if name == WEIGHTS:
        (checkpoint / INDEX).unlink()
    make(checkpoint / name)
    sentence = refusal(checkpoint)
    assert sentence.startswith(f"{checkpoint / name}: ") and problem in sentence


@pytest.mark.parametrize("kind", NO_FILES)
def test_a_shard_that_is_no_file(checkpoint: Path, kind: str) -> None:
    (checkpoint / WEIGHTS).unlink()
    make, problem = NO_FILES[kind]
    make(checkpoint / WEIGHTS)
    sentence = refusal(checkpoint)
    assert WEIGHTS in sentence and ("is not a file in" in sentence or problem in sentence)


@pytest.mark.parametrize("name", FILES)
def test_what_may_not_be_read(checkpoint: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refusing(path: Any, *rest: Any) -> int:
        if str(path) == str(checkpoint / name):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *rest)

    monkeypatch.setattr(os, "open", refusing)
    expected = f"{checkpoint / name}: cannot be read (Permission denied)"
    assert refusal(checkpoint).startswith(expected)


SIDE_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/short.jinja",
]
# Files that are read if there is no tokenizer.json.
VOCABULARY_FILES = ["tokenizer.model", "vocab.json", "merges.txt", "tekken.json", "config.json"]
NO_SIDE_FILES = NO_FILES | {"a terabyte": (_sparse, "is larger than the 256 MiB that such a")}
del NO_SIDE_FILES["link through a file"]  # it leads through tokenizer.json


@pytest.mark.parametrize("name", [*SIDE_FILES, *VOCABULARY_FILES])
@pytest.mark.parametrize("kind", NO_SIDE_FILES)
def test_what_is_no_file_beside_the_tokenizer(checkpoint: Path, name: str, kind: str) -> None:
    """It is not taken for absent: a chat template or an added token would be lost silently."""
    make, problem = NO_SIDE_FILES[kind]
    file = checkpoint / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    if name in VOCABULARY_FILES:
        (checkpoint / "tokenizer.json").unlink()
        (checkpoint / "vocab.txt").write_text("a")
    make(file)
    begin = time.process_time()
    with pytest.raises(TextError) as caught:
        Tokenizer(checkpoint)
    assert time.process_time() - begin < MOST_WORK_S
    sentence = str(caught.value)
    assert sentence.startswith(f"{file}: ") and problem in sentence


@pytest.mark.parametrize("kind", ["fifo", "endless device", "dangling link"])
def test_templates_in_what_is_no_directory(checkpoint: Path, kind: str) -> None:
    make, _ = NO_FILES[kind]
    make(checkpoint / "additional_chat_templates")
    with pytest.raises(TextError, match="tokenizer: .* cannot be loaded .*additional_chat_templa"):
        Tokenizer(checkpoint)


@pytest.mark.parametrize("name", FILES)
def test_a_terabyte_of_nothing(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    _sparse(checkpoint / name)
    sentence = refusal(checkpoint)
    problem = "JSON" if name == WEIGHTS else f"larger than the {MAX_JSON_BYTES >> 20} MiB"
    assert sentence.startswith(f"{checkpoint / name}: ") and problem in sentence


# ------------------------------------------------------------ what is not JSON, or strange JSON


TOO_DEEP = "nested deeper than 100 levels"
TEXTS: dict[str, tuple[bytes, str]] = {
    "100,000 lists": (b"[" * 100_000 + b"]" * 100_000, TOO_DEEP),
    "100,000 objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, TOO_DEEP),
    "lists without an end": (b"[" * 100_000, TOO_DEEP),
    "500 lists in a value": (b'{"model": ' + b"[" * 500 + b"]" * 500 + b"}", TOO_DEEP),
    "lists side by side": (b'{"a": [' + b"[]," * 100_000 + b"0]}", ""),
    "a key twice": (b'{"model": ".", "a": 1, "a": 2}', "key 'a' comes twice"),
    "a key twice, deep inside": (b'{"a": [{"b": {"c": 1, "c": 1}}]}', "key 'c' comes twice"),
    "many keys twice": (
        b"{" + b",".join(b'"%d":0' % (i % 50_000) for i in range(100_000)) + b"}",
        "key '0' comes twice",
    ),
    "a long key twice": (b'{"%s":1,"%s":2}' % (b"k" * 100_000, b"k" * 100_000), "comes twice"),
    "5,000 digits": (b'{"model": %s}' % (b"9" * 5000), "not valid JSON"),
    "NaN": (b"NaN", "a JSON object is expected"),
    "null": (b"null", "a JSON object is expected"),
    "a number": (b"1", "a JSON object is expected"),
    "a string": (b'"model"', "a JSON object is expected"),
    "a list": (b"[{}]", "a JSON object is expected"),
    "a byte order mark": (b'\xef\xbb\xbf{"model": "."}', "not valid JSON"),
    "UTF-16": ('{"model": "."}'.encode("utf-16"), "not valid JSON"),
    "UTF-32": ('{"model": "."}'.encode("utf-32"), "not valid JSON"),
    "Latin-1": (b'{"model": "caf\xe9"}', "not valid JSON"),
    "zeros": (bytes(100), "not valid JSON"),
    "blanks": (b" \n" * 1000, "not valid JSON"),
    "half an object": (b'{"model": ".",', "not valid JSON"),
    "an object and more": (b'{"model": "."} {}', "not valid JSON"),
    "a comment": (b'{"model": "."} // mine', "not valid JSON"),
    "other quotes": (b"{'model': '.'}", "not valid JSON"),
    "a pickle": (b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.", "not valid JSON"),
}


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("kind", TEXTS)
def test_strange_json(checkpoint: Path, name: str, kind: str) -> None:
    text, problem = TEXTS[kind]
    (checkpoint / name).write_bytes(text)
    if not problem and name == GENERATION:  # only one of its keys means anything to us
        start(checkpoint)
        return
    sentence = refusal(checkpoint)
    assert sentence.startswith(f"{checkpoint / name}: ") and problem in sentence


DEEP: list[Any] = []
for _ in range(90):
    DEEP = [DEEP]

# Values that no key of any file may have.
VALUES: dict[str, Any] = {
    "400 digits": 10**400,
    "minus 400 digits": -(10**400),
    "NaN": float("nan"),
    "infinity": float("inf"),
    "a deep list": DEEP,
    "an object": {"a": {}},
    "a lone surrogate": "\ud800",
    "a zero byte": "\0",
    "a long text": "x" * 100_000,
    "lines": "a\nb",
    "a long list": [1.5] * 100_000,
}
KEYS = {
    MODEL: ["model", "max_num_seqs", "kv_cache_gib", "device", "master_addr", "assigned_layers"],
    CONFIG: ["architectures", "hidden_size", "rms_norm_eps", "num_hidden_layers", "rope_scaling",
             "eos_token_id", "tie_word_embeddings", "hidden_act", "head_dim"],
    GENERATION: ["eos_token_id"],
    INDEX: ["weight_map"],
}  # fmt: skip


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize(("name", "key"), [(n, key) for n in KEYS for key in KEYS[n]])
def test_strange_values(checkpoint: Path, name: str, key: str, kind: str) -> None:
    file = checkpoint / name
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: VALUES[kind]}))
    if key == "eos_token_id" and kind == "400 digits":  # no token has it, as with any other
        start(checkpoint)
        return
    sentence = refusal(checkpoint)
    assert sentence.startswith(f"{file}: ") and key in sentence.replace(str(file), "")


@pytest.mark.parametrize(
    ("over", "problem"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but only a whole number"),
        ({"num_hidden_layers": 512}, "is missing (and"),
        ({"hidden_size": 2**24, "head_dim": 16}, "the config asks for"),
        ({"vocab_size": 2**24}, "the config asks for [16777216, 64]"),
        ({"intermediate_size": 2**24}, "the config asks for [64, 16777216]"),
        ({"head_dim": 2**24}, "the config asks for"),
        ({"num_attention_heads": 2**24, "num_key_value_heads": 1}, "head_dim is 0"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings is 1000000000000"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 1e30}}, "the model's length is"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 1e30}}, "the model's length is"),
        ({"rope_scaling": {"rope_type": "\ud800"}}, "RoPE type '\\ud800' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 1e300}}, "factor is 1e+300"),
        (
            {"rope_theta": 1, "rope_scaling": {"rope_type": "yarn", "factor": 2}},
            "rope_theta is 1.0, but YaRN needs more than 1",
        ),
        (
            {"head_dim": 2, "rope_scaling": {"rope_type": "dynamic", "factor": 2}},
            "dynamic RoPE scaling needs 4 channels",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 5,
                              "high_freq_factor": 4}},
            "low_freq_factor is 5.0, but only at most high_freq_factor=4.0 is supported",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "x" * 10**6: 1}}, "key 'xxx"),
        ({"layer_types": [["full_attention"], {}]}, "layer_types is"),
        ({"architectures": ["Evil"] * 10**6}, "architectures is ['Evil',"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_a_config_that_lies(checkpoint: Path, over: dict[str, Any], problem: str) -> None:
    file = checkpoint / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | over))
    sentence = refusal(checkpoint)
    assert sentence.startswith(str(checkpoint)) and problem in sentence


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "num_experts_per_tok"])
def test_experts_without_number(tmp_path: Path, key: str) -> None:
    write_tiny_model(tmp_path, "Qwen3MoeForCausalLM")
    (tmp_path / MODEL).write_text('{"model": "."}')
    file = tmp_path / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: 10**9}))
    assert f"{file}: {key} is 1000000000, but only" in refusal(tmp_path)


# ------------------------------------------------------------ an index that leads astray


@pytest.mark.parametrize(
    "name",
    [
        "../../../../../../etc/passwd", "/etc/passwd", "../checkpoint/model.safetensors",
        "./model.safetensors", "sub/model.safetensors", "/dev/zero", "", ".", "..", "\0", "a\0b",
        "\ud800", "a\nb", "x" * 300, "x" * 1_000_000, "x/" * 5000, "nowhere.safetensors",
        "model.safetensors/", "~/model.safetensors", "..\\model.safetensors",
    ],
    ids=lambda name: ascii(name[:30]),
)  # fmt: skip
def test_the_index_names_what_is_no_file_here(checkpoint: Path, name: str) -> None:
    (checkpoint / "sub").mkdir()
    shutil.copy(checkpoint / WEIGHTS, checkpoint / "sub" / WEIGHTS)
    index = json.loads((checkpoint / INDEX).read_text())
    index["weight_map"][DOWN] = name
    (checkpoint / INDEX).write_text(json.dumps(index))
    sentence = refusal(checkpoint)
    assert sentence.startswith(f"{checkpoint / INDEX}: names ")
    assert sentence.endswith(f", which is not a file in {checkpoint}")


@pytest.mark.parametrize("name", [CONFIG, INDEX, "tokenizer.json"])
def test_the_index_names_a_file_of_another_kind(checkpoint: Path, name: str) -> None:
    index = json.loads((checkpoint / INDEX).read_text())
    index["weight_map"][DOWN] = name
    (checkpoint / INDEX).write_text(json.dumps(index))
    assert refusal(checkpoint).startswith(f"{checkpoint / name}: not a complete safetensors file")


# ------------------------------------------------------------ weights that lie


def parts(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def write_raw(file: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    length = len(header) if length is None else length
    file.write_bytes(length.to_bytes(8, "little") + header + data)


@pytest.mark.parametrize("length", [0, 1, 10**12, 2**63, 2**64 - 1, 100_000_001])
def test_a_header_of_a_wrong_length(checkpoint: Path, length: int) -> None:
    header, data = parts(checkpoint / WEIGHTS)
    write_raw(checkpoint / WEIGHTS, json.dumps(header).encode(), data, length)
    if length == 100_000_001:
        os.truncate(checkpoint / WEIGHTS, 200_000_000)
    sentence = refusal(checkpoint)
    assert sentence.startswith(f"{checkpoint / WEIGHTS}: ")
    assert "header" in sentence or "JSON" in sentence


@pytest.mark.parametrize("kind", [kind for kind in TEXTS if kind != "lists side by side"])
def test_a_strange_header(checkpoint: Path, kind: str) -> None:
    text, problem = TEXTS[kind]
    _, data = parts(checkpoint / WEIGHTS)
    write_raw(checkpoint / WEIGHTS, text, data)
    sentence = refusal(checkpoint)
    assert sentence.startswith(f"{checkpoint / WEIGHTS}: ") and problem in sentence


def _entry(**over: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header[DOWN] = {k: v for k, v in (header[DOWN] | over).items() if v is not ...}

    return change


def _shift(begin: int, end: int) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        first, last = header[DOWN]["data_offsets"]
        header[DOWN]["data_offsets"] = [first + begin, last + end]

    return change


def _rename(name: str) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header[name] = header.pop(DOWN)

    return change


def _all_at_once(header: dict[str, Any]) -> None:
    for name in header.keys() - {"__metadata__"}:
        header[name]["data_offsets"] = header[DOWN]["data_offsets"]


DESCRIBED, GAP = "is described as", "does not begin where another ends"
HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "overlap": (_shift(-4, 0), GAP),
    "a hole": (_shift(4, 0), GAP),
    "all in one place": (_all_at_once, GAP),
    "backwards": (_entry(data_offsets=[24576, 0]), GAP),
    "beyond the file": (_entry(data_offsets=[10**12, 10**12 + 24576]), GAP),
    "of 400 digits": (_entry(data_offsets=[10**400, 10**400]), GAP),
    "below nothing": (_entry(data_offsets=[-24576, 0]), DESCRIBED),
    "half a byte": (_entry(data_offsets=[0.5, 1.5]), DESCRIBED),
    "true bytes": (_entry(data_offsets=[False, True]), DESCRIBED),
    "three offsets": (_entry(data_offsets=[0, 1, 2]), DESCRIBED),
    "no offsets": (_entry(data_offsets=...), DESCRIBED),
    "no shape": (_entry(shape=...), DESCRIBED),
    "no dtype": (_entry(dtype=...), DESCRIBED),
    "a shape of texts": (_entry(shape=["64", "96"]), DESCRIBED),
    "a shape below nothing": (_entry(shape=[-64, -96]), DESCRIBED),
    "a shape of NaN": (_entry(shape=[float("nan"), 96]), DESCRIBED),
    "a dtype of lists": (_entry(dtype=["F32"]), DESCRIBED),
    "an unknown dtype": (_entry(dtype="F32\n" * 10**5), "has dtype"),
    "integers": (_entry(dtype="I32"), "has dtype I32; supported: F64, F32, F16, BF16"),
    "more bytes than numbers": (_entry(dtype="F16"), "has 24576 bytes, its shape 12288"),
    "fewer bytes than numbers": (_entry(dtype="F64"), "has 24576 bytes, its shape 49152"),
    "another shape": (_entry(shape=[96, 64]), "has shape [96, 64], the config asks for [64, 96]"),
    "a huge shape": (_entry(shape=[2**62, 2**62]), "the config asks for [64, 96]"),
    "a million dimensions": (_entry(shape=[1] * 10**6), "the config asks for [64, 96]"),
    "no description": (lambda header: header.update({DOWN: None}), DESCRIBED),
    "a text for a description": (lambda header: header.update({DOWN: "x" * 10**6}), DESCRIBED),
    "not there": (lambda header: header.pop(DOWN), GAP),
    "a strange name": (_rename("\ud800\n"), "tensor '\\ud800\\n' is left over"),
    "a long name": (_rename("x" * 10**6), "xxx is left over"),
    "no name": (_rename(""), "tensor  is left over"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_lies(checkpoint: Path, kind: str) -> None:
    change, problem = HEADERS[kind]
    header, data = parts(checkpoint / WEIGHTS)
    change(header)
    write_raw(checkpoint / WEIGHTS, json.dumps(header).encode(), data)
    sentence = refusal(checkpoint)
    assert sentence.startswith(f"{checkpoint / WEIGHTS}: ") and problem in sentence


@pytest.mark.parametrize("change", [-1, 1, -100_000, 1 << 40])
def test_a_file_of_another_size(checkpoint: Path, change: int) -> None:
    file = checkpoint / WEIGHTS
    os.truncate(file, file.stat().st_size + change)
    assert refusal(checkpoint).startswith(f"{file}: not a complete safetensors file (it has ")


def test_a_file_that_shrinks_while_it_is_read(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = checkpoint / WEIGHTS
    move = read._move

    def cut_then_move(*piece: Any) -> None:
        os.truncate(file, 100)
        move(*piece)

    monkeypatch.setattr(read, "_move", cut_then_move)
    assert refusal(checkpoint).startswith(f"{file}: not a complete safetensors file (it ends at ")


# ------------------------------------------------------------ what is none of our business


EXTRAS: dict[str, Spoil] = {
    "dangling link": lambda path: (path / "README.md").symlink_to("nowhere"),
    "link to itself": lambda path: (path / "README.md").symlink_to("README.md"),
    "endless device": lambda path: (path / "README.md").symlink_to("/dev/zero"),
    "fifo": lambda path: os.mkfifo(path / "pytorch_model.bin"),
    "socket": lambda path: _socket(path / "socket"),
    "directory": lambda path: (path / "original").mkdir(mode=0),
    "a name that is no text": lambda path: Path(os.fsdecode(bytes(path) + b"/\xff\xfe")).touch(),
    "a name of lines": lambda path: (path / "a\nb").touch(),
    "pickled weights": lambda path: (path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\n."),
    "code": lambda path: (path / "modeling_evil.py").write_text("raise SystemExit"),
}


@pytest.mark.parametrize("kind", EXTRAS)
def test_other_files_do_not_matter(checkpoint: Path, kind: str) -> None:
    EXTRAS[kind](checkpoint)
    start(checkpoint)


def test_links_may_leave_the_directory(checkpoint: Path, tmp_path: Path) -> None:
    """As in Hugging Face's cache, whose files are links to blobs."""
    (tmp_path / "blobs").mkdir()
    for i, file in enumerate(sorted(checkpoint.iterdir())):
        file.rename(tmp_path / f"blobs/{i}")
        file.symlink_to(f"../blobs/{i}")
    start(checkpoint)


def test_a_directory_that_may_not_be_listed(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(path: Any = ".") -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refusing)
    monkeypatch.setattr(os, "scandir", refusing)
    assert refusal(checkpoint) == f"{checkpoint}: cannot be read (Permission denied)"


def test_the_fingerprint_sees_what_a_link_leads_to(checkpoint: Path) -> None:
    config = read_config(checkpoint / MODEL)
    (checkpoint / "extra").symlink_to("target")
    seen = [attach._fingerprint(config)]
    for text in ("one", "three"):
        (checkpoint / "target").write_text(text)
        os.utime(checkpoint / "target", ns=(1, 1))
        seen.append(attach._fingerprint(config))
    assert len(set(seen)) == 3
