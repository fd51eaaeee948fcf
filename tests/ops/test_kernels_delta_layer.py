"""A whole gated delta layer of Qwen3-Next, with our three operations between its projections, against transformers':
results, states, and the gradients by its input and all its weights."""

from __future__ import annotations

import numpy as np
import pytest
from poisoned_memory import poison  # noqa: F401

import nitinol as na
from nitinol.ops.delta_rule import delta_rule_forward, delta_rule_recurrent
from nitinol.ops.delta_rule_backward import delta_rule_backward
from nitinol.ops.gated_norm import gated_norm_backward, gated_norm_forward
from nitinol.ops.short_convolution import short_convolution_forward, short_convolution_step
from nitinol.ops.short_convolution_backward import short_convolution_backward

torch = pytest.importorskip("torch")
qwen3_next = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")

pytestmark = pytest.mark.usefixtures("poison")
HEADS, V_HEADS, DIM_K, DIM_V, WIDTH = 2, 4, 16, 24, 4
CLOSE = 2e-5  # both in fp32: errors of 1e-6, of which projections sum up some dozens
# transformers' gradients by dt_bias and A_log are off by up to 2e-5 (ours by 1e-6, both measured against float64): its
# decays are exponentials of differences of sums, which reach some hundreds in a chunk.
CLOSE_GRADIENT = 2e-4


def arrays(*tensors):
    return [na.array(x.detach().contiguous().numpy()) for x in tensors]


def tensors(*found):
    return tuple(None if x is None else torch.from_numpy(x.numpy()) for x in found)


def operation(forward, backward):
    """A pair of functions on Arrays as a function of torch, with gradients."""

    class Operation(torch.autograd.Function):
        @staticmethod
        def forward(context, *inputs):
            context.save_for_backward(*inputs)
            return tensors(forward(*arrays(*inputs)))[0]

        @staticmethod
        def backward(context, gradient):
            return tensors(*backward(*arrays(gradient, *context.saved_tensors)))

    return Operation.apply


def layer_of_transformers():
    config = qwen3_next.Qwen3NextConfig(
        hidden_size=32, linear_num_key_heads=HEADS, linear_num_value_heads=V_HEADS, linear_key_head_dim=DIM_K,
        linear_value_head_dim=DIM_V, linear_conv_kernel_dim=WIDTH, num_hidden_layers=1,
        layer_types=["linear_attention"],
    )  # fmt: skip
    layer = qwen3_next.Qwen3NextGatedDeltaNet(config, 0)
    torch.nn.init.normal_(layer.norm.weight)
    torch.nn.init.normal_(layer.dt_bias)
    return layer, {"epsilon": config.rms_norm_eps}


def ours(layer, hidden, convolve, rule, normalise):
    """The layer's forward pass as in its paper, with these three functions of tensors."""
    batch, tokens, _ = hidden.shape
    projected = layer.in_proj_qkvz(hidden), layer.in_proj_ba(hidden)
    query, key, value, z, b, a = layer.fix_query_key_value_ordering(*projected)
    mixed = torch.cat([x.reshape(batch, tokens, -1) for x in (query, key, value)], dim=-1)
    mixed = convolve(mixed, layer.conv1d.weight[:, 0])
    query, key, value = torch.split(mixed, [HEADS * DIM_K, HEADS * DIM_K, V_HEADS * DIM_V], dim=-1)
    g = -layer.A_log.exp() * torch.nn.functional.softplus(a + layer.dt_bias)
    query, key = (x.reshape(batch, tokens, HEADS, DIM_K) for x in (query, key))
    core = rule(query, key, value.reshape(batch, tokens, V_HEADS, DIM_V), g, b.sigmoid())
    return layer.out_proj(normalise(core, z, layer.norm.weight).reshape(batch, tokens, -1))


def test_results_and_gradients(device_name):
    layer, epsilon = layer_of_transformers()
    hidden = torch.randn(2, 70, 32, requires_grad=True)
    towards = torch.randn(2, 70, 32)
    weights = [hidden, *layer.parameters()]
    expected = layer(hidden)
    expected_gradients = torch.autograd.grad((expected * towards).sum(), weights)
    expected = expected.detach()

    convolve = operation(
        lambda *x: short_convolution_forward(device_name, *x)[0],
        lambda d, *x: short_convolution_backward(device_name, d, None, *x)[:2],
    )
    rule = operation(
        lambda *x: delta_rule_forward(device_name, *x, normalise=True)[0],
        lambda d, *x: delta_rule_backward(device_name, d, None, *x, normalise=True)[:5],
    )
    normalise = operation(
        lambda *x: gated_norm_forward(device_name, *x, **epsilon),
        lambda d, *x: gated_norm_backward(device_name, d, *x, **epsilon),
    )
    found = ours(layer, hidden, convolve, rule, normalise)
    np.testing.assert_allclose(found.detach(), expected.detach(), rtol=0, atol=CLOSE * float(expected.abs().max()))
    names = ["hidden", *(name for name, _ in layer.named_parameters())]
    for name, one, other in zip(names, torch.autograd.grad((found * towards).sum(), weights), expected_gradients):
        np.testing.assert_allclose(one, other, rtol=0, atol=CLOSE_GRADIENT * float(other.abs().max()), err_msg=name)


@torch.no_grad()
def test_a_prompt_and_then_tokens(device_name):
    layer, epsilon = layer_of_transformers()
    hidden = torch.randn(1, 40, 32)
    expected = layer(hidden)
    state = {}

    def prompt_convolution(x, weight):
        out, state["window"] = short_convolution_forward(device_name, *arrays(x, weight))
        return tensors(out)[0]

    def prompt_rule(*x):
        out, state["memory"] = delta_rule_forward(device_name, *arrays(*x), normalise=True)
        return tensors(out)[0]

    def normalise(*x):
        return tensors(gated_norm_forward(device_name, *arrays(*x), **epsilon))[0]

    def convolve(x, weight):
        return tensors(short_convolution_step(device_name, *arrays(x, weight), None, state["window"]))[0]

    def rule(*x):
        return tensors(delta_rule_recurrent(device_name, *arrays(*x), state["memory"], normalise=True))[0]

    found = [ours(layer, hidden[:, :36], prompt_convolution, prompt_rule, normalise)]
    na.evaluate(*state.values())
    found += [ours(layer, hidden[:, t : t + 1], convolve, rule, normalise) for t in range(36, 40)]
    np.testing.assert_allclose(torch.cat(found, 1), expected, rtol=0, atol=CLOSE * float(expected.abs().max()))
