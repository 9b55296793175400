"""Videos through LLM: what becomes of their times, and answers as with the moments by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clips import clip, url_of

from gllm_client.local_answers import LocalAnswers
from gllm_engine.engine.llm import LLM
from gllm_engine.model.tiny import write_tiny_model
from gllm_engine.sampling import InvalidField, SamplingParams

GREEDY = SamplingParams(max_tokens=6, ignore_eos=True, temperature=0.0)
START, PAD, END, VIDEO = 3, 4, 5, 6  # ids of the tiny model's tokens
FILM = clip(frames=96)  # four seconds, so 8 frames and 4 moments
ASKED = {"type": "text", "text": "Which?"}
SMALL: dict[str, Any] = {"cpu_threads": 1, "max_model_len": 512, "num_pages": 128}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = tmp_path_factory.mktemp("model")
    write_tiny_model(path, "Qwen3VLForConditionalGeneration", seed=2)
    with LLM(str(path), **SMALL) as made:
        yield made


def test_a_time_stands_before_each_moment(llm: LLM, tmp_path: Path) -> None:
    """In place of the tokens around the placeholder of the chat template."""
    path = tmp_path / "film.mp4"
    path.write_bytes(FILM)
    chats: list[Any] = [
        [{"role": "user", "content": [part, ASKED]}]
        for part in (
            {"type": "video_url", "video_url": {"url": url_of(FILM)}},
            {"type": "video", "video": path},
        )
    ]
    first, second = llm.chat(chats, GREEDY)
    assert first.error is None
    assert first.prompt_token_ids == second.prompt_token_ids
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    ids = first.prompt_token_ids
    shown = llm.tokenizer.decode([id for id in ids if id != VIDEO], skip_special_tokens=False)
    mark = "<|vision_start|><|vision_end|>"
    # Frames 0, 14, 27, 41, 54, 68, 81 and 95 of 24 a second.
    times = [f"<{time} seconds>" for time in (0.3, 1.4, 2.5, 3.7)]
    assert f"user\n{''.join(time + mark for time in times)}Which?" in shown
    assert ids.count(START) == ids.count(END) == 4
    assert ids.count(VIDEO) % 4 == 0
    texts: list[Any] = [
        {"prompt": "Which?", "videos": [str(path)]},
        {"prompt": "<|vision_start|><|video_pad|><|vision_end|>Which?", "videos": [FILM]},
        {
            "prompt_token_ids": [START, VIDEO, END, *llm.tokenizer.encode("Which?")],
            "videos": [FILM],
        },
    ]
    outputs = llm.generate(texts, GREEDY)
    assert len({tuple(output.prompt_token_ids) for output in outputs}) == 1
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1


def test_prefixes_and_other_videos(llm: LLM) -> None:
    prompts: list[Any] = [{"prompt": "Which?", "videos": [clip(seed=seed)]} for seed in (1, 2, 1)]
    (first,) = llm.generate(prompts[0], GREEDY)
    (second,) = llm.generate(prompts[1], GREEDY)
    (again,) = llm.generate(prompts[2], GREEDY)
    assert first.prompt_token_ids == second.prompt_token_ids
    assert second.num_cached_tokens < 16  # what is before its first moment is less than a page
    assert again.num_cached_tokens > len(first.prompt_token_ids) - 32
    assert first.outputs[0].token_ids == again.outputs[0].token_ids
    assert first.outputs[0].token_ids != second.outputs[0].token_ids


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ({"prompt": "a", "videos": [b"\0no"]}, "video: video 1: it is none of MP4"),
        ({"prompt": "a", "videos": [FILM, "/no.mp4"]}, "video: video 2: it cannot be read"),
        ({"prompt": "a", "videos": [7]}, "video: video 1: 7 is no URL or base64"),
        ({"prompt": "a", "images": [FILM]}, "image: image 1: it is none of JPEG"),
        (
            {"prompt": "<|video_pad|>"},
            "video: the prompt has 1 placeholders (token 6) for 0 videos",
        ),
        ({"prompt": "a", "videos": [FILM] * 5}, "video: 5 videos given, at most 4 (max_videos)"),
    ],
)
def test_bad_videos_fail_one_prompt(llm: LLM, prompt: Any, sentence: str) -> None:
    bad, good = llm.generate([prompt, {"prompt": "Which?"}], GREEDY)
    assert bad.error is not None and bad.error.startswith(sentence)
    assert good.error is None


def test_a_local_source_takes_videos_of_token_ids(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path, "Qwen2_5_VLForConditionalGeneration", seed=2)
    source = LocalAnswers(SMALL | {"model": str(path), "max_video_frames": 4})
    try:
        loaded = source._load((VIDEO, 20), videos=[FILM])
    finally:
        source.close()
    assert [moment.time for moment in loaded.images] == [None, 8]  # two seconds of 4 positions
    with pytest.raises(InvalidField, match="video: 5 videos given, at most 4"):
        source._load((VIDEO, 20), videos=[FILM] * 5)
    assert loaded.token_ids.count(VIDEO) == 2 * loaded.images[0].rows * loaded.images[0].columns
