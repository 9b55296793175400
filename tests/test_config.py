"""EngineConfig: what is refused, with which sentence, and what is left to the device."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args, get_type_hints

import msgspec
import pytest

from gllm_engine import PATH_KEYS, ConfigError, EngineConfig, make_config, read_config
from gllm_engine.config import settle


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"model": ".", "gpu_memory": 1}', "unknown key 'gpu_memory'; known keys are model,"),
        ('{"model": ".", "page_size": 24}', "page_size: 24 is not a power of two"),
        ('{"model": ".", "max_num_seqs": -1}', r"max_num_seqs: -1 is outside \[0, 16384\]"),
        (
            '{"model": ".", "prefill_drain_steps": 0}',
            r"prefill_drain_steps: 0 is outside \[1, 1024\]",
        ),
        (
            '{"model": ".", "min_prefill_tokens": 0}',
            r"min_prefill_tokens: 0 is outside \[1, 1048576\]",
        ),
        (
            '{"model": ".", "schedule_policy": "throttled"}',
            "Invalid enum value 'throttled' - at $.schedule_policy",
        ),
        (
            '{"model": ".", "kv_cache_dtype": "int8"}',
            "Invalid enum value 'int8' - at $.kv_cache_dtype",
        ),
        ('{"model": ".", "max_num_seqs": "many"}', "Expected int, got str - at $.max_num_seqs"),
        (
            '{"model": ".", "max_num_seqs": 8, "max_num_batched_tokens": 4}',
            "max_num_batched_tokens: 4 is less than max_num_seqs=8",
        ),
        (
            '{"model": ".", "pipeline_parallel_size": 0}',
            r"pipeline_parallel_size: 0 is outside \[1, 64\]",
        ),
        (
            '{"model": ".", "tensor_parallel_size": 3, "nnodes": 2}',
            "nnodes: 3 ranks .* are not shared out evenly among 2 nodes",
        ),
        (
            '{"model": ".", "tensor_parallel_size": 2, "nnodes": 2}',
            "master_addr: it is needed with nnodes=2",
        ),
        (
            '{"model": ".", "tensor_parallel_size": 2, "nnodes": 2, "master_addr": "10.0.0.1"}',
            "cluster_key_file: it is needed with nnodes=2",
        ),
        (
            '{"model": ".", "spare_layers": 2}',
            "spare_layers: 2 is for layers that move between stages, and there is one stage",
        ),
        (
            '{"model": ".", "encoder_workers": 1, "tensor_parallel_size": 2, "nnodes": 2, '
            '"master_addr": "10.0.0.1", "cluster_key_file": "key"}',
            "encoder_workers: 1 is for ranks of one machine, .* the 2 ranks of the first stage",
        ),
        ('{"model": ".", "encoder_workers": 65}', r"encoder_workers: 65 is outside \[0, 64\]"),
        (
            '{"model": ".", "encoder_workers": 1, "device": "none"}',
            "encoder_workers: 1 is for a model that takes images, and with device=none",
        ),
        (
            '{"model": ".", "encoder_workers": 1, "master_addr": "10.0.0.1"}',
            "cluster_key_file: it is needed with master_addr, for encoders of other machines",
        ),
        *(
            (
                f'{{"model": ".", "master_addr": "{address}"}}',
                f"'{re.escape(address)}' is not an address of this machine",
            )
            for address in ("0.0.0.0", "::", "fe80::1", "leader.example", "10.0.0.1:1", "[fd00::1]")
        ),
        *(
            (
                f'{{"model": ".", "pipeline_parallel_size": 2, "assigned_layers": "{layers}"}}',
                f"assigned_layers: '{layers}' is not 2 numbers above 0 with commas between",
            )
            for layers in (
                "",
                "4",
                "1,2,3",
                "4,0",
                "4,-1",
                "4,x",
                "4,1.5",
                "4,,4",
                "4;4",
                "4,10000",
            )
        ),
        *(
            (f'{{"model": ".", "tenant_weights": {text}}}', f"tenant_weights.*{problem}")
            for text, problem in (
                ('{"a": 0}', r"0.0 of 'a' is outside \[0.001, 1000\]"),
                ('{"a": 1e400}', "inf of 'a' is outside"),
                ('{"other": 2}', "'other' means all tenants without a weight"),
                (f'{{"{"x" * 129}": 2}}', "is not a text of 128 characters at most"),
                (r'{"\ud800": 2}', "ud800' is not a text of 128"),
                (str({str(i): 1 for i in range(1025)}).replace("'", '"'), "1025 tenants are named"),
            )
        ),
        *(
            (
                f'{{"model": ".", "allowed_media_hosts": ["a.example", "{host}"]}}',
                f"allowed_media_hosts: {re.escape(repr(host))} is not a host such as",
            )
            for host in (
                "",
                "https://a.example",
                "a.example:80",
                "*.example",
                "a..b",
                "[::1]",
            )
        ),
        (
            '{"model": ".", "allowed_media_hosts": "a.example"}',
            "Expected array, got str - at $.allowed_media_hosts",
        ),
        (
            '{"model": ".", "allowed_media_directory": "missing"}',
            "allowed_media_directory: .*missing is not a directory",
        ),
        ('{"model": ".", "max_images": 0}', r"max_images: 0 is outside \[1, 4096\]"),
        ('{"model": ".", "tenant_weights": 3}', "Expected object, got int - at $.tenant_weights"),
        ('{"model": ".", "seed": 1, "seed": 2}', "key 'seed' comes twice"),
        ('{"model": "nowhere"}', "nowhere is not a directory"),
        ("{}", "missing required field model"),
        ("[]", "a JSON object is expected"),
        ("{", "not valid JSON"),
    ],
)
def test_a_bad_model_json_is_refused_with_a_sentence(
    tmp_path: Path, text: str, problem: str
) -> None:
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(ConfigError, match=problem.replace("$", r"\$")):
        read_config(tmp_path / "model.json")


def number_fields() -> list[str]:
    hints = get_type_hints(EngineConfig)
    numbers = [name for name, hint in hints.items() if {int, float} & {hint, *get_args(hint)}]
    return [name for name in numbers if name != "tenant_weights"]  # numbers by name


@pytest.mark.parametrize("name", number_fields())
def test_every_number_has_a_range(tmp_path: Path, name: str) -> None:
    """Whichever way JSON can say a number that is none of use, the key is named, briefly."""
    (tmp_path / "model").mkdir()
    for text in ("NaN", "Infinity", "1e400", "9" * 400, "-" + "9" * 400, "-1", "true", '"8"', "[]"):
        (tmp_path / "model.json").write_text(f'{{"model": "model", "{name}": {text}}}')
        with pytest.raises(ConfigError, match=name) as caught:
            read_config(tmp_path / "model.json")
        assert len(str(caught.value)) < 200 + len(str(tmp_path))
    with pytest.raises(ConfigError, match=name):
        EngineConfig(model="m", **{name: 10**5000})


def test_long_layers_are_not_repeated() -> None:
    with pytest.raises(ConfigError, match=r"assigned_layers: '9{47}\.\.\.9{47}' is not 1 numbers"):
        EngineConfig(model="m", assigned_layers="9" * 5000)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model.json: cannot be read"):
        read_config(tmp_path / "model.json")


def test_paths_are_taken_from_the_files_directory(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "model.json").write_text('{"model": "weights"}')
    assert read_config(tmp_path / "model.json").model == str(tmp_path / "weights")
    assert make_config({"model": "."}).model == str(Path.cwd())
    config = make_config({"model": ".", **dict.fromkeys(PATH_KEYS, "weights")}, tmp_path)
    assert {getattr(config, key) for key in PATH_KEYS} == {str(tmp_path / "weights")}


def test_every_path_is_taken_so() -> None:
    """Of the keys whose value is a text, all others are no paths."""
    texts = {
        field.name
        for field in msgspec.structs.fields(EngineConfig)
        if field.type in (str, str | None)
    }
    assert texts - {"model", *PATH_KEYS} == {"assigned_layers", "master_addr"}


def test_hosts_are_names_and_addresses() -> None:
    hosts = ["images.example.com", "Intra_net", "10.0.0.1", "fd00::1"]
    assert make_config({"model": ".", "allowed_media_hosts": hosts}).allowed_media_hosts == (
        *hosts,
    )


def test_layers_of_stages() -> None:
    def stage_layers(text: str | None) -> tuple[int, ...] | None:
        config = {"model": ".", "pipeline_parallel_size": 3, "assigned_layers": text}
        return make_config(config).stage_layers()

    assert stage_layers(None) is None
    assert stage_layers("16,17, 15") == (16, 17, 15)


def test_the_policy_of_a_pipeline_is_throttling() -> None:
    assert EngineConfig(model=".", tensor_parallel_size=2).policy == "chunked_prefill"
    pipeline = EngineConfig(model=".", pipeline_parallel_size=2)
    assert pipeline.policy == "token_throttling"
    chosen = msgspec.structs.replace(pipeline, schedule_policy="chunked_prefill")
    assert chosen.policy == "chunked_prefill"


GIB = 1 << 30
# Bytes of a GPU.
CPU, GPU = None, 80 * GIB


def chosen(memory: int | None, state_bytes: int = 0, **values: int) -> tuple[int, int, int]:
    config = settle(EngineConfig(model=".", **values), memory, state_bytes)
    return config.max_num_seqs, config.max_num_batched_tokens, config.plans_in_flight


def test_defaults_fit_the_device() -> None:
    assert chosen(CPU) == (256, 2048, 1)
    assert chosen(GPU) == (1024, 8192, 2)
    assert chosen(CPU, pipeline_parallel_size=3)[2] == 4
    assert chosen(GPU, pipeline_parallel_size=3)[2] == 4


def test_states_take_a_quarter_of_a_gpu_at_most() -> None:
    state = 63 << 20  # of Qwen3.5-35B-A3B
    assert chosen(CPU, state)[0] == 64
    assert chosen(GPU, state)[0] == 256
    assert chosen(139 * GIB, state)[0] == 512
    assert chosen(GPU, state, tensor_parallel_size=2)[0] == 512
    assert chosen(GPU, state, pipeline_parallel_size=4)[0] == 1024
    assert chosen(GPU, state, pipeline_parallel_size=2, spare_layers=1)[0] == 256
    assert chosen(GPU, 1 << 20)[0] == 1024
    assert chosen(GPU, 40 * GIB)[0] == 1


@pytest.mark.parametrize("memory", [CPU, GPU])
def test_what_was_asked_for_stays(memory: int | None) -> None:
    asked = {"max_num_seqs": 7, "max_num_batched_tokens": 70, "plans_in_flight": 3}
    assert chosen(memory, 1 << 40, **asked) == (7, 70, 3)


def test_one_default_gives_way_to_the_other_number() -> None:
    assert chosen(CPU, max_num_batched_tokens=16)[:2] == (16, 16)
    assert chosen(CPU, max_num_seqs=4096)[:2] == (4096, 4096)
