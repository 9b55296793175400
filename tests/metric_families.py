"""The metrics of the backend as its source declares them; importing it needs a Triton stub."""

from __future__ import annotations

import ast
from pathlib import Path

from gllm_client.openai_server.pages import MALFORMED_CALLS

BACKEND = Path(__file__).resolve().parents[1] / "backend/gllm"


def families() -> dict[str, tuple[str, str]]:
    """Name without "gllm:" -> (kind, help)."""
    tree = ast.parse((BACKEND / "metrics.py").read_text())
    assigned = {ast.unparse(n.targets[0]): n for n in tree.body if isinstance(n, ast.Assign)}
    found: dict[str, tuple[str, str]] = ast.literal_eval(assigned["FAMILIES"].value)
    return found


# Series of the OpenAI server's own page -> their labels. All are counters.
OPENAI_SERVER = {MALFORMED_CALLS: {"model", "format", "process"}}


def counted_labels() -> dict[str, set[str]]:
    """The labels of a counter besides model and version, from the calls that count."""
    found: dict[str, set[str]] = {"prefix_cache_snapshot_hits_total": {"kind"}}
    for node in ast.walk(ast.parse((BACKEND / "model.py").read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "count":
            name = ast.literal_eval(node.args[0])
            found.setdefault(name, set()).update(str(keyword.arg) for keyword in node.keywords)
    return found
