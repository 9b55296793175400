"""What README and docs say that a machine can hold against the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from metric_families import families

from gllm_engine import EngineConfig, SamplingParams
from gllm_engine.arch import FAMILIES
from gllm_engine.images.decode import DECODED_BYTES, WEBP_BYTES
from gllm_engine.images.processor import RESIZED_BYTES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").glob("*.md"))


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_configuration_key_is_in_the_table_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|([^|]*)\|", section("Configuration"), re.MULTILINE))
    assert list(rows) == list(EngineConfig.__struct_fields__)
    config = EngineConfig(model=".")
    for key, told in rows.items():
        default = getattr(config, key)
        if default not in (None, ".", 0):  # these defaults are told in words
            spelled = f"{default:g}" if isinstance(default, float) else str(default)
            spelled = spelled.replace("()", "[]")  # as JSON has it
            assert told.strip("` ").lower() == spelled.lower(), key


def test_every_sampling_parameter_is_named() -> None:
    told = set(re.findall(r"`(\w+)`", (ROOT / "docs/requests.md").read_text()))
    assert set(SamplingParams.__struct_fields__) <= told


def test_every_family_is_in_the_table() -> None:
    told = set(re.findall(r"`(\w+)`", section("Models").split("RoPE scaling")[0]))
    assert told == FAMILIES.keys()


def table(page: str, title: str) -> list[list[str]]:
    """Cells of the rows of the table under a heading."""
    text = (ROOT / page).read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in re.split(r" \| ", line.strip("|"))] for line in lines]


def test_every_metric_is_in_the_table() -> None:
    expected = [[f"`gllm:{n}`", kind.lower(), text] for n, (kind, text) in families().items()]
    assert table("docs/operations.md", "Metrics") == expected


def test_every_log_line_is_in_the_source() -> None:
    """The words between what changes (N, ..., a letter) stand in the product's code."""
    files = [p for top in ("gllm_engine", "client", "backend") for p in (ROOT / top).rglob("*.py")]
    code = "".join(path.read_text() for path in files)
    rows = table("docs/operations.md", "Log lines")
    assert len(rows) > 5
    for line, _ in rows:
        for words in re.split(r"\.\.\.|\b[A-Z]\b|[\[\]():]", line.strip("`")):
            assert words.strip(" ,") in code, f"{line}: {words!r}"


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_something_follows_a_colon(page: Path) -> None:
    """A list, a table, code or a picture, not the next thought."""
    assert not re.search(r".*:\n\n(?![-|`*!<\d ]).*", page.read_text())


def test_the_memory_of_an_image_is_told_as_it_is_counted() -> None:
    images = (ROOT / "docs/images.md").read_text()
    sizes = f"{DECODED_BYTES} bytes a pixel, of WEBP {WEBP_BYTES}, and {RESIZED_BYTES} for"
    assert sizes in images
    for page in PAGES:  # once, so that no page tells otherwise
        told = re.findall(r"\d+\s+bytes\s+a\s+pixel", page.read_text())
        assert len(told) == (page.name == "images.md"), page.name
