"""Import torch and what stands on it at less cost than in passing.

Nearly all of the time before the first step is imports of other packages, and much of that is not
theirs by need:

- Python's garbage collector walks everything imported so far again and again, at the end of the
  process too, and in a forked worker it copies every page that it touches. Here no full collection
  runs meanwhile, and what was imported is then set aside for good (`gc.freeze`).
- PEFT imports bitsandbytes in every case, which has torch compile a function as it is imported,
  and for that the whole of torch's inductor is loaded. The function belongs to devices for which
  bitsandbytes has no kernels of its own; there it runs uncompiled instead.

It also bounds what the process keeps without use:

- For 16-bit products on a CPU, torch and oneDNN compile a kernel for each new shape and keep the
  last 1,024 of them each. Packs and pictures have ever new shapes, and a run's memory would grow
  for hundreds of steps; fewer are kept (docs/performance.md has the figures).
- glibc gives each thread an arena of its own, whose free memory no other thread gets; one is kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import platform
import sys
from collections.abc import Iterator

NO_COMPILE = "TORCHDYNAMO_DISABLE"
KERNEL_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
KEPT_KERNELS = "64"
M_ARENA_MAX = -8
"""glibc's number of the setting (malloc.h)."""
YOUNG, MIDDLE, NEVER = 10_000, 10, 1_000_000
"""Thresholds of the garbage collector: short-lived garbage goes, full collections do not run."""


def preload(*modules: str) -> None:
    """Import `modules`, all that they stand on, and set it aside from garbage collection.

    Where torch is imported already there is nothing to save: a plain import then.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, KEPT_KERNELS)
    if platform.libc_ver()[0] == "glibc" and "MALLOC_ARENA_MAX" not in os.environ:
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    with contextlib.nullcontext() if "torch" in sys.modules else _cheap_imports():
        for module in modules:
            importlib.import_module(module)


@contextlib.contextmanager
def _cheap_imports() -> Iterator[None]:
    thresholds = gc.get_threshold()
    given = os.environ.get(NO_COMPILE)
    gc.set_threshold(YOUNG, MIDDLE, NEVER)
    # torch reads it at each `torch.compile`: one after the imports compiles as ever.
    os.environ[NO_COMPILE] = "1"
    try:
        yield
        gc.freeze()
    finally:
        gc.set_threshold(*thresholds)
        if given is None:
            del os.environ[NO_COMPILE]
        else:
            os.environ[NO_COMPILE] = given
