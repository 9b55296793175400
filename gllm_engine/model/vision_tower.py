"""The vision tower: interprets a Vision, and makes embeddings of images.

This module owns the order of patches and the attention between them. It knows no family, no
checkpoint and no prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gllm_engine.arch.model import AttentionShape
from gllm_engine.arch.vision import VISUAL, Vision
from gllm_engine.layers import DenseFfn, Linear, NormLayer, Platform, Views
from gllm_engine.ops import Attend, RotaryInputs, Segments, select_ops
from gllm_engine.parallel import ALONE

_THETA = 10_000.0
# Of one pass; an image may have more. It bounds the memory of a call.
_PASS_PATCHES = 16384
# GPUs multiply matrices faster whose rows are whole multiples of 16 bytes, and of tiles.
_WHOLE_ROW = 64


class _Ffn:
    """A DenseFfn whose hidden rows end with zeros, up to a whole row: they change no sum. It has no
    bias of its output.
    """

    def __init__(self, vision: Vision, platform: Platform) -> None:
        self._hidden = vision.hidden
        whole = -(-vision.hidden // _WHOLE_ROW) * _WHOLE_ROW
        ffn = replace(vision.ffn, hidden=whole, out_bias=False)
        self._ffn = DenseFfn(ffn, vision.dim, platform)
        for view in self._ffn.weights().values():
            assert isinstance(view, Tensor)
            view.zero_()

    def __call__(self, x: Tensor, total: Tensor) -> Tensor:
        """[patches, dim]; the result is added to `total`, in place."""
        return self._ffn(x, None, total)

    def weights(self) -> Views:
        views = self._ffn.weights()
        for name, view in views.items():
            assert isinstance(view, Tensor)
            if name == "mlp.down_proj.weight":
                views[name] = view[:, : self._hidden]
            else:
                views[name] = view[: self._hidden]
        return views


class _Block:
    """x += attention(norm1(x)); x += ffn(norm2(x)), in place.

    A norm adds the bias of the output that is added to x next.
    """

    def __init__(self, vision: Vision, platform: Platform) -> None:
        self._ops = platform.ops
        self._heads = vision.heads
        self._head_dim = vision.head_dim
        shapes = vision.block_weights()
        qkv = ["attn.q_proj", "attn.k_proj", "attn.v_proj"]
        self._qkv = Linear(qkv, shapes, platform)
        self._biases: dict[str, Tensor] = {}
        if vision.bias:
            names = ("attn.o_proj.bias", "mlp.down_proj.bias")
            self._biases = {name: platform.empty(*shapes.pop(name)) for name in names}
        self._out = Linear(["attn.o_proj"], shapes, platform)
        self._ffn = _Ffn(vision, platform)
        self._norms = {
            name: NormLayer(vision.norm, vision.eps, vision.dim, platform)
            for name in ("norm1", "norm2")
        }

    def __call__(self, x: Tensor, rotary: RotaryInputs | None, attend: Attend) -> Tensor:
        normed = self._norms["norm1"](x, add_after=self._biases.get("attn.o_proj.bias"))
        qkv = self._qkv(normed).unflatten(1, (-1, self._head_dim))
        qk, v = qkv.split((2 * self._heads, self._heads), 1)
        if rotary is not None:
            qk = self._ops.rotate(qk, rotary)
        q, k = qk.chunk(2, 1)
        x = self._out.add_to(x, attend(q, k, v).flatten(1))
        normed = self._norms["norm2"](x, add_after=self._biases.get("mlp.down_proj.bias"))
        return self._ffn(normed, x)

    def weights(self) -> Views:
        views = self._qkv.weights() | self._out.weights() | self._ffn.weights() | self._biases
        for name, norm in self._norms.items():
            views |= norm.weights(name)
        return views


class _Merger:
    """See Vision. `joins_first`: patches are joined before the norm."""

    def __init__(self, vision: Vision, platform: Platform, joins_first: bool) -> None:
        self._joins_first = joins_first
        self._ops = platform.ops
        self._joined = vision.merge**2 * vision.dim
        shapes = vision.merger_weights(joins_first)
        self._norm: NormLayer | None = None
        if vision.merger_norm:
            (width,) = shapes["norm.weight"]
            self._norm = NormLayer(vision.norm, vision.merger_eps or vision.eps, width, platform)
        self._shrink = Linear(["shrink"], shapes, platform) if vision.shrinks else None
        self._dim = vision.dim
        self._up = Linear(["up_proj"], shapes, platform)
        self._down = Linear(["down_proj"], shapes, platform)

    def __call__(self, x: Tensor) -> Tensor:
        """[patches, dim] to [embeddings, out]."""
        x = x.view(-1, self._joined) if self._joins_first else x
        x = (x if self._norm is None else self._norm(x)).view(-1, self._joined)
        if self._shrink is not None:
            x = self._shrink(x.unflatten(1, (-1, self._dim)).mT.flatten(1))
        hidden = self._up(x)
        return self._down(self._ops.activate(hidden, "gelu", gated=False))

    def weights(self) -> Views:
        views = self._up.weights() | self._down.weights()
        if self._norm is not None:
            views |= self._norm.weights("norm")
        return views if self._shrink is None else views | self._shrink.weights()


class VisionTower:
    """A vision tower whose weights are not yet loaded; load.py fills the tensors of `weights()`."""

    def __init__(self, vision: Vision, dtype: torch.dtype, device: torch.device) -> None:
        self.vision = vision
        self._device = device
        self._ops = select_ops(device)
        # Made here: the host waits for the stream when it copies them to a GPU.
        self._mean = torch.tensor(vision.mean, device=device)
        self._std = torch.tensor(vision.std, device=device)
        self._plan_images = self._ops.make_segment_planner(
            vision.heads, vision.head_dim, dtype, device
        )
        platform = Platform(self._ops, dtype, device, ALONE)
        outer = ("patch_embed.weight", "patch_embed.bias", "pos_embed.weight", "class_embed")
        shapes = vision.weights()
        self._outer = {
            name: platform.empty(*shapes[VISUAL + name])
            for name in outer
            if VISUAL + name in shapes
        }
        self._norms = {
            name: NormLayer(vision.norm, vision.eps, vision.dim, platform) for name in vision.norms
        }
        self._blocks = [_Block(vision, platform) for _ in range(vision.depth)]
        self._merger = _Merger(vision, platform, joins_first=False)
        self._deep = {block: _Merger(vision, platform, joins_first=True) for block in vision.deep}

    @property
    def compiled_attention(self) -> AttentionShape | None:
        """Of attention whose kernel must be compiled; None: there is none."""
        return self._plan_images.shape

    def weights(self) -> dict[str, Tensor]:
        """Canonical weight name -> the tensor, as of Decoder.weights."""
        views: Views = dict(self._outer)
        for name, norm in self._norms.items():
            views |= norm.weights(name)
        parts: dict[str, _Block | _Merger] = {"merger": self._merger}
        parts |= {f"blocks.{i}": block for i, block in enumerate(self._blocks)}
        parts |= {f"deepstack.{i}": merger for i, merger in enumerate(self._deep.values())}
        for part, owner in parts.items():
            views |= {f"{part}.{name}": view for name, view in owner.weights().items()}
        return {VISUAL + name: view for name, view in views.items() if isinstance(view, Tensor)}

    def encode(self, images: list[Tensor]) -> list[Tensor]:
        """Embeddings of each image, [1 + num_deep, rows * columns, out]: first those that replace
        the placeholders', then what is added after the decoder's layers 0, 1, ...

        `images`: uint8 [..., height, width, 3] on the tower's device, of sizes that Vision.grid
        takes: one frame, or as many as a patch has.
        """
        return [found for some in self._passes(images) for found in self._encode(some)]

    def _passes(self, images: list[Tensor]) -> Iterator[list[Tensor]]:
        some: list[Tensor] = []
        patches = 0
        for image in images:
            more = image.shape[-3] * image.shape[-2] // self.vision.patch**2
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
        grids = [vision.grid(*image.shape[-3:-1]) for image in images]
        sizes = [rows * columns for rows, columns in grids]
        joined = vision.merge**2
        x = torch.cat([self._embed(image) for image in images])
        lengths = [size * joined + vision.has_class for size in sizes]
        of_images = self._plan_images(lengths)
        of_windows = of_images
        order = None
        if vision.window:
            order = self._window_order(grids)
            windows = [size * joined for grid in grids for size in self._window_sizes(*grid)]
            of_windows = Segments(windows, self._device).attend
            x = x.unflatten(0, (-1, joined))[order].flatten(0, 1)
        rotary = None if vision.rotary is None else self._rotary_inputs(grids, order)
        if vision.first_norm:
            x = self._norms["first_norm"](x)
        deep = []
        for i, block in enumerate(self._blocks):
            x = block(x, rotary, of_images if vision.is_whole(i) else of_windows)
            if i in self._deep:
                deep.append(self._deep[i](x))
        if vision.last_norm:
            x = self._norms["last_norm"](x)
        if vision.has_class:
            x = torch.cat([part[1:] for part in x.split(lengths)])
        found = torch.stack([self._merger(x), *deep])
        if order is not None:
            found = found[:, order.argsort()]
        # Copies, so that to keep one image's embeddings does not keep those of the others.
        return [part.clone() for part in found.split(sizes, 1)]

    def _embed(self, image: Tensor) -> Tensor:
        """The input of the first block, [patches, dim]."""
        weight = self._outer["patch_embed.weight"].flatten(1)
        x = F.linear(
            self._patches(image).to(weight.dtype), weight, self._outer.get("patch_embed.bias")
        )
        if self.vision.has_class:
            x = torch.cat([self._outer["class_embed"][None], x])
        return (
            x + self._positions(*self.vision.grid(*image.shape[-3:-1])) if self.vision.table else x
        )

    def _patches(self, image: Tensor) -> Tensor:
        """The numbers of an image's patches in float32, [patches, width of the weight].

        The arithmetic is that of transformers' image processors: the share of 255 is computed in
        float64 and rounded.
        """
        vision = self.vision
        share = (image.double() * (1 / 255)).float()
        pixels = (share - self._mean) / self._std
        rows = pixels.shape[-3] // vision.patch
        columns = pixels.shape[-2] // vision.patch
        size = (-1, rows, vision.patch, columns, vision.patch, 3)
        # [rows, columns, 3, frames, patch, patch]
        patches = pixels.view(size).permute(1, 3, 5, 0, 2, 4)
        frames = patches.expand(-1, -1, -1, vision.frames or 1, -1, -1)
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
        table = self._outer["pos_embed.weight"].flatten(0, -2)
        own = table[: vision.has_class]
        square = table[vision.has_class :].unflatten(0, (1, vision.table, -1))
        size = (rows * vision.merge, columns * vision.merge)
        found = F.interpolate(
            square.permute(0, 3, 1, 2).float(),
            size,
            mode=vision.stretch,
            align_corners=vision.stretch == "bilinear",
        )
        return torch.cat([own, self._in_blocks(found[0].permute(1, 2, 0)).to(table.dtype)])

    def _rotary_inputs(self, grids: list[tuple[int, int]], order: Tensor | None) -> RotaryInputs:
        """Of all images' patches, whose embeddings have this order."""
        vision = self.vision
        angles = torch.cat([self._angles(*grid) for grid in grids])
        rows = torch.arange(len(angles), device=self._device)
        if order is not None:
            rows = rows.unflatten(0, (-1, vision.merge**2))[order].flatten()
        pairs = vision.rotary == "alternating"
        return self._ops.rotary_inputs(angles.cos(), angles.sin(), rows, torch.float32, pairs)

    def _angles(self, rows: int, columns: int) -> Tensor:
        """By which queries and keys are rotated, in float32: [patches, head_dim / 2]."""
        vision = self.vision
        half = vision.head_dim // 2
        exponents = torch.arange(0, half, 2, device=self._device, dtype=torch.float32) / half
        sides = (rows * vision.merge, columns * vision.merge)
        places = [torch.arange(side, device=self._device) for side in sides]
        grid = torch.stack(torch.meshgrid(*places, indexing="ij"), -1)
        of_sides = exponents.expand(2, -1)
        if vision.rotary == "shifted":
            of_sides = torch.stack([exponents, exponents + 1 / half])
        angles = self._in_blocks(grid)[:, :, None] / _THETA**of_sides
        return (angles.flip(1).mT if vision.rotary == "alternating" else angles).flatten(1)

    def _window_order(self, grids: list[tuple[int, int]]) -> Tensor:
        """The embeddings of all images, ordered by window."""
        window = self.vision.window
        orders = []
        at = 0
        for rows, columns in grids:
            index = torch.arange(rows * columns, device=self._device)
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
