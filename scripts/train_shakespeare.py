#!/usr/bin/env python3
"""Train the model that ships in model_repository/shakespeare, from one text file.

    python scripts/train_shakespeare.py --text shakespeare.txt --out model_repository/shakespeare/1

A Qwen3-shaped decoder (5.2 M parameters, 10.5 MB in bf16) and a byte-level BPE tokenizer of 2,048
tokens. Half of the samples are the plays as they stand, half are their dialogues in the chat
template's form, so that the model both continues a text and answers a message. The last tenth of
the text is held out; the checkpoint with the lowest held-out loss is kept.

Written out in plain torch rather than with the engine's decoder, which has no dropout and no
gradients. The result is an ordinary Hugging Face checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 768,
    "hidden_act": "silu",
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 0,
    "bos_token_id": None,
}
EVAL_EVERY = 50  # steps


def train_tokenizer(text: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=CONFIG["vocab_size"],
            special_tokens=[END, START, STOP],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def dialogues(text: str, rng: random.Random) -> str:
    """The plays as chats of 2 to 8 turns, each turn one speech, speakers left out."""
    speeches = [s.strip() for s in re.split(r"\n\n", text) if re.match(r"[A-Z][^\n]{0,40}:\n", s)]
    speeches = [s.split(":\n", 1)[1] for s in speeches]
    chats, i = [], rng.randrange(2)
    while i < len(speeches):
        turns = speeches[i : i + 2 * rng.randint(1, 4)]
        roles = ["user", "assistant"] * len(turns)
        chats.append(
            "".join(
                f"{START}{role}\n{turn}{STOP}\n" for role, turn in zip(roles, turns, strict=False)
            )
        )
        i += len(turns)
    return END.join(chats)


class Layer(nn.Module):
    def __init__(self, c: dict, dropout: float) -> None:
        super().__init__()
        dim, heads, kv, hd = (
            c["hidden_size"],
            c["num_attention_heads"],
            c["num_key_value_heads"],
            c["head_dim"],
        )
        self.shape, self.p = (heads, kv, hd), dropout
        self.input_layernorm = nn.RMSNorm(dim, c["rms_norm_eps"])
        self.post_attention_layernorm = nn.RMSNorm(dim, c["rms_norm_eps"])
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(dim, heads * hd, bias=False),
                "k_proj": nn.Linear(dim, kv * hd, bias=False),
                "v_proj": nn.Linear(dim, kv * hd, bias=False),
                "o_proj": nn.Linear(heads * hd, dim, bias=False),
                "q_norm": nn.RMSNorm(hd, c["rms_norm_eps"]),
                "k_norm": nn.RMSNorm(hd, c["rms_norm_eps"]),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(dim, c["intermediate_size"], bias=False),
                "up_proj": nn.Linear(dim, c["intermediate_size"], bias=False),
                "down_proj": nn.Linear(c["intermediate_size"], dim, bias=False),
            }
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        (heads, kv, hd), a, m = self.shape, self.self_attn, self.mlp
        h, (batch, length, _) = self.input_layernorm(x), x.shape
        q = a["q_norm"](a["q_proj"](h).view(batch, length, heads, hd)).transpose(1, 2)
        k = a["k_norm"](a["k_proj"](h).view(batch, length, kv, hd)).transpose(1, 2)
        v = a["v_proj"](h).view(batch, length, kv, hd).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True, dropout_p=self.p if self.training else 0.0
        )
        y = a["o_proj"](y.transpose(1, 2).reshape(batch, length, -1))
        x = x + F.dropout(y, self.p, self.training)
        h = self.post_attention_layernorm(x)
        y = m["down_proj"](F.silu(m["gate_proj"](h)) * m["up_proj"](h))
        return x + F.dropout(y, self.p, self.training)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Decoder(nn.Module):
    """The training twin of a Qwen3 checkpoint; its state dict has Qwen3's names."""

    def __init__(self, c: dict, dropout: float) -> None:
        super().__init__()
        self.c, self.p = c, dropout
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(c["vocab_size"], c["hidden_size"]),
                "layers": nn.ModuleList(Layer(c, dropout) for _ in range(c["num_hidden_layers"])),
                "norm": nn.RMSNorm(c["hidden_size"], c["rms_norm_eps"]),
            }
        )
        for name, p in self.named_parameters():
            if p.ndim == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(
                    p, std=0.02 / math.sqrt(2 * c["num_hidden_layers"]) if deep else 0.02
                )

    def forward(self, ids: Tensor) -> Tensor:
        m, c = self.model, self.c
        position = torch.arange(ids.shape[1], device=ids.device).float()
        half = torch.arange(0, c["head_dim"], 2, device=ids.device).float() / c["head_dim"]
        angle = torch.outer(position, c["rope_theta"] ** -half)
        x = F.dropout(m["embed_tokens"](ids), self.p, self.training)
        for layer in m["layers"]:
            x = layer(x, angle.cos(), angle.sin())
        return F.linear(m["norm"](x), m["embed_tokens"].weight)


def batches(streams: list[Tensor], size: int, length: int, rng: random.Random, device: str):
    while True:
        rows = []
        for _ in range(size):
            stream = rng.choice(streams)
            i = rng.randrange(len(stream) - length - 1)
            rows.append(stream[i : i + length + 1])
        yield torch.stack(rows).to(device)


@torch.no_grad()
def held_out_loss(model: Decoder, ids: Tensor, length: int, device: str) -> float:
    """Mean nats per token, each window of `length` predicted from itself alone."""
    model.eval()
    count = (len(ids) - 1) // length
    windows = torch.stack([ids[i * length : (i + 1) * length + 1] for i in range(count)])
    total = 0.0
    for rows in windows.to(device).split(16):
        with torch.autocast(device, torch.bfloat16):
            logits = model(rows[:, :-1])
        total += F.cross_entropy(
            logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
        ).item()
    model.train()
    return total / (count * length)


def schedule(step: int, steps: int, peak: float) -> float:
    warm = min(1.0, (step + 1) / 100)
    return peak * warm * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hardware = f"one {torch.cuda.get_device_name()}" if device == "cuda" else "CPU"
    text = args.text.read_text()
    cut = int(len(text) * 0.9)
    cut = text.rindex("\n\n", 0, cut) + 2
    train_text, test_text = text[:cut], text[cut:]
    tokenizer = train_tokenizer(train_text)

    # BPE dropout: many tokenisations of the one short text, against overfitting.
    # Its draws cannot be seeded: a second training comes out close, not the same.
    # Plays and chats alternate, so that a sample is one or the other with the same odds.
    copies = [t for _ in range(args.variants) for t in (train_text, dialogues(train_text, rng))]
    tokenizer.model.dropout = args.bpe_dropout
    streams = [torch.tensor(e.ids) for e in tokenizer.encode_batch(copies)]
    tokenizer.model.dropout = None
    plays = torch.tensor(tokenizer.encode(test_text).ids)
    chats = torch.tensor(tokenizer.encode(dialogues(test_text, random.Random(0))).ids)
    chars_per_token = len(test_text) / len(plays)

    model = Decoder(CONFIG, args.dropout).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(streams[0]):,} tokens")
    decay = [p for p in model.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim != 2]
    groups = [
        {"params": decay, "weight_decay": args.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device == "cuda")
    best, source = math.inf, batches(streams, args.batch, args.length, rng, device)
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, args.steps, args.lr)
        rows = next(source)
        with torch.autocast(device, torch.bfloat16):
            logits = model(rows[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % EVAL_EVERY == 0 or step + 1 == args.steps:
            now = held_out_loss(model, plays, args.length, device)
            chat = held_out_loss(model, chats, args.length, device)
            print(
                f"step {step + 1}: train {loss.item():.3f}, held out {now:.3f} (chats {chat:.3f})",
                flush=True,
            )
            if now + chat < best:
                best = now + chat
                summary = {
                    "held_out_nats_per_token": round(now, 4),
                    "held_out_nats_per_character": round(now / chars_per_token, 4),
                    "held_out_chat_nats_per_token": round(chat, 4),
                    "step": step + 1,
                    "arguments": {k: v for k, v in vars(args).items() if k not in ("text", "out")},
                    "hardware": hardware,
                }
                save(args.out, model, tokenizer, summary)
    print(json.dumps(summary))


def save(out: Path, model: Decoder, tokenizer: Tokenizer, summary: dict) -> None:
    out.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().to("cpu", torch.bfloat16) for k, v in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    end, stop = tokenizer.token_to_id(END), tokenizer.token_to_id(STOP)
    files = {
        "config.json": CONFIG | {"eos_token_id": end},
        "generation_config.json": {"eos_token_id": [end, stop]},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "model_max_length": CONFIG["max_position_embeddings"],
            "chat_template": CHAT_TEMPLATE,
        },
        "training.json": summary,
    }
    for name, value in files.items():
        (out / name).write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="the plays, one file")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint's directory")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens a sequence")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.35)
    parser.add_argument("--weight-decay", type=float, default=2.0)
    parser.add_argument("--bpe-dropout", type=float, default=0.05)
    parser.add_argument("--variants", type=int, default=12, help="tokenisations of the text")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
