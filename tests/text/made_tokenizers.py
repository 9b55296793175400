"""Tokenizers made on the spot, of the two kinds that checkpoints have."""

from __future__ import annotations

import json

from hypothesis import HealthCheck, settings
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Inner
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "Hello world, hello there! STOP here or stop there; a b c d e f g.",
    "日本語のテキスト、你好世界。 Grüße, naïve café, Ελληνικά, русский текст.",
    '{"name": "fox", "age": 3, "tags": ["a", "b"]} true false null 0123456789',
    "emoji 🙂🙃👨‍👩‍👧 🇩🇪 e\u0301 \u0928\u093f",
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role not in ['user', 'assistant', 'system'] %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RELAXED = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> Inner:
    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    inner.add_tokens(
        [AddedToken("<tool call>", special=False), AddedToken("日本🙂", special=False)]
    )
    return inner


def byte_fallback() -> Inner:
    fallback = [f"<0x{value:02X}>" for value in range(256)]
    inner = Inner(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    specials = ["<unk>", *SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=specials + fallback, show_progress=False
    )
    inner.train_from_iterator(CORPUS[:2], trainer)
    # Byte tokens are ordinary vocabulary; only the trainer needs them announced as special.
    state = json.loads(inner.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in specials]
    return Inner.from_str(json.dumps(state))


def metaspace() -> Inner:
    """As in old conversions of sentencepiece models: words carry their marker."""
    inner = Inner(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", *SPECIAL], show_progress=False
    )
    inner.train_from_iterator([*CORPUS, "   indented    text   "], trainer)
    inner.add_tokens([AddedToken("▁▁in▁▁", special=False)])
    return inner


def save(inner: Inner, directory, **settings) -> None:
    bos = inner.token_to_id("<s>")
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    outer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", **settings
    )
    outer.chat_template = TEMPLATE
    outer.save_pretrained(str(directory))
