#!/usr/bin/env python3
"""Train the model that ships in scripts/image_repository/pictures, on pictures made by a script.

    python scripts/train_pictures.py --out scripts/image_repository/pictures/1
    python scripts/train_pictures.py --evaluate scripts/image_repository/pictures/1

A Qwen2.5-VL of 4.7 M parameters (9.4 MB in bf16) that answers short questions about coloured shapes
and digits, and a byte-level BPE tokenizer of the words in them. Nothing is downloaded:
scripts/draw_pictures.py draws every picture once and asks about it. The first part of the training
has many pictures and asks only what is in them. In the second part all questions of a picture share
a row: half of the rows are conversations, in the others each question sees the picture and itself
alone.

--evaluate asks the engine about pictures of other seeds, some with pairs of colour and shape that
no picture of the training has, and prints the share of answers that are right to the letter.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from draw_pictures import SIZES, Picture, Question, make_picture, questions
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IMAGE_START, IMAGE, IMAGE_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
VIDEO = "<|video_pad|>"
SPECIAL = [END, START, STOP, IMAGE_START, IMAGE, IMAGE_END, VIDEO]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PATCH, MERGE = 14, 2
SIDE = PATCH * MERGE  # pixels of an embedding
PIXELS = 112 * 112  # of an image, at most and about
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
VISION = {
    "depth": 4,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_heads": 3,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
    "out_hidden_size": 256,
    "window_size": 112,
    "fullatt_block_indexes": [0, 1, 2, 3],
    "initializer_range": 0.06,
}
TEXT = {
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.06,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [8, 12, 12],
    },
}
IMAGE_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": 2,
    "min_pixels": PIXELS // 2,
    "max_pixels": PIXELS,
    "image_mean": MEAN,
    "image_std": STD,
    "resample": 3,
    "do_convert_rgb": True,
}
IGNORED = -100  # as a label
BICUBIC = 3  # Pillow's number
EVAL_EVERY = 200  # steps


def train_tokenizer() -> Tokenizer:
    rng = random.Random("tokenizer")
    asked = [each for _ in range(3000) for each in questions(rng, make_picture(rng).things)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [f"user\n{each.text} assistant\n{each.answer}" for each in asked],
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def make_model(tokenizer: Tokenizer) -> torch.nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    token = tokenizer.token_to_id
    config = Qwen2_5_VLConfig(
        text_config=TEXT
        | {
            "vocab_size": tokenizer.get_vocab_size(),
            "eos_token_id": token(STOP),
            "bos_token_id": None,
            "pad_token_id": None,
        },
        vision_config=VISION,
        image_token_id=token(IMAGE),
        video_token_id=token(VIDEO),
        vision_start_token_id=token(IMAGE_START),
        vision_end_token_id=token(IMAGE_END),
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="eager")


def pixels_of(pictures: list[Picture]) -> Tensor:
    """uint8 [pictures, height, width, 3]: pictures of one size, as the model's processor makes
    them.
    """
    width, height = (side // 2 for side in pictures[0].image.size)
    data = b"".join(each.image.resize((width, height), BICUBIC).tobytes() for each in pictures)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, height, width, 3)


def patches_of(pixels: Tensor) -> Tensor:
    """[patches, 3 * 2 * PATCH * PATCH], in blocks of MERGE x MERGE: what the tower takes."""
    count, height, width, _ = pixels.shape
    x = (pixels / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    x = x.view(count, height // SIDE, MERGE, PATCH, width // SIDE, MERGE, PATCH, 3)
    x = x.permute(0, 1, 4, 2, 5, 7, 3, 6).unsqueeze(6)  # a picture is a film of two equal frames
    return x.expand(*x.shape[:6], 2, *x.shape[7:]).reshape(-1, 3 * 2 * PATCH * PATCH)


def see(visual: torch.nn.Module, patches: Tensor, grid: Tensor) -> Tensor:
    """The embeddings that the tower makes of pictures of one size: what its own forward does,
    several times faster on a CPU, where that takes one picture after the other.
    """
    from transformers.vision_utils import get_vision_position_ids

    x = F.linear(patches, visual.patch_embed.proj.weight.flatten(1))
    cos, sin = visual.rotary_pos_emb(x, get_vision_position_ids(grid, MERGE))
    cos, sin = (each.view(len(grid), -1, 1, cos.shape[-1]) for each in (cos, sin))
    for block in visual.blocks:
        qkv = block.attn.qkv(block.norm1(x)).view(*cos.shape[:2], 3, block.attn.num_heads, -1)
        q, k, v = (each.transpose(1, 2) for each in rotated(qkv, cos, sin))
        weights = (q @ k.transpose(2, 3) * block.attn.scaling).softmax(-1)
        x = x + block.attn.proj((weights @ v).transpose(1, 2).reshape(x.shape))
        x = x + block.mlp(block.norm2(x))
    return visual.merger(x)


def rotated(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unbind(2)
    pairs = [(each, torch.cat((-b, a), -1)) for each in (q, k) for a, b in [each.chunk(2, -1)]]
    q, k = (each * cos + half * sin for each, half in pairs)
    return q.to(v.dtype), k.to(v.dtype), v


class Rows:
    """Pictures with their questions as rows of tokens, one row a picture.

    ids, labels: int64 [rows, length]; labels[i] is what follows token i where that is part of an
    answer, else IGNORED. positions: int64 [3, rows, length]. mask: float32 [rows, 1, length,
    length], 0 where a token sees another one, else -inf.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        pictures: list[Picture],
        asked: list[list[Question]],
        conversations: list[bool],
    ) -> None:
        self.tokenizer = tokenizer
        width, height = (side // 2 // SIDE for side in pictures[0].image.size)
        self.grid = torch.tensor([[1, height * MERGE, width * MERGE]]).repeat(len(pictures), 1)
        self.patches = patches_of(pixels_of(pictures))
        rows = [self._row(*row, height, width) for row in zip(asked, conversations, strict=True)]
        length = max(len(row[0]) for row in rows)
        self.ids = torch.zeros(len(rows), length, dtype=torch.long)
        self.labels = torch.full((len(rows), length), IGNORED)
        self.positions = torch.zeros(3, len(rows), length, dtype=torch.long)
        parts = torch.full((len(rows), length), -1)  # 0 is seen by all that follows
        for i, (ids, labels, positions, part) in enumerate(rows):
            count = len(ids)
            self.ids[i, :count] = torch.tensor(ids)
            self.labels[i, :count] = torch.tensor(labels)
            self.positions[:, i, :count] = torch.tensor(positions).T
            parts[i, :count] = torch.tensor(part)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        seen = (parts[:, None, :] == 0) | (parts[:, None, :] == parts[:, :, None])
        self.mask = torch.where((seen & causal)[:, None], 0.0, -math.inf)

    def _row(
        self, asked: list[Question], conversation: bool, height: int, width: int
    ) -> tuple[list[int], list[int], list[list[int]], list[int]]:
        """ids, labels, positions and parts of a row."""
        ids = self._encode(f"{START}user\n{IMAGE_START}")
        positions = [[i] * 3 for i in range(len(ids))]
        first = len(ids)
        ids += [self.tokenizer.token_to_id(IMAGE)] * (height * width)
        positions += [[first, first + y, first + x] for y in range(height) for x in range(width)]
        ids += self._encode(IMAGE_END)
        start = first + max(height, width)
        positions.append([start] * 3)
        labels = [IGNORED] * len(ids)
        parts = [0] * len(ids)
        for number, each in enumerate(asked):
            turn = f"\n{START}user\n" if conversation and number else ""
            question = self._encode(f"{turn}{each.text}{STOP}\n{START}assistant\n")
            answer = self._encode(f"{each.answer}{STOP}")
            if not conversation:
                start = first + max(height, width)
            new = len(question) + len(answer)
            ids += question + answer
            positions += [[start + 1 + i] * 3 for i in range(new)]
            labels += [IGNORED] * (len(question) - 1) + answer + [IGNORED]
            parts += [0 if conversation else number + 1] * new
            start += new
        return ids, labels, positions, parts

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def scores(self, model: torch.nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """float32 logits of the tokens of all answers, these tokens, and the row of each."""
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = model.get_input_embeddings()(self.ids)
            seen = see(model.model.visual, self.patches, self.grid)
            places = (self.ids == self.tokenizer.token_to_id(IMAGE))[..., None]
            hidden = model.model.language_model(
                inputs_embeds=embeddings.masked_scatter(places, seen.float()),
                position_ids=self.positions,
                attention_mask={"full_attention": self.mask},
                use_cache=False,
            ).last_hidden_state
            wanted = self.labels != IGNORED
            logits = model.lm_head(hidden[wanted])
        return logits.float(), self.labels[wanted], wanted.nonzero()[:, 0]


def make_rows(tokenizer: Tokenizer, seed: str, count: int, captions: bool) -> Rows:
    """`captions`: twice as many pictures, each only with the question of what is in it."""
    rng = random.Random(seed)
    size = rng.choice((SIZES[0], *SIZES))
    pictures = [make_picture(rng, size) for _ in range(2 * count if captions else count)]
    asked = [questions(rng, picture.things) for picture in pictures]
    if captions:
        asked = [[one for one in each if one.kind == "what is in it"] for each in asked]
    return Rows(tokenizer, pictures, asked, [rng.random() < 0.5 for _ in pictures])


@torch.no_grad()
def share_right(model: torch.nn.Module, rows: Rows) -> float:
    """The share of rows whose one answer is right, each token given those before it."""
    logits, labels, row = rows.scores(model)
    wrong = set(row[logits.argmax(-1) != labels].tolist())
    return 1 - len(wrong) / len(rows.ids)


def make_optimizers(model: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for all else."""
    embeddings = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embeddings]
    known = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in known]
    return [
        torch.optim.Muon(matrices, lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def schedule(step: int, steps: int, peak: float) -> float:
    warm = min(1.0, (step + 1) / 100)
    return peak * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))


def held_out(tokenizer: Tokenizer, count: int) -> Rows:
    """Pictures of seeds that no training has, a question each."""
    rng = random.Random("held out while training")
    pictures = [make_picture(rng) for _ in range(count)]
    asked = [questions(rng, picture.things)[:1] for picture in pictures]
    return Rows(tokenizer, pictures, asked, [False] * count)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    tokenizer = train_tokenizer()
    model = make_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    optimizers = make_optimizers(model, args.lr)
    test = held_out(tokenizer, 300)
    start = time.monotonic()
    losses: list[float] = []
    for step in range(args.steps):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = schedule(step, args.steps, args.lr)
            optimizer.zero_grad(set_to_none=True)
        rows = make_rows(tokenizer, f"{args.seed} {step}", args.batch, step < args.captions)
        logits, labels, _ = rows.scores(model)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 20 == 0:
            mean = sum(losses[-20:]) / 20
            print(f"{time.monotonic() - start:.0f} s, step {step + 1}: {mean:.4f}", flush=True)
        if (step + 1) % EVAL_EVERY == 0 or step + 1 == args.steps:
            right = share_right(model, test)
            print(f"step {step + 1}: held out {right:.3f}", flush=True)
            summary = {
                "step": step + 1,
                "held_out_right": round(right, 4),
                "arguments": {k: v for k, v in vars(args).items() if k not in ("out", "evaluate")},
                "hardware": "CPU",
            }
            save(args.out, model, tokenizer, summary)


def save(out: Path, model: torch.nn.Module, tokenizer: Tokenizer, summary: dict) -> None:
    """Written beside `out` first, so that what is there is always whole."""
    new = out.with_name(out.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(out, new) if out.exists() else new.mkdir(parents=True)
    copy = make_model(tokenizer)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(new)
    tokenizer.save(str(new / "tokenizer.json"))
    end, stop = tokenizer.token_to_id(END), tokenizer.token_to_id(STOP)
    files = {
        "generation_config.json": {"eos_token_id": [end, stop]},
        "preprocessor_config.json": IMAGE_PROCESSOR,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": STOP,
            "model_max_length": TEXT["max_position_embeddings"],
            "chat_template": CHAT_TEMPLATE,
        },
        "training.json": summary,
    }
    for name, value in files.items():
        (new / name).write_text(json.dumps(value, indent=2) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    new.rename(out)


def exam(count: int, unseen: bool) -> list[tuple[Picture, list[Question]]]:
    """Pictures of fixed seeds that no training has, with their questions.

    `unseen`: each has a pair of colour and shape or digit that no picture of the training has.
    """
    found = []
    for number in range(count):
        rng = random.Random(f"exam {unseen} {number}")
        picture = make_picture(rng, SIZES[number % len(SIZES)], unseen)
        found.append((picture, questions(rng, picture.things)))
    return found


def conversation(picture: Picture, question: Question) -> list[dict]:
    content = [
        {"type": "image", "image": picture.image},
        {"type": "text", "text": question.text},
    ]
    return [{"role": "user", "content": content}]


def answers(llm, papers: list[tuple[Picture, list[Question]]]) -> list[tuple[Question, str]]:
    """Each question, asked alone, with what the engine answers, greedily."""
    from gllm_engine import SamplingParams

    asked = [(picture, question) for picture, each in papers for question in each]
    outputs = llm.chat(
        [conversation(*each) for each in asked], SamplingParams(temperature=0, max_tokens=40)
    )
    return [(q, output.outputs[0].text) for (_, q), output in zip(asked, outputs, strict=True)]


def evaluate(model: Path, count: int) -> None:
    """Print a row for each kind of question, with the share of right answers in both exams."""
    from gllm_engine import LLM

    rows: dict[str, list[str]] = {}
    with LLM(model=str(model)) as llm:
        for unseen in (False, True):
            total, right = Counter(), Counter()
            for question, answer in answers(llm, exam(count, unseen)):
                for kind in (question.kind, "all"):
                    total[kind] += 1
                    right[kind] += answer == question.answer
            for kind in sorted(total, key=lambda kind: (kind == "all", kind)):
                rows.setdefault(kind, []).append(f"{right[kind] / total[kind]:.1%}")
    for kind, shares in rows.items():
        print(f"| {kind} | {' | '.join(shares)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="train, to this directory")
    what.add_argument("--evaluate", type=Path, help="the checkpoint's directory")
    parser.add_argument("--pictures", type=int, default=400, help="of each exam")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--captions", type=int, default=900, help="steps of the first part")
    parser.add_argument("--batch", type=int, default=48, help="pictures a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.evaluate:
        evaluate(args.evaluate, args.pictures)
    else:
        train(args)


if __name__ == "__main__":
    main()
