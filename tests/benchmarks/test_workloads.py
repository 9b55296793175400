"""Workloads are the same everywhere and always: figures of different days can be compared."""

from __future__ import annotations

import hashlib
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from gllm_benchmarks.workloads import (
    at_rate,
    images_of,
    lengths,
    make_jobs,
    poisson,
    read_azure,
    with_images,
)

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 23:59:58.5000000,374,44
2023-11-17 00:00:00.2500009,396,109
2023-11-17 00:00:02.5000000,879,55
"""


def test_share_is_the_workload_that_peers_were_measured_on() -> None:
    pairs = lengths("share")
    assert len(pairs) == 2000
    assert (sum(p for p, _ in pairs), sum(n for _, n in pairs)) == (436_979, 393_788)
    assert pairs[:3] == [(111, 149), (268, 134), (548, 42)]
    assert (max(p for p, _ in pairs), max(n for _, n in pairs)) == (2048, 1024)


def test_how_many_images_a_request_has_is_told() -> None:
    assert images_of("image") == "4 to 8 images and "
    assert images_of("image1") == "1 image and "
    assert images_of("image:3:2:2") == "2 images and "
    assert images_of("lat1") == ""


def test_prompts_are_bit_for_bit_the_same() -> None:
    jobs = make_jobs(lengths("share")[:20], 128_256)
    digest = hashlib.sha256(repr([job.prompt for job in jobs]).encode()).hexdigest()
    assert digest[:16] == "237676e81bf1e9b5"
    assert all(0 <= id < 128_256 for job in jobs for id in job.prompt)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("1k1k", [(1024, 1024)] * 512),
        ("prefill", [(8192, 16)] * 96),
        ("lat1", [(128, 256)]),
        ("lat64", [(512, 256)] * 64),
        ("fixed:3:7:9", [(7, 9)] * 3),
        ("image", [(200, 64)] * 32),
        ("image1", [(200, 64)] * 16),
        ("image:3:1:2", [(200, 64)] * 3),
    ],
)
def test_fixed_lengths(name: str, expected: list[tuple[int, int]]) -> None:
    assert lengths(name) == expected


@pytest.mark.parametrize(
    "name",
    ["", "shared", "fixed:1:2", "image:2:1", "fixed:1:0:2", "fixed:1:2:-3", "fixed:10000000:1:1"],
)
def test_unknown_workloads_are_named(name: str) -> None:
    with pytest.raises(SystemExit, match=f"workload '{name}' is unknown; known are share, 1k1k"):
        lengths(name)


def test_images_are_in_front_of_the_text() -> None:
    name = "image:3:1:2"
    jobs = make_jobs(lengths(name), 40)
    special = {7: "start", 9: "place", 8: "end", 30: "other"}
    found = with_images(jobs, name, special)
    assert found == with_images(jobs, name, special)
    for job, plain in zip(found, jobs, strict=True):
        count = len(job.images)
        assert 1 <= count <= 2 and job.output_len == 64
        assert job.prompt[: 3 * count] == [7, 9, 8] * count
        text = [id for id in plain.prompt if id not in special]
        assert job.prompt[3 * count :] == text and job.prompt_len > 2000 * count
    files = [b64decode(image) for job in found for image in job.images]
    others = with_images(make_jobs(lengths(name), 40, seed=2), name, special)
    assert len({*files, *(b64decode(image) for job in others for image in job.images)}) == sum(
        len(job.images) for job in (*found, *others)
    )
    with Image.open(BytesIO(files[0])) as image:
        assert image.size == (1920, 1080)
        assert len({image.getpixel((x, 500)) for x in range(0, 1920, 40)}) > 40
    assert with_images(jobs, "share", special) is jobs


def test_azure_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    arrivals, pairs = read_azure(path)
    assert pairs == [(374, 44), (396, 109), (879, 55)]
    assert arrivals == pytest.approx([0, 1.75, 4.0], abs=2e-6)
    assert at_rate(arrivals, 1.0) == pytest.approx([0, 0.875, 2.0], abs=2e-6)
    assert read_azure(path, limit=2) == (arrivals[:2], pairs[:2])


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE + "2023-11-17 00:00:03,seven,1\n")
    with pytest.raises(SystemExit, match="request 4"):
        read_azure(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="TIMESTAMP"):
        read_azure(path)
    path.write_text("")
    with pytest.raises(SystemExit, match="no request"):
        read_azure(path)


def test_poisson_arrivals() -> None:
    arrivals = poisson(20_000, 8.0)
    assert arrivals == poisson(20_000, 8.0) != poisson(20_000, 8.0, seed=1)
    gaps = [later - at for at, later in zip(arrivals, arrivals[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert arrivals[0] == 0 and min(gaps) >= 0
    assert mean == pytest.approx(1 / 8, rel=0.03) and deviation == pytest.approx(mean, rel=0.03)
