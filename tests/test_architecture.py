"""The rules of the house that a machine can check: who imports whom, how large it all is."""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("gllm_engine", "backend", "client", "benchmarks")
MAX_CODE_LINES = 12_000
MAX_FUNCTION_LINES = 60

# What a part may import of ours; the standard library is always allowed.
OURS = {
    "gllm_engine/sampling.py": set(),
    "gllm_engine/config.py": set(),
    "gllm_engine/types.py": {"sampling"},
    "gllm_engine/spec": {"types", "config", "spec"},
    "gllm_engine/sched": {"types", "config", "sampling", "spec", "sched"},
    "gllm_engine/dist": {"types", "dist"},
    "gllm_engine/ops": {"types", "ops"},
    "gllm_engine/layers": {"ops", "dist", "spec", "layers"},
    "gllm_engine/model": {"layers", "ops", "dist", "spec", "model"},
    "gllm_engine/runner": {"model", "ops", "dist", "types", "sampling", "spec", "config", "runner"},
    "gllm_engine/engine/cluster.py": {"", "config"},
    "gllm_engine/engine": {
        "types", "config", "sampling", "spec", "sched", "dist", "model", "runner", "engine",
    },
    "gllm_engine/worker.py": {"engine"},
    "backend": {"", "gllm_backend"},
    "client": {"", "gllm_client"},
    "benchmarks/peer.py": set(),
    "benchmarks/kernels.py": {"", "ops", "spec", "gllm_benchmarks"},
    "benchmarks/plot.py": set(),
    "benchmarks": {"", "gllm_client", "gllm_benchmarks"},
}  # fmt: skip
# What a part may import of others.
OTHERS = {
    "gllm_engine/sampling.py": {"msgspec"},
    "gllm_engine/config.py": {"msgspec"},
    "gllm_engine/types.py": {"msgspec"},
    "gllm_engine/spec": {"msgspec"},
    "gllm_engine/sched": {"msgspec"},
    "gllm_engine/dist": {"torch"},
    "gllm_engine/worker.py": set(),
    "gllm_engine/ops": {"torch", "numpy", "triton", "flashinfer"},
    "gllm_engine/layers": {"torch"},
    "gllm_engine/model": {"torch", "safetensors", "tokenizers"},
    "gllm_engine/runner": {"torch", "numpy"},
    "gllm_engine/engine/cluster.py": {"torch", "zmq"},
    "gllm_engine/engine": {
        "torch", "msgspec", "zmq", "tokenizers", "transformers", "llguidance", "tqdm", "numpy",
    },
    "backend": {"msgspec", "numpy", "triton_python_backend_utils"},
    "client": {"msgspec", "numpy", "tritonclient", "grpc", "tqdm", "yaml"},
    "benchmarks/peer.py": {"vllm"},
    "benchmarks/kernels.py": {"torch"},
    "benchmarks/plot.py": {"matplotlib"},
    "benchmarks": {"numpy", "tritonclient", "tqdm", "torch", "msgspec"},
}  # fmt: skip


def part_of(path: Path) -> str:
    name = path.relative_to(ROOT).as_posix()
    return next((part for part in OURS if name == part or name.startswith(part + "/")), "")


def product_files() -> list[Path]:
    return sorted(p for top in PRODUCT for p in (ROOT / top).rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(part: str, names: set[str]) -> list[str]:
    bad = []
    for name in sorted(names):
        top, _, rest = name.partition(".")
        if top == "gllm_engine":
            # "from gllm_engine import X" reaches a public name; anything deeper is a package.
            first = rest.split(".")[0]
            home = ROOT / "gllm_engine" / first
            inside = first if home.exists() or home.with_suffix(".py").exists() else ""
            if inside not in OURS[part]:
                bad.append(name)
        elif top.startswith("gllm_"):
            if top not in OURS[part]:
                bad.append(name)
        elif top not in sys.stdlib_module_names and top not in OTHERS[part]:
            bad.append(name)
    return bad


@pytest.mark.parametrize("path", product_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    if path == ROOT / "gllm_engine/__init__.py" or path.read_text().strip() == "":
        return
    part = part_of(path)
    assert part, f"{path} belongs to no part of the table"
    assert not violations(part, imports(path))


def test_the_import_rule_can_fail() -> None:
    assert violations("gllm_engine/sched", {"torch", "gllm_engine.runner.runner.Runner"})
    assert violations("backend", {"gllm_engine.engine.client.EngineClient"})
    assert not violations("backend", {"gllm_engine.EngineClient", "os"})


def code_lines(source: str) -> int:
    """Lines that hold code: no blanks, comments or docstrings."""
    lines: set[int] = set()
    skip = {
        tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
        tokenize.ENDMARKER, tokenize.ENCODING,
    }  # fmt: skip
    starts_statement = True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        docstring = starts_statement and token.type == tokenize.STRING
        if token.type not in skip and not docstring:
            lines |= set(range(token.start[0], token.end[0] + 1))
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            starts_statement = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    return len(lines)


def test_code_lines_are_counted_right() -> None:
    body = ['"""Doc."""', "", "# why", "def f(x):", '    """Doc', '    more."""']
    body += ["    y = [1,", "         2]", "    return y", ""]
    assert code_lines("\n".join(body)) == 4


def test_size_budget() -> None:
    total = sum(code_lines(p.read_text()) for p in product_files())
    assert total <= MAX_CODE_LINES, f"{total} lines of code, the budget is {MAX_CODE_LINES}"


@pytest.mark.parametrize("path", product_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_fit_a_screen(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", product_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_says_what_it_owns(path: Path) -> None:
    source = path.read_text()
    assert source == "" or ast.get_docstring(ast.parse(source)), f"{path} has no docstring"
