"""Evaluations by other people's harnesses, which are run as programs: lm-eval, BFCL, lmms-eval.

This module owns their commands and where their results lie. Nothing is fetched: a data set lies in
--data under its name on the Hugging Face hub, and the harness runs there with the hub switched off.
"""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

from gllm_benchmarks.record import Figures

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
SERVER = "num_concurrent={concurrency},timeout={timeout:.0f},model={model},base_url={url}"
LM_EVAL = (
    "lm_eval --model local-chat-completions --apply_chat_template --output_path {out} "
    f"--model_args {SERVER}/chat/completions --tasks "
)
LMMS_EVAL = f"lmms-eval --model openai --output_path {{out}} --model_args {SERVER} --tasks "
BFCL = (
    "bfcl generate --num-threads {concurrency} --skip-server-setup --model {model} "
    "--test-category single_turn",
    "bfcl evaluate --model {model} --test-category single_turn",
)


class Task(NamedTuple):
    """`package`: what pip installs. `commands`: in words, with fields. `data`: is in --data."""

    package: str
    commands: tuple[str, ...]
    data: tuple[str, ...] = ()


TASKS = {
    "gsm8k": Task("lm-eval[api]", (LM_EVAL + "gsm8k",), ("openai/gsm8k",)),
    "mmlu_pro": Task("lm-eval[api]", (LM_EVAL + "mmlu_pro",), ("TIGER-Lab/MMLU-Pro",)),
    "ifeval": Task(
        "lm-eval[api,ifeval]",
        (LM_EVAL + "ifeval",),
        ("google/IFEval", "nltk_data/tokenizers/punkt_tab"),
    ),
    "mmmu": Task("lmms-eval", (LMMS_EVAL + "mmmu_val",), ("lmms-lab-encoder/MMMU",)),
    "bfcl": Task("bfcl-eval", BFCL),  # its data are in its package
}


def run(arguments: Namespace) -> Figures:
    """The harness's own figures. Raises SystemExit with a sentence."""
    package, lines, data = TASKS[arguments.task]
    program = lines[0].split()[0]
    if shutil.which(program) is None:
        raise SystemExit(
            f"{arguments.task}: the program {program} is not installed; "
            f"pip install '{package}', in an environment of its own if you like, on PATH"
        )
    directory = (arguments.data or Path()).resolve()
    for part in data:
        if arguments.data is None or not (directory / part).is_dir():
            raise SystemExit(f"{arguments.task}: --data must be a directory that holds {part}")
    with tempfile.TemporaryDirectory(prefix="gllm-evaluate-") as out:
        url = arguments.url.rstrip("/").removesuffix("/v1") + "/v1"
        key = arguments.api_key_file.read_text().strip() if arguments.api_key_file else "none"
        # The names by which the harnesses know the server, its key and their folders.
        variables = OFFLINE | {"HF_HOME": f"{out}/hf", "BFCL_PROJECT_ROOT": out}
        variables["NLTK_DATA"] = str(directory / "nltk_data")
        for name in ("OPENAI", "REMOTE_OPENAI"):
            variables |= {f"{name}_BASE_URL": url, f"{name}_API_KEY": key}
        for line in lines:
            words = [
                word.format_map(vars(arguments) | {"url": url, "out": out}) for word in line.split()
            ]
            words += shlex.split(arguments.harness_args)
            done = subprocess.run(words, cwd=directory, env=os.environ | variables)
            if done.returncode:
                raise SystemExit(f"{arguments.task}: {line[:40]} ... failed: {done.returncode}")
        return read_results(Path(out))


def read_results(out: Path) -> Figures:
    """The results of lm-eval or lmms-eval, or the first row of each of BFCL's tables."""
    for path in out.rglob("*results*.json"):
        return json.loads(path.read_text())["results"]
    tables = {path.stem: path.read_text().splitlines() for path in out.glob("score/data_*.csv")}
    return {name: next(csv.DictReader(lines)) for name, lines in sorted(tables.items())}
