"""A video from a file or a list of pictures to a clip of upright RGB frames.

file -> frames counted -> which to take (fps, min_frames, max_frames) -> those decoded, shrunk
pictures -> at most max_frames of them, evenly -> shrunk

Which frames are taken is decided by qwen-vl-utils, as for the models' own training; the extra
`video` brings it. The processor's video processor makes the rest: its size, its patches.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image

from vlmtune.data.media import locate_video, read_image
from vlmtune.data.types import Image, Video
from vlmtune.errors import VlmtuneError, plural, shorten
from vlmtune.recipe.data_section import VideoSection

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream


FRAMES_LEFT_OUT = "frames of a video left out to fit video.max_frames"

FEWEST_FRAMES = 2

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif"
"""What FFmpeg may read: no playlist, whose reader opens other files and addresses."""


@dataclass(frozen=True)
class Clip:
    """`frames`, upright RGB, all of one size, are those of number `indices` of a video of
    `num_frames`, `fps` a second. `notes` are fixed wordings, for `Sample.notes`."""

    frames: tuple[PIL.Image.Image, ...]
    indices: tuple[int, ...]
    num_frames: int
    fps: float
    notes: tuple[str, ...] = ()

    def metadata(self) -> dict[str, Any]:
        """As a processor takes it (`video_metadata`)."""
        width, height = self.frames[0].size
        return {
            "total_num_frames": self.num_frames,
            "fps": self.fps,
            "width": width,
            "height": height,
            "duration": self.num_frames / self.fps,
            "frames_indices": list(self.indices),
        }


def read_video(video: Video, *, section: VideoSection, max_pixels: int) -> Clip:
    """The frames that `section` takes of a video.

    A frame of more than `max_pixels` pixels is refused before it is decoded. Pictures given as
    frames count as `section.fps` a second. Raises VlmtuneError with the reason.
    """
    if isinstance(video.ref, tuple):
        return _from_pictures(video, video.ref, section, max_pixels)
    found = locate_video(video)
    name = shorten(str(found)) if isinstance(found, Path) else f"{len(found)} bytes of video"
    with _opened(found, name) as (container, stream):
        _check_size(stream, name, max_pixels)
        fps = stream.average_rate or stream.guessed_rate
        if not fps:
            raise VlmtuneError("the video does not state its frame rate", got=name)
        num_frames = _count_frames(container, stream, name)
        indices = _frames_to_take(num_frames, float(fps), section, name)
        container.seek(0)
        frames = _decode(container, stream, indices, name, section.max_pixels)
    return Clip(frames, indices, num_frames, float(fps))


def _from_pictures(
    video: Video, refs: Sequence[str], section: VideoSection, max_pixels: int
) -> Clip:
    if len(refs) < FEWEST_FRAMES:
        raise VlmtuneError(
            "the video has too few frames", got=len(refs), expected=f"at least {FEWEST_FRAMES}"
        )
    kept = _spread(len(refs), min(len(refs), section.max_frames))
    notes = [] if len(kept) == len(refs) else [FRAMES_LEFT_OUT]
    frames = []
    for index in kept:
        frame = Image(refs[index], video.base_dir, None, video.media_policy)
        opened = read_image(frame, max_pixels=max_pixels)
        notes += opened.notes
        frames.append(_shrunk(opened.picture, section.max_pixels))
    sizes = {frame.size for frame in frames}
    if len(sizes) > 1:
        shown = ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
        raise VlmtuneError(
            "the frames of the video differ in size", got=shown, expected="one size for all"
        )
    return Clip(tuple(frames), kept, len(refs), section.fps, tuple(dict.fromkeys(notes)))


def _spread(count: int, number: int) -> tuple[int, ...]:
    """`number` of `count` positions, evenly, the first and the last included."""
    return tuple(round(place * (count - 1) / (number - 1)) for place in range(number))


def _frames_to_take(
    num_frames: int, fps: float, section: VideoSection, name: str
) -> tuple[int, ...]:
    if num_frames < FEWEST_FRAMES:
        raise VlmtuneError(
            "the video has too few frames",
            got=f"{name}: {num_frames}",
            expected=f"at least {FEWEST_FRAMES}",
        )
    wanted = {
        "fps": min(section.fps, fps),
        "min_frames": min(section.min_frames, num_frames),
        "max_frames": section.max_frames,
    }
    number = _qwen_vl_utils().smart_nframes(wanted, total_frames=num_frames, video_fps=fps)
    return _spread(num_frames, number)


def _qwen_vl_utils() -> Any:
    try:
        from qwen_vl_utils import vision_process
    except ImportError as error:
        raise _extra_missing(error) from error
    return vision_process


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise _extra_missing(error) from error
    return av


def _extra_missing(error: ImportError) -> VlmtuneError:
    return VlmtuneError(
        f"videos need a package that is not installed ({error.name})",
        do="in the checkout of vlmtune: pip install -e '.[video]'",
    )


@contextmanager
def _opened(found: Path | bytes, name: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first video stream; FFmpeg's errors, inside too, as VlmtuneErrors."""
    av = _av()
    source: Any = str(found) if isinstance(found, Path) else io.BytesIO(found)
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    try:
        with av.open(source, options=options) as container:
            if not container.streams.video:
                raise VlmtuneError("there is no video in the file", got=name)
            yield container, container.streams.video[0]
    except (av.error.FFmpegError, OSError) as error:
        raise VlmtuneError(
            f"the video cannot be decoded ({error.strerror or type(error).__name__})",
            got=name,
            expected="MP4, MOV, WebM, MKV, AVI, MPEG, FLV, Ogg or GIF",
            do="replace the file; it may be cut off",
        ) from error


def _check_size(stream: VideoStream, name: str, max_pixels: int) -> None:
    width, height = stream.width, stream.height
    if not width or not height:
        raise VlmtuneError("the video has no picture size", got=name)
    if width * height > max_pixels:
        raise VlmtuneError(
            "the video's frames have too many pixels",
            got=f"{name}: {width} x {height} = {width * height}",
            expected=f"at most {max_pixels} (data.max_image_pixels)",
            do="make it smaller, or raise data.max_image_pixels",
        )


def _count_frames(container: InputContainer, stream: VideoStream, name: str) -> int:
    """The frames that will be shown; nothing is decoded."""
    shown, stored = 0, 0
    for packet in container.demux(stream):
        if packet.size:
            stored += 1
            shown += not packet.is_discard
    if stored < stream.frames:
        raise VlmtuneError(
            "the video is cut off",
            got=f"{name}: {stored} of {plural(stream.frames, 'frame')}",
            do="replace the file",
        )
    return shown


def _decode(
    container: InputContainer,
    stream: VideoStream,
    indices: Sequence[int],
    name: str,
    max_pixels: int | None,
) -> tuple[PIL.Image.Image, ...]:
    wanted = set(indices)
    frames: list[PIL.Image.Image] = []
    decoded = 0
    for decoded, frame in enumerate(container.decode(stream), start=1):
        if decoded - 1 in wanted:
            frames.append(_shrunk(_upright(frame), max_pixels))
            if len(frames) == len(wanted):
                return tuple(frames)
    raise VlmtuneError(
        "the video cannot be decoded to its end",
        got=f"{name}: {decoded} of {plural(indices[-1] + 1, 'frame')}",
        do="replace the file; it may be cut off",
    )


def _upright(frame: av.VideoFrame) -> PIL.Image.Image:
    picture = frame.to_image()
    turns = round(frame.rotation / 90) % 4
    return picture.rotate(90 * turns, expand=True) if turns else picture


def _shrunk(picture: PIL.Image.Image, max_pixels: int | None) -> PIL.Image.Image:
    width, height = picture.size
    if max_pixels is None or width * height <= max_pixels:
        return picture
    scale = math.sqrt(max_pixels / (width * height))
    sides = max(1, math.floor(width * scale)), max(1, math.floor(height * scale))
    return picture.resize(sides, PIL.Image.Resampling.BICUBIC)
