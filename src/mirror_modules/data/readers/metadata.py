"""Image files without their metadata: decoders refuse some files whose metadata is damaged although no pixel is."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
_WEBP_PIXELS = (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")
_WEBP_METADATA = (b"EXIF", b"XMP ", b"ICCP")


def without_metadata(content: bytes) -> bytes | None:
    """Copy a PNG, JPEG or WebP file without text, color profiles and everything else that changes no pixel.

    Intact EXIF data is kept, for the orientation. What follows the last complete chunk is dropped: of a truncated file,
    the copy holds fewer pixels, or none, and is no more readable than before.

    Args:
        content: The bytes of a file.

    Returns:
        The copy; None for other formats.
    """
    if content.startswith(_PNG):
        return _PNG + b"".join(_png_chunks(content)) + struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))
    if content.startswith(b"\xff\xd8\xff"):
        return b"\xff\xd8" + b"".join(_jpeg_segments(content))
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        chunks = b"WEBP" + b"".join(_webp_chunks(content))
        return b"RIFF" + struct.pack("<I", len(chunks)) + chunks
    return None


def _png_chunks(content: bytes) -> Iterator[bytes]:
    """Chunks with pixels, transparency and EXIF data, up to the end of the image."""
    at = len(_PNG)
    while at + 12 <= len(content):
        length, name = struct.unpack_from(">I4s", content, at)
        end = at + length + 12
        if name == b"IEND" or end > len(content):
            return
        # The name of an ancillary chunk begins with a small letter.
        is_ancillary = bool(name[0] & 0x20)
        is_intact = zlib.crc32(content[at + 4 : end - 4]) == struct.unpack_from(">I", content, end - 4)[0]
        if not is_ancillary or (name in (b"tRNS", b"eXIf") and is_intact):
            yield content[at:end]
        at = end


def _jpeg_segments(content: bytes) -> Iterator[bytes]:
    """Everything but comments and application segments; of these, JFIF, Adobe (both define the colors) and EXIF."""
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        marker, length = content[at + 1], struct.unpack_from(">H", content, at + 2)[0]
        if marker == 0xDA:  # the pixels follow
            break
        segment = content[at : at + 2 + length]
        start = segment[4:10]
        is_metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE
        is_kept = (
            (marker == 0xE0 and start.startswith(b"JFIF\0") and length >= 16)
            or (marker == 0xE1 and start == b"Exif\0\0")
            or (marker == 0xEE and start.startswith(b"Adobe") and length >= 14)
        )
        if is_kept or not is_metadata:
            yield segment
        at += 2 + length
    yield content[at:]


def _webp_chunks(content: bytes) -> Iterator[bytes]:
    """Complete chunks other than color profile and XMP; the flags in the header are those of the chunks that remain."""
    chunks, at = [], 12
    while at + 8 <= len(content):
        name, length = struct.unpack_from("<4sI", content, at)
        if name not in _WEBP_PIXELS + _WEBP_METADATA:
            # The length of the chunk before is not that of its content: its pixels are damaged.
            return
        end = at + 8 + length
        if end > len(content):
            break
        if name in (*_WEBP_PIXELS, b"EXIF"):
            chunks.append((name, content[at:end] + bytes(length % 2)))
        at = end + length % 2
    has_exif = any(name == b"EXIF" for name, _ in chunks)
    for name, chunk in chunks:
        if name == b"VP8X":
            # Bits of the first byte: 0x20 color profile, 0x08 EXIF, 0x04 XMP.
            flags = chunk[8] & ~0x2C | 0x08 * has_exif
            chunk = chunk[:8] + bytes([flags]) + chunk[9:]
        yield chunk
