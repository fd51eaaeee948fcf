"""Collect Python source for the bundled model: the standard library and wheels under permissive licences.

    pip download --no-deps --only-binary=:all: -d wheels/general sympy networkx ...
    pip download --no-deps --only-binary=:all: -d wheels/primer algorithms pygorithm ...
    python tools/demo_data.py --general wheels/general --primer wheels/primer --out corpus.jsonl.xz

The result holds one JSON object a line: `source` (package and version), `path`, `part` ("train",
"held-out file", "held-out package"), `weight` (how often a training file is repeated in an epoch) and
`text`. The packages with their licences and sizes are printed as the table of the model card.
"""

from __future__ import annotations

import argparse
import ast
import email
import hashlib
import json
import lzma
import re
import sys
import sysconfig
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

PERMISSIVE = re.compile(
    r"\bMIT\b|BSD|Apache|\bPSF|Python Software Foundation|\bISC\b|HPND|Unlicense|\b0BSD\b|Zlib", re.IGNORECASE
)
RESTRICTED = re.compile(r"GPL|General Public|Mozilla|\bMPL\b|Creative Commons|\bCC-BY|Proprietary", re.IGNORECASE)
LICENCE_TEXT = {  # how the texts of the common permissive licences begin, for packages without a metadata field
    "Permission is hereby granted, free of charge": "MIT",
    "Redistribution and use in source and binary forms": "BSD",
    "Apache License": "Apache-2.0",
    "free and unencumbered software released into the public domain": "Unlicense",
}
FOREIGN = re.compile(r"vendor|third_?party|extern|/_?ext/|site-packages|idna|lib2to3/tests|test/(bad|tokenize)")
GENERATED = re.compile(r"generated (by|from|with)|auto-?generated|do not edit", re.IGNORECASE)
HEADER_COMMENT = re.compile(r"(?:[ \t]*#[^\n]*\n|\s*\n)+")

PRIMER_WEIGHT = 4  # some 7 MB of textbook functions against some 250 MB of library code
PACKAGE_LIMIT = 8_000_000  # bytes of text from one package, so that no project's style dominates
HELD_OUT_PACKAGES = ("bottle", "mido", "textdistance")


def licence_of(wheel: zipfile.ZipFile) -> tuple[str, str, str]:
    """Name, version and permissive licence of a wheel; the licence is empty when it is not clearly permissive."""
    names = wheel.namelist()
    metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
    header = email.message_from_string(wheel.read(metadata).decode(errors="replace"))
    classifiers = [c.split("::")[-1].strip() for c in header.get_all("Classifier", []) if c.startswith("License ::")]
    field = (header.get("License") or "").strip().split("\n")[0][:60]
    stated = header.get("License-Expression") or ", ".join(classifiers) or field
    if not PERMISSIVE.search(stated) and not RESTRICTED.search(stated):
        for name in names:
            if ".dist-info/" in name and re.search(r"LICEN[CS]E|COPYING", name.upper()):
                text = " ".join(wheel.read(name).decode(errors="replace").split())
                stated = next((label for phrase, label in LICENCE_TEXT.items() if phrase in text), stated)
    good = PERMISSIVE.search(stated) and not RESTRICTED.search(stated + field)
    return str(header["Name"]), str(header["Version"]), stated if good else ""


def clean(raw: bytes) -> str | None:
    """The text of a source file, without its licence header; None for what a model should not learn from."""
    try:
        text = raw.decode("utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if re.search(r"General Public License|\bA?L?GPL|Mozilla Public|Creative Commons", text):
        return None
    text = "\n".join(line.rstrip() for line in text.replace("\r\n", "\n").expandtabs(4).split("\n"))
    header = HEADER_COMMENT.match(text)
    if header and re.search(r"copyright|licen[cs]e|all rights reserved|^#!|coding[:=]", header[0], re.IGNORECASE):
        text = text[header.end() :]
    text = re.sub(r"\n{4,}", "\n\n\n", text).strip("\n") + "\n"
    lines = text.split("\n")
    digits = sum(character.isdigit() for character in text)
    odd = (
        not 120 <= len(text) <= 150_000
        or max(map(len, lines)) > 300
        or len(text) > 60 * len(lines)
        or digits > 0.12 * len(text)
        or sum(not character.isascii() for character in text) > 0.02 * len(text)
        or GENERATED.search(text[:1000])
    )
    return None if odd else text


def source_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Pairs of name and contents of the Python files in a wheel or under a folder."""
    if path.is_dir():
        for file in sorted(path.rglob("*.py")):
            yield str(file.relative_to(path)), file.read_bytes()
    else:
        with zipfile.ZipFile(path) as wheel:
            for name in sorted(wheel.namelist()):
                if name.endswith(".py"):
                    yield name, wheel.read(name)


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def collect(general: Path, primer: Path) -> Iterator[dict[str, str | int]]:
    """Yield the corpus's records and print a table row for each package."""
    version = ".".join(map(str, sys.version_info[:3]))
    sources = [("Python standard library", version, "PSF-2.0", Path(sysconfig.get_paths()["stdlib"]), 2)]
    for folder, weight in ((primer, PRIMER_WEIGHT), (general, 1)):
        for path in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(path) as wheel:
                sources.append((*licence_of(wheel), path, weight))
    seen: set[int] = set()
    for name, version, licence, path, weight in sources:
        if not licence:
            print(f"left out (no clearly permissive licence): {name} {version}", file=sys.stderr)
            continue
        # In the order of their hashes: a package over the limit gives a random sample of its files.
        files = sorted(source_files(path), key=lambda file: hash_of(file[0]))
        used = count = 0
        for file, raw in files:
            text = None if FOREIGN.search(file) or used > PACKAGE_LIMIT * (3 if path.is_dir() else 1) else clean(raw)
            # Duplicates are found by their code alone, whatever their spacing.
            key = hash_of("".join(text.split())) if text else 0
            if text is None or key in seen:
                continue
            seen.add(key)
            used, count = used + len(text), count + 1
            part = "held-out package" if name in HELD_OUT_PACKAGES else "train"
            if part == "train" and key % 50 == 0:
                part = "held-out file"
            is_test = re.search(r"(^|/)(tests?|idlelib)/|test_|__init__|setup\.py", file)
            repeat = 1 if is_test else weight
            yield {"source": f"{name} {version}", "path": file, "part": part, "weight": repeat, "text": text}
        if count:
            print(f"| {name} | {version} | {licence} | {count} | {used / 1e6:.2f} | {weight} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--general", type=Path, required=True, help="folder of wheels, each file used once")
    parser.add_argument("--primer", type=Path, required=True, help=f"folder of wheels, used {PRIMER_WEIGHT} times")
    parser.add_argument("--out", type=Path, required=True, help="the corpus, JSON lines through xz")
    arguments = parser.parse_args()
    print("| package | version | licence | files | MB | weight |\n| --- | --- | --- | ---: | ---: | ---: |")
    with lzma.open(arguments.out, "wt", preset=4, encoding="utf-8") as out:
        for record in collect(arguments.general, arguments.primer):
            out.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
