"""What a kernel's code depends on: the text when the decorator ran, and everything that the text refers to."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import numpy as np
import pytest

import nitinol
from nitinol.compiler import driver
from nitinol.language.jit import jit as plain_jit
from nitinol.runtime.kernel import Kernel, jit
from nitinol.runtime.launch import interpret

pytestmark = pytest.mark.cpu
HEAD = "import math\nimport nitinol\nimport nitinol.language as tl\n\n"


@pytest.fixture
def load(tmp_path):
    """load(text): a module of that text, from a file, and the file."""
    count = 0

    def load(text):
        nonlocal count
        count += 1
        path = tmp_path / f"kernels_{count}.py"
        path.write_text(HEAD + text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module, path

    return load


def result(kernel, *arguments):
    out = np.full(1, np.nan, np.float32)
    kernel[(1,)](out, *arguments)
    return out.item()


def test_the_language_imports_nothing_that_stands_on_it():
    folder = Path(nitinol.__file__).parent / "language"
    files = list(folder.rglob("*.py"))
    assert len(files) > 10
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.partition(".")[0] != "nitinol" or name.startswith("nitinol.language"), f"{path}: {name}"


def test_a_file_that_is_edited_later_changes_nothing(load):
    text = "@nitinol.jit\ndef kernel(out):\n    tl.store(out, 1.0)\n"
    module, path = load(text)
    path.write_text(HEAD + "# another line, so that all places move\n\n" + text.replace("1.0", "2.0"))
    assert result(module.kernel) == 1.0
    assert "1.0" in module.kernel.source


def test_a_kernel_of_the_language_can_be_made_one_to_launch(load):
    text = "from nitinol.language.jit import jit\n@jit\ndef kernel(out):\n    tl.store(out, 1.0)\n"
    module, path = load(text)
    path.write_text(HEAD + text.replace("1.0", "2.0"))
    with pytest.raises(TypeError):
        module.kernel[(1,)]
    launchable = jit(module.kernel)
    assert isinstance(launchable, Kernel) and not isinstance(module.kernel, Kernel)
    assert launchable.cache_key == module.kernel.cache_key and jit(launchable) is launchable
    assert result(launchable) == 1.0


HELPERS = """
@nitinol.jit
def two(x):
    return x * 2

@nitinol.jit
def hundred(x):
    return x * 100

@nitinol.jit
def twice(x):
    return helper(helper(x))

helper, function = two, tl.exp2
SIZE = 5

class Sizes:
    SIZE = 3.0

@nitinol.jit
def kernel(out, x):
    tl.store(out, twice(x) + function(x * 0.0))

@nitinol.jit
def constant(out):
    tl.store(out, Sizes.SIZE + math.tau * 0)
"""


@pytest.mark.parametrize("interpreted", [False, True])
def test_a_helper_that_is_bound_anew_is_compiled_anew(load, interpreted):
    module, _ = load(HELPERS)

    def value():
        if interpreted:
            with interpret():
                return result(module.kernel, 3.0)
        return result(module.kernel, 3.0)

    first = module.kernel.cache_key
    assert value() == 13.0
    module.helper = module.hundred
    assert value() == 30001.0 and module.kernel.cache_key != first
    module.function = nitinol.language.sqrt  # the same text, and nothing of this project's is in it but the name
    assert value() == 30000.0
    module.helper, module.function = module.two, nitinol.language.exp2
    assert value() == 13.0 and module.kernel.cache_key == first


def test_a_helper_bound_between_the_key_and_the_compilation(load):
    module, _ = load(HELPERS)
    assert module.kernel.cache_key  # as when somebody asks for it early
    module.helper = module.hundred
    assert result(module.kernel, 3.0) == 30001.0
    module.helper = module.two
    assert result(module.kernel, 3.0) == 13.0


def test_constants_in_classes_and_modules_are_covered(load):
    module, _ = load(HELPERS)
    assert result(module.constant) == 3.0
    module.Sizes.SIZE = 4.0
    assert result(module.constant) == 4.0


def test_the_same_text_with_another_operation_is_another_kernel(load):
    text = "operation = tl.{}\n\n@nitinol.jit\ndef kernel(out, x):\n    tl.store(out, operation(x))\n"
    kernels = [load(text.format(name))[0].kernel for name in ("exp2", "sqrt", "exp2")]
    assert [result(kernel, 4.0) for kernel in kernels] == [16.0, 2.0, 16.0]
    assert kernels[0].cache_key == kernels[2].cache_key != kernels[1].cache_key


def test_a_kernel_defined_again_and_again_is_compiled_once(load):
    text = "def make():\n    @nitinol.jit\n    def kernel(out):\n        tl.store(out, 7.0)\n    return kernel\n"
    module, _ = load(text)
    assert result(module.make()) == 7.0
    before = len(driver._compiled)
    for _ in range(20):
        assert result(module.make()) == 7.0
    assert len(driver._compiled) == before


def test_a_function_without_a_file_says_so():
    namespace = {"jit": plain_jit}
    exec("@jit\ndef kernel(x):\n    pass", namespace)
    with pytest.raises(ValueError, match="the source of kernel cannot be read"):
        assert namespace["kernel"].source
