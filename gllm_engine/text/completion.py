"""Turns the tokens of one sequence into its output: text, stop strings and log probabilities.

Decides where the text ends. Knows nothing of the engine's scheduling or of how deltas are sent.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from gllm_engine.sampling import InvalidField, SamplingParams
from gllm_engine.text.detokenizer import Detokenizer
from gllm_engine.text.tokenizer import Tokenizer
from gllm_engine.types import Finish, Image, Request, TokenLogprobs

Logprobs = dict[int, dict[str, float | int | str]]


@dataclass(slots=True)
class Delta:
    """The new part of a sequence's output since the last delta.

    `token_ids`: the new tokens, including a stop token or the token that completed a stop string.
    Text may come later than its tokens (half a character, the beginning of a stop string).
    `logprobs`: one {token id: {logprob, rank, decoded_token}} for each new token, or None.
    `cumulative_logprob`: of the whole output so far; None if log probabilities are not requested.
    `finish_reason`: None, "stop", "length", "abort" or "error"; a delta with a reason is the last.
    `stop_reason`: the stop string or the stop token's id; None for any other end.
    `prompt_logprobs`: in the first delta of `LLM.stream`, if requested: one entry for each prompt
    token, None for the first token.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[Logprobs | None] | None = None


class Completion:
    """The text side of one sequence.

    A stop string ends the text at its last character, wherever the borders between tokens are. If
    two stop strings end at the same character, the one that began earlier counts. A stop string
    that is complete before `min_tokens` tokens is ordinary text. The text is cut before the stop
    string. With `include_stop_str_in_output` it is cut after the stop string, and it includes the
    text of a stop token.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], sampling: SamplingParams
    ) -> None:
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._detokenizer = Detokenizer(
            tokenizer.spelling, prompt_ids, sampling.skip_special_tokens
        )
        self._stops = _StopStrings(sampling.stop) if sampling.stop else None
        self._cumulative = 0.0
        self.num_tokens = 0
        self.finished = False
        # True once a stop string ended the text while the engine still generates. The caller must
        # then abort the sequence in the engine; later tokens fed to this object are dropped.
        self.wants_abort = False

    def feed(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprobs] = (),
        finish: Finish | None = None,
    ) -> Delta | None:
        """Add tokens, their log probabilities (if requested), and the Finish at the end.

        A stop token must come in the same call as its `finish`. Returns None after the end.
        """
        if self.finished:
            return None
        delta = Delta()
        hidden = 1 if self._hides_last(tokens, finish) else 0
        if self._stops is None:
            delta.text = self._detokenizer.feed(tokens[: len(tokens) - hidden])
            used = len(tokens)
        else:
            used = self._search(self._stops, delta, tokens, hidden)
        delta.token_ids = list(tokens[:used])
        self.num_tokens += used
        self._add_logprobs(delta, logprobs[:used])
        if delta.finish_reason is not None:  # a stop string
            self.finished = True
            self.wants_abort = finish is None
        elif finish is not None:
            self._end(delta, finish)
        return delta

    def _hides_last(self, tokens: Sequence[int], finish: Finish | None) -> bool:
        return (
            finish is not None
            and finish.stop_token is not None
            and not self._sampling.include_stop_str_in_output
            and bool(tokens)
            and tokens[-1] == finish.stop_token
        )

    def _search(self, stops: _StopStrings, delta: Delta, tokens: Sequence[int], hidden: int) -> int:
        """Feed tokens one by one up to a stop string. Returns the number of tokens used."""
        texts = []
        for index in range(len(tokens) - hidden):
            counts = self.num_tokens + index + 1 >= self._sampling.min_tokens
            text, stop = stops.push(self._detokenizer.feed(tokens[index : index + 1]), counts)
            texts.append(text)
            if stop is not None:
                if self._sampling.include_stop_str_in_output:
                    texts.append(stop)
                delta.text = "".join(texts)
                delta.finish_reason = "stop"
                delta.stop_reason = stop
                return index + 1
        delta.text = "".join(texts)
        return len(tokens)

    def _end(self, delta: Delta, finish: Finish) -> None:
        delta.finish_reason = finish.reason
        held = self._stops.held if self._stops is not None else ""
        delta.text += held + self._detokenizer.flush()
        if finish.stop_token in self._sampling.stop_token_ids:
            delta.stop_reason = finish.stop_token
        self.finished = True

    def _add_logprobs(self, delta: Delta, logprobs: Sequence[TokenLogprobs]) -> None:
        if self._sampling.logprobs is None:
            return
        delta.logprobs = [render_logprobs(self._tokenizer, entry) for entry in logprobs]
        self._cumulative += sum(entry.logprobs[0] for entry in logprobs)
        delta.cumulative_logprob = self._cumulative


def render_logprobs(tokenizer: Tokenizer, entry: TokenLogprobs) -> Logprobs:
    """One position as {token id: {logprob, rank, decoded_token}}, the sampled token first."""
    return {
        id: {"logprob": logprob, "rank": rank, "decoded_token": tokenizer.token_text(id)}
        for id, logprob, rank in zip(entry.token_ids, entry.logprobs, entry.ranks, strict=True)
    }


def truncated(
    prompt: list[int], sampling: SamplingParams, max_model_len: int, has_images: bool = False
) -> list[int]:
    """The end of a prompt that `truncate_prompt_tokens` leaves of it. Raises InvalidField for a
    prompt with images that would be cut."""
    most = sampling.truncate_prompt_tokens
    if most == -1:
        most = max(1, max_model_len - (sampling.max_tokens or 1))
    if most is None or most >= len(prompt):
        return prompt
    if has_images:
        problem = f"the prompt has {len(prompt)} tokens and images, it is not cut to {most}"
        raise InvalidField("truncate_prompt_tokens", problem)
    return prompt[-most:]


def make_requests(
    tokenizer: Tokenizer,
    prompt: list[int],
    sampling: SamplingParams,
    ids: Iterable[int],
    images: tuple[Image, ...] = (),
) -> list[Request]:
    """The `sampling.n` requests of one prompt with its images, with ids taken from `ids`.

    The first request has the requested seed (else a random one), so it equals the request of n=1.
    The others have seeds derived from that one. Only the first request computes prompt logprobs.
    """
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
    bad_words = tokenizer.bad_words(sampling.bad_words)
    requests = []
    for index, id in zip(range(sampling.n), ids, strict=False):
        own_seed = _derive_seed(seed, index)
        requests.append(Request(id, prompt, sampling, own_seed, bad_words, images))
        if index == 0:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
    return requests


def _derive_seed(seed: int, index: int) -> int:
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class _StopStrings:
    """Finds stop strings in a growing text, and holds back text that may begin a stop string.

    Invariant: `held` is the longest suffix of the text that is a proper prefix of a stop string.
    So every later match lies within `held` and the text after it.
    """

    __slots__ = ("_firsts", "_longest", "_stops", "held")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._firsts = frozenset(stop[0] for stop in stops)
        self._longest = max(map(len, stops))
        self.held = ""

    def push(self, text: str, counts: bool) -> tuple[str, str | None]:
        """Add text. Returns the text that can be shown, and the stop string after it or None.

        `counts` False: a stop string that is complete within `text` does not end the text.
        """
        if not text:
            return "", None
        known = len(self.held)
        text = self.held + text
        found = self._first(text, known) if counts else None
        if found is not None:
            start, stop = found
            self.held = ""
            return text[:start], stop
        keep = self._held_from(text)
        self.held = text[keep:]
        return text[:keep], None

    def _first(self, text: str, known: int) -> tuple[int, str] | None:
        """The start and the stop string of the match that ends first after `known` characters."""
        best: tuple[int, int, str] | None = None  # (end, start, stop)
        for stop in self._stops:
            start = text.find(stop, max(0, known - len(stop) + 1))
            if start >= 0:
                match = (start + len(stop), start, stop)
                best = match if best is None else min(best, match)
        return None if best is None else best[1:]

    def _held_from(self, text: str) -> int:
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._firsts:
                tail = text[start:]
                if any(len(stop) > len(tail) and stop.startswith(tail) for stop in self._stops):
                    return start
        return len(text)
