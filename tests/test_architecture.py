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
# Tokens of code, so that neither formatting nor dense statements win anything.
TOKEN_BUDGETS = {
    ("gllm_engine",): 246_150,
    ("backend", "client"): 74_500,
    ("benchmarks",): 31_800,
}
MAX_FUNCTION_LINES = 60

# What a part may import of ours; the standard library is always allowed.
OURS = {
    "gllm_engine/sampling.py": set(),
    "gllm_engine/files.py": set(),
    "gllm_engine/routing.py": set(),
    "gllm_engine/attention_shape.py": set(),
    "gllm_engine/config.py": {"files", "sampling"},
    "gllm_engine/types.py": {"sampling"},
    "gllm_engine/arch": {"types", "config", "files", "routing", "attention_shape", "arch"},
    "gllm_engine/sched/rotary.py": {"types"},
    "gllm_engine/sched": {"types", "config", "sampling", "arch", "sched"},
    "gllm_engine/parallel": {"types", "parallel"},
    "gllm_engine/ops": {"types", "routing", "attention_shape", "ops"},
    "gllm_engine/layers": {"ops", "parallel", "arch", "layers"},
    "gllm_engine/model": {"files", "layers", "ops", "parallel", "arch", "model"},
    "gllm_engine/timeline": {"types", "config", "files", "timeline"},
    "gllm_engine/runner": {
        "model", "ops", "parallel", "types", "sampling", "arch", "config", "timeline", "runner",
    },
    "gllm_engine/software.py": {""},
    "gllm_engine/socket_directory.py": set(),
    "gllm_engine/heartbeat.py": set(),
    "gllm_engine/workers/channel.py": {"config", "files", "heartbeat", "software"},
    "gllm_engine/wire.py": {"types", "config", "sampling"},
    "gllm_engine/images/resize.py": set(),
    "gllm_engine/images/video_decoder.py": {"images", "os_process"},
    "gllm_engine/images/fetch.py": {"config", "files", "sampling"},
    "gllm_engine/images/spread.py": set(),
    "gllm_engine/images/pixels.py": {"images"},
    "gllm_engine/images/decode.py": {"files", "sampling", "images"},
    "gllm_engine/images/read.py": {"config", "files", "arch", "images"},
    "gllm_engine/images": {"types", "config", "files", "sampling", "images"},
    "gllm_engine/os_process.py": set(),
    "gllm_engine/text/template_source.py": set(),
    "gllm_engine/text/template_renderer.py": {"os_process", "text"},
    "gllm_engine/text": {"types", "config", "files", "sampling", "os_process", "text"},
    "gllm_engine/workers": {
        "types", "config", "files", "sampling", "arch", "parallel", "model", "runner", "wire",
        "os_process", "socket_directory", "timeline", "workers",
    },
    "gllm_engine/engine": {
        "types", "config", "sampling", "arch", "sched", "model", "runner", "text", "images", "wire",
        "heartbeat", "os_process", "socket_directory", "software", "timeline", "workers", "engine",
    },
    "gllm_engine/worker.py": {"workers"},
    "gllm_engine/encoder.py": {"workers"},
    "backend": {"", "gllm_backend"},
    "client/openai_server": {"gllm_client"},
    "client": {"", "gllm_client"},
    "benchmarks/peer.py": set(),
    "benchmarks/kernels.py": {"", "ops", "arch", "gllm_benchmarks"},
    "benchmarks/plot.py": set(),
    "benchmarks/ours.py": {"", "images"},
    "benchmarks/workloads.py": set(),
    "benchmarks": {"", "gllm_client", "gllm_benchmarks"},
}  # fmt: skip
# What a part may import of others.
OTHERS = {
    "gllm_engine/sampling.py": {"msgspec"},
    "gllm_engine/files.py": set(),
    "gllm_engine/routing.py": set(),
    "gllm_engine/attention_shape.py": set(),
    "gllm_engine/config.py": {"msgspec"},
    "gllm_engine/types.py": {"msgspec"},
    "gllm_engine/arch": {"msgspec"},
    "gllm_engine/sched/rotary.py": {"numpy"},
    "gllm_engine/sched": {"msgspec"},
    "gllm_engine/parallel": {"torch"},
    "gllm_engine/worker.py": set(),
    "gllm_engine/encoder.py": set(),
    "gllm_engine/ops": {"torch", "numpy", "triton", "flashinfer"},
    "gllm_engine/layers": {"torch"},
    "gllm_engine/model": {"torch", "safetensors", "tokenizers", "tqdm"},
    "gllm_engine/timeline": {"msgspec"},
    "gllm_engine/runner": {"torch", "numpy"},
    "gllm_engine/heartbeat.py": {"zmq"},
    "gllm_engine/workers/channel.py": {"zmq"},
    "gllm_engine/wire.py": {"msgspec"},
    "gllm_engine/images/resize.py": set(),
    "gllm_engine/images/fetch.py": set(),
    "gllm_engine/images/spread.py": set(),
    "gllm_engine/images/decode.py": {"PIL"},
    "gllm_engine/images/pixels.py": {"PIL"},
    "gllm_engine/images/read.py": set(),
    "gllm_engine/images/video_decoder.py": {"av", "PIL", "msgspec"},
    "gllm_engine/images": {"msgspec"},
    "gllm_engine/os_process.py": {"msgspec"},
    "gllm_engine/text/template_source.py": {"jinja2"},
    "gllm_engine/text/template_renderer.py": set(),
    "gllm_engine/software.py": set(),
    "gllm_engine/socket_directory.py": set(),
    "gllm_engine/text": {"msgspec", "tokenizers", "transformers", "llguidance", "numpy"},
    "gllm_engine/workers": {"torch", "zmq", "msgspec"},
    "gllm_engine/engine": {"torch", "msgspec", "zmq", "tqdm"},
    "backend": {"msgspec", "numpy", "triton_python_backend_utils"},
    "client/openai_server": {"msgspec", "fastapi", "starlette", "uvicorn", "opentelemetry"},
    "client": {"msgspec", "numpy", "tritonclient", "grpc", "tqdm", "yaml"},
    "benchmarks/peer.py": {"vllm", "PIL"},
    "benchmarks/kernels.py": {"torch"},
    "benchmarks/plot.py": {"matplotlib"},
    "benchmarks/ours.py": {"torch", "msgspec"},
    "benchmarks/workloads.py": {"PIL"},
    "benchmarks": {"numpy", "tritonclient", "tqdm", "torch", "msgspec", "aiohttp"},
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


def count_tokens(source: str) -> int:
    """Tokens of code: no comments, docstrings, line ends or indentation."""
    layout = {
        tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
        tokenize.ENDMARKER, tokenize.ENCODING,
    }  # fmt: skip
    count = 0
    starts_statement = True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        docstring = starts_statement and token.type == tokenize.STRING
        if token.type not in layout and not docstring:
            count += 1
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            starts_statement = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    return count


def test_tokens_are_counted_right() -> None:
    body = ['"""Doc."""', "", "# why", "def f(x):", '    """Doc', '    more."""']
    body += ["    y = [1,", "         2]", "    return y", ""]
    assert count_tokens("\n".join(body)) == 6 + 7 + 2
    one_line = "def f(x):\n    y = [1, 2]; return y\n"
    assert count_tokens(one_line) == 6 + 7 + 1 + 2  # no gain: a semicolon is a token


@pytest.mark.parametrize("folders", TOKEN_BUDGETS, ids="+".join)
def test_size_budget(folders: tuple[str, ...]) -> None:
    files = [p for p in product_files() if p.relative_to(ROOT).parts[0] in folders]
    total = sum(count_tokens(p.read_text()) for p in files)
    budget = TOKEN_BUDGETS[folders]
    assert total <= budget, f"{total} tokens of code in {folders}, the budget is {budget}"


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


def has_swap(targets: list[ast.expr], values: list[ast.expr]) -> bool:
    """Whether a value needs what an earlier target was: then one statement is right."""
    assigned: set[str] = set()
    for target, value in zip(targets, values, strict=True):
        if assigned & {ast.unparse(node) for node in ast.walk(value)}:
            return True
        assigned.add(ast.unparse(target))
    return False


def squeezed(tree: ast.AST) -> list[int]:
    """Lines with several assignments in one, or with arguments out of a starred tuple."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            starred = [arg.value for arg in node.args if isinstance(arg, ast.Starred)]
            if any(isinstance(value, ast.Tuple) for value in starred):
                lines.append(node.lineno)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            target = node.targets[0]
            if isinstance(target, ast.Tuple) and not has_swap(target.elts, node.value.elts):
                lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", product_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_statements_are_not_squeezed(path: Path) -> None:
    """One assignment a statement, arguments as they are, layout by the formatter.

    Triton's kernels are let off: they assign vectors in pairs, and lay out long lists of arguments.
    """
    if not path.is_relative_to(ROOT / "gllm_engine/ops/triton"):
        source = path.read_text()
        assert "# fmt: skip" not in source
        assert not squeezed(ast.parse(source))


def test_a_swap_is_told_from_a_squeezed_statement() -> None:
    assert not squeezed(ast.parse("a, b = b, a\nf(*args)"))
    assert squeezed(ast.parse("a, b = 1, 2\nx.a, b = 1, x.a\nf(*(1, 2), 3)")) == [1, 3]


def test_test_modules_have_names_of_their_own() -> None:
    """pytest imports them by their bare names."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert len(names) == len(set(names))
