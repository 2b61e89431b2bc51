"""An error of a picture or a text, with the row it is in."""

from __future__ import annotations

from vlmtune.data.types import Source
from vlmtune.errors import SampleError, VlmtuneError


def placed(error: VlmtuneError, source: Source) -> SampleError:
    """`error` as one of the sample at `source`."""
    return SampleError(
        error.message,
        file=source.file,
        line=source.line,
        got=error.got,
        expected=error.expected,
        do=error.do,
    )
