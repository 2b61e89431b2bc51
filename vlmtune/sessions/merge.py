"""A run's adapter and its base model into one verified checkpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlmtune.errors import VlmtuneError
from vlmtune.sessions.preload import preload

if TYPE_CHECKING:
    from vlmtune.models.merge_verify import MergeReport

SHARD_SIZE = re.compile(r"\d+(\.\d+)?(KB|MB|GB|TB)")


def merge(
    run: str | Path,
    output: str | Path,
    *,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    shard_size: str = "2GB",
    data: Sequence[str | Path] = (),
    trust_remote_code: bool = False,
) -> MergeReport:
    """Merge the adapter of a run or adapter folder into its base model, as `vlmtune merge` does.

    `output` is complete and verified, or absent: `MergeFailed`, whose `report` has the figures, is
    raised where the merged model's logits are not those of base + adapter.
    """
    if SHARD_SIZE.fullmatch(shard_size) is None:  # before torch is loaded
        raise VlmtuneError(
            "wrong value for --shard-size", got=shard_size, expected="a size, e.g. 5GB"
        )
    preload("vlmtune.models.merge")
    from vlmtune.models.merge import merge as merge_adapter

    return merge_adapter(
        run,
        Path(output),
        dtype=dtype,
        shard_size=shard_size,
        data=[Path(file) for file in data],
        trust_remote_code=trust_remote_code,
    )
