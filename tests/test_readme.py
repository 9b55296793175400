"""What the README says that a machine can hold against the code."""

from __future__ import annotations

import re
from pathlib import Path

from gllm_engine import EngineConfig, SamplingParams
from gllm_engine.arch import FAMILIES

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_configuration_key_is_in_the_table_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|([^|]*)\|", section("Configuration"), re.MULTILINE))
    assert list(rows) == list(EngineConfig.__struct_fields__)
    config = EngineConfig(model=".")
    for key, told in rows.items():
        default = getattr(config, key)
        if default not in (None, ".", 0):  # these defaults are told in words
            spelled = f"{default:g}" if key == "drain_timeout_s" else str(default)
            assert told.strip("` ").lower() == spelled.lower(), key


def test_every_sampling_parameter_is_named() -> None:
    told = set(re.findall(r"`(\w+)`", section("What a request may say")))
    assert set(SamplingParams.__struct_fields__) <= told


def test_every_family_is_in_the_table() -> None:
    told = set(re.findall(r"`(\w+)`", section("Models").split("RoPE scaling")[0]))
    assert told == set(FAMILIES)
