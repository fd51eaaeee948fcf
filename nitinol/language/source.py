"""The source of a kernel: text, syntax tree, places, free variables, and a hash of all that it depends on.

The text is the file's when the decorator runs, which is what Python has executed: a file that is edited later changes
nothing in this process.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import linecache
import textwrap
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from nitinol.language.core import constexpr, unwrap
from nitinol.language.types import DType, PointerType

ABSENT = object()


class Source:
    """A Python function whose syntax tree is read."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.fn = function
        self.__name__ = function.__name__
        self.__qualname__ = function.__qualname__
        self.__module__ = function.__module__
        self.__doc__ = function.__doc__
        self.file = function.__code__.co_filename
        linecache.checkcache(self.file)
        self._file_lines = linecache.getlines(self.file, function.__globals__)
        self._key = ""
        self._used: list[tuple[Source, ast.AST, Any]] = []  # what `_key` covers: a name or attribute, and its value

    def __repr__(self) -> str:
        return f"<jit function {self.__module__}.{self.__qualname__}>"

    @cached_property
    def _source_lines(self) -> tuple[list[str], int]:
        first = self.fn.__code__.co_firstlineno
        if first > len(self._file_lines):
            raise ValueError(f"the source of {self.__name__} cannot be read: define kernels in a file")
        return inspect.getblock(self._file_lines[first - 1:]), first

    @cached_property
    def source(self) -> str:
        """The source text, without the indentation of the place where it stands."""
        return textwrap.dedent("".join(self._source_lines[0]))

    @cached_property
    def tree(self) -> ast.FunctionDef:
        """The syntax tree of the definition; add `line_offset` and `column_offset` for places in the file."""
        node = ast.parse(self.source).body[0]
        if not isinstance(node, ast.FunctionDef):
            raise ValueError(f"{self.__name__}: @jit takes a function defined with def")
        return node

    @property
    def line_offset(self) -> int:
        return self._source_lines[1] - 1

    @cached_property
    def column_offset(self) -> int:
        first = self._source_lines[0][0]
        return len(first) - len(first.lstrip())

    def source_line(self, line: int) -> str:
        """The text of a line of the file, "" if it is not part of this function."""
        index = line - self._source_lines[1]
        lines = self._source_lines[0]
        return lines[index] if 0 <= index < len(lines) else ""

    def lookup(self, name: str, absent: Any) -> Any:
        """A free variable's value: of the enclosing functions, or global."""
        code = self.fn.__code__
        if name in code.co_freevars and self.fn.__closure__:
            cell = self.fn.__closure__[code.co_freevars.index(name)]
            try:
                return cell.cell_contents
            except ValueError:
                return absent
        return self.fn.__globals__.get(name, absent)

    def resolve(self, node: ast.AST, absent: Any = ABSENT) -> Any:
        """What a name or a dotted name refers to outside the function, `absent` if that is unknown."""
        if isinstance(node, ast.Name):
            return self.lookup(node.id, absent)
        if isinstance(node, ast.Attribute):
            owner = self.resolve(node.value, ABSENT)
            return getattr(owner, node.attr, absent) if isinstance(owner, (ModuleType, type)) else absent
        return absent

    @property
    def cache_key(self) -> str:
        """A hash of the source and of all that it refers to: other functions, constants, the tile language.

        It is another one as soon as a function or a constant that it covers is another one. RuntimeError if a
        constexpr global has another value than when the kernel was first compiled.
        """
        self.check_globals()
        if not self._key:
            digest = hashlib.sha256(_language_version())
            self._used = []
            _add_source(self, digest, set(), self._used)
            self._key = digest.hexdigest()
        return self._key

    def check_globals(self) -> None:
        """Forgets a key that no longer covers what the kernel refers to; RuntimeError as `cache_key` raises it."""
        for function, node, value in self._used:
            now = function.resolve(node)
            if now is value or (known_text(value) is not None and known_text(now) == known_text(value)):
                continue
            if isinstance(value, constexpr):
                raise RuntimeError(
                    f"the global {ast.unparse(node)} was {unwrap(value)!r} when {self.__name__} was compiled and is "
                    f"now {unwrap(now)!r}: pass what changes as a constexpr argument"
                )
            self._key = ""


@functools.cache
def _language_version() -> bytes:
    """Changes whenever the tile language's own source does; 1 ms, once."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()


def _add_source(function: Source, digest: Any, seen: set[Any], used: list[Any]) -> None:
    if function in seen:
        return
    seen.add(function)
    digest.update(function.source.encode())
    for default in function.fn.__defaults__ or ():
        digest.update(str(known_text(default)).encode())
    for node in ast.walk(function.tree):
        if not isinstance(node, (ast.Name, ast.Attribute)):
            continue
        value = function.resolve(node)
        called = getattr(value, "jit_function", value)
        if isinstance(called, Source):
            _add_source(called, digest, seen, used)
        elif inspect.isfunction(called):
            if called.__module__.startswith("nitinol.language"):  # its text is in the version
                digest.update(f"{called.__module__}.{called.__qualname__}".encode())
                if isinstance(node, ast.Attribute):  # tl.load stays what it is
                    continue
            else:
                digest.update(_function_text(called).encode())
        elif isinstance(value, (constexpr, DType)) or (isinstance(node, ast.Attribute) and _is_plain(value)):
            digest.update(f"{ast.unparse(node)}={known_text(value)}".encode())
        else:
            continue
        used.append((function, node, value))


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, tuple)) or value is None


def _function_text(function: Any) -> str:
    """What a plain Python function does, as far as a text can tell: its source and what it closes over."""
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        text = function.__code__.co_code.hex()
    cells = [known_text(c.cell_contents) for c in function.__closure__ or ()]
    return f"{function.__module__}.{function.__qualname__} {text} {cells} {function.__defaults__}"


def known_text(value: Any) -> str | None:
    """A text that tells one known value from another, types included; None for unknown kinds of value."""
    value = unwrap(value)
    if value is None or isinstance(value, (int, float, str, bool)):
        return repr(value)
    if isinstance(value, (DType, PointerType)):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, Source):
        return f"{value.__qualname__}#{value.cache_key[:16]}"
    if isinstance(value, (tuple, list)):
        parts = [known_text(v) for v in value]
        return None if None in parts else f"({', '.join(map(str, parts))})"
    if inspect.isfunction(value):
        digest = hashlib.sha256(_function_text(value).encode()).hexdigest()
        return f"{value.__module__}.{value.__qualname__}#{digest[:16]}"
    if inspect.isclass(value) or inspect.isbuiltin(value):
        return f"{value.__module__}.{value.__qualname__}"
    if type(value).__module__ == "numpy" and hasattr(value, "item") and not getattr(value, "shape", None):
        return repr(value.item())
    return None
