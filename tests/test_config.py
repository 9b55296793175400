"""EngineConfig: what is refused, and with which sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from gllm_engine import ConfigError, make_config, read_config


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"model": ".", "gpu_memory": 1}', "unknown key 'gpu_memory'; known keys are model,"),
        ('{"model": ".", "page_size": 24}', "page_size: 24 is not a power of two"),
        ('{"model": ".", "max_num_seqs": -1}', r"max_num_seqs: -1 is outside \[0, 16384\]"),
        ('{"model": ".", "max_num_seqs": "many"}', "Expected int, got str - at $.max_num_seqs"),
        (
            '{"model": ".", "max_num_seqs": 8, "max_num_batched_tokens": 4}',
            "max_num_batched_tokens: 4 is less than max_num_seqs=8",
        ),
        ('{"model": ".", "seed": 1, "seed": 2}', "key 'seed' comes twice"),
        ('{"model": "nowhere"}', "nowhere is not a directory"),
        ("{}", "missing required field model"),
        ("[]", "expected a JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_a_bad_model_json_is_refused_with_a_sentence(
    tmp_path: Path, text: str, problem: str
) -> None:
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(ConfigError, match=problem.replace("$", r"\$")):
        read_config(tmp_path / "model.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model.json: cannot be read"):
        read_config(tmp_path / "model.json")


def test_paths_are_taken_from_the_files_directory(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "model.json").write_text('{"model": "weights"}')
    assert read_config(tmp_path / "model.json").model == str(tmp_path / "weights")
    assert make_config({"model": "."}).model == str(Path.cwd())
