"""Alters frames: bits flipped, bytes cut, doubled and moved, numbers replaced by large ones, odd frames made up."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Sequence
from typing import Any

__all__ = ["NUMBERS", "Mutator"]

NUMBERS = (0, 1, 2, 3, 7, 8, 63, 64, 65, 255, 256, 1000, 1001, 65535, 2**31 - 1, 2**31, 2**32 - 1)


class Mutator:
    """Alters frames; repeated by its seed.

    Args:
        frames: honest ones.
        seed: of all choices.
    """

    def __init__(self, frames: Sequence[bytes], seed: int) -> None:
        self.random = random.Random(seed)
        self._frames = list(frames)

    def pick(self) -> bytes:
        """An honest frame."""
        return self.random.choice(self._frames)

    def of_kind(self, kinds: Sequence[int]) -> bytes | None:
        """Half of the time an honest frame of one of these kinds."""
        found = [frame for frame in self._frames if frame[1] in kinds] if self.random.random() < 0.5 else []
        return self.random.choice(found) if found else None

    def frame(self, base: bytes | None = None) -> bytes:
        """An altered frame: one to three changes of an honest one, noise, or a whole one with odd contents."""
        chance = self.random
        if base is None and chance.random() < 0.15:
            return self.odd()
        data = bytearray(self.pick() if base is None else base)
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            self._change(data)
        return bytes(data)

    def _change(self, data: bytearray) -> None:
        chance = self.random
        how = chance.randrange(12)
        size = len(data)
        if how == 0 or size == 0:
            data[:] = chance.randbytes(chance.randrange(80))
        elif how <= 2:
            for _ in range(chance.choice((1, 1, 2, 8))):
                data[chance.randrange(size)] ^= 1 << chance.randrange(8)
        elif how == 3:
            del data[chance.randrange(size) :]
        elif how == 4:
            data += chance.randbytes(chance.randrange(1, 40))
        elif how == 5:
            at = chance.randrange(size)
            data[at : at + 4] = chance.choice(NUMBERS).to_bytes(4, "little")
        elif how == 6:
            at = chance.randrange(size)
            data[at : at + 8] = (chance.choice(NUMBERS) * chance.choice((1, 2**31))).to_bytes(8, "little")
        elif how == 7:
            at = chance.randrange(size)
            del data[at : at + chance.randrange(1, 16)]
        elif how == 8:
            at, length = chance.randrange(size), chance.randrange(1, 64)
            data[at:at] = data[at : at + length]
        elif how == 9:
            other = self.pick()
            data[chance.randrange(size) :] = other[chance.randrange(len(other)) :]
        elif how == 10:
            data[min(1, size - 1)] = chance.randrange(256)
        else:
            at = chance.randrange(size)
            data[at] = (data[at] + chance.choice((1, 255))) % 256

    def odd(self) -> bytes:
        """A frame put together field by field, with numbers, shapes and texts that nobody honest would send."""
        chance = self.random

        def number(size: int) -> bytes:
            value = chance.choice(NUMBERS) if chance.random() < 0.7 else chance.getrandbits(8 * size)
            return (value % 256**size).to_bytes(size, "little")

        def text(*choices: str) -> bytes:
            data = chance.choice((*choices, "", "é", "\x1b[2J", "a\nb", "A" * 1001, "city", "\u2028")).encode()
            return number(4) if chance.random() < 0.05 else len(data).to_bytes(4, "little") + data

        def plain() -> bytes:
            data = json.dumps(self.plain({"steps": 4, "label": "posterior", "deep": {"a": [1, 2]}})).encode()
            data = chance.choice((data, data, b"[" * 9000, b"9" * 5000, b'{"a":1,"a":NaN}', b"\xff", b"null"))
            return len(data).to_bytes(4, "little") + data

        def address() -> bytes:
            return number(8) + number(8) + number(4) + bytes(32) + text("outputs")

        def table() -> bytes:
            shape = [chance.choice(NUMBERS) for _ in range(chance.randrange(6))]
            size = 8 * math.prod(shape)
            cells = bytes(size) if size < 5000 else bytes(8)
            return text("bands") + bytes((len(shape),)) + b"".join(n.to_bytes(4, "little") for n in shape) + cells

        def task() -> bytes:
            draws, parameters = chance.choice(NUMBERS), chance.choice(NUMBERS)
            size = 8 * draws * parameters
            theta = struct.pack("<d", chance.choice((0.5, math.nan, math.inf, 1e308))) * (min(size, 4096) // 8)
            seed = chance.choice((b"\0", b"\1" + number(8), b"\2"))
            head = bytes((chance.randrange(5),)) + number(8)
            return head + struct.pack("<II", draws, parameters) + theta + text("fd") + seed + plain()

        kind = chance.choice((4, 5, 6, 7, 8, 9, 9, 10, 10, 10, 11, 12, 13, 14, 15))
        few = chance.randrange(4)
        bodies = [chance.randbytes(chance.choice((0, 8, 16, 24))) for _ in range(few)]
        pieces = b"".join(len(each).to_bytes(4, "little") + each for each in bodies)
        count = few.to_bytes(4, "little") if chance.random() < 0.8 else number(4)
        body = {
            4: lambda: chance.randbytes(64),
            5: lambda: count + chance.randbytes(64 * few),
            6: lambda: count + pieces,
            7: lambda: count + pieces,
            8: lambda: b"",
            9: lambda: number(8) + task(),
            10: lambda: number(8) + b"\1" + text("fit") + plain() + (1).to_bytes(4, "little") + table(),
            11: lambda: (
                address()
                + number(8)
                + bytes((chance.randrange(4), chance.randrange(3)))
                + bytes(32)
                + text()
                + count
                + pieces
            ),
            12: lambda: (
                address()
                + chance.choice((b"\0" + count + b"".join(number(8) + p for p in [pieces]), b"\1\1\0" + text("no")))
            ),
            13: lambda: text("queens") + text("gone"),
            14: lambda: text("no"),
            15: lambda: text("bye"),
        }[kind]()
        return bytes((1, kind)) + body

    def plain(self, value: Any, depth: int = 0) -> Any:
        """A JSON value with one thing in it changed in kind or size."""
        chance = self.random
        if isinstance(value, dict) and value and chance.random() < 0.9:
            key = chance.choice(sorted(value))
            changed = dict(value)
            if chance.random() < 0.1:
                changed[chance.choice(("", "version", "sharing", "\ud800"))] = changed.pop(key)
            else:
                changed[key] = self.plain(value[key], depth + 1)
            return changed
        if isinstance(value, list) and value and chance.random() < 0.8:
            at = chance.randrange(len(value))
            return [*value[:at], self.plain(value[at], depth + 1), *value[at + chance.choice((0, 1, 1, 1)) :]]
        if isinstance(value, str) and value and chance.random() < 0.6:
            at = chance.randrange(len(value))
            return value[:at] + chance.choice(("", "0", "\x00", "é", "\ud800", "A" * 70)) + value[at + 1 :]
        return chance.choice(
            (None, True, -1, 0, 2**64, 10**400, 1e308, -0.0, "", "x", [], {}, [[]], {"": 0}, "A" * 2000, value)
        )
