"""Optimisers that update parameters in place, as a part of a compiled step.

    optimiser = AdamW(parameters, 1e-3)

    @nitinol.compile
    def step(tokens):
        loss, gradients = nitinol.value_and_grad(model)(optimiser.parameters, tokens)
        optimiser.update(gradients)
        return loss
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import nitinol.language as tl
from nitinol.graph.array import Array
from nitinol.graph.conversion import array
from nitinol.graph.evaluation import evaluate
from nitinol.graph.views import row_major
from nitinol.language.types import DType
from nitinol.ops.adamw import ADAMW, SQUARES, AdamWState, adamw_state, decay_table, flat_offsets
from nitinol.ops.creation import as_array, zeros
from nitinol.ops.indexing import concatenate
from nitinol.transform.trees import flatten, rebuild


class AdamW:
    """AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019), one launch for all parameters.

    parameters: an Array, or tuples, lists and dicts of Arrays, float32, float16 or bfloat16. They are copied into one
    flat buffer (one for each type); `parameters` of the optimiser, of the same structure, are the views of it that the
    model must use from then on. Half types have float32 copies, from which they are rounded after each step.
    learning_rate: in device memory; setting it changes the next step, also of a compiled function. weight_decay: a
    number, or numbers in the structure of the parameters. eight_bit: moments in bytes, with a scale for each 256
    values (Dettmers et al., "8-bit optimizers via block-wise quantization", 2022). clip_norm: gradients are scaled so
    that their norm, over all parameters, is at most this.

    Raises TypeError for parameters of other types, and ValueError for betas and structures that do not fit.
    """

    def __init__(
        self, parameters: Any, learning_rate: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8, weight_decay: Any = 0.01, eight_bit: bool = False, clip_norm: float | None = None,
    ) -> None:  # fmt: skip
        leaves, self._structure = flatten(parameters)
        leaves = [as_array(leaf) for leaf in leaves]
        if not leaves:
            raise ValueError("AdamW: there are no parameters; expected Arrays, or tuples, lists and dicts of them")
        if not all(0 < beta < 1 for beta in betas):
            raise ValueError(f"AdamW: betas are {betas}, expected two numbers between 0 and 1")
        decays, structure = flatten(weight_decay)
        if structure == self._structure:
            pass
        elif isinstance(weight_decay, (int, float)):
            decays = [weight_decay] * len(leaves)
        else:
            raise ValueError("AdamW: weight_decay is neither a number nor numbers in the structure of the parameters")
        self.betas, self.epsilon, self.clip_norm = (float(betas[0]), float(betas[1])), float(epsilon), clip_norm
        self._rate = array(np.array([learning_rate], np.float32)).evaluate()
        types: dict[DType, list[int]] = {}
        for place, leaf in enumerate(leaves):
            types.setdefault(leaf.dtype, []).append(place)
        self._groups = [
            _Group([leaves[i] for i in places], [decays[i] for i in places], dtype, places, eight_bit)
            for dtype, places in types.items()
        ]
        views = {i: view for group in self._groups for i, view in zip(group.places, group.parameters)}
        self.parameters = rebuild(self._structure, [views[i] for i in range(len(leaves))])

    @property
    def learning_rate(self) -> float:
        return float(self._rate.item())

    @learning_rate.setter
    def learning_rate(self, rate: float | Array) -> None:
        self._rate.assign(rate)

    @property
    def steps(self) -> int:
        """How many steps have been taken."""
        return int(self._groups[0].state.steps[0].item())

    @property
    def state(self) -> list[tuple[Array, AdamWState]]:
        """For each type of parameters all of them, flat, and their state: what a checkpoint holds."""
        return [(group.flat, group.state) for group in self._groups]

    def update(self, gradients: Any) -> Array | None:
        """One step in place by gradients in the structure of the parameters; their norm [1] before they are clipped, or
        None where they are not. ValueError for another structure and other shapes."""
        leaves, structure = flatten(gradients)
        if structure != self._structure:
            raise ValueError("AdamW: the gradients have another structure than the parameters")
        for gradient, parameter in zip(leaves, flatten(self.parameters)[0]):
            if gradient.shape != parameter.shape:
                raise ValueError(
                    f"AdamW: a gradient has shape {gradient.shape}, but its parameter {parameter.shape}; expected the "
                    "same"
                )
        for group in self._groups:
            for slot, place in zip(group.slots, group.places):
                slot.assign(leaves[place])
        squares = None
        if self.clip_norm is not None:
            parts = [SQUARES(group.gradients) for group in self._groups]
            squares = parts[0] if len(parts) == 1 else concatenate(parts)
        limit = None if self.clip_norm is None else float(self.clip_norm)
        norm = None
        for group in self._groups:
            norm = ADAMW(
                group.flat, group.gradients, *group.state, self._rate, group.decay, squares, betas=self.betas,
                epsilon=self.epsilon, limit=limit,
            )  # fmt: skip
        return norm


class _Group:
    """The parameters of one type: places among all leaves; views of `flat`, in which each starts on a new block;
    slots, the same views of their gradients."""

    def __init__(
        self, leaves: list[Array], decays: list[float], dtype: DType, places: list[int], eight_bit: bool
    ) -> None:
        if dtype not in (tl.float32, tl.float16, tl.bfloat16):
            raise TypeError(
                f"AdamW: a parameter of shape {leaves[0].shape} is of type {dtype}, expected float32, float16 or "
                "bfloat16; convert it with astype, or leave it out"
            )
        for leaf in leaves:
            if not leaf.size:
                raise ValueError(f"AdamW: a parameter has shape {leaf.shape} and no values; leave it out")
        self.places = places
        shapes = [leaf.shape for leaf in leaves]
        offsets, size = flat_offsets(shapes)
        self.flat, self.gradients = zeros(size, dtype).copy(), zeros(size, dtype).copy()
        self.parameters = _parts(self.flat, shapes, offsets)
        self.slots = _parts(self.gradients, shapes, offsets)
        for view, leaf in zip(self.parameters, leaves):
            view.assign(leaf)
        master = self.flat.astype(tl.float32).copy() if dtype != tl.float32 else None
        evaluate(self.flat, self.gradients, *([] if master is None else [master]))
        self.state = adamw_state(size, eight_bit, master)
        self.decay = decay_table(shapes, decays)


def _parts(flat: Array, shapes: list[tuple[int, ...]], offsets: list[int]) -> list[Array]:
    """Views of a flat buffer."""
    assert all(offset + math.prod(shape) <= flat.size for offset, shape in zip(offsets, shapes))
    return [flat.looking(shape, row_major(shape), offset) for offset, shape in zip(offsets, shapes)]
