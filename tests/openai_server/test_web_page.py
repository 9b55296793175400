"""The chat page in a real browser, and its files."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import BROWSER, NAMES, Browser, PageError
from metrics_page import metrics_page
from patience import SOON_S
from scripted_triton import FakeModel
from serving import Served, serve

from gllm_client.openai_server.web_page import FILES

ROOT = Path(__file__).resolve().parents[2]
UI = ROOT / "client/openai_server/ui"
in_browser = pytest.mark.skipif(BROWSER is None, reason=f"no browser found ({', '.join(NAMES)})")
THINKS = "<think> </think>"  # in a chat template: the model can think


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    running = Browser(tmp_path_factory.mktemp("profile"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def with_page(session_served: Served) -> Iterator[Served]:
    with serve(session_served.triton, ui=True) as server:
        yield server


@pytest.fixture
def shown(served: Served, with_page: Served) -> Served:
    """A server with the page and one fresh model, "m"."""
    with_page.forget()
    return with_page


def says(*answers: str, **about: Any) -> FakeModel:
    """A model that gives these answers in turn."""
    rest = iter(answers)
    return FakeModel(answer=lambda asked, choice: next(rest), **about)


def asked_messages(served: Served) -> Any:
    tokenized = [each for each in served.model.asked if "messages" in each.inputs]
    return json.loads(tokenized[-1].inputs["messages"])


ENDED = "!document.querySelector('#send').disabled && document.querySelector('.note')"


def say(page: Any, text: str) -> None:
    """Send a message, once the page knows a model."""
    page.wait("document.querySelector('#model').value")
    page.write("#prompt", text)
    page.click("#send")


# ------------------------------------------------------------ a chat


@in_browser
def test_a_chat(shown: Served, browser: Browser) -> None:
    with browser.page(shown.url) as page:
        page.wait("document.querySelector('#model').value")
        page.write("#prompt", "Good day")
        page.enter()
        page.wait(ENDED)
        assert page.text(".assistant .text") == "Good day!"
        assert page.text(".user .text") == "Good day" and page.run("at('prompt').value") == ""
        assert re.fullmatch(r"9 tokens in \d+\.\d s", page.text(".assistant .note"))
        say(page, "And now?")
        page.wait("document.querySelectorAll('.note').length === 2")
        roles = [(m["role"], m["content"]) for m in asked_messages(shown)]
        assert roles == [("user", "Good day"), ("assistant", "Good day!"), ("user", "And now?")]
        page.click("#new")
        assert page.text("#chat") == ""
        say(page, "Anew")
        page.wait(ENDED)
        assert [m["content"] for m in asked_messages(shown)] == ["Anew"]
        assert page.complaints() == []


@in_browser
def test_text_comes_as_it_is_made_and_stops_on_demand(shown: Served, browser: Browser) -> None:
    """What was said before the stop stays part of the conversation."""
    shown.model.pause = threading.Event()
    with browser.page(shown.url) as page:
        say(page, "Hello")
        page.wait("document.querySelector('.assistant .text')?.innerText === 'Hel'")
        assert page.run("at('send').disabled") and not page.run("at('stop').disabled")
        page.click("#stop")
        page.wait(ENDED)
        (asked,) = [each for each in shown.model.asked if "operation" not in each.inputs]
        assert asked.cancelled.wait(SOON_S)
        assert (page.text(".assistant .text"), page.text(".note")) == ("Hel", "stopped")
        assert page.run("at('stop').disabled")
        shown.model.pause = None
        say(page, "Go on")
        page.wait("document.querySelectorAll('.note').length === 2")
        assert [m["content"] for m in asked_messages(shown)] == ["Hello", "Hel", "Go on"]


@in_browser
def test_a_new_chat_leaves_the_answer_under_way_behind(shown: Served, browser: Browser) -> None:
    shown.model.pause = threading.Event()
    with browser.page(shown.url) as page:
        say(page, "Hello")
        page.wait("document.querySelector('.assistant .text')")
        page.click("#new")
        page.wait("!document.querySelector('#send').disabled")
        shown.model.pause = None
        say(page, "Anew")
        page.wait(ENDED)
        assert [m["content"] for m in asked_messages(shown)] == ["Anew"]
        assert page.text("#chat").startswith("Anew\n")


@in_browser
def test_thoughts_are_folded(served: Served, browser: Browser) -> None:
    answer = "<think>Let me see.</think>It is so."
    served.triton.models["m"] = says(answer, chat_template=THINKS)
    with (
        serve(served.triton, ui=True, reasoning_format="think") as server,
        browser.page(server.url) as page,
    ):
        say(page, "Why?")
        page.wait(ENDED)
        assert page.text(".assistant .text") == "It is so."
        assert page.text("details") == "Thoughts"  # and no more is seen
        page.click("summary")
        assert page.wait("document.querySelector('details').open")
        assert page.text("details").split() == ["Thoughts", "Let", "me", "see."]


@in_browser
def test_the_model_is_chosen(shown: Served, browser: Browser) -> None:
    shown.triton.models["other"] = says("I am the other.")
    shown.forget()
    assert shown.http.get("/health").status_code == 200
    with browser.page(shown.url) as page:
        page.wait("document.querySelectorAll('#model option').length === 2")
        page.run("at('model').value = 'other'")
        say(page, "Who?")
        page.wait(ENDED)
        assert page.text(".assistant .text") == "I am the other."


@in_browser
@pytest.mark.parametrize(
    ("refuse_after", "sentence"), [(0, "the queue is full"), (1, "an internal error")]
)
def test_a_failure_is_told(
    shown: Served, browser: Browser, refuse_after: int, sentence: str
) -> None:
    """Before the answer and within it. The next message goes without what got no answer."""
    shown.model.refusal = f"{sentence} <b>now</b>"
    shown.model.refuse_after = refuse_after
    with browser.page(shown.url) as page:
        say(page, "Hello")
        page.wait("document.querySelector('.error') && !at('send').disabled")
        assert page.text(".error") == f"{sentence} <b>now</b>"
        shown.model.refusal = None
        say(page, "Again")
        page.wait("document.querySelector('.note')")
        kept = ["Hello", "Hel"] if refuse_after else []
        assert [m["content"] for m in asked_messages(shown)] == [*kept, "Again"]


# ------------------------------------------------------------ what a model says is text

HOSTILE = (
    "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'>"
    "<a href=\"javascript:window.ran = 1\">here</a></div><svg onload='window.ran = 1'>"
)


@in_browser
def test_an_answer_is_never_more_than_text(served: Served, browser: Browser) -> None:
    """Nor are thoughts, and what the user writes."""
    answer = f"<think>{HOSTILE}</think>{HOSTILE}"
    served.triton.models["m"] = says(answer, chat_template=THINKS, tokens_per_chunk=7)
    with (
        serve(served.triton, ui=True, reasoning_format="think") as server,
        browser.page(server.url) as page,
    ):
        say(page, HOSTILE)
        page.wait(ENDED)
        page.click("summary")
        for place in (".user .text", ".thoughts", ".assistant .text"):
            assert page.text(place) == HOSTILE
        inside = "#chat :is(script, img, a, svg)"
        assert page.run(f"document.querySelectorAll('{inside}').length") == 0
        assert page.run("window.ran") is None
        assert page.complaints() == []


@in_browser
def test_the_browser_would_refuse_markup_and_scripts(shown: Served, browser: Browser) -> None:
    """A second wall: the policy that comes with the page."""
    attempts = [
        "at('chat').innerHTML = '<b>bold</b>'",
        "at('chat').insertAdjacentHTML('beforeend', '<b>bold</b>')",
        "document.write('<b>bold</b>')",
        "document.createElement('script').text = 'window.ran = 1'",
    ]
    with browser.page(shown.url) as page:
        for attempt in attempts:
            with pytest.raises(PageError, match="Trusted"):
                page.run(attempt)


@in_browser
def test_nothing_is_loaded_from_elsewhere(shown: Served, browser: Browser) -> None:
    with browser.page(shown.url) as page:
        page.wait("document.querySelector('#model').value")
        # Another origin, on the same machine.
        elsewhere = shown.url.replace("127.0.0.1", "localhost") + "/health"
        with pytest.raises(PageError, match="Failed to fetch"):
            page.run(f"fetch('{elsewhere}')")
        assert any("Content Security Policy" in each for each in page.complaints())


# ------------------------------------------------------------ keys


@in_browser
def test_a_key_is_asked_for_and_kept_in_memory_alone(
    served: Served, browser: Browser, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("secret-key\n")
    keys = str(tmp_path / "keys")
    with (
        serve(served.triton, ui=True, api_key_file=keys) as server,
        browser.page(server.url) as page,
    ):
        page.wait("at('problem').innerText.includes('API key')")
        page.write("#key", "wrong")
        page.run("at('key').blur()")
        page.wait("at('problem').innerText.includes('API key')")
        page.write("#key", "secret-key")
        page.run("at('key').blur()")
        page.wait("at('model').value === 'm' && at('problem').innerText === ''")
        say(page, "Hello")
        page.wait(ENDED)
        assert page.text(".assistant .text") == "Hello!"
        kept = "[document.cookie, localStorage.length, sessionStorage.length, location.href]"
        assert page.run(kept) == ["", 0, 0, f"{server.url}/"]
        page.open(server.url)
        assert page.run("at('key').value") == ""


# ------------------------------------------------------------ the strip

PAGE = """# HELP gllm:num_requests_running Sequences being computed.
gllm:num_requests_running{model="m",version="1"} 3
gllm:num_requests_running{model="other",version="1"} 40
gllm:num_requests_waiting{model="m",version="1"} 7
gllm:kv_cache_usage{version="1",model="m"} 0.625
gllm:generation_tokens_total{model="m",version="1"} %d
"""


@pytest.fixture
def metrics() -> Iterator[str]:
    """A metrics page whose model makes 1,000,000 tokens from one read to the next."""
    reads = iter(range(10**9))

    with metrics_page(lambda: (PAGE % (next(reads) * 1_000_000)).encode()) as address:
        yield address


@in_browser
def test_the_strip_shows_the_load(served: Served, browser: Browser, metrics: str) -> None:
    with serve(served.triton, ui=True, metrics_url=metrics) as server:
        with browser.page(server.url) as page:
            # A million tokens in somewhat over the strip's second.
            rate = int(page.wait("at('rate').innerText !== '–' && at('rate').innerText"))
            assert 1_000 < rate <= 1_010_000
            assert [page.text(f"#{id}") for id in ("running", "waiting", "cache")] == [
                "3",
                "7",
                "62.5%",
            ]


@in_browser
def test_without_metrics_the_strip_is_empty(shown: Served, browser: Browser) -> None:
    with browser.page(shown.url) as page:
        say(page, "Hello")
        page.wait(ENDED)
        for id in ("rate", "running", "waiting", "cache"):
            assert page.text(f"#{id}") == "–"
        assert page.complaints() == []


# ------------------------------------------------------------ the files


def test_the_page_is_served_on_demand_alone(served: Served, shown: Served) -> None:
    for path in FILES:
        assert served.http.get(path).status_code == 404
        answer = shown.http.get(path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"].split("; ")
        assert "default-src 'none'" in policy and "script-src 'self'" in policy
        assert not any("unsafe" in each or "*" in each or "http" in each for each in policy)
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert shown.http.get("/ui/../gate.py").status_code == 404


def test_the_files_name_no_other_place() -> None:
    for name, _ in FILES.values():
        text = (UI / name).read_text()
        assert not re.search(r"(https?:)?//[\w.]", re.sub(r"^\s*//.*$", "", text, flags=re.M)), name
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\b", text), name
    html = (UI / "page.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|style=|<style", html)


def test_the_wheel_carries_the_files() -> None:
    told = re.search(
        r'^"gllm_client.openai_server" = \["(.*)"\]$', (ROOT / "pyproject.toml").read_text(), re.M
    )
    assert told
    carried = UI.parent.glob(told[1])
    assert {path.name for path in carried} == {name for name, _ in FILES.values()}
