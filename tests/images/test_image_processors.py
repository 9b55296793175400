"""Processors against transformers: the same pixels, the same number of tokens."""

from __future__ import annotations

import ast
import json
import math
from importlib.util import find_spec
from io import BytesIO
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import checkpoint, encoded, noise, read
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from gllm_engine.arch import ArchError, read_arch
from gllm_engine.config import ConfigError
from gllm_engine.images import ImageProcessor, PreparedImage
from gllm_engine.images.resize import CenterCrop, Fit, LongestEdge, Padded, PixelRange, Rule
from gllm_engine.sampling import InvalidField

RAW = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
# width, height: enlarged, reduced, odd, narrow, kept as it is
SIZES = [(1, 1), (33, 900), (901, 17), (640, 427), (1601, 1203), (56, 84), (3, 600), (10, 2000)]
MODES = ["RGB", "L", "P", "CMYK", "1", "YCbCr", "HSV", "LAB"]


def processor(path: Path, model_type: str, preprocessor: object = None, **options: object):
    path = checkpoint(path, model_type, preprocessor)
    found = read(path, **options)
    assert found is not None
    return found


def array(image: PreparedImage) -> np.ndarray:
    return np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, 3)


def unpatched(values: np.ndarray, rows: int, columns: int, patch: int) -> np.ndarray:
    """The pixels [height, width, 3] of the patches that Qwen2-VL's processor returns."""
    blocks = values.reshape(rows, columns, 2, 2, 3, 2, patch, patch)[:, :, :, :, :, 0]
    pixels = blocks.transpose(0, 2, 5, 1, 3, 6, 4)
    return pixels.reshape(rows * 2 * patch, columns * 2 * patch, 3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("model_type", "patch", "given", "bounds"),
    [
        ("qwen2_5_vl", 14, {"min_pixels": 3136, "max_pixels": 250_000}, (3136, 250_000)),
        ("qwen2_5_vl", 14, None, (3136, 1_003_520)),
        (
            "qwen3_vl",
            16,
            {"size": {"shortest_edge": 65536, "longest_edge": 300_000}},
            (65536, 300_000),
        ),
        ("qwen3_5_moe", 16, {"min_pixels": 65536, "max_pixels": 65536}, (65536, 65536)),
    ],
)
def test_qwen_equals_transformers(tmp_path, size, model_type, patch, given, bounds) -> None:
    image = noise(*size)
    ours = processor(tmp_path, model_type, given)
    found = ours.prepare(encoded(image))
    theirs = Qwen2VLImageProcessorPil(
        patch_size=patch, size={"shortest_edge": bounds[0], "longest_edge": bounds[1]}
    )(image, **RAW)
    assert [1, found.rows * 2, found.columns * 2] == theirs["image_grid_thw"][0].tolist()
    expected = unpatched(theirs["pixel_values"], found.rows, found.columns, patch)
    assert np.array_equal(array(found), expected)


@pytest.mark.parametrize("size", SIZES)
def test_llava_equals_transformers(tmp_path: Path, size: tuple[int, int]) -> None:
    image = noise(*size)
    found = processor(tmp_path, "llava").prepare(encoded(image))
    options = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    theirs = CLIPImageProcessorPil(**options)(image, **RAW)["pixel_values"][0]
    assert np.array_equal(array(found), theirs.transpose(1, 2, 0))
    assert (found.rows, found.columns, found.stride) == (24, 24, 24)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("edge", [1540, 500])
def test_pixtral_equals_transformers(tmp_path: Path, size: tuple[int, int], edge: int) -> None:
    image = noise(*size)
    found = processor(tmp_path, "mistral3", {"size": {"longest_edge": edge}}).prepare(
        encoded(image)
    )
    theirs = PixtralImageProcessorPil(size={"longest_edge": edge}, patch_size=28)(image, **RAW)
    assert [found.height, found.width] == list(theirs["image_sizes"][0])
    assert np.array_equal(array(found), theirs["pixel_values"][0].transpose(1, 2, 0))
    assert (found.rows * 28, found.columns * 28) == (found.height, found.width)
    assert found.stride == found.columns + 1


def their_navit_resize():
    """transformers' function; its module needs torchvision, the function does not."""
    path = find_spec("transformers").submodule_search_locations[0]
    source = Path(path, "models/kimi_k25/image_processing_kimi_k25.py").read_text()
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if getattr(node, "name", "") == "navit_resize"]
    names = {"math": math}
    exec(compile(tree, "navit", "exec"), names)
    return names["navit_resize"]


@given(
    height=st.integers(1, 20000),
    width=st.integers(1, 20000),
    patches=st.integers(4, 20000),
    side=st.integers(2, 600),
)
@settings(deadline=None)
def test_kimi_equals_transformers(height: int, width: int, patches: int, side: int) -> None:
    fit = Padded(28, 14, patches, side).fit(height, width)
    size, padded = their_navit_resize()(height, width, 14, 2, patches, side)
    assert (fit.size, (fit.height, fit.width)) == (size, padded)


def test_kimi_pads_with_black(tmp_path: Path) -> None:
    image = noise(75, 45)
    found = processor(tmp_path, "kimi_k25").prepare(encoded(image))
    pixels = array(found)
    assert pixels.shape == (56, 84, 3)
    assert (found.rows, found.columns) == (2, 3)
    assert np.array_equal(pixels[:45, :75], np.asarray(image))
    assert not pixels[45:].any() and not pixels[:, 75:].any()


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_resized_after_they_are_rgb(tmp_path: Path, mode: str) -> None:
    image = noise(61, 47, mode)
    kind = "PNG" if mode in ("L", "P", "1") else "TIFF"
    if mode == "HSV":
        kind, image = "GIF", noise(61, 47, "P")
    data = encoded(image, kind)
    with Image.open(BytesIO(data)) as opened:
        rgb = opened.convert("RGB")
    ours = processor(tmp_path, "qwen2_5_vl")
    assert ours.prepare(data) == ours.prepare(encoded(rgb))


# ---------------------------------------------------------------- sizes

sides = st.integers(1, 60_000)
rules = st.one_of(
    st.builds(
        lambda factor, least, more: PixelRange(factor, least, max(factor**2, least) + more),
        st.sampled_from([2, 28, 32]),
        st.integers(1, 100_000),
        st.integers(0, 2_000_000),
    ),
    st.builds(LongestEdge, st.sampled_from([14, 28, 32]), st.integers(32, 4000)),
    st.builds(CenterCrop, st.just(14), st.integers(28, 700), st.sampled_from([28, 336])),
    st.builds(Padded, st.just(28), st.just(14), st.integers(4, 30_000), st.integers(2, 600)),
)


@given(rule=rules, height=sides, width=sides)
@settings(max_examples=400, deadline=None)
def test_a_fit_is_whole_and_within_the_largest(rule: Rule, height: int, width: int) -> None:
    fit = rule.fit(height, width)
    assert fit.height % rule.factor == fit.width % rule.factor == 0
    assert fit.height > 0 and fit.width > 0 and min(fit.size) > 0
    largest = rule.largest()
    if isinstance(rule, PixelRange | Padded) and rule.factor in (fit.height, fit.width):
        return  # a strip may be larger; `prepare` refuses it then
    assert fit.height * fit.width <= largest[0] * largest[1]


@given(rule=rules)
@settings(max_examples=200, deadline=None)
def test_the_largest_is_of_whole_embeddings_and_close(rule: Rule) -> None:
    height, width = rule.largest()
    assert height % rule.factor == width % rule.factor == 0
    if isinstance(rule, PixelRange) and rule.most > 4 * (rule.least + rule.factor**2):
        rows = height // rule.factor
        assert 0 <= rows * width // rule.factor - rule.most // rule.factor**2 < rows
    if isinstance(rule, LongestEdge | Padded):
        fit = rule.fit(height, width)
        assert fit.height * fit.width <= height * width


def test_published_settings_have_their_known_maxima(tmp_path: Path) -> None:
    published = {"min_pixels": 3136, "max_pixels": 12845056}
    qwen = processor(tmp_path, "qwen2_5_vl", published)
    assert qwen.rule.largest() == (3584, 3584)
    assert qwen.max_tokens == 16384
    lowered = processor(tmp_path, "qwen2_5_vl", published, image_max_pixels=802_816)
    assert lowered.rule.largest() == (896, 896)
    mistral = processor(tmp_path, "mistral3", {"size": {"longest_edge": 1540}})
    assert mistral.max_tokens == 55 * 55
    assert len(mistral.tokens(55, 55)) == 55 * 56
    lowered = processor(tmp_path, "mistral3", {}, image_max_pixels=200_000)
    assert lowered.rule.largest() == (420, 420)
    kimi = {"media_proc_cfg": {"in_patch_limit": 16384, "patch_limit_on_one_side": 512}}
    kimi = processor(tmp_path, "kimi_k25", kimi)
    assert kimi.max_tokens == 248 * 18  # of an image of 503 x 7292 pixels
    assert kimi.rule.fit(7292, 503) == Fit((6918, 477), 248 * 28, 18 * 28)
    assert kimi == processor(tmp_path, "kimi_k25", {"size": {"max_height": 512, "max_width": 512}})
    lowered = processor(tmp_path, "kimi_k25", {}, image_max_pixels=200_000)
    assert lowered.rule == Padded(28, 14, 1020, 512)
    (tmp_path / "preprocessor_config.json").unlink()
    assert processor(tmp_path, "llava").max_tokens == 576


def test_settings_may_be_in_the_combined_file(tmp_path: Path) -> None:
    """transformers 5 writes one file, which counts before the older one."""
    combined = {"image_processor": {"size": {"shortest_edge": 4096, "longest_edge": 8192}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(combined))
    found = processor(tmp_path, "qwen3_vl", {"min_pixels": 1, "max_pixels": 2**20})
    assert found.rule == PixelRange(32, 4096, 8192)
    (tmp_path / "processor_config.json").write_text("{}")
    assert processor(tmp_path, "qwen3_vl").rule == PixelRange(32, 1, 2**20)


def test_a_model_without_images_has_no_processor(tmp_path: Path) -> None:
    assert read(checkpoint(tmp_path, "llama")) is None
    assert read(checkpoint(tmp_path, "qwen3_5", vision_config=None)) is None
    assert read(checkpoint(tmp_path, 3)) is None


@pytest.mark.parametrize(
    ("model_type", "preprocessor", "config", "options", "problem"),
    [
        ("qwen3_vl", {"resample": 2}, {}, {}, "resample: 2 is not supported, only 3"),
        ("qwen3_vl", {"do_resize": False}, {}, {}, "do_resize: False is not supported"),
        ("qwen3_vl", {"size": {"height": 3}}, {}, {}, "height: 3 is not supported"),
        (
            "qwen3_vl",
            {"min_pixels": -1},
            {},
            {},
            r"min_pixels: -1 is outside .1, 1073741824.",
        ),
        ("qwen3_vl", {"min_pixels": 9e9}, {}, {}, "min_pixels: 9000000000.0 is outside"),
        ("qwen3_vl", {}, {"image_token_id": "x"}, {}, "image_token_id is 'x', but only"),
        ("qwen3_vl", {}, {"vision": {"patch_size": [14, 16]}}, {}, "patch_size is .14, 16., but"),
        ("qwen3_vl", {}, {}, {"image_max_pixels": 65535}, "image_max_pixels: 65535 is below 65536"),
        (
            "llava",
            {},
            {},
            {"image_max_pixels": 112_895},
            "image_max_pixels: 112895 is below 112896",
        ),
        ("kimi_k25", {}, {}, {"image_max_pixels": 783}, "image_max_pixels: 783 is below 784"),
        ("mistral3", {}, {}, {"image_max_pixels": 783}, "image_max_pixels: 783 is below 784"),
        ("llava", {"do_pad": True}, {}, {}, "do_pad: True is not supported"),
        ("llava", {"do_center_crop": False}, {}, {}, "do_center_crop: False is not supported"),
        ("llava", {"crop_size": 224}, {}, {}, "crop_size: 224 is not the 336 of the tower"),
    ],
)
def test_settings_that_are_not_supported_are_refused(
    tmp_path, model_type, preprocessor, config, options, problem
) -> None:
    path = checkpoint(tmp_path, model_type, preprocessor, **config)
    with pytest.raises((ConfigError, ArchError), match=problem):
        read(path, **options)


@pytest.mark.parametrize("keys", [*permutations(["image_token_id", "image_token_index"])])
@pytest.mark.parametrize("model_type", ["llava", "mistral3", "qwen3_vl", "kimi_k25"])
def test_the_engine_and_front_ends_read_the_same(
    tmp_path: Path, model_type: str, keys: tuple[str, str]
) -> None:
    """Whichever of several keys counts, in whatever order they stand."""
    path = checkpoint(tmp_path, model_type)
    config = json.loads((path / "config.json").read_text())
    for key in ("image_token_id", "image_token_index", "media_placeholder_token_id"):
        config.pop(key, None)
    config |= dict(zip(keys, (20, 21), strict=True))
    (path / "config.json").write_text(json.dumps(config))
    found = read(path)
    tower = read_arch(path).vision
    assert found is not None and tower is not None
    assert found.placeholder == tower.image_token in (20, 21)
    assert found.rule.factor == tower.patch * tower.merge


def test_mistrals_breaks_come_from_the_tokenizer(tmp_path: Path) -> None:
    assert processor(tmp_path, "mistral3").breaks == (12, 13)
    (tmp_path / "other").mkdir()
    added = [{"content": name, "id": i} for i, name in enumerate(("[IMG_END]", "x", "[IMG_BREAK]"))]
    (tmp_path / "other/tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    found = processor(tmp_path, "mistral3", tokenizer=str(tmp_path / "other"))
    assert found.breaks == (2, 0)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added[:1]}))
    with pytest.raises(ConfigError, match=r"\[IMG_BREAK\], \[IMG_END\] is missing"):
        processor(tmp_path, "mistral3")
    llava = checkpoint(tmp_path / "other", "llava", vision_config={"model_type": "pixtral"})
    assert read(llava).rule == LongestEdge(16, 1024)


# ---------------------------------------------------------------- preparing


@pytest.fixture
def qwen(tmp_path: Path) -> ImageProcessor:
    return processor(tmp_path, "qwen2_5_vl", max_image_mib=1, max_image_megapixels=2)


def test_the_digest_is_of_pixels_and_size(qwen: ImageProcessor) -> None:
    image = Image.new("RGB", (56, 84), "red")
    found = qwen.prepare(encoded(image))
    assert len(found.digest) == 16
    assert qwen.prepare(encoded(image, "BMP")) == found
    turned = qwen.prepare(encoded(image.transpose(Image.Transpose.ROTATE_90)))
    assert turned.pixels == found.pixels
    assert turned.digest != found.digest
    image.putpixel((3, 3), (254, 0, 0))
    assert qwen.prepare(encoded(image)).digest != found.digest


@pytest.mark.parametrize("size", [(1, 201), (201, 1), (2, 401)])
def test_narrow_images_are_refused(qwen: ImageProcessor, size: tuple[int, int]) -> None:
    problem = f"image: image 3: it has {size[0]} x {size[1]} pixels, one side is over 200 times"
    with pytest.raises(InvalidField, match=problem):
        qwen.prepare(encoded(noise(*size)), number=3)


def test_a_narrow_image_must_not_take_more_than_the_largest(tmp_path: Path) -> None:
    settings = {"min_pixels": 784, "max_pixels": 4 * 784}
    ours = processor(tmp_path, "qwen2_5_vl", settings)
    assert ours.max_tokens == 4
    with pytest.raises(InvalidField, match="which take 1 x 15 tokens, at most 4 are allowed"):
        ours.prepare(encoded(noise(200, 1)))
