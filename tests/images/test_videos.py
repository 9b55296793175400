"""Videos: which frames are taken, what they become, and what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from array import array
from fcntl import ioctl
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from select import select
from termios import FIONREAD
from time import sleep
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from clips import clip, transformers_processor
from msgspec import json
from msgspec.structs import replace as changed
from pictures import checkpoint, read
from PIL import Image as Picture

from gllm_engine.config import ConfigError
from gllm_engine.images import PreparedVideo, place, video
from gllm_engine.images.video import Task, VideoProcessor
from gllm_engine.images.video_rule import Spaced, Stamped
from gllm_engine.sampling import InvalidField
from gllm_engine.types import Image

SPACED = Spaced(28, 128 * 28**2, 768 * 28**2, 10**8, 2.0, 4, 768, int(128000 * 28**2 * 0.9), 2)
STAMPED = Stamped(32, 4096, 25165824, 10**8, 2.0, 4, 768, 768 * 32**2)
# Frames of a file, frames a second, height, width.
FILES = [
    (2, 24.0, 64, 96),
    (3, 1.0, 720, 1280),
    (7, 30.0, 33, 900),
    (48, 24.0, 64, 96),
    (101, 25.0, 20, 30),
    (299, 29.97, 1080, 1920),
    (1000, 10.0, 500, 500),
    (20000, 23.976, 480, 640),
]


def processor(rule: Spaced | Stamped = STAMPED, **over: Any) -> VideoProcessor:
    values = {"max_bytes": 1 << 20, "max_pixels": 10**5, "seconds": 60.0} | over
    return VideoProcessor(rule, placeholder=9, around=(7, 8), **values)


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(("total", "fps", "height", "width"), FILES)
@pytest.mark.parametrize("is_capped", [True, False])
def test_frames_and_sizes_are_those_of_transformers(
    monkeypatch: pytest.MonkeyPatch,
    total: int,
    fps: float,
    height: int,
    width: int,
    is_capped: bool,
) -> None:
    for family, rule in (("qwen2_vl", SPACED), ("qwen3_vl", STAMPED)):
        rule = rule if is_capped else changed(rule, cap=0)
        theirs = transformers_processor(family, fps=2.0, num_frames=None)
        monkeypatch.setattr(type(theirs).__mro__[2], "resize", lambda self, image, size, **_: size)
        metadata = SimpleNamespace(total_num_frames=total, fps=fps)
        expected = theirs.sample_frames(metadata, fps=2.0 if rule is SPACED else None).tolist()
        taken = rule.indices(total, fps)
        assert taken == expected
        frames = torch.empty(1, len(taken), 3, height, width, device="meta")
        size = SimpleNamespace(shortest_edge=rule.least, longest_edge=rule.most)
        found = theirs.resize(frames, size, None, rule.factor, 2, is_capped)
        assert rule.size(len(taken), height, width) == (found.height, found.width)


def test_the_time_of_frames_is_that_of_transformers() -> None:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from transformers.video_utils import VideoMetadata

    for total, fps, *_ in FILES:
        taken = STAMPED.indices(total, fps)
        theirs = Qwen3VLProcessor._calculate_timestamps(None, list(taken), fps, 2)
        assert STAMPED.seconds(taken, fps) == theirs
        taken = SPACED.indices(total, fps)
        metadata = VideoMetadata(total_num_frames=total, fps=fps, frames_indices=taken)
        interval = 2 * (2 / metadata.sampled_fps)
        grid = torch.tensor([len(taken) // 2, 1, 1])
        positions = Qwen2_5_VLModel.get_vision_position_ids(None, 5, grid, 1, 1, interval)
        assert SPACED.times(taken, total, fps) == (positions[0] - 5).tolist()


# ---------------------------------------------------------------- decoding

KINDS = {
    "mp4": {},
    "h264": {"codec": "libx264"},
    "mov": {"container": "mov"},
    "webm": {"codec": "libvpx-vp9", "container": "webm"},
    "mkv": {"codec": "libx264", "container": "matroska"},
    "avi": {"codec": "mjpeg", "container": "avi"},
    "gif": {"codec": "gif", "container": "gif", "fps": 10},
}


@pytest.mark.parametrize("kind", KINDS)
def test_moments_hold_the_frames_of_the_file(kind: str) -> None:
    import av

    file = clip(frames=11, **KINDS[kind])
    fps = KINDS[kind].get("fps", 24)
    found = processor(changed(STAMPED, fps=6.0)).prepare(file)
    with av.open(BytesIO(file)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    taken = STAMPED.__class__.indices(changed(STAMPED, fps=6.0), 11, fps)
    resized = [np.asarray(Picture.fromarray(frames[i]).resize((96, 64), 3)) for i in taken]
    resized += resized[-1:] * (len(resized) % 2)
    assert [moment.time for moment in found.moments] == [None] * (len(resized) // 2)
    assert len(found.seconds) == len(found.moments)
    for moment, pair in zip(
        found.moments, zip(resized[::2], resized[1::2], strict=True), strict=True
    ):
        assert (moment.height, moment.width, moment.rows, moment.columns) == (64, 96, 2, 3)
        assert moment.pixels == np.stack(pair).tobytes()


def test_resizing_is_almost_that_of_transformers() -> None:
    """torchvision resizes uint8 by torch's interpolate, whose weights have fewer bits."""
    rng = np.random.default_rng(0)
    for (height, width), size in (((97, 130), (64, 96)), ((120, 160), (224, 288))):
        frame = rng.integers(0, 256, (height, width, 3), np.uint8)
        pixels = torch.from_numpy(frame).permute(2, 0, 1)[None]
        theirs = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)
        ours = np.asarray(Picture.fromarray(frame).resize(size[::-1], 3)).astype(int)
        difference = np.abs(ours - theirs[0].permute(1, 2, 0).numpy())
        assert difference.max() <= 2
        assert (difference > 0).mean() < 0.01


def test_spaced_moments_have_times_and_static_ones_one_digest() -> None:
    found = processor(SPACED).prepare(clip(frames=96))
    assert [moment.time for moment in found.moments] == [None, 2, 4, 6]
    assert found.seconds == []
    still = processor(SPACED).prepare(clip(frames=24, width=8, height=8))
    assert len({moment.digest for moment in still.moments}) == 1
    assert len({moment.digest for moment in found.moments}) > 1


def test_moments_may_be_further_apart_than_their_tokens() -> None:
    """96 x 64 pixels become 14 x 10 tokens."""
    rule = changed(SPACED, max_frames=4, positions_per_s=140)
    film = clip(frames=96)  # moments are 2 s apart
    assert [moment.time for moment in processor(rule).prepare(film).moments] == [None, 280]


def test_frames_are_turned_upright() -> None:
    """By the matrix of a telephone's file: a quarter turn."""
    file = bytearray(clip(frames=4))
    at = file.index(b"tkhd") + 4 + 40
    one = 1 << 16
    for index, value in enumerate((0, one, 0, -one & 0xFFFFFFFF, 0, 0)):
        file[at + 4 * index : at + 4 * index + 4] = value.to_bytes(4, "big")
    plain = processor().prepare(clip(frames=4)).moments[0]
    turned = processor().prepare(bytes(file)).moments[0]
    assert (turned.height, turned.width) == (plain.width, plain.height)
    before, after = (
        np.frombuffer(each.pixels, np.uint8).reshape(2, each.height, each.width, 3)
        for each in (plain, turned)
    )
    assert (np.rot90(before, -1, (1, 2)) == after).all()


# ---------------------------------------------------------------- what is refused

MP4 = clip()
BAD: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "no video": (b"\0hello", {}, "it is none of MP4, MOV, WEBM, MKV, AVI and GIF, it begins with"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(30), {}, "it is none of MP4"),
    "a playlist": (b"#EXTM3U\nfile:///etc/passwd", {}, "it is none of MP4"),
    "truncated": (MP4[: len(MP4) // 2], {}, "it is a broken or truncated video"),
    "truncated behind its header": (clip(codec="mjpeg", container="avi")[:30000], {}, "it is "),
    "no frames": (MP4[:32] + bytes(300), {}, "it is a broken or truncated video"),
    "one frame": (clip(frames=1), {}, "it has 1 frames, at least 2 are needed"),
    "large file": (MP4, {"max_bytes": 100}, f"it has {len(MP4)} bytes, at most 100 are allowed"),
    "large frames": (MP4, {"max_pixels": 6000}, "a frame has 96 x 64 pixels, at most 6000"),
    "narrow frames": (clip(frames=2, width=16 * 128, height=8), {}, "one side is over 200 times"),
    "a codec of its own": (
        clip(codec="flv1", container="avi"),
        {},
        "its frames are flv, not one of h264,",
    ),
    "a codec of nobody": (
        clip(codec="mjpeg", container="avi").replace(b"MJPG", b"zzzz"),
        {},
        "its frames are unknown, not one of h264,",
    ),
    "slow": (MP4, {"seconds": 0.01}, "it takes longer to decode than 0.01 s"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_videos_are_refused(case: str) -> None:
    file, over, sentence = BAD[case]
    with pytest.raises(InvalidField) as caught:
        processor(**over).prepare(file, 3)
    assert str(caught.value).startswith("video: video 3: ")
    assert sentence in str(caught.value)


def test_more_tokens_than_a_prompt_has_are_not_decoded() -> None:
    with pytest.raises(InvalidField, match=r"4 frames of 96 x 64 pixels take 12 tokens, .* 11 "):
        processor().prepare(MP4, max_tokens=11)
    assert processor().prepare(MP4, max_tokens=12).moments


def test_a_header_is_not_believed() -> None:
    """It tells a hundred million frames of a file of 48: neither memory nor time goes to them."""
    file = bytearray(clip(codec="mjpeg", container="avi"))
    at = file.index(b"strh") + 8 + 32
    file[at : at + 4] = (10**8).to_bytes(4, "little")
    with pytest.raises(InvalidField, match="48 of 100000000 frames are there"):
        processor().prepare(bytes(file))


@pytest.mark.parametrize("cut", [10, 30])
def test_a_cut_file_shows_what_it_shows(tmp_path: Path, cut: int) -> None:
    """As telephones cut: the edit list of an MP4 leaves out frames that are still in the file."""
    file = greys(tmp_path / "video.mp4", 12, cut=cut)
    found = processor(changed(STAMPED, max_frames=2)).prepare(file)
    assert found.seconds == [(47 - cut) / 24 / 2]
    frames = np.frombuffer(found.moments[0].pixels, np.uint8).reshape(2, -1)
    assert np.abs(frames.astype(int) - [[5 * cut], [5 * 47]]).max() <= 2
    with pytest.raises(InvalidField, match=r"it is truncated, \d+ of \d+ frames are there"):
        processor().prepare(file[:-40])


def test_a_title_may_have_any_encoding() -> None:
    import av

    file = BytesIO()
    with av.open(file, "w", format="avi") as output:
        output.metadata["title"] = "Cafe"
        stream = output.add_stream("mjpeg", rate=24)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p"
        for _ in range(2):
            output.mux(stream.encode(av.VideoFrame(96, 64, "yuvj420p")))
    title = "Café".encode("latin-1")
    assert processor().prepare(file.getvalue().replace(b"Cafe", title)).moments


def greys(path: Path, group: int, skip: int = 0, cut: int = 0) -> bytes:
    """A file of 48 frames, each brighter by 5, in groups of which only the first is a whole one.

    Without the first `skip` frames, and to be shown from number `cut` on.
    """
    import av

    with av.open(path, "w", options={"movflags": "faststart"} if cut else {}) as output:
        options = {"g": str(group), "keyint_min": str(group), "sc_threshold": "0", "bf": "0"}
        stream = output.add_stream("libx264", rate=24, options=options)
        stream.width = 96
        stream.height = 64
        packets = []
        for number in range(48):
            picture = np.full((64, 96, 3), 5 * number, np.uint8)
            packets += stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24"))
        packets += stream.encode()
        for number, packet in enumerate(packets):
            packet.pts = packet.dts = number - cut
            packet.time_base = Fraction(1, 24)
        output.mux(packets[skip:])
    return path.read_bytes()


def test_a_few_frames_may_be_missing_but_not_many(tmp_path: Path) -> None:
    """The first one, which the rest of its group needs to be decoded."""
    path = tmp_path / "video.mkv"
    assert len(processor().prepare(greys(path, 4, skip=1)).moments) == 2
    with pytest.raises(InvalidField, match="it is broken, 24 of 47 frames can be decoded"):
        processor().prepare(greys(path, 24, skip=1))


def test_a_request_that_is_over_ends_the_decoder() -> None:
    asked = threading.Event()

    def is_over() -> bool:
        asked.set()
        return True

    with pytest.raises(InvalidField):
        processor().prepare(MP4, is_over=is_over)
    assert asked.is_set()


def test_memory_is_reserved_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the file's copy, then that of the frames, which nobody decodes if it is refused."""
    files = []
    memory_file = video._memory_file

    def counted() -> Any:
        files.append(memory_file())
        return files[-1]

    monkeypatch.setattr(video, "_memory_file", counted)
    reserved = []
    frames = 3 * 96 * 64 * 4

    def reserve(size: int) -> None:
        reserved.append(size)
        assert sum(os.fstat(file.fileno()).st_size for file in files) < len(MP4) + frames / 4
        if is_full and len(reserved) == 2:
            raise RuntimeError("there is no room")

    is_full = False
    found = processor().prepare(MP4, reserve=reserve)
    assert reserved == [len(MP4), 2 * frames]
    assert sum(len(moment.pixels) for moment in found.moments) == frames
    is_full = True
    reserved.clear()
    files.clear()
    processes = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda *given, **named: processes.append(popen(*given, **named)) or processes[-1],
    )
    with pytest.raises(RuntimeError, match="there is no room"):
        processor().prepare(MP4, reserve=reserve)
    (process,) = processes
    assert process.returncode == -signal.SIGKILL


def test_a_decoder_that_dies_costs_one_video(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video.sys, "executable", "/bin/false")
    with pytest.raises(InvalidField, match="its decoder ended with exit status 1"):
        processor().prepare(MP4)


def test_a_decoder_tells_that_its_memory_is_too_small(tmp_path: Path) -> None:
    """As FFmpeg says it, whose errors are otherwise those of broken files."""
    program = (
        "import errno; from gllm_engine.images import video_decoder as decoder; "
        "decoder._decode = lambda *_: decoder.av.error.err_check(-errno.ENOMEM); decoder.main()"
    )
    task = json.encode(Task("gif", STAMPED, 10**5, 1000, 60)).decode()
    with open(tmp_path / "answer", "w+b") as answer:
        command = [sys.executable, "-c", program, task, "-1"]
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=answer, check=True)
        answer.seek(0)
        assert b"it takes more than 4 GiB of memory to decode" in answer.read()


def use_decoder(monkeypatch: pytest.MonkeyPatch, directory: Path, told: int, then: str) -> None:
    """One that tells of so many bytes of frames, waits for its room, and then does something."""
    decoder = directory / "decoder"
    tells = f"socket = int(sys.argv[4]); os.write(socket, b'{told}'); os.read(socket, 1)"
    decoder.write_text(f"#!{sys.executable} -S\nimport os, sys; {tells}; {then}")
    decoder.chmod(0o700)
    monkeypatch.setattr(video.sys, "executable", str(decoder))


@pytest.mark.parametrize("told", [-(10**9), 0, 10**9])
def test_a_decoder_is_not_believed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: int
) -> None:
    """An impossible number would let others have no memory, or all of it."""
    use_decoder(monkeypatch, tmp_path, told, "pass")
    reserved: list[int] = []
    with pytest.raises(InvalidField, match=f"its decoder tells of {told} bytes of frames"):
        processor().prepare(MP4, max_tokens=1000, reserve=reserved.append)
    assert reserved == [len(MP4)]


@pytest.mark.parametrize(("total", "pixels"), [(0, 2 * 3 * 32 * 32), (5, 2 * 3 * 32 * 32 - 1)])
def test_an_answer_that_is_not_whole_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, total: int, pixels: int
) -> None:
    answer = json.encode(video.Decoded("", 32, 32, [0], total, 1.0)) + b"\n" + bytes(pixels)
    use_decoder(monkeypatch, tmp_path, 6144, f"os.write(1, {answer!r})")
    with pytest.raises(InvalidField, match="the process that decodes it wrote no whole answer"):
        processor().prepare(MP4)


def test_the_output_of_a_decoder_is_bounded(tmp_path: Path) -> None:
    program = (
        "import gllm_engine.images.video_decoder as program;"
        "program._decode = lambda task, source, output, socket: output.write(bytes(2 << 20));"
        "program.main()"
    )
    task = json.encode(Task("gif", STAMPED, 10**5, 10, 60)).decode()
    with open(tmp_path / "answer", "wb") as answer:
        command = [sys.executable, "-c", program, task, "-1"]
        with pytest.raises(subprocess.CalledProcessError):
            subprocess.run(command, stdin=subprocess.DEVNULL, stdout=answer, check=True)
    assert (tmp_path / "answer").stat().st_size == (1 << 20) + 2 * 3 * 32**2 * 10


def test_a_decoder_ends_with_its_parent() -> None:
    """It waits for a file here, of which there is no end."""
    task = Task("gif", STAMPED, 10**5, 1000, 60)
    decoder = [sys.executable, "-m", "gllm_engine.images.video_decoder"]
    decoder += [json.encode(task).decode(), "-1"]
    program = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"
    reader, writer = os.pipe()
    with (
        os.fdopen(writer, "wb", 0) as file,
        subprocess.Popen(
            [sys.executable, "-c", program, *decoder], stdin=reader, stdout=subprocess.PIPE
        ) as parent,
    ):
        os.close(reader)
        file.write(b"GIF89a")
        unread = array("i", [1])
        while unread[0]:  # once it reads, it has made its preparations
            sleep(0.01)
            ioctl(writer, FIONREAD, unread)
        parent.kill()
        assert parent.stdout is not None
        ended, _, _ = select([parent.stdout], [], [], 10)  # the decoder has it too
        assert ended


def test_without_the_library_videos_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "find_spec", lambda name: None if name == "av" else True)
    with pytest.raises(InvalidField, match="videos need PyAV, which the extra 'video'"):
        processor().prepare(MP4)


# ---------------------------------------------------------------- checkpoints


def test_checkpoints_say_how_they_want_videos(tmp_path: Path) -> None:
    (tmp_path / "video_preprocessor_config.json").write_text(
        '{"size": {"longest_edge": 25165824, "shortest_edge": 4096}, "fps": 1.5, "max_frames": 40}'
    )
    path = checkpoint(tmp_path, "qwen3_vl", video_token_id=11)
    limits = {"max_video_mib": 2, "max_video_megapixels": 3, "max_video_frames": 20}
    found = read(path, **limits, video_decode_s=4.0)
    assert found is not None and found.videos is not None
    expected = changed(STAMPED, fps=1.5, max_frames=20, frame_most=found.videos.rule.frame_most)
    assert found.videos == VideoProcessor(expected, 11, (3, 5), 2 << 20, 3 * 10**6, 4.0)


@pytest.mark.parametrize(
    ("model_type", "rule"),
    [
        ("qwen2_5_vl", changed(SPACED, positions_per_s=4)),
        ("qwen3_5_moe", changed(STAMPED, least=128 * 32**2, most=768 * 32**2)),
    ],
)
def test_without_a_file_they_are_those_of_transformers(
    tmp_path: Path, model_type: str, rule: Any
) -> None:
    path = checkpoint(tmp_path, model_type, {"min_pixels": 3136, "max_pixels": 12845056})
    found = read(path, image_max_pixels=10**8)
    assert found is not None and found.videos is not None
    assert found.videos.rule == rule
    assert (found.videos.placeholder, *found.videos.around) == (6, 3, 5)


@pytest.mark.parametrize(
    ("key", "id", "sentence"),
    [
        ("video_token_id", 384, "video_token_id: 384 is no token, the text model has vocab_size="),
        ("vision_start_token_id", 10**6, "vision_start_token_id: 1000000 is no token, the text"),
        ("vision_end_token_id", 384, "vision_end_token_id: 384 is no token, the text model has"),
        ("video_token_id", 7, "video_token_id: 7 is the placeholder of images too"),
    ],
)
def test_placeholders_are_tokens_of_their_own(
    tmp_path: Path, key: str, id: int, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read(checkpoint(tmp_path, "qwen3_vl", **{key: id}))


def test_other_families_take_none(tmp_path: Path) -> None:
    found = read(checkpoint(tmp_path, "llava"))
    assert found is not None and found.videos is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ('{"fps": "2"}', "fps: 2 is outside"),
        ('{"fps": -1}', "fps: -1 is outside"),
        ('{"temporal_patch_size": 4}', "temporal_patch_size: 4 is not supported, only 2"),
        ('{"image_mean": [0, 0, 0]}', "image_mean: .* is not supported"),
        ('{"max_frames": 0}', "max_frames: 0 is outside"),
    ],
)
def test_settings_that_are_not_supported(tmp_path: Path, settings: str, sentence: str) -> None:
    (tmp_path / "video_preprocessor_config.json").write_text(settings)
    path = checkpoint(tmp_path, "qwen3_vl", {"image_mean": [0.5, 0.5, 0.5]})
    with pytest.raises(ConfigError, match=sentence):
        read(path)


# ---------------------------------------------------------------- places


def moment(name: bytes, time: int | None = None) -> Image:
    return Image(name * 16, 0, 1, 2, 2, 32, 64, name, time)


def test_places_of_videos(tmp_path: Path) -> None:
    """Times are texts, in the tokens of the placeholder or without them; images go their way."""
    found = read(
        checkpoint(
            tmp_path,
            "qwen3_vl",
            video_token_id=9,
            vision_start_token_id=1,
            vision_end_token_id=2,
        )
    )
    assert found is not None
    picture = moment(b"p")
    stamped = PreparedVideo([moment(b"a"), moment(b"b")], [0.25, 1.0])
    spaced = PreparedVideo([moment(b"a"), moment(b"b", 2)], [])
    texts = []

    def encode(text: str) -> list[int]:
        texts.append(text)
        return [50 + len(texts)]

    ids, placed = place(found, [5, 1, 9, 2, 6, 7, 9], [stamped, picture, spaced], encode)
    first = [51, 1, 9, 9, 2, 52, 1, 9, 9, 2]
    assert ids == [5, *first, 6, 7, 7, 9, 9, 9, 9]
    assert texts == ["<0.2 seconds>", "<1.0 seconds>"]
    assert [(each.first, each.digest[:1], each.time) for each in placed] == [
        (3, b"a", None),
        (8, b"b", None),
        (12, b"p", None),
        (14, b"a", None),
        (16, b"b", 2),
    ]
    assert place(found, [9], [stamped], encode)[0] == [53, 1, 9, 9, 2, 54, 1, 9, 9, 2]
    for wrong in ([9, 9], []):
        with pytest.raises(InvalidField, match=f"video: the prompt has {len(wrong)} placeholders"):
            place(found, wrong, [stamped])
