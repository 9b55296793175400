"""The start benchmark: a checkpoint that fits its config, and starts that are timed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from gllm_benchmarks import start
from gllm_engine.spec.tiny import tiny_config


def test_starts_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(tiny_config("GlmForCausalLM")))
    monkeypatch.setattr(start, "_FILE_BYTES", 1 << 14)  # several files
    command = ["start", "--model", str(model), "--repeat", "1", "--directory", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--config", "num_pages=64"])
    start.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert figures["config"] == {"num_pages": 64} and len(figures["start_s"]) == 1
    assert 0 < figures["start_s"][0] < 60 and figures["checkpoint_gb"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
