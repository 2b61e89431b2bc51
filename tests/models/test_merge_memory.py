"""The memory of a merge: two shards and a few tensors, whatever the size of the model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SHARD_BYTES = 100 * 10**6
TENSOR_BYTES = 4096 * 1024 * 4
"""The largest weight of `bench_merge.py`'s model in float32."""


def bench(root, folder, once, layers):
    command = [sys.executable, str(root / "scripts" / "bench_merge.py"), "--once", once]
    command += ["--layers", str(layers), "--work", str(folder), "--shard-size", "100MB"]
    environment = {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()[-1:]


@pytest.mark.slow
def test_a_merge_takes_two_shards_and_a_few_tensors_of_memory_and_not_the_model(root, tmp_path):
    peaks, sizes = {}, {}
    for layers in (6, 18):
        folder = tmp_path / str(layers)
        folder.mkdir()
        bench(root, folder, "make", layers)
        files = (folder / "model").glob("*.safetensors")
        sizes[layers] = sum(file.stat().st_size for file in files)
        peaks[layers] = json.loads(bench(root, folder, "streamed", layers)[0])["peak_bytes"]
    # Beside: the adapter, and what PEFT, the processor and the first forward pass load lazily.
    beside = 150 * 10**6
    assert sizes[18] > 5 * SHARD_BYTES
    for peak in peaks.values():
        assert peak < 2 * SHARD_BYTES + 4 * TENSOR_BYTES + beside, peaks
    assert peaks[18] - peaks[6] < 0.4 * (sizes[18] - sizes[6]), peaks
    whole = json.loads(bench(root, tmp_path / "18", "whole", 18)[0])["peak_bytes"]
    assert whole > 2 * sizes[18]  # in float32, at the least: the figure can tell the two apart
