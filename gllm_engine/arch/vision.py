"""A vision tower as data: what makes embeddings of an image for a decoder. No tensors.

Canonical weight names begin with VISUAL; within a block they are those of a Layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gllm_engine.arch.checkpoint import Names
from gllm_engine.arch.formats import Shapes
from gllm_engine.arch.model import Activation, Dense, NormKind, linear_weights, norm_weights

VISUAL = "visual."
# Of the images that CLIP was trained on, which other towers take over.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
Rotary = Literal["halves", "shifted", "alternating"]


@dataclass(frozen=True)
class Vision:
    """Cuts an image in patches, runs `depth` blocks on them, and merges neighbours.

    A block is x += attention(norm(x)); x += ffn(norm(x)). A merger normalises patches, joins each
    `merge` x `merge` of them, and computes down(gelu(up(x))), one embedding. Queries and keys are
    rotated by a patch's row and column, half of the pairs of a head's channels by each.
    """

    dim: int
    depth: int  # blocks
    heads: int
    hidden: int  # between the products of a block's ffn
    out: int  # channels of an embedding: those of the decoder
    patch: int  # pixels a side
    merge: int  # patches a side
    image_token: int  # id of the placeholder token
    mean: tuple[float, ...]  # of red, green and blue, as shares of 255
    std: tuple[float, ...]
    norm: NormKind
    act: Activation
    gated: bool
    eps: float = 1e-6  # of every norm
    bias: bool = True  # of attention and ffn
    # Of a patch; a picture is so many equal ones. 0: patches have no such dimension.
    frames: int = 0
    # "halves": pairs of channels are (i, i + head_dim / 2), the first ones rotated by the row.
    # "shifted": as that, but the column's frequencies lie between those of the row. "alternating":
    # pairs are (2i, 2i + 1), rotated by the column and the row in turn.
    rotary: Rotary | None = "halves"
    patch_bias: bool = True
    # Side of a square table of learned positions, which is stretched over the image; 0: no table.
    table: int = 0
    stretch: Literal["bilinear", "bicubic"] = "bilinear"
    # One more patch, which is learned and no part of a merger's input; its position is before the
    # table's.
    has_class: bool = False
    first_norm: bool = False  # of patches, before the blocks
    last_norm: bool = False
    # Embeddings a side of the windows that a patch sees; the last ones of a row or a column may be
    # smaller. 0: a patch sees the image.
    window: int = 0
    whole: tuple[int, ...] = ()  # blocks without windows
    # Blocks after which a merger of its own makes what is added to the residual stream after the
    # decoder's first layers (DeepStack, arXiv 2406.04334). It joins patches before it normalises.
    deep: tuple[int, ...] = ()
    merger_norm: bool = True
    merger_eps: float | None = None  # None: eps
    merger_hidden: int | None = None  # between up and down; None: merge * merge * dim
    merger_bias: bool = True
    # Joined patches first go through a linear layer of dim channels. It takes them with the channel
    # as the outer dimension.
    shrinks: bool = False
    names: Names = Names()  # of the tensors of its checkpoints

    @property
    def num_deep(self) -> int:
        return len(self.deep)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def ffn(self) -> Dense:
        return Dense(self.hidden, self.bias, self.bias, act=self.act, gated=self.gated)

    @property
    def norms(self) -> tuple[str, ...]:
        """Outside of blocks and mergers."""
        return ("first_norm",) * self.first_norm + ("last_norm",) * self.last_norm

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of an image's embeddings. The sizes are in pixels, multiples of
        patch * merge.
        """
        side = self.patch * self.merge
        return height // side, width // side

    def is_whole(self, block: int) -> bool:
        """Whether a patch sees the whole image in this block."""
        return not self.window or block in self.whole

    def block_weights(self) -> Shapes:
        shapes = norm_weights("norm1", self.dim, self.norm)
        for part in ("q", "k", "v", "o"):
            shapes |= linear_weights(f"attn.{part}_proj", self.dim, self.dim, self.bias)
        return shapes | norm_weights("norm2", self.dim, self.norm) | self.ffn.shapes(self.dim)

    def merger_weights(self, joins_first: bool) -> Shapes:
        joined = self.merge**2 * self.dim
        hidden = self.merger_hidden or joined
        shapes: Shapes = {}
        if self.merger_norm:
            shapes = norm_weights("norm", joined if joins_first else self.dim, self.norm)
        if self.shrinks:
            shapes["shrink.weight"] = (self.dim, joined)
            joined = self.dim
        shapes |= linear_weights("up_proj", hidden, joined, self.merger_bias)
        return shapes | linear_weights("down_proj", self.out, hidden, self.merger_bias)

    def weights(self) -> Shapes:
        """Canonical name -> shape of every weight."""
        frames = (self.frames,) if self.frames else ()
        shapes: Shapes = {"patch_embed.weight": (self.dim, 3, *frames, self.patch, self.patch)}
        if self.patch_bias:
            shapes["patch_embed.bias"] = (self.dim,)
        if self.table:
            rows = (self.table**2 + self.has_class,)
            # Of the only family that stretches so, checkpoints have it as a square.
            square = (self.table, self.table)
            lead = square if self.stretch == "bicubic" else rows
            shapes["pos_embed.weight"] = (*lead, self.dim)
        if self.has_class:
            shapes["class_embed"] = (self.dim,)
        for name in self.norms:
            shapes |= norm_weights(name, self.dim, self.norm)
        parts = {f"blocks.{i}": self.block_weights() for i in range(self.depth)}
        parts["merger"] = self.merger_weights(joins_first=False)
        parts |= {f"deepstack.{i}": self.merger_weights(True) for i in range(self.num_deep)}
        for part, own in parts.items():
            shapes |= {f"{part}.{name}": shape for name, shape in own.items()}
        return {VISUAL + name: shape for name, shape in shapes.items()}
