"""Several processes of one program as threads, with a `gather` between them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def run_processes(program: Callable[[int, Callable[[list], list]], Any], count: int = 2) -> list:
    """What `program(rank, gather)` returns for each rank; the first error of one is raised."""
    barrier = threading.Barrier(count)
    sent: list[list] = [[] for _ in range(count)]

    def run(rank: int) -> Any:
        def gather(mine: list) -> list:
            sent[rank] = mine
            barrier.wait(timeout=60)
            together = [item for part in sent for item in part]
            barrier.wait(timeout=60)
            return together

        try:
            return program(rank, gather)
        except threading.BrokenBarrierError:
            return None
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        return [future.result() for future in [pool.submit(run, rank) for rank in range(count)]]
