"""The thinnest path: a vector sum and a reduction over a simdgroup."""

import numpy as np
from metal_runner import Runner

SOURCE = """
#include <metal_stdlib>
using namespace metal;
kernel void add(device const float* a [[buffer(0)]], device const float* b [[buffer(1)]],
                device float* c [[buffer(2)]], uint i [[thread_position_in_grid]]) { c[i] = a[i] + b[i]; }
kernel void total(device const float* x [[buffer(0)]], device float* out [[buffer(1)]],
                  uint i [[thread_position_in_grid]], uint g [[threadgroup_position_in_grid]]) {
    float s = simd_sum(x[i]);
    if (i % 32 == 0) out[g] = s;
}
"""


def test_vector_add_and_simd_sum(rng):
    r = Runner(SOURCE)
    a, b, c = rng.standard_normal((3, 1001)).astype("f")
    r.run("add", [a, b, c], threads=1001, size=128)
    assert np.array_equal(c, a + b)
    x, out = rng.standard_normal((7, 32)).astype("f"), np.full(7, np.nan, "f")
    r.run("total", [x, out], groups=7, size=32)
    assert np.allclose(out, x.sum(1), atol=1e-5)  # 32 additions of numbers around 1
