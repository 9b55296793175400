"""A vision tower as data: what makes embeddings of an image for a decoder. No tensors.

Canonical weight names begin with VISUAL; within a block they are those of a Layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from gllm_engine.arch.checkpoint import Names
from gllm_engine.arch.formats import Shapes
from gllm_engine.arch.model import Activation, Dense, NormKind, linear_weights, norm_weights

VISUAL = "visual."


@dataclass(frozen=True)
class Vision:
    """Cuts an image in patches, runs `depth` blocks on them, and merges neighbours.

    A block is x += attention(norm(x)); x += ffn(norm(x)). A merger normalises patches, joins each
    `merge` x `merge` of them, and computes down(gelu(up(x))), one embedding. Queries and keys are
    rotated by a patch's row and column, a quarter of the channels' pairs by each.
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
    frames: int = 2  # of a patch; an image is so many equal ones
    patch_bias: bool = True
    # Side of a square table of learned positions, which is stretched over the image; 0: no table.
    table: int = 0
    # Embeddings a side of the windows that a patch sees; the last ones of a row or a column may be
    # smaller. 0: a patch sees the image.
    window: int = 0
    whole: tuple[int, ...] = ()  # blocks without windows
    # Blocks after which a merger of its own makes what is added to the residual stream after the
    # decoder's first layers (DeepStack, arXiv 2406.04334). It joins patches before it normalises.
    deep: tuple[int, ...] = ()
    names: Names = Names()  # of the tensors of its checkpoints

    @property
    def num_deep(self) -> int:
        return len(self.deep)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def ffn(self) -> Dense:
        return Dense(self.hidden, bias=True, out_bias=True, act=self.act, gated=self.gated)

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
            shapes |= linear_weights(f"attn.{part}_proj", self.dim, self.dim, True)
        return shapes | norm_weights("norm2", self.dim, self.norm) | self.ffn.shapes(self.dim)

    def merger_weights(self, joins_first: bool) -> Shapes:
        joined = self.merge**2 * self.dim
        shapes = norm_weights("norm", joined if joins_first else self.dim, self.norm)
        shapes |= linear_weights("up_proj", joined, joined, True)
        return shapes | linear_weights("down_proj", self.out, joined, True)

    def weights(self) -> Shapes:
        """Canonical name -> shape of every weight."""
        pixels = (self.dim, 3, self.frames, self.patch, self.patch)
        shapes: Shapes = {"patch_embed.weight": pixels}
        if self.patch_bias:
            shapes["patch_embed.bias"] = (self.dim,)
        if self.table:
            shapes["pos_embed.weight"] = (self.table**2, self.dim)
        parts = {f"blocks.{i}": self.block_weights() for i in range(self.depth)}
        parts["merger"] = self.merger_weights(joins_first=False)
        parts |= {f"deepstack.{i}": self.merger_weights(True) for i in range(self.num_deep)}
        for part, own in parts.items():
            shapes |= {f"{part}.{name}": shape for name, shape in own.items()}
        return {VISUAL + name: shape for name, shape in shapes.items()}
