"""Offline runs of both engines, each in a process of its own; vLLM's part is played by a fake."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from patience import SCRIPT_S
from trace_checks import read_trace

from gllm_benchmarks.offline import (
    MODELS,
    configure,
    main,
    model_directory,
    parse_pairs,
    summarize,
)
from gllm_benchmarks.ours import kind_of
from gllm_benchmarks.served_model import read_settings, read_vocab, write_tokenizer
from gllm_benchmarks.workloads import IMAGE_TOKENS, Job, lengths, make_jobs, warm_up, with_images
from gllm_engine import Tokenizer, make_config, write_tiny_model
from gllm_engine.arch import read_arch
from gllm_engine.images import read_processor

# Answers at once with token 7, and notes what it was asked; `WRONG` tells it to misbehave.
FAKE = """
import json, os, sys, types
from pathlib import Path

__version__ = "0.24.0"
NOTES = Path(__file__).with_name("notes")


def note(**what):
    with NOTES.open("a") as file:
        file.write(json.dumps(what, default=lambda image: [image.format, *image.size]) + "\\n")


class SamplingParams:
    def __init__(self, **fields):
        self.fields = fields


class LLM:
    def __init__(self, **config):
        files = sorted(os.listdir(config["model"]))
        routing = os.environ.get("VLLM_MOE_ROUTING_SIMULATION_STRATEGY")
        has_ours = "gllm_engine" in sys.modules
        note(config=config, path=sys.path, gllm=has_ours, files=files, routing=routing)
        cache = types.SimpleNamespace(num_gpu_blocks=10, block_size=16)
        config = types.SimpleNamespace(cache_config=cache)
        self.llm_engine = types.SimpleNamespace(vllm_config=config)

    def generate(self, prompts, sampling, use_tqdm):
        note(prompts=prompts, sampling=[each.fields for each in sampling])
        wrong = os.environ.get("WRONG")
        if wrong == "exit":
            os._exit(3)
        if wrong == "hang":
            __import__("time").sleep(600)
        answers = []
        for each in sampling:
            n = each.fields["max_tokens"]
            ids = [10**6 if wrong == "id" else 7] * (n - 1 if wrong == "short" else n)
            output = types.SimpleNamespace(token_ids=tuple(ids))
            answers.append(types.SimpleNamespace(outputs=[output]))
        return answers
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path, "Qwen3ForCausalLM")
    return path


@pytest.fixture
def site(tmp_path: Path) -> Path:
    package = tmp_path / "site" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE)
    return package.parent


def offline(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gllm_benchmarks.offline", *arguments]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=SCRIPT_S
    )


def test_both_engines_do_the_same_work(model: Path, site: Path, tmp_path: Path) -> None:
    done = offline(
        *("--engine", "both", "--model", str(model), "--peer-site", str(site), "--repeat", "2"),
        *("--workloads", "fixed:3:9:5,fixed:1:4:2", "--config", "cpu_threads=1"),
        *("--config", "num_pages=64", "--config", "max_num_seqs=2"),
        *("--peer-config", "block_size=32", "--peer-config", 'attention_config={"a": 1}'),
        *("--timeline", str(tmp_path / "out.json")),
        GLLM_COMMIT="abc",
    )
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["benchmark"] == f"offline-{model.name}" and line["commit"] == "abc"
    for engine, about in line["figures"].items():
        assert about["start_s"] > 0 and about["config"]["load_format"] == "dummy"
        for name, tokens in (("fixed:3:9:5", 15), ("fixed:1:4:2", 2)):
            run = about[name]
            assert run["tokens"] == tokens and len(run["all_seconds"]) == 2, engine
            assert run["seconds"] == max(run["all_seconds"])
    assert list(line["figures"]) == ["ours", "vllm"]
    assert line["figures"]["ours"]["fixed:1:4:2"]["steps"] == 2
    assert line["figures"]["vllm"]["version"] == "0.24.0"
    assert line["figures"]["ours"]["kv_tokens"] == 64 * 16
    assert line["figures"]["vllm"]["kv_tokens"] == 10 * 16
    trace = read_trace(tmp_path / "out.json")
    assert trace["otherData"]["summary"]["shares"][0]["steps"] > 2
    table, *timelines = done.stdout.split(" timeline\n")
    for name, shares in zip(("fixed:3:9:5", "fixed:1:4:2"), timelines[::2], strict=True):
        (share,) = line["figures"]["ours"][f"{name} timeline"]["shares"]
        assert share["steps"] == line["figures"]["ours"][name]["steps"]
        cells = [cell.strip() for cell in shares.splitlines()[3].split("|")[1:-1]]
        # The record's number was rounded before it is rounded here.
        assert float(cells[4].rstrip("%")) == pytest.approx(100 * share["busy"], abs=0.11)
    rows = [r.split("|")[1:-1] for r in table.splitlines() if r.startswith("| ")]
    assert [cell.strip() for cell in rows[0]][-1] == "ours / vllm"
    told = {(row[0].strip(), row[1].strip()): row for row in rows[2:]}
    assert len(told) == 6
    ours, vllm = (line["figures"][e]["fixed:3:9:5"]["seconds"] for e in ("ours", "vllm"))
    assert float(told["fixed:3:9:5", "ours"][-1]) == pytest.approx(vllm / ours, abs=1e-3)


def test_what_the_peer_is_asked(model: Path, site: Path) -> None:
    done = offline(
        *("--engine", "vllm", "--model", str(model), "--peer-site", str(site)),
        *("--workloads", "fixed:40:1000:20", "--config", "gpu_memory_utilization=0.5"),
    )
    assert done.returncode == 0, done.stderr
    notes = [json.loads(n) for n in (site / "vllm/notes").read_text().splitlines()]
    start, warm, run = notes
    assert start["routing"] is None
    assert not start["gllm"] and str(Path(__file__).parents[2] / "benchmarks") not in start["path"]
    assert str(site) in start["path"]
    assert start["config"] == {
        "model": str(model),
        "load_format": "dummy",
        "enable_prefix_caching": False,
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "max_num_seqs": 1024,
        "gpu_memory_utilization": 0.5,
        "max_model_len": 1024,
    }
    assert len(warm["prompts"]) == 32 and warm["sampling"][0]["max_tokens"] == 8
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    jobs = make_jobs(lengths("fixed:40:1000:20"), vocab)
    assert [each["prompt_token_ids"] for each in run["prompts"]] == [job.prompt for job in jobs]
    expected = {"temperature": 1.0, "max_tokens": 20, "ignore_eos": True, "detokenize": False}
    assert run["sampling"] == [expected] * 40


@pytest.mark.parametrize("family", ["DeepseekV2ForCausalLM", "KimiK25ForConditionalGeneration"])
def test_the_peer_chooses_experts_evenly(family: str, tmp_path: Path, site: Path) -> None:
    model = write_tiny_model(tmp_path / "experts", family)
    (model / "tokenizer.json").unlink(missing_ok=True)
    done = offline(
        *("--engine", "vllm", "--model", str(model), "--peer-site", str(site)),
        *("--workloads", "fixed:1:4:2"),
    )
    assert done.returncode == 0, done.stderr
    start, *_ = map(json.loads, (site / "vllm/notes").read_text().splitlines())
    assert start["routing"] == "uniform_random"


def test_both_engines_get_the_same_images(tmp_path: Path, site: Path) -> None:
    model = write_tiny_model(tmp_path / "sees", "Qwen2_5_VLForConditionalGeneration")
    (model / "tokenizer.json").unlink()
    name = "image:3:1:2"
    done = offline(
        *("--engine", "both", "--model", str(model), "--peer-site", str(site)),
        *("--workloads", name, "--config", "cpu_threads=1", "--config", "num_pages=256"),
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])["figures"]
    assert [figures[engine][name]["tokens"] for engine in ("ours", "vllm")] == [3 * 64] * 2
    start, _, run = map(json.loads, (site / "vllm/notes").read_text().splitlines())
    assert start["config"]["skip_tokenizer_init"] is False
    assert start["config"]["mm_processor_cache_gb"] == 0
    assert start["config"]["max_model_len"] >= 2691 + 200 + 64
    assert {"config.json", "preprocessor_config.json", "tokenizer.json"} <= {*start["files"]}
    assert "model.safetensors" not in start["files"]
    config = json.loads((model / "config.json").read_text())
    special = {config[f"{key}_token_id"]: "" for key in ("vision_start", "image", "vision_end")}
    vocab = config["text_config"]["vocab_size"]
    jobs = with_images(
        make_jobs(lengths(name), vocab), name, special | {config["video_token_id"]: ""}
    )
    for asked, (prompt, _, images) in zip(run["prompts"], jobs, strict=True):
        assert asked["prompt_token_ids"] == prompt
        assert asked["multi_modal_data"]["image"] == [["JPEG", 1920, 1080]] * len(images)


def test_the_peer_loads_no_tower_for_text(tmp_path: Path, site: Path) -> None:
    model = write_tiny_model(tmp_path / "sees", "Qwen2_5_VLForConditionalGeneration")
    done = offline(
        *("--engine", "vllm", "--model", str(model), "--peer-site", str(site)),
        *("--workloads", "fixed:1:4:2"),
    )
    assert done.returncode == 0, done.stderr
    start, *_ = map(json.loads, (site / "vllm/notes").read_text().splitlines())
    assert start["config"]["language_model_only"] and start["config"]["skip_tokenizer_init"]


def test_a_made_up_tokenizer_knows_the_places_of_images(tmp_path: Path) -> None:
    model = MODELS / "qwen2.5-vl-7b"
    write_tokenizer(model, tmp_path)
    tokenizer = Tokenizer(tmp_path)
    vocab, special = read_vocab(model)
    assert vocab == 152_064 and [*special] == [151652, 151655, 151653, 151656]
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    assert tokenizer.encode(place) == [151652, 151655, 151653]
    assert tokenizer.decode([30, 31]) == " 1e 1f"
    processor = read_processor(make_config({"model": str(model)}))
    assert processor is not None and processor.placeholder == 151655
    fit = processor.rule.fit(1080, 1920)
    assert fit.height * fit.width // 28**2 == IMAGE_TOKENS


def test_settings_of_a_text_model_are_found_beside_those_of_images(tmp_path: Path) -> None:
    inner = {"vocab_size": 9, "n_routed_experts": 2}
    (tmp_path / "config.json").write_text(json.dumps({"image_token_id": 7, "text_config": inner}))
    assert read_settings(tmp_path).items() >= inner.items()
    assert read_vocab(tmp_path) == (9, {7: "<|image_pad|>"})


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("short", "more or fewer tokens"),
        ("id", "outside the vocabulary"),
        ("exit", "vllm: its process ended with status 3"),
        ("hang", "vllm: not done after 3 s"),
    ],
)
def test_a_peer_that_cheats_or_fails_is_told(
    model: Path, site: Path, wrong: str, sentence: str
) -> None:
    done = offline(
        *("--engine", "vllm", "--model", str(model), "--peer-site", str(site)),
        *("--workloads", "fixed:2:5:4", "--timeout", "3"),
        WRONG=wrong,
    )
    assert done.returncode and sentence in done.stderr and "figures" not in done.stdout


def test_what_was_measured_is_told_if_the_peer_fails(
    model: Path, site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def drive(engine: str, *_: Any) -> dict[str, Any]:
        if engine == "vllm":
            raise SystemExit("vllm: no figures")
        run = {"seconds": 2.0, "first_token": 0.5, "steps": 4, "tokens": 8}
        return {"start_s": 1.0, "kv_tokens": 100, "fixed:2:5:4": [run]}

    monkeypatch.setattr("gllm_benchmarks.offline.drive", drive)
    asked = ["--engine", "both", "--model", str(model), "--peer-site", str(site)]
    monkeypatch.setattr(sys, "argv", ["offline", *asked, "--workloads", "fixed:2:5:4"])
    with pytest.raises(SystemExit, match="vllm: no figures"):
        main()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(line["figures"]) == ["ours"]


def test_a_peer_must_be_there(model: Path, tmp_path: Path) -> None:
    done = offline("--engine", "both", "--model", str(model), "--peer-site", str(tmp_path))
    assert done.returncode == 2 and "in which there is vllm" in done.stderr


def test_a_timeline_is_of_our_engine(model: Path, site: Path) -> None:
    asked = ("--engine", "vllm", "--model", str(model), "--peer-site", str(site))
    done = offline(*asked, "--timeline", "out.json")
    assert done.returncode == 2 and "--timeline: it is of our engine" in done.stderr


def test_the_models_by_name() -> None:
    sizes = {path.name: read_arch(path) for path in MODELS.iterdir()}
    assert {name: arch.vocab for name, arch in sizes.items()} == {
        "deepseek-v2-lite": 102_400,
        "gpt-oss-20b": 201_088,
        "llama-3.1-8b": 128_256,
        "llama-3.1-8b-fp8": 128_256,
        "qwen2.5-vl-7b": 152_064,
        "qwen3-0.6b": 151_936,
        "qwen3-30b-a3b": 151_936,
        "qwen3-30b-a3b-fp8": 151_936,
        "qwen3-32b": 151_936,
        "qwen3.5-35b-a3b": 248_320,
    }
    assert model_directory("qwen3-0.6b") == (MODELS / "qwen3-0.6b").resolve()
    with pytest.raises(SystemExit, match="none of deepseek-v2-lite, gpt-oss-20b, llama-3.1-8b"):
        model_directory("gpt")


def test_configurations() -> None:
    ours = parse_pairs(["max_num_seqs=512", "enforce_eager=true", "dtype=float16"])
    assert ours == {"max_num_seqs": 512, "enforce_eager": True, "dtype": "float16"}
    peer: dict[str, Any] = configure("vllm", ours, {"max_num_batched_tokens": 8192}, 8208)
    assert peer["max_model_len"] == 9216 and peer["max_num_seqs"] == 512
    assert peer["max_num_batched_tokens"] == 8192 and "enforce_eager" not in peer
    assert configure("ours", ours, {}, 8208)["enforce_eager"] is True
    with pytest.raises(SystemExit, match="'eager' is not KEY=VALUE"):
        parse_pairs(["eager"])


def launched_kernels() -> set[str]:
    """The names of the kernels of ours that are launched, as kernel[grid](...), not only called."""
    launched: set[str] = set()
    jitted: set[str] = set()
    for path in (Path(__file__).parents[2] / "gllm_engine/ops/triton").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                found = any("triton.jit" in ast.unparse(each) for each in node.decorator_list)
                jitted |= {node.name} if found else set()
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched.add(ast.unparse(node.func.value))
    return launched & jitted


def test_every_kernel_of_ours_has_a_kind() -> None:
    kinds = {kernel: kind_of(kernel) for kernel in launched_kernels()}
    assert len(kinds) > 40 and "other" not in kinds.values(), kinds
    experts = {"_route", "_count", "_place", "_sort_few", "_grouped", "_sum"}
    assert {kernel for kernel, kind in kinds.items() if kind == "experts"} == experts | {
        "_few_gate_up",
        "_few_down",
    }
    assert kinds["_choose"] == "sampling" and kinds["_choose_tokens"] == "indexer"
    assert kinds["_dequantize"] == "rounding to float8" and kinds["_dequantize_packed"] == "GEMM"
    assert kind_of("void splitKreduce_kernel<32, 16>") == "GEMM"
    assert kind_of("void at::native::reduce_kernel<512>") == "other"


def test_warm_up_is_bounded() -> None:
    jobs = make_jobs(lengths("prefill")[:6], 100)
    assert [(len(p), n) for p, n, _ in warm_up(jobs)] == [(8192, 8)] * 4
    assert [(len(p), n) for p, n, _ in warm_up(make_jobs([(10**5, 3)], 100))] == [(10**5, 3)]
    pictured = [Job([1] * 100, 9, ["a"] * 6)] * 4
    assert warm_up(pictured) == [Job([1] * 100, 8, ["a"] * 6)] * 2


def test_the_median_is_told() -> None:
    runs = [{"seconds": s, "tokens": 1} for s in (5.0, 1.0, 3.0)]
    assert summarize(runs) == {"seconds": 3.0, "tokens": 1, "all_seconds": [5.0, 1.0, 3.0]}
    assert summarize(runs[:2])["seconds"] == 5.0
