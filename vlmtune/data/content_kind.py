"""What bytes look like from their beginning, for messages about files that are no pictures."""

from __future__ import annotations

HEAD_BYTES = 512

_MAGIC = (
    (b"\x89PNG", "a PNG"),
    (b"\xff\xd8\xff", "a JPEG"),
    (b"GIF8", "a GIF"),
    (b"BM", "a BMP"),
    (b"II*\x00", "a TIFF"),
    (b"MM\x00*", "a TIFF"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript program"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "gzip data"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
)
_BRANDS = (
    ((b"heic", b"heix", b"mif1", b"heim", b"hevc"), "a HEIC picture"),
    ((b"avif", b"avis"), "an AVIF picture"),
    ((b"isom", b"mp4", b"qt  ", b"M4V", b"avc1"), "a video"),
)
_MARKUP = ((b"<!doctype html", "an HTML page"), (b"<html", "an HTML page"), (b"<svg", "SVG"))
_KNOWN = frozenset({"a PNG", "a JPEG", "a GIF", "a BMP", "a TIFF", "a WebP"})


def content_kind(head: bytes) -> str | None:
    """What a file with these first bytes is, in words; None where that cannot be told."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a WebP"
    if head[4:8] == b"ftyp":
        named = (name for brands, name in _BRANDS if head[8:12].startswith(brands))
        return next(named, "a video or a HEIF picture")
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<"):
        return next((name for mark, name in _MARKUP if mark in text), "XML")
    return "JSON" if text.startswith((b"{", b"[")) else None


def is_readable_kind(kind: str) -> bool:
    """Whether pictures of this kind are read."""
    return kind in _KNOWN
