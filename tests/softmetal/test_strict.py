# ruff: noqa: E501  (Metal source in strings)
"""What Metal refuses is refused, with the line; and what is broken says so in a sentence."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from metal_runner import Metal, Runner

DEVICE = Metal.MTLCreateSystemDefaultDevice()
HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"  # the cases start in line 3
REFUSED = {
    "kernel void f(float* x [[buffer(0)]]) {}": "without an address space",
    "void g(float* x) {}": "without an address space",
    "void g(const int& x) {}": "without an address space",
    "void g() { float a = 1; float* p = &a; }": "without an address space",
    "float g(float x) { double y = x; return y; }": "double",
    "int g(int n) { return n ? g(n - 1) : 0; }": "calls itself",
    "int h(int n);\nint g(int n) { return h(n); }\nint h(int n) { return g(n); }": "calls itself",
    "void g() { goto end; end: return; }": "goto",
    "struct A { virtual void f() {} };": "virtual",
    "void g() { throw 1; }": "exceptions",
    "void g() { try { } catch (...) { } }": "exceptions",
    "thread int* g() { return new int; }": "new operator",
    "void g() { thread_local int x; }": "thread_local",
    "int g() { static int n = 0; return n; }": "static variables",
    "int counter = 3;": "constant address space",
    "kernel int f(device int* x [[buffer(0)]]) { return 1; }": "must return void",
    "kernel void f(device int* x [[buffer(31)]]) {}": "at most 31",
    "kernel void f(device int* x [[buffer(0)]], device int* y [[buffer(0)]]) {}": "same buffer index",
    "kernel void f(device int* x, uint i) {}": "no attribute",
    "kernel void f(texture2d<float> t [[texture(0)]]) {}": "texture",
    "void g() { threadgroup float t[3]; }": "only be declared in a kernel",
    "kernel void f(device int* x) {}\nvoid g(device int* x) { f(x); }": "is a kernel",
    "kernel void f(device int* x) { constant int* p = 0; p[0] = 1; }": "const",
    "kernel void f(device int* x) { threadgroup int* p = x; }": "cannot initialize",
    "kernel void f(device int* x) { thread int* p = x; }": "cannot initialize",
    "kernel void f(device const int* x) { device int* p = x; }": "cannot initialize",
    "kernel void f(constant int& x) { device const int* p = &x; }": "cannot initialize",
    "kernel void f(device float4* x) { half4 h = x[0]; }": "cannot initialize",
    "kernel void f(device int* x) { x[0] = y; }": "undeclared identifier 'y'",
    "kernel void f(device int* x) {": "unmatched",
    "kernel void f(device int* x) { x[0] = 1 }": "expected ';'",
    "kernel void a(device int* x) {}\n[[host_name(\"a\")]] kernel void b(device int* x) {}": "two kernels",
}  # fmt: skip


@pytest.mark.parametrize("source", REFUSED)
def test_refused(source):
    library, error = DEVICE.newLibraryWithSource_options_error_(HEAD + source, None, None)
    assert library is None and error.domain() == "MTLLibraryErrorDomain" and error.code() == 3
    text = error.localizedDescription()
    assert REFUSED[source] in text
    assert "program_source" in text and ("program_source:" + str(3 + source.count("\n")) in text or ":3:" in text or "calls" in text
                                         or "two kernels" in text)  # fmt: skip
    assert "__global" not in text and "__private" not in text


def test_accepted_though_it_looks_like_the_refused():
    """Overloads that call each other, methods, references to local variables with their space, tables."""
    r = Runner(
        HEAD
        + """
static float f(float x) { return x; }
static float f(float2 x) { return f(x.x) + f(x.y); }
template <typename T> T g(T x) { return x; }
static constant float table[] = {1, 2};
constexpr constant int n = 2;
namespace inner { struct A { float x; static float make(float y) { return y; } float more() const { return x * 2; } };
  inline A make(float x) { A a; a.x = x; return a; } }
using namespace inner;
union U { float f; uint u; };
template <typename T> struct Two { T a, b; Two() = default; Two(T x) : a(x), b(x) {}
    template <typename V> Two(Two<V> o) : a(T(o.a)), b(T(o.b)) {}
    bool operator<(Two o) const { return a < o.a; } operator float() const { return float(a); }
    thread T& first() { return a; } T twice() const { return 2 * a; } };
struct Holder { Two<float> two; float sum(const thread float& x) { two.first() += x; return two.a + two.twice(); } };
float take(uint2 p, const thread float& f) { return p.x + f; }
kernel void k(device float* x [[buffer(0)]]) {
    float a[n]; thread float* p = a; thread float& r = a[1]; r = 3; p[0] = f(float2(1, 2)) * 2;
    U u; u.f = 1; x[0] = inner::make(p[0]).more() + table[1] * g(r) + u.u + A::make(2);
    Holder h; h.two = n > 1 ? Two<float>(3) : ((device Two<float>*)x)[1];  // two address spaces, one class
    short2 at(1, 2); uint4 some = {1, 2};
    x[1] = h.sum(1.5f) + take({1, 2}, 2.0f) + at.y + some.y + some.z;
}
"""
    )
    x = np.zeros(8, "f")
    r.run("k", [x], groups=1, size=1)
    assert x[1] == 4.5 + 2 * 4.5 + 3 + 2 + 2 + 0


def test_too_much_threadgroup_memory_is_refused_with_the_pipeline():
    """As on a Mac: the library compiles, the pipeline does not come into being."""
    r = Runner(HEAD + "kernel void f(device float* x) { threadgroup float big[9000]; big[0] = 1; x[0] = big[0]; }")
    pipeline, error = DEVICE.newComputePipelineStateWithFunction_error_(r.library.newFunctionWithName_("f"), None)
    assert pipeline is None and "'f' declares 36000 bytes of threadgroup memory" in error.localizedDescription()


def test_missing_function_and_missing_compiler():
    r = Runner(HEAD + "kernel void k(device int* x) {}")
    assert r.library.newFunctionWithName_("nothing") is None
    _, error = r.library.newFunctionWithName_constantValues_error_("nothing", None, None)
    assert "no function 'nothing'; it has k" in error.localizedDescription()
    code = "import sys; sys.modules['ziglang'] = None; import importlib.util as u; u.find_spec = lambda n: None\nimport softmetal\n"
    done = subprocess.run([sys.executable, "-c", code + "softmetal.install()"], capture_output=True, text=True)
    assert done.returncode and "pip install ziglang" in done.stderr.strip().splitlines()[-1]


def test_the_cache_is_used_and_shared(tmp_path, monkeypatch):
    """A second process compiles nothing; what lies in the cache has its final name."""
    program = (
        "import softmetal, softmetal.compile as c; softmetal.install(); import Metal\n"
        "runs = []; real = c.run; c.run = lambda a, t=None: (runs.append(a), real(a, t))[1]\n"
        "d = Metal.MTLCreateSystemDefaultDevice()\n"
        "l, e = d.newLibraryWithSource_options_error_('kernel void k(device int* x) { x[0] = 1; }', None, None)\n"
        "p, e = d.newComputePipelineStateWithFunction_error_(l.newFunctionWithName_('k'), None)\nprint(len(runs))"
    )
    monkeypatch.setenv("SOFTMETAL_CACHE", str(tmp_path))
    counts = [
        int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
        for _ in "ab"
    ]
    assert counts[0] > 0 and counts[1] == 0
    assert all(p.suffix in (".so", ".json", ".pch") for p in tmp_path.iterdir())


def test_a_language_version_without_bfloat():
    options = Metal.MTLCompileOptions.alloc().init()
    options.setLanguageVersion_(Metal.MTLLanguageVersion3_0)
    text = HEAD + "kernel void f(device float* x) {\n    x[0] = __METAL_VERSION__;\n#ifdef __HAVE_BFLOAT__\n    bfloat y = 1;\n#endif\n}"
    x = np.zeros(1, "f")
    Runner(text, options).run("f", [x], groups=1, size=1)
    assert x[0] == 300
    library, error = DEVICE.newLibraryWithSource_options_error_(text.replace("#ifdef __HAVE_BFLOAT__", "#if 1"), options, None)
    assert library is None
    assert "program_source:6: error: 'bfloat' needs language version 3.1" in error.localizedDescription()
