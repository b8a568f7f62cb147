"""
A zip file with exactly one encoding: stored members in name order, no dates, no flags, no extras.

The same members always give the same bytes, so a shard can be named by its checksum; and a file that
is not byte for byte what `pack` writes is refused, which leaves a stranger's zip no room for tricks
(duplicate, encrypted, compressed or overlapping members, names that climb out, junk before or behind).
Nothing is ever extracted to disk.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

from fpo.store.format.invariants import Invalid

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")

_VERSION = 20
_MADE_BY_UNIX = (3 << 8) | _VERSION
_DATE_1980_01_01 = (1 << 5) | 1
_REGULAR_FILE_0644 = 0o100644 << 16


MAX_MEMBERS = 64
"""A base has 21 at most; a stranger's zip may have millions, each a Python object."""


def pack(members: Mapping[str, bytes | memoryview]) -> bytes:
    """The zip of these members. Names are ASCII; the whole stays below 4 GiB."""
    body: list[bytes | memoryview] = []
    directory: list[bytes] = []
    offset = 0
    for name in sorted(members):
        data, raw_name = members[name], name.encode("ascii")
        # version, flags, method, time, date, crc, compressed size, size, name length, extra length
        common = (
            _VERSION,
            0,
            0,
            0,
            _DATE_1980_01_01,
            zlib.crc32(data),
            len(data),
            len(data),
            len(raw_name),
            0,
        )
        local = _LOCAL.pack(b"PK\x03\x04", *common) + raw_name
        directory.append(
            _CENTRAL.pack(b"PK\x01\x02", _MADE_BY_UNIX, *common, 0, 0, 0, _REGULAR_FILE_0644, offset) + raw_name
        )
        body += [local, data]
        offset += len(local) + len(data)
    listing = b"".join(directory)
    end = _END.pack(b"PK\x05\x06", 0, 0, len(directory), len(directory), len(listing), offset, 0)
    return b"".join([*body, listing, end])


def unpack(data: bytes) -> dict[str, memoryview]:
    """The members of a zip that `pack` wrote, without copying. Raises Invalid for any other bytes."""
    view = memoryview(data)
    members: dict[str, memoryview] = {}
    offset = 0
    for _ in range(MAX_MEMBERS):
        if data[offset : offset + 4] != b"PK\x03\x04":
            break
        start = offset + _LOCAL.size
        if start > len(data):
            break
        *_, size, name_length, _extra = _LOCAL.unpack_from(data, offset)
        raw_name = data[start : start + name_length]
        members[raw_name.decode("ascii", "replace")] = view[start + name_length : start + name_length + size]
        offset = start + name_length + size
    # Whatever was misread above cannot survive this: checksums, sizes, order and directory are written anew.
    if not all(name.isascii() for name in members) or pack(members) != data:
        raise Invalid("it is not a zip file as this format writes it (truncated, changed or foreign)")
    return members
