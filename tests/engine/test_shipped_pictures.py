"""The shipped model of pictures: its answers about pictures that it has not seen."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from gllm_engine import LLM, SamplingParams

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "scripts/image_repository/pictures/1"
MAX_BYTES = 15_000_000
PICTURES = 25  # of each exam, with some 140 questions
CHANCE = 0.05  # about twice the standard error of a share of so many answers
GREEDY = SamplingParams(temperature=0, max_tokens=40)


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """scripts/train_pictures.py as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        import train_pictures

        yield train_pictures


@pytest.fixture(scope="module")
def papers(script: ModuleType) -> list[tuple]:
    """Unseen pictures of five sizes, with their questions."""
    return script.exam(5, unseen=False)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(model=str(SHIPPED), num_pages=1024) as llm:
        yield llm


def share_right(script: ModuleType, llm: LLM, papers: list[tuple]) -> float:
    answers = script.answers(llm, papers)
    return sum(question.answer == answer for question, answer in answers) / len(answers)


def stated(column: int) -> float:
    """The share of right answers to all questions that the page tells of an exam."""
    page = (ROOT / "docs/images.md").read_text()
    row = re.search(r"^\| all \| ([\d.]+)% \| ([\d.]+)% \|$", page, re.MULTILINE)
    assert row is not None
    return float(row[1 + column]) / 100


@pytest.mark.parametrize("unseen", [False, True], ids=["pictures", "pairs"])
def test_answers_are_right_as_often_as_the_page_says(
    script: ModuleType, llm: LLM, unseen: bool
) -> None:
    """Of a part of the page's exam."""
    part = script.exam(PICTURES, unseen)
    assert share_right(script, llm, part) == pytest.approx(stated(unseen), abs=CHANCE)


def test_answers_are_about_the_picture(script: ModuleType, llm: LLM, papers: list[tuple]) -> None:
    """With another picture the same questions get other answers, most of them."""
    images = [picture for picture, _ in papers]
    others = zip(images[1:] + images[:1], [asked for _, asked in papers], strict=True)
    assert share_right(script, llm, list(others)) < 0.6


def test_no_exam_has_what_the_training_has(script: ModuleType) -> None:
    import draw_pictures

    rng = random.Random(0)
    for _ in range(100):
        things = draw_pictures.make_picture(rng).things
        assert not {(each.colour, each.name) for each in things} & draw_pictures.UNSEEN
    for picture, _ in script.exam(5, unseen=True):
        assert {(each.colour, each.name) for each in picture.things} & draw_pictures.UNSEEN


def test_the_engine_answers_as_transformers_does(
    script: ModuleType, llm: LLM, papers: list[tuple]
) -> None:
    chosen = [(picture, asked[0]) for picture, asked in papers]
    outputs = llm.chat([script.conversation(*each) for each in chosen], GREEDY)
    processor = Qwen2VLImageProcessorPil.from_pretrained(SHIPPED)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(SHIPPED, dtype=torch.float32)
    for (picture, _), output in zip(chosen, outputs, strict=True):
        assert output.prompt_token_ids is not None
        ids = torch.tensor([output.prompt_token_ids])
        inputs = processor(images=[picture.image], return_tensors="pt")
        kinds = (ids == model.config.image_token_id).int()
        answer = model.generate(
            ids, mm_token_type_ids=kinds, max_new_tokens=40, do_sample=False, **inputs
        )
        assert answer[0, ids.shape[1] :].tolist() == list(output.outputs[0].token_ids)


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < MAX_BYTES
