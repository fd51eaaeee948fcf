"""The source of a kernel: text, syntax tree, places, free variables, and a hash of all that it depends on."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
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
        self.used_globals: list[tuple[Source, ast.AST, Any]] = []  # filled by `cache_key`

    def __repr__(self) -> str:
        return f"<jit function {self.__module__}.{self.__qualname__}>"

    @cached_property
    def _source_lines(self) -> tuple[list[str], int]:
        try:
            return inspect.getsourcelines(self.fn)
        except (OSError, TypeError) as error:
            raise ValueError(f"the source of {self.__name__} cannot be read: define kernels in a file") from error

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
            return getattr(owner, node.attr, absent) if isinstance(owner, ModuleType) else absent
        return absent

    @cached_property
    def cache_key(self) -> str:
        """A hash of the source and of all that it refers to: other functions, constexpr globals, the tile language."""
        digest = hashlib.sha256(_language_version())
        _add_source(self, digest, set(), self.used_globals)
        return digest.hexdigest()

    def check_globals(self) -> None:
        """RuntimeError if a constexpr global that is part of `cache_key` has another value since."""
        for function, node, value in self.used_globals:
            now = function.resolve(node)
            if now is not value and known_text(now) != known_text(value):
                raise RuntimeError(
                    f"the global {ast.unparse(node)} was {unwrap(value)!r} when {self.__name__} was compiled and is "
                    f"now {unwrap(now)!r}: pass what changes as a constexpr argument"
                )


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
        value = getattr(value, "jit_function", value)
        if isinstance(value, Source):
            _add_source(value, digest, seen, used)
        elif inspect.isfunction(value) and not value.__module__.startswith("nitinol.language"):
            digest.update(_function_text(value).encode())
        elif isinstance(value, (constexpr, DType)):
            digest.update(f"{ast.unparse(node)}={known_text(value)}".encode())
            if isinstance(value, constexpr):
                used.append((function, node, value))


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
