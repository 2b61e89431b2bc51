"""Clips made in the test: frame i is of brightness `brightness(i)` throughout."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import PIL.Image


def brightness(index: int) -> int:
    return 20 + 10 * index


def write_clip(
    path: Path, *, num_frames: int = 20, fps: int = 10, size: tuple[int, int] = (64, 48)
) -> Path:
    """A video of `num_frames` frames, `size` (width, height)."""
    width, height = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.gop_size = 5
        for index in range(num_frames):
            pixels = np.full((height, width, 3), min(255, brightness(index)), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def write_frames(folder: Path, *, count: int, size: tuple[int, int] = (64, 48)) -> tuple[str, ...]:
    """Pictures `0.png`, `1.png`, … of the same brightness as the frames of a clip."""
    for index in range(count):
        shade = (min(255, brightness(index)),) * 3
        PIL.Image.new("RGB", size, shade).save(folder / f"{index}.png")
    return tuple(f"{index}.png" for index in range(count))


def turned(path: Path) -> Path:
    """The clip of an MP4 file, to be shown turned by a quarter: its display matrix rewritten."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 4 + 20 + 16  # version 0: times, ids and layers before it
    quarter = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    for number, value in enumerate(quarter):
        place = at + 4 * number
        content[place : place + 4] = value.to_bytes(4, "big", signed=True)
    out = path.with_name("turned.mp4")
    out.write_bytes(bytes(content))
    return out
