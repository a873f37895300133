"""Whether a compiled module is complete, asked before it is loaded.

The system maps a library into memory as far as its headers say. Where the file ends before, the
process is killed at the first access behind its end (SIGBUS), and no message is ever seen.
"""

from __future__ import annotations

import struct
from pathlib import Path

_ELF64_LITTLE = b"\x7fELF\x02\x01"
_LOADED = 1  # the type of a segment that is mapped, PT_LOAD


def mapped_bytes(path: Path) -> int:
    """How long the file has to be for what is mapped; 0 for other formats than 64-bit ELF."""
    with path.open("rb") as file:
        head = file.read(64)
        if head[:6] != _ELF64_LITTLE:
            return 0
        if len(head) < 64:
            return 64
        (begin,) = struct.unpack_from("<Q", head, 32)
        each, count = struct.unpack_from("<HH", head, 54)
        file.seek(begin)
        table = file.read(each * count)
    end: int = begin + each * count
    if each < 56 or len(table) < each * count:
        return end
    for start in range(0, len(table), each):
        (kind,) = struct.unpack_from("<I", table, start)
        offset, length = struct.unpack_from("<Q16xQ", table, start + 8)
        if kind == _LOADED:
            end = max(end, offset + length)
    return end


def flaw(path: Path) -> str:
    """What is wrong with the file, or "", where the system can say it itself when it loads it."""
    size = path.stat().st_size
    if size == 0:
        return "the file is empty"
    end = mapped_bytes(path)
    return f"the file is cut off after {size:,} of {end:,} bytes or more" if size < end else ""
