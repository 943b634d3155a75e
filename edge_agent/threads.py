"""Named threads that own one blocking resource each."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")


class OwnerThread:
    """Calls run one after the other in the order they were made, each in the same thread."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._began: float | None = None

    @property
    def busy_s(self) -> float:
        """For how long the call that runs has run, seconds; 0 where none does."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    async def call(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """What `work(*args, **kwargs)` returns or raises there.

        A caller that is cancelled stops waiting; work that has begun runs to its end.
        """
        loop = asyncio.get_running_loop()

        def run() -> R:
            self._began = time.monotonic()
            try:
                return work(*args, **kwargs)
            finally:
                self._began = None

        return await loop.run_in_executor(self._executor, run)

    def post(self, work: Callable[[], object]) -> None:
        """Have `work` run after what was asked for before; nobody waits for it. For any thread; after `close` it is not
        run."""
        with contextlib.suppress(RuntimeError):  # closed
            self._executor.submit(work)

    def __enter__(self) -> OwnerThread:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Drop what has not begun; what runs ends on its own."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def spawn(name: str, work: Callable[[], None]) -> None:
    """Run `work` in a thread of its own, which does not keep the process from ending."""
    threading.Thread(target=work, name=name, daemon=True).start()


async def in_thread(name: str, work: Callable[[], R]) -> R:
    """What `work()` returns or raises, run in a thread of its own.

    The thread is a daemon: work that never returns does not keep the process from ending, and a
    caller that is cancelled leaves it behind.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[R] = loop.create_future()

    def tell(result: R | None, error: BaseException | None) -> None:
        if done.done():  # cancelled meanwhile
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(cast("R", result))

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001  handed to the caller, whatever it is
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, result, failure)

    spawn(name, run)
    return await done
