"""From an address in a compiled library to the line of the Metal source (DWARF 4, section .debug_line)."""

from __future__ import annotations

import bisect
import functools
import struct
from pathlib import Path

SOURCE = "program_source"


def section(data: bytes, wanted: str) -> bytes:
    """A section of a 64-bit little-endian ELF file, or nothing."""
    table, size, count, names = *struct.unpack_from("<Q", data, 40), *struct.unpack_from("<3H", data, 58)
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)]
    text = headers[names][4]
    for name, _, _, _, offset, length in headers:
        at = text + name
        if data[at : data.index(b"\0", at)].decode() == wanted:
            return data[offset : offset + length]
    return b""


class Reader:
    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data, self.at = data, at

    def take(self, form: str) -> int:
        value = struct.unpack_from("<" + form, self.data, self.at)[0]
        self.at += struct.calcsize("<" + form)
        return int(value)

    def leb(self, signed: bool = False) -> int:
        value = shift = 0
        while True:
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value - (1 << shift) if signed and byte & 64 else value

    def text(self) -> str:
        end = self.data.index(b"\0", self.at)
        value, self.at = self.data[self.at : end].decode(errors="replace"), end + 1
        return value


@functools.lru_cache(maxsize=64)
def table(path: str) -> list[tuple[int, str, int]]:
    """Rows (address, file, line) of a library, sorted by address; `file` is empty where a sequence ends."""
    r, rows = Reader(section(Path(path).read_bytes(), ".debug_line")), []
    while r.at < len(r.data):
        length = r.take("I")
        end = r.at + length
        version, header = r.take("H"), r.take("I")
        program = r.at + header
        if version != 4:
            break
        step, _, _, base, width, first = r.take("B"), r.take("B"), r.take("B"), r.take("b"), r.take("B"), r.take("B")
        operands = [0] + [r.take("B") for _ in range(first - 1)]
        while r.text():
            pass
        files = [""]
        while name := r.text():
            files.append(name)
            r.leb(), r.leb(), r.leb()
        r.at = program
        address, file, line = 0, 1, 1
        while r.at < end:
            code = r.take("B")
            if code >= first:
                address += (code - first) // width * step
                line += base + (code - first) % width
                rows.append((address, files[file] if file < len(files) else "", line))
            elif code == 0:
                size = r.leb()
                after, kind = r.at + size, r.take("B")
                if kind == 1:
                    rows.append((address, "", 0))
                    address, file, line = 0, 1, 1
                elif kind == 2:
                    address = r.take("Q")
                r.at = after
            elif code == 1:
                rows.append((address, files[file] if file < len(files) else "", line))
            elif code == 2:
                address += r.leb() * step
            elif code == 3:
                line += r.leb(signed=True)
            elif code == 4:
                file = r.leb()
            elif code == 8:
                address += (255 - first) // width * step
            elif code == 9:
                address += r.take("H")
            else:
                for _ in range(operands[code]):
                    r.leb()
        r.at = end
    rows.sort(key=lambda row: row[0])
    return rows


def find(path: str, pc: int) -> str:
    """The line of the program at an address (relative to the library's start); "" if it is not known."""
    rows = table(path)
    i = bisect.bisect_right(rows, pc, key=lambda row: row[0]) - 1
    while i >= 0 and rows[i][1] and (SOURCE not in rows[i][1] or not rows[i][2]):
        i -= 1  # code of the language's own header: the program's line before it
    return str(rows[i][2]) if i >= 0 and rows[i][1] else ""
