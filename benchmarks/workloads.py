"""The benchmarks' workloads: reproducible prompt lengths, output lengths and arrival times.

This module knows no engine. Prompts are random token ids, so that they share no prefixes.
"""

from __future__ import annotations

import csv
import io
import math
import random
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

WARM_UP_PROMPT_TOKENS = 32_768  # enough for steps of all relevant sizes
WARM_UP_OUTPUT_LEN = 8
IMAGE_TOKENS = 2691  # of Qwen2.5-VL, each of 28 x 28 pixels
IMAGE_LENGTHS = (200, 64)  # tokens of text and of the output, of requests with images
Lengths = list[tuple[int, int]]  # (prompt tokens, output tokens) of each request


class Job(NamedTuple):
    """One request; the output has exactly `output_len` tokens.

    `images`: files in base64, for each of which the prompt has one placeholder.
    """

    prompt: list[int]
    output_len: int
    images: Sequence[str] = ()

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt and about those of the images."""
        return len(self.prompt) + IMAGE_TOKENS * len(self.images)


def lengths(name: str) -> Lengths:
    """The lengths of a workload in WORKLOADS, of fixed:COUNT:IN:OUT or image:COUNT:FEWEST:MOST.

    Tokens of images are not in them. Raises SystemExit for any other name.
    """
    if name == "share":
        return _share()
    kind, numbers = _parse(name)
    if not numbers:
        known = ", ".join(WORKLOADS)
        raise SystemExit(
            f"workload {name!r} is unknown; known are {known}, image, image1, fixed:COUNT:IN:OUT, "
            "image:COUNT:FEWEST:MOST"
        )
    pair = IMAGE_LENGTHS if kind == "image" else (numbers[1], numbers[2])
    return [pair] * numbers[0]


def images_of(name: str) -> str:
    """How many images a workload's requests have, as a text; empty if they have none."""
    kind, numbers = _parse(name)
    if kind != "image":
        return ""
    _, fewest, most = numbers
    number = f"{fewest} to {most}" if fewest < most else most
    return f"{number} {'image' if most == 1 else 'images'} and "


def _parse(name: str) -> tuple[str, list[int]]:
    """A workload's kind, fixed or image, and its three numbers, of which unknown ones have none."""
    kind, *numbers = (_FIXED | _IMAGES).get(name, name).split(":")
    is_known = kind in ("fixed", "image") and len(numbers) == 3 and all(map(is_count, numbers))
    return kind, [int(number) for number in numbers if is_known]


def is_count(text: str) -> bool:
    """Whether `text` is a number from 1 to 9,999,999."""
    return text.isdecimal() and len(text) < 8 and int(text) > 0


def make_jobs(pairs: Lengths, vocab: int, seed: int = 1) -> list[Job]:
    """Requests of these lengths, with prompts of ids below `vocab`."""
    ids = random.Random(seed)
    return [Job(ids.choices(range(vocab), k=p), n) for p, n in pairs]


def with_images(jobs: list[Job], name: str, special: dict[int, str]) -> list[Job]:
    """The jobs of a workload with its images, if it has any, in front of the text.

    Other prompts get other images. `special`: tokens that the text does not have; the first three
    stand for an image. Raises SystemExit for a workload with images and no such tokens.
    """
    kind, numbers = _parse(name)
    if kind != "image":
        return jobs
    if not special:
        raise SystemExit(f"workload {name!r} is for a model that takes images")
    place = [*special][:3]
    draws = random.Random(str(jobs))
    found = []
    for prompt, output_len, _ in jobs:
        images = [_make_image(draws) for _ in range(draws.randint(*numbers[1:]))]
        text = [id for id in prompt if id not in special]
        found.append(Job(place * len(images) + text, output_len, images))
    return found


def _make_image(draws: random.Random) -> str:
    """A JPEG file of 1920 x 1080 pixels with smooth random colours, as base64."""
    from PIL import Image

    colours = Image.frombytes("RGB", (48, 27), draws.randbytes(48 * 27 * 3))
    file = io.BytesIO()
    colours.resize((1920, 1080)).save(file, "JPEG")
    return b64encode(file.getvalue()).decode()


def warm_up(jobs: list[Job]) -> list[Job]:
    """The first jobs of a workload, with short outputs."""
    chosen: list[Job] = []
    total = 0
    for job in jobs:
        total += job.prompt_len
        if chosen and total > WARM_UP_PROMPT_TOKENS:
            break
        chosen.append(job._replace(output_len=min(job.output_len, WARM_UP_OUTPUT_LEN)))
    return chosen


def read_azure(path: Path, limit: int | None = None) -> tuple[list[float], Lengths]:
    """Arrivals (seconds since the first) and lengths of an Azure LLM inference trace.

    `path`: a CSV file with the columns TIMESTAMP, ContextTokens and GeneratedTokens (Azure public
    dataset, 2023). `limit`: read only this many requests from its start. Raises SystemExit for a
    file that is no such trace.
    """

    def parse(row: dict[str, str]) -> tuple[float, tuple[int, int]]:
        # Python before 3.11 parses at most six digits of a second's fraction.
        at = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
        return at, (int(row["ContextTokens"]), int(row["GeneratedTokens"]))

    with path.open(newline="") as file:
        arrivals, pairs = zip(*parsed(path, csv.DictReader(file), parse, limit), strict=True)
    return [at - arrivals[0] for at in arrivals], list(pairs)


def parsed(
    path: Path, entries: Iterable[Any], parse: Callable[[Any], Any], limit: int | None
) -> list[Any]:
    """What `parse` makes of a trace's entries, one for each request, and at most `limit`.

    Raises SystemExit if there is none, or if `parse` fails.
    """
    found = []
    for entry in islice(entries, limit):
        try:
            found.append(parse(entry))
        except (KeyError, TypeError, ValueError) as error:
            raise SystemExit(f"{path}: request {len(found) + 1}: {error!r}") from None
    if not found:
        raise SystemExit(f"{path}: holds no request")
    return found


def read_load(
    workload: str, trace: Path | None, limit: int | None
) -> tuple[str, list[float], Lengths]:
    """The name of the workload or trace, the trace's arrivals (else empty), and the lengths."""
    if trace is not None:
        return trace.name, *read_azure(trace, limit)
    return workload, [], lengths(workload)[:limit]


def at_rate(arrivals: list[float], rate: float) -> list[float]:
    """`arrivals` with time scaled to a mean of `rate` requests per second."""
    factor = (len(arrivals) - 1) / rate / (arrivals[-1] or 1.0)
    return [at * factor for at in arrivals]


def poisson(count: int, rate: float, seed: int = 0) -> list[float]:
    """Poisson arrivals (independent users): a mean of `rate` requests/s, the first at 0."""
    draws = random.Random(seed)
    return list(accumulate((draws.expovariate(rate) for _ in range(count - 1)), initial=0.0))


def _share() -> Lengths:
    """2,000 requests with the length distribution of conversations."""
    draws = random.Random(0)

    def draw(mean: float, sigma: float, high: int) -> int:
        length = int(draws.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))
        return min(max(length, 4), high)

    return [(draw(220, 1.0, 2048), draw(200, 0.8, 1024)) for _ in range(2000)]


_FIXED = {
    "1k1k": "fixed:512:1024:1024",
    "prefill": "fixed:96:8192:16",
    "lat1": "fixed:1:128:256",
    "lat64": "fixed:64:512:256",
}
WORKLOADS = ("share", *_FIXED)
# Requests, and the fewest and most images of each.
_IMAGES = {"image": "image:32:4:8", "image1": "image:16:1:1"}
