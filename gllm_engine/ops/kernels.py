"""Which kernels a GPU has for which shapes and dtypes, and the memory that they keep.

The modules of the kernels choose by these functions. They need neither a GPU nor a kernel library,
so that the choice can be told on any machine. `Ops` documents the operations.
"""

from __future__ import annotations

from typing import Literal

import torch

from gllm_engine.attention_shape import AttentionShape

# GPUs with different kernels.
DeviceKind = Literal["hopper", "gpu"]  # "gpu": any other GPU

# Dtypes for which there are kernels other than plain torch.
HALF = (torch.bfloat16, torch.float16)
# Channels of (a query or key, a value) for which FlashInfer has kernels.
_HEAD_DIMS = ((64, 64), (128, 128), (256, 256), (192, 128))
# Bytes for the partial results of rows that FlashInfer splits among multiprocessors.
PARTIALS_BYTES = 384 << 20
# Bytes of an indexer's scores at once: of 409 rows with contexts of 163,840 tokens.
SCORE_BYTES = 256 << 20
# Gated delta rule: rows of so many tokens or more are long, and are computed in blocks of tokens; a
# block of `BLOCK` tokens takes `BLOCK` numbers of two matrices, and `FACTORS` others, per token.
LONG = 16
BLOCK = 64
FACTORS = 4
# Bytes of K and V of chunks that latent attention makes at once: of 47,000 tokens and 16 heads of
# 192 and 128 channels, or of 299,000 tokens and one head.
EXPANDED_BYTES = 512 << 20
# Tokens of the absorbed form of latent attention at once, which takes 4 bytes for each number of a
# latent, token and head; and the most parts of contexts beyond one per token.
ABSORBED_TOKENS = 2048
EXTRA_PARTS = 128
# Rows and columns of the only blocks that torch's products take.
_FP8_BLOCK = (128, 128)
# Rows of a product with an int8 weight whose int32 sums are in memory at once: of 28,672 columns
# 224 MiB.
INT8_ROWS_AT_ONCE = 2048
# Rows and columns of an int8 weight have a multiple of this in torch's products.
_INT8_MULTIPLE = 8
# Columns of an FP8 weight that must have one scale: as many as a thread loads at once in a product
# with one row, and as many as FP8 tensor cores add up at once.
_FP8_LOADED = 8
_FP8_DEPTH = 32
# Most rows of products with 4-bit numbers that are decoded in registers. With more rows, a plain
# matrix, made once, and cuBLAS are faster: the matrix takes the time to write and read it, and
# cuBLAS saves about a third of the time of the product.
PACKED_ROWS = 512
_MADE_ANEW = "with the numbers of a weight made anew for each product (slow)"


def on_hopper(device: torch.device) -> bool:
    """Whether kernels compute on a Hopper GPU, or as if: without a GPU, in Triton's interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


def has_chunk_kernels(head_dim: int, dtype: torch.dtype, value_dim: int | None = None) -> bool:
    """Whether FlashInfer has kernels for prefill chunks with such heads and queries of `dtype`.
    `value_dim`: None: as head_dim. If they differ, K and V may not be in pages.
    """
    return dtype in HALF and (head_dim, value_dim or head_dim) in _HEAD_DIMS


def padded_head(head_dim: int, dtype: torch.dtype) -> int | None:
    """The least size of heads, from `head_dim` on, for which FlashInfer has kernels, if any."""
    sizes = (dim for dim, value in _HEAD_DIMS if dim == value >= head_dim)
    return min(sizes, default=None) if dtype in HALF else None


def chunk_backend(is_hopper: bool, is_same_dtype: bool) -> str:
    """FlashInfer's name for its kernels for chunks. Its FlashAttention-3 runs only on Hopper, and
    needs queries of the same dtype as K and V.
    """
    return "fa3" if is_hopper and is_same_dtype else "fa2"


def rounds_chunks(
    is_hopper: bool, dtype: torch.dtype, cache_dtype: torch.dtype, softcap: float | None = None
) -> bool:
    """Whether chunks attend with their heads rounded to the dtype of pages, for FlashAttention-3.
    Its float8 kernels have no softcap.
    """
    return is_hopper and dtype in HALF and cache_dtype != dtype and softcap is None


def has_short_chunks(
    is_hopper: bool, shape: AttentionShape, dtype: torch.dtype, cache_dtype: torch.dtype
) -> bool:
    """Whether short chunks over pages use FlashAttention-2, and long ones FlashAttention-3. Windows
    and softcaps have other kernels, which are not worth their compilation for pages of `dtype`.
    """
    windowed = shape.window is not None and not shape.chunked
    plain = is_hopper and dtype in HALF and shape.softcap is None
    return plain and (cache_dtype != dtype or not windowed)


def has_scaled_product(
    dtype: torch.dtype, block: tuple[int, int] | None = None, is_hopper: bool = False
) -> bool:
    """Whether torch multiplies inputs of `dtype` by FP8 weights with a scale for each `block` of
    (rows, columns), if the weight's sizes fit. None: a scale for each row, or one.
    """
    return dtype == torch.bfloat16 and (block is None or is_hopper and block == _FP8_BLOCK)


def has_fp8_gemv(dtype: torch.dtype, columns: int) -> bool:
    """Whether Triton multiplies one row of `dtype` by FP8 weights. Each `columns` of them, from the
    first on, have one scale; 0: all columns have.
    """
    return dtype in HALF and columns % _FP8_LOADED == 0


def has_fp8_tiles(dtype: torch.dtype, columns: int) -> bool:
    """As has_fp8_gemv, for any number of rows on Hopper."""
    return dtype in HALF and columns % _FP8_DEPTH == 0


def has_int8_product(dtype: torch.dtype, width: int, depth: int) -> bool:
    """Whether torch multiplies inputs of `dtype`, rounded to int8, by an int8 weight."""
    return dtype in HALF and width % _INT8_MULTIPLE == depth % _INT8_MULTIPLE == 0


def attention_kernels(
    device: DeviceKind, shape: AttentionShape, dtype: torch.dtype, cache_dtype: torch.dtype
) -> str:
    """The kernels of attention over K and V in pages: of decode rows, then of prefill chunks."""
    if not has_chunk_kernels(shape.head_dim, dtype):
        why = f"heads of {shape.head_dim} in {str(dtype).removeprefix('torch.')}"
        return f"decode: Triton; prefill: plain torch (slow), for {why}"
    hopper = device == "hopper"
    fresh = chunk_backend(hopper, True)
    more = ""
    if rounds_chunks(hopper, dtype, cache_dtype, shape.softcap):
        more = ", with queries rounded to FP8"
    if has_short_chunks(hopper, shape, dtype, cache_dtype):
        more += "; short chunks after the first one: fa2"
    elif (later := chunk_backend(hopper, cache_dtype == dtype)) != fresh:
        more = f"; chunks after the first one: {later}"
    return f"decode: Triton; prefill: FlashInfer {fresh}{more}"


def latent_kernels(device: DeviceKind, key_dim: int, value_dim: int, dtype: torch.dtype) -> str:
    """The kernels of latent attention: of decode rows, then of prefill chunks."""
    if not has_chunk_kernels(key_dim, dtype, value_dim):
        why = f"heads of {key_dim} and {value_dim} in {str(dtype).removeprefix('torch.')}"
        return f"Triton, absorbed; so too prefill (slow), for {why}"
    fresh = chunk_backend(device == "hopper", True)
    return f"decode: Triton, absorbed; prefill: FlashInfer {fresh}, expanded"


def product_kernels(device: DeviceKind, dtype: torch.dtype) -> str:
    """The kernels of products with a matrix of plain numbers."""
    if dtype not in HALF:
        return "cuBLAS"
    few = " and for few rows" if device == "hopper" else ""
    return f"cuBLAS; Triton for one row{few}"


def fp8_product_kernels(
    device: DeviceKind, dtype: torch.dtype, block: tuple[int, int] | None
) -> str:
    """The kernels of products with FP8 weights whose sizes fit; see has_scaled_product."""
    columns = 0 if block is None else block[1]
    one = "Triton for one row; " if has_fp8_gemv(dtype, columns) else ""
    tiles = device == "hopper" and has_fp8_tiles(dtype, columns)
    if has_scaled_product(dtype, block, device == "hopper"):
        few = "Triton for few rows; " if tiles else ""
        return f"{one}{few}torch's scaled products; several rows are rounded to FP8"
    if tiles:
        return "Triton; several rows are rounded to FP8"
    return f"{one}cuBLAS, {_MADE_ANEW}"


def int8_product_kernels(device: DeviceKind, dtype: torch.dtype) -> str:
    """The kernels of products with int8 weights whose sizes fit."""
    if dtype not in HALF:
        return f"cuBLAS, {_MADE_ANEW}"
    return "Triton for one row; torch's int8 products; several rows are rounded to INT8"


def packed_product_kernels(device: DeviceKind) -> str:
    """The kernels of products with weights of 4-bit numbers."""
    return f"Triton; for more than {PACKED_ROWS} rows cuBLAS, {_MADE_ANEW}"
