"""Parts of a task on the idle threads of the pool that runs it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class SpreadPool(ThreadPoolExecutor):
    """Its threads help each other, those without a task of their own."""

    def __init__(self, threads: int, name: str = "") -> None:
        super().__init__(threads, name)
        self._tasks = set[Future[Any]]()  # that are not done

    @property
    def idle(self) -> int:
        """Threads for which there is no task; below 0, tasks that no thread has."""
        return self._max_workers - len(self._tasks)

    def submit(self, *task: Any, **named: Any) -> Future[Any]:
        future = super().submit(*task, **named)
        self._tasks.add(future)
        future.add_done_callback(self._tasks.discard)
        return future

    def spread(self, work: Callable[[int], None], numbers: range) -> None:
        """Call `work` for each number, for a task of this pool: on its thread and on those that are
        idle. It waits for no thread that has another task.

        Raises what `work` raises, and RuntimeError once the pool is shut down.
        """
        left = iter(numbers)  # which the threads share

        def take() -> None:
            for number in left:
                work(number)

        helpers = [self.submit(take) for _ in range(min(self.idle, len(numbers) - 1))]
        try:
            take()
        finally:
            for helper in helpers:
                if not helper.cancel():
                    helper.result()
