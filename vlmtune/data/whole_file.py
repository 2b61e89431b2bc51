"""A file that others may read at any moment: there as a whole, or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_shared(place: Path, content: bytes) -> None:
    """Write `content` beside `place` and rename it, readable for all who may enter the folder.

    Any number of processes may do so at once, and be killed meanwhile. Raises OSError where the
    disk refuses; `place` is then as it was.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=place.parent, prefix=".part-")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            # A temporary file is its maker's alone; a cache may be shared.
            os.fchmod(stream.fileno(), 0o644)
        os.replace(name, place)
    finally:
        Path(name).unlink(missing_ok=True)
