"""docker/Dockerfile as data: its instructions in order, as far as ours goes."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "docker/Dockerfile"


def instructions(name: str | None = None) -> list[tuple[str, str]]:
    """(name, the rest) of each instruction, with lines that go on joined; of one name, or all."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    pairs = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(kind, rest) for kind, rest in pairs if name in (None, kind)]


def environment() -> dict[str, str]:
    """What ENV sets."""
    pairs = [word.split("=", 1) for _, rest in instructions("ENV") for word in rest.split()]
    return {pair[0]: pair[1] for pair in pairs}


def command() -> list[str]:
    """What a container runs unless it is told otherwise."""
    ((_, text),) = instructions("CMD")
    return [str(word) for word in json.loads(text)]


def exposed_ports() -> set[int]:
    return {int(port) for _, rest in instructions("EXPOSE") for port in rest.split()}
