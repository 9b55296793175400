"""Snapshots: copies of the states of sequences, for models whose layers keep one per sequence.

A snapshot is found by the hash of the pages before it. Its memory is apart from that of the pages,
so a new snapshot takes the place of an old one, and never that of keys and values.

    tokens                 0 .. 15 | 16 .. 31 | 32 .. 47 | 48 .. 63 | 64 .. 75
    keys and values        cached    cached     cached     cached
    snapshots                               ^                     ^
                                            branch                prompt, answer

A prompt of which 40 tokens are cached can begin at token 32 only if the state there was copied. So
states are copied where they are likely to be needed: see SnapshotKind.
"""

from __future__ import annotations

from typing import Literal

from gllm_engine.sched.pages import PagePool

# prompt: at the prompt's last full page, for a longer prompt with the same beginning.
# branch: where the cached pages of a prompt ended, beyond its snapshot, for other prompts that
# branch off there. answer: at the answer's last full page, for the next turn of a conversation.
SnapshotKind = Literal["prompt", "branch", "answer"]


class SnapshotPool(PagePool):
    """A PagePool whose pages are snapshots. `kinds`: of each snapshot, since it was taken."""

    def __init__(self, num_snapshots: int, page_size: int) -> None:
        super().__init__(num_snapshots, page_size)
        self.kinds: list[SnapshotKind] = ["prompt"] * num_snapshots

    def take_one(self, kind: SnapshotKind) -> int | None:
        """Take a snapshot of undefined content; None if all are in use."""
        if not self.num_free:
            return None
        (snapshot,) = self.take(1)
        self.kinds[snapshot] = kind
        return snapshot

    def touch(self, snapshot: int) -> None:
        """Make a snapshot, which was found by hash, the last to be taken for other content."""
        self.share([snapshot])
        self.give_back([snapshot])
