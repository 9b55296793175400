"""Writes a complete tiny model of any family: random weights, a tokenizer, a chat template.

Nothing is downloaded. Tensors have the family's checkpoint names. Norms and biases are random too,
so an implementation that omits one generates different text.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from gllm_engine.arch.layout import checkpoint_places
from gllm_engine.arch.model import SELECTION_BIAS, Model
from gllm_engine.arch.names import checkpoint_shapes, checkpoint_tensors
from gllm_engine.arch.read import make_arch
from gllm_engine.arch.tiny import tiny_config
from gllm_engine.arch.vision import VISUAL, Vision
from gllm_engine.model.encode import in_formats, stored_weight

# Token ids 0, 1, 2. The first and the last token end generation.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Token ids 3, 4, 5 of a model that takes images. The second one is the placeholder.
IMAGE_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
# Token id 6 of a model that takes videos.
VIDEO_TOKEN = "<|video_pad|>"
# Of Mistral. Only the placeholder is in prompts; the others end rows and images.
_ROW_TOKENS = ("[IMG_BREAK]", "[IMG]", "[IMG_END]")
_BYTES = 256  # every byte is a token
MIN_VOCAB = len(SPECIAL_TOKENS) + _BYTES  # of a model of text
MAX_TOKENIZER_VOCAB = 384

_SENTENCES = (
    "The quick brown fox jumps over the lazy dog while the rain keeps falling on the hills.",
    "A language model reads some text and then says which token is likely to come next.",
    "Once upon a time there was a small engine that wanted to serve a great many requests.",
    "What is the capital of France? The capital of France is Paris, a city on the river Seine.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))  # 3\n",
    "Counting: 0 1 2 3 4 5 6 7 8 9 10 11 12 100 1000. The answer, they say, is 42.",
    "Où est la bibliothèque? Ça va très bien, merci. Straße, señor, naïve, coöperate.",
    "你好,世界。今天天气很好。こんにちは世界。안녕하세요. Привет, мир! 🙂🚀👩‍💻",
)

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Of a message's text, or of its list of parts. VIDEO and IMAGE stand for a video and an image.
_PARTS = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'video' %}VIDEO{% else %}IMAGE{% endif %}{% endfor %}{% endif %}"
)


def write_tiny_model(
    directory: Path | str,
    family: str = "LlamaForCausalLM",
    seed: int = 0,
    dtype: str = "float32",
    **over: Any,
) -> Path:
    """Write config, weights, tokenizer and generation config to `directory`; returns its path. Of a
    model that takes images or videos, also what resizes them.

    `family`: an architecture name in arch.FAMILIES. `dtype`: float32, bfloat16 or float16.
    `over`: keys of config.json to change; with quantization_config, the matrices that usually are
    quantised are stored in its format. Raises ArchError for a config that is not supported,
    ValueError for a vocabulary too small for the tokenizer.
    """
    directory = Path(directory)
    config = tiny_config(family, **over) | {"dtype": dtype}
    arch = make_arch(config)
    own = _ROW_TOKENS if config["model_type"] == "mistral3" else IMAGE_TOKENS
    takes_videos = "video_token_id" in config
    special = list(SPECIAL_TOKENS if arch.vision is None else SPECIAL_TOKENS + own)
    special += [VIDEO_TOKEN] * takes_videos
    least = len(special) + _BYTES
    if arch.vocab < least:
        raise ValueError(f"vocabulary of {arch.vocab} tokens: at least {least} are needed")
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", {"eos_token_id": [2, 0]})
    _write_tokenizer(directory, min(arch.vocab, MAX_TOKENIZER_VOCAB), arch.max_len, tuple(special))
    if arch.vision is not None:
        _write_json(directory / "preprocessor_config.json", _image_processor(config, arch.vision))
        if takes_videos:
            videos = _video_processor(config, arch.vision)
            _write_json(directory / "video_preprocessor_config.json", videos)
    tensors = random_checkpoint(arch, seed)
    tensors = in_formats(arch.quantized(), tensors, _dtype(dtype))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def random_checkpoint(arch: Model, seed: int) -> dict[str, Tensor]:
    """Random float32 checkpoint tensors, scaled so that hidden states and logits vary."""
    generator = torch.Generator().manual_seed(seed)
    shapes = arch.weights()
    stored = checkpoint_shapes(arch)
    places = checkpoint_places(arch)
    tensors = {}
    for name, parts in checkpoint_tensors(arch).items():
        tensors[name] = torch.empty(stored[name])
        for part in parts:
            weight = _random_weight(part, shapes[part], arch, generator)
            view = stored_weight(tensors[name], places[part], shapes[part])
            view.copy_(weight.view(view.shape))
    return tensors


def _random_weight(
    name: str, shape: tuple[int, ...], arch: Model, generator: torch.Generator
) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.startswith(VISUAL) and name.endswith(".weight") and len(shape) == 1:
        return 1 + 0.3 * noise
    if name == "model.norm.weight":
        # Factors of both signs: otherwise a tied model repeats its input for ever.
        return noise - 1 if arch.norm == "rms_plus_one" else noise
    if name.endswith("linear_attn.norm.weight"):
        return 1 + 0.3 * noise
    if name.endswith("linear_attn.A_log"):
        return noise - 2  # states remember tens of tokens
    if name.endswith("norm.weight"):
        return 0.3 * noise if arch.norm == "rms_plus_one" else 1 + 0.3 * noise
    if name.endswith(".sinks"):
        return noise
    if name.endswith(SELECTION_BIAS):
        return 0.1 * noise  # as scores vary: a larger one would choose the same experts always
    if name.endswith(".bias"):
        return 0.3 * noise
    # An embedding row is used unscaled. A row of the output projection is multiplied with `dim`
    # numbers of size about 1; logits that differ by about 3 give text that varies but prefers some
    # tokens.
    is_input = name == "model.embed_positions.weight" or (
        name.startswith("model.embed_tokens") and not arch.tie
    )
    is_output = name.startswith(("lm_head", "model.embed_tokens"))
    gain = 3.0 if is_output else 1.0
    return noise if is_input else noise * gain * prod(shape[1:] or shape) ** -0.5


def _dtype(name: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f"dtype {name!r} is not supported; supported: {', '.join(known)}")
    return known[name]


def _image_processor(config: dict[str, Any], vision: Vision) -> dict[str, Any]:
    """Images get at most 144 embeddings."""
    side = vision.patch * vision.merge  # of an embedding
    colours = {"image_mean": vision.mean, "image_std": vision.std}
    match config["model_type"]:
        case "llava":
            edge = config["vision_config"]["image_size"]
            crop = {"height": edge, "width": edge}
            return colours | {"size": {"shortest_edge": edge}, "crop_size": crop}
        case "mistral3":
            return colours | {"patch_size": vision.patch, "size": {"longest_edge": 12 * side}}
        case "kimi_k25":
            return {"media_proc_cfg": colours | {"in_patch_limit": 144 * vision.merge**2}}
    return colours | {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": vision.patch,
        "merge_size": vision.merge,
        "temporal_patch_size": vision.frames,
        "size": {"shortest_edge": 16 * side**2, "longest_edge": 144 * side**2},
    }


def _video_processor(config: dict[str, Any], vision: Vision) -> dict[str, Any]:
    """Two frames get at most 36 embeddings; Qwen3-VL bounds all frames together."""
    area = (vision.patch * vision.merge) ** 2
    pairs = 1 if config["model_type"] == "qwen2_5_vl" else 12
    return {
        "video_processor_type": "Qwen2VLVideoProcessor",
        "image_mean": vision.mean,
        "image_std": vision.std,
        "patch_size": vision.patch,
        "merge_size": vision.merge,
        "temporal_patch_size": vision.frames,
        "max_frames": 16,
        "size": {"shortest_edge": 4 * area, "longest_edge": 36 * area * pairs},
    }


def _write_tokenizer(directory: Path, vocab: int, max_len: int, special: tuple[str, ...]) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    template = _CHAT_TEMPLATE
    if own := special[len(SPECIAL_TOKENS) :]:
        image = own[1] if own == _ROW_TOKENS else "".join(IMAGE_TOKENS)
        parts = _PARTS.replace("IMAGE", image).replace("VIDEO", image.replace("image", "video"))
        template = template.replace("{{ message['content'] }}", parts)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": max_len,
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    _write_json(directory / "tokenizer_config.json", settings)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
