"""The vision tower: interprets a Vision, and makes embeddings of images.

This module owns the order of patches and the attention between them. It knows no family, no
checkpoint and no prompt.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gllm_engine.arch.vision import VISUAL, Vision
from gllm_engine.layers import DenseFfn, Linear, NormLayer, Platform, Views
from gllm_engine.ops import Segments, select_ops
from gllm_engine.parallel import ALONE

_THETA = 10_000.0
# Of one pass; an image may have more. It bounds the memory of a call.
_PASS_PATCHES = 16384


class _Block:
    """x += attention(norm1(x)); x += ffn(norm2(x)), in place."""

    def __init__(self, vision: Vision, platform: Platform) -> None:
        self._heads = (3, vision.heads, vision.head_dim)
        shapes = vision.block_weights()
        qkv = ["attn.q_proj", "attn.k_proj", "attn.v_proj"]
        self._qkv = Linear(qkv, shapes, platform)
        self._out = Linear(["attn.o_proj"], shapes, platform)
        self._ffn = DenseFfn(vision.ffn, vision.dim, platform)
        self._norms = {
            name: NormLayer(vision.norm, vision.eps, vision.dim, platform)
            for name in ("norm1", "norm2")
        }

    def __call__(self, x: Tensor, rotary: tuple[Tensor, Tensor], seen: Segments) -> Tensor:
        qkv = self._qkv(self._norms["norm1"](x)).unflatten(1, self._heads)
        q, k = _rotate(qkv[:, :2], *rotary).unbind(1)
        x = self._out.add_to(x, seen.attend(q, k, qkv[:, 2]).flatten(1))
        return self._ffn(self._norms["norm2"](x), None, x)

    def weights(self) -> Views:
        views = self._qkv.weights() | self._out.weights() | self._ffn.weights()
        for name, norm in self._norms.items():
            views |= norm.weights(name)
        return views


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [patches, ..., heads, dim], rotated by angles whose cos and sin are [patches, dim / 2]."""
    size = (len(x), *[1] * (x.dim() - 2), -1)
    cos = cos.view(size)
    sin = sin.view(size)
    first, second = x.float().chunk(2, -1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(rotated, -1).to(x.dtype)


class _Merger:
    """Norm, two linear layers; neighbouring patches are joined before or after the norm."""

    def __init__(self, vision: Vision, platform: Platform, joins_first: bool) -> None:
        self._joins_first = joins_first
        self._ops = platform.ops
        self._joined = vision.merge**2 * vision.dim
        shapes = vision.merger_weights(joins_first)
        (width,) = shapes["norm.weight"]
        self._norm = NormLayer(vision.norm, vision.eps, width, platform)
        self._up = Linear(["up_proj"], shapes, platform)
        self._down = Linear(["down_proj"], shapes, platform)

    def __call__(self, x: Tensor) -> Tensor:
        """[patches, dim] to [embeddings, out]."""
        x = self._norm(x.view(-1, self._joined) if self._joins_first else x)
        hidden = self._up(x.view(-1, self._joined))
        return self._down(self._ops.activate(hidden, "gelu", gated=False))

    def weights(self) -> Views:
        return self._norm.weights("norm") | self._up.weights() | self._down.weights()


class VisionTower:
    """A vision tower whose weights are not yet loaded; load.py fills the tensors of `weights()`."""

    def __init__(self, vision: Vision, dtype: torch.dtype, device: torch.device) -> None:
        self.vision = vision
        self.device = device
        platform = Platform(select_ops(device), dtype, device, ALONE)
        outer = ("patch_embed.weight", "patch_embed.bias", "pos_embed.weight")
        shapes = vision.weights()
        self._outer = {
            name: platform.empty(*shapes[VISUAL + name])
            for name in outer
            if VISUAL + name in shapes
        }
        self._blocks = [_Block(vision, platform) for _ in range(vision.depth)]
        self._merger = _Merger(vision, platform, joins_first=False)
        self._deep = {block: _Merger(vision, platform, joins_first=True) for block in vision.deep}

    def weights(self) -> dict[str, Tensor]:
        """Canonical weight name -> the tensor, as of Decoder.weights."""
        views: Views = dict(self._outer)
        parts: dict[str, _Block | _Merger] = {"merger": self._merger}
        parts |= {f"blocks.{i}": block for i, block in enumerate(self._blocks)}
        parts |= {f"deepstack.{i}": merger for i, merger in enumerate(self._deep.values())}
        for part, owner in parts.items():
            views |= {f"{part}.{name}": view for name, view in owner.weights().items()}
        return {VISUAL + name: view for name, view in views.items() if isinstance(view, Tensor)}

    def encode(self, images: list[Tensor]) -> list[Tensor]:
        """Embeddings of each image, [1 + num_deep, rows * columns, out]: first those that replace
        the placeholders', then what is added after the decoder's layers 0, 1, ...

        `images`: uint8 [height, width, 3] on the tower's device, of sizes that Vision.grid takes.
        """
        return [found for some in self._passes(images) for found in self._encode(some)]

    def _passes(self, images: list[Tensor]) -> Iterator[list[Tensor]]:
        some: list[Tensor] = []
        patches = 0
        for image in images:
            more = image.shape[0] * image.shape[1] // self.vision.patch**2
            if some and patches + more > _PASS_PATCHES:
                yield some
                some = []
                patches = 0
            some.append(image)
            patches += more
        if some:
            yield some

    def _encode(self, images: list[Tensor]) -> list[Tensor]:
        vision = self.vision
        grids = [vision.grid(*image.shape[:2]) for image in images]
        weight = self._outer["patch_embed.weight"].flatten(1)
        patches = torch.cat([self._patches(image).to(weight.dtype) for image in images])
        x = F.linear(patches, weight, self._outer.get("patch_embed.bias"))
        if vision.table:
            x += torch.cat([self._positions(*grid) for grid in grids])
        angles = torch.cat([self._angles(*grid) for grid in grids])
        sizes = [rows * columns for rows, columns in grids]
        joined = vision.merge**2
        image_wide = Segments([size * joined for size in sizes], self.device)
        narrow = image_wide
        order = None
        if vision.window:
            order = self._window_order(grids)
            windows = [size * joined for grid in grids for size in self._window_sizes(*grid)]
            narrow = Segments(windows, self.device)
            x = x.unflatten(0, (-1, joined))[order].flatten(0, 1)
            angles = angles.unflatten(0, (-1, joined))[order].flatten(0, 1)
        rotary = (angles.cos(), angles.sin())
        deep = []
        for i, block in enumerate(self._blocks):
            x = block(x, rotary, image_wide if vision.is_whole(i) else narrow)
            if i in self._deep:
                deep.append(self._deep[i](x))
        found = torch.stack([self._merger(x), *deep])
        if order is not None:
            found = found[:, order.argsort()]
        # Copies, so that to keep one image's embeddings does not keep those of the others.
        return [part.clone() for part in found.split(sizes, 1)]

    def _patches(self, image: Tensor) -> Tensor:
        """The numbers of an image's patches in float32, [patches, 3 * frames * patch * patch].

        The arithmetic is that of transformers' image processors: the share of 255 is computed in
        float64 and rounded.
        """
        vision = self.vision
        share = (image.double() * (1 / 255)).float()
        mean = torch.tensor(vision.mean, device=self.device)
        pixels = (share - mean) / torch.tensor(vision.std, device=self.device)
        rows = len(pixels) // vision.patch
        size = (rows, vision.patch, -1, vision.patch, 3)
        patches = pixels.view(size).permute(0, 2, 4, 1, 3)  # [rows, columns, 3, patch, patch]
        frames = patches.unsqueeze(3).expand(-1, -1, -1, vision.frames, -1, -1)
        return self._in_blocks(frames).flatten(1)

    def _in_blocks(self, x: Tensor) -> Tensor:
        """[rows, columns, ...] of patches to [patches, ...], in which those that a merger joins
        adjoin.
        """
        merge = self.vision.merge
        x = x.unflatten(1, (-1, merge)).unflatten(0, (-1, merge))
        return x.transpose(1, 2).flatten(0, 3)

    def _positions(self, rows: int, columns: int) -> Tensor:
        """The table of learned positions, stretched over the patches: [patches, dim]."""
        vision = self.vision
        table = self._outer["pos_embed.weight"]
        square = table.view(1, vision.table, vision.table, -1).permute(0, 3, 1, 2).float()
        size = (rows * vision.merge, columns * vision.merge)
        found = F.interpolate(square, size, mode="bilinear", align_corners=True)
        return self._in_blocks(found[0].permute(1, 2, 0)).to(table.dtype)

    def _angles(self, rows: int, columns: int) -> Tensor:
        """By which queries and keys are rotated, in float32: [patches, head_dim / 2]."""
        vision = self.vision
        half = vision.head_dim // 2
        exponents = torch.arange(0, half, 2, device=self.device, dtype=torch.float32) / half
        sides = (rows * vision.merge, columns * vision.merge)
        places = [torch.arange(side, device=self.device) for side in sides]
        grid = torch.stack(torch.meshgrid(*places, indexing="ij"), -1)
        return (self._in_blocks(grid)[:, :, None] / _THETA**exponents).flatten(1)

    def _window_order(self, grids: list[tuple[int, int]]) -> Tensor:
        """The embeddings of all images, ordered by window."""
        window = self.vision.window
        orders = []
        at = 0
        for rows, columns in grids:
            index = torch.arange(rows * columns, device=self.device)
            row = index // columns // window
            column = index % columns // window
            number = row * -(-columns // window) + column
            orders.append(at + number.argsort(stable=True))
            at += rows * columns
        return torch.cat(orders)

    def _window_sizes(self, rows: int, columns: int) -> Iterator[int]:
        """Embeddings in each window."""
        window = self.vision.window
        for row in range(0, rows, window):
            for column in range(0, columns, window):
                yield min(window, rows - row) * min(window, columns - column)
