"""Sampling on the device: greedy choice, exact top-k, top-p and min-p sets, the penalty, counters, and frequencies."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_runner import ENGINES, poisoned, run

from nitinol.ops import sampling

CONTEXT = 32


@pytest.fixture
def rng():
    return np.random.default_rng()


def sample(engine, logits, position=4, tokens=1, history=(), temperature=0.0, top_k=0, top_p=1.0, min_p=0.0,
           penalty=1.0, window=0, seed=1, **shape):  # fmt: skip
    """The token, the weights that the kernel left, and the state after the step."""
    memory = poisoned(CONTEXT, np.int32)
    memory[: len(history)] = history
    state = sampling.SamplingState(
        poisoned(1, np.int32), np.array([position], np.int32), memory,
        np.array([temperature, top_p, min_p, penalty], np.float32), np.array([seed, top_k, window], np.int64),
    )  # fmt: skip
    weights = poisoned(len(logits) + 1)
    run(
        engine, sampling.sample_kernel, (1,), logits=np.append(logits, np.float32(np.inf)), weights=weights,
        vocabulary=len(logits), tokens=tokens, context=CONTEXT, **state._asdict(), **{"BLOCK": 128} | shape,
    )  # fmt: skip
    assert np.isnan(weights[-1])
    return int(state.token[0]), weights[:-1], state


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("vocabulary", [1, 100, 128, 1001])
def test_greedy_takes_the_first_of_the_highest(rng, engine, vocabulary, chunk):
    logits = rng.normal(size=vocabulary).astype(np.float32) - 100
    places = np.sort(rng.choice(vocabulary, min(3, vocabulary), replace=False))
    logits[places] = -50
    token, _, state = sample(engine, logits, position=7, tokens=5, CHUNK=chunk)
    assert token == places[0]
    assert state.position[0] == 12 and state.history[12] == token
    untouched = np.delete(state.history, 12)
    assert (untouched == poisoned(CONTEXT - 1, np.int32)).all()


def test_state_at_the_end_of_the_context(rng):
    token, _, state = sample("native", rng.normal(size=50).astype(np.float32), position=CONTEXT - 1)
    assert state.position[0] == CONTEXT and 0 <= token < 50  # and nothing was written past the history


def test_logits_without_a_highest_still_give_a_token():
    for logits in (np.full(300, np.nan, np.float32), np.full(300, -np.inf, np.float32)):
        for temperature in (0.0, 1.0):
            token, _, _ = sample("native", logits, temperature=temperature)
            assert 0 <= token < 300


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chunk", [1, 4])
def test_penalty_counts_once_and_only_in_the_window(rng, engine, chunk):
    logits = rng.normal(size=200).astype(np.float32)
    history = rng.integers(0, 200, 20)
    history[12] = history[15]  # twice in the window
    history[14] = 5000  # no token: ignored
    options = {"temperature": 0.0, "penalty": 1.3, "window": 10, "CHUNK": chunk}
    token, weights, _ = sample(engine, logits, position=19, history=history, **options)
    expected = logits.copy()
    recent = np.unique(history[10:20])
    recent = recent[recent < 200]
    expected[recent] = np.where(logits[recent] > 0, logits[recent] / np.float32(1.3), logits[recent] * np.float32(1.3))
    np.testing.assert_array_equal(weights, expected)
    assert token == expected.argmax()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 5000},
        {"top_p": 0.5},
        {"top_p": 0.0},
        {"min_p": 0.1},
        {"penalty": 1.2, "window": 8, "temperature": 0.7},
        {"top_k": 40, "top_p": 0.8, "min_p": 0.02, "temperature": 0.7, "penalty": 1.2, "window": 8},
    ],
)
def test_only_kept_tokens_are_drawn_where_the_running_sum_says(rng, engine, chunk, options):
    """The reference's distribution on the same logits: the token must be the one at which its running sum passes the
    same uniform number, give or take the rounding of fp32 sums (1e-5 of the total)."""
    options = {"temperature": 1.0, "min_p": 0.0, "top_p": 1.0, "top_k": 0, "penalty": 1.0, "window": 0, **options}
    logits = (rng.normal(size=333) * 3).astype(np.float32)
    logits[rng.integers(0, 333, 30)] = logits[11]  # ties
    history = rng.integers(0, 333, 12)
    recent = history[12 - options["window"] :]
    given = {k: v for k, v in options.items() if k != "window"}
    probabilities = sampling.sampling_reference(logits, recent, **given)
    running = np.concatenate([[0], np.cumsum(probabilities)])
    for seed in range(4 if engine == "native" else 1):
        token, _, _ = sample(engine, logits, position=11, history=history, seed=seed, CHUNK=chunk, **options)
        uniform = philox_uniform(seed, 12)
        assert probabilities[token] > 0
        assert running[token] - 1e-5 <= uniform <= running[token + 1] + 1e-5


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 0.7, "top_k": 5000}])
def test_the_devices_own_blocks(rng, options, device_name):
    """More tiles than one on every device; running sums to 1e-4, as fp32 sums of 40,000 weights are."""
    logits = rng.normal(size=40_001).astype(np.float32)
    found = sampling.blocks(device_name, len(logits))
    shape = {name.replace("_warps", "num_warps"): value for name, value in found.items()}
    token, _, _ = sample("native", logits, position=11, seed=3, **options, **shape)
    if options["temperature"] == 0:
        assert token == logits.argmax()
        return
    given = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "penalty": 1.0, **options}
    probabilities = sampling.sampling_reference(logits, np.zeros(0, np.int64), **given)
    running = np.concatenate([[0], np.cumsum(probabilities)])
    assert probabilities[token] > 0
    assert running[token] - 1e-4 <= philox_uniform(3, 12) <= running[token + 1] + 1e-4


def philox_uniform(seed: int, counter: int) -> float:
    """Philox 4x32-10 of (seed, counter), first word, as a float in [0, 1): in Python integers."""
    mask = 0xFFFFFFFF
    x = [counter & mask, 0, 0, 0]
    keys = [seed & mask, seed >> 32 & mask]
    for _ in range(10):
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(b >> 32) ^ x[1] ^ keys[0], b & mask, (a >> 32) ^ x[3] ^ keys[1], a & mask]
        keys = [(keys[0] + 0x9E3779B9) & mask, (keys[1] + 0xBB67AE85) & mask]
    word = x[0] - (1 << 32) if x[0] >> 31 else x[0]
    return (-word - 1 if word < 0 else word) * 4.6566127342e-10


def test_ties_at_rank_k_are_all_kept():
    logits = np.array([0, 3, 1, 3, 3, -2], np.float32)
    found = {sample("native", logits, temperature=1.0, top_k=2, position=i, seed=3)[0] for i in range(25)}
    assert found == {1, 3, 4}  # each is missed with probability (2 / 3) ** 25 = 4e-5, for this seed not


def test_a_seed_repeats_and_another_differs(rng):
    logits = rng.normal(size=1000).astype(np.float32)
    draws = [[sample("native", logits, temperature=1.5, position=i, seed=s)[0] for i in range(8)] for s in (5, 5, 6)]
    assert draws[0] == draws[1] and draws[0] != draws[2] and len(set(draws[0])) > 1
