"""
Facts as bytes that have one spelling: canonical JSON, JSON that carries its own checksum, sha256.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any


def sha256_hex(data: bytes | memoryview) -> str:
    """64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(obj: Any) -> bytes:
    """
    The one way to write these facts: sorted keys, no whitespace, UTF-8.

    Only dict (string keys), list, tuple, str, int, bool and None. Raises TypeError for anything else: a
    float has several spellings, so a fact that is not whole is given as a string.
    """
    _refuse_ambiguous(obj, "$")
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def checked_json(body: dict[str, Any]) -> bytes:
    """A JSON object for people and machines, with the sha256 of the rest of it under "check"."""
    return _spelled({**body, "check": hashlib.sha256(_spelled(body)).hexdigest()})


def parse_json(data: bytes, most_values: int) -> Any:
    """
    A stranger's JSON. Raises ValueError for what is none, and for more than `most_values` values in it: counted
    before anything is built of them, since an empty list of two bytes becomes an object of sixty.
    """
    if sum(data.count(sign) for sign in (b",", b"[", b"{")) > most_values:
        raise ValueError(f"it holds more than {most_values} values")
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_checked_json(data: bytes, most_values: int = 2**20) -> dict[str, Any]:
    """What `checked_json` was given. Raises ValueError for any other bytes, and above `most_values`."""
    body = parse_json(data, most_values)
    if not isinstance(body, dict) or "check" not in body:
        raise ValueError("it is no JSON object with a checksum")
    del body["check"]
    # The same bytes, the same check.
    if data != checked_json(body):
        raise ValueError("its checksum does not fit its contents")
    return body


def _spelled(body: dict[str, Any]) -> bytes:
    text = json.dumps(body, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def _refuse_ambiguous(obj: Any, where: str) -> None:
    if isinstance(obj, dict):
        for name, value in obj.items():
            if not isinstance(name, str):
                raise TypeError(f"canonical JSON: a key at {where} is {name!r}, keys are strings")
            _refuse_ambiguous(value, f"{where}.{name}")
    elif isinstance(obj, (list, tuple)):
        for n, value in enumerate(obj):
            _refuse_ambiguous(value, f"{where}[{n}]")
    # type(), not isinstance: numpy's float64 is a float, an IntEnum is an int.
    elif type(obj) not in (str, int, bool, type(None)):
        raise TypeError(f"canonical JSON: {where} is {obj!r}, a {type(obj).__name__}; give a string or an int")
