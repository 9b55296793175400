"""What a checkpoint says of itself beside its weights, for servers in front of the engine.

Owns the reading of generation_config.json's sampling defaults. Knows nothing of requests.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gllm_engine.config import ConfigError
from gllm_engine.files import read_object
from gllm_engine.sampling import InvalidField, parse_sampling
from gllm_engine.text.tokenizer import Tokenizer

# Keys of generation_config.json and the sampling parameters that they are defaults of.
_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def describe_checkpoint(
    path: Path, tokenizer: Tokenizer, modalities: Sequence[str] = ("text",)
) -> dict[str, Any]:
    """Facts of the checkpoint in directory `path`, as JSON would have them.

    architectures; input_modalities: `modalities`; chat_template: Jinja sources by name, or None;
    special_tokens: the ids of all special tokens, by their texts; generation_config: the sampling
    defaults that it gives, by its own keys. A default that is no valid sampling parameter is left
    out. Raises ConfigError for a file that is not JSON.
    """
    template = tokenizer.chat_template
    generation = path / "generation_config.json"
    given = read_object(generation, ConfigError) if os.path.lexists(generation) else {}
    return {
        "architectures": read_object(path / "config.json", ConfigError).get("architectures"),
        "input_modalities": list(modalities),
        "chat_template": None if template is None else template.sources,
        "special_tokens": tokenizer.special_tokens,
        "generation_config": {
            key: given[key] for key in _DEFAULTS if key in given and _is_valid(key, given[key])
        },
    }


def _is_valid(key: str, value: Any) -> bool:
    if not isinstance(value, int | float):
        return False
    try:
        parse_sampling({_DEFAULTS[key]: value})
    except InvalidField:
        return False
    return True
