#!/usr/bin/env python
"""Nitinol on an NVIDIA GPU: beside official Triton, beside PyTorch's transformers, and beside what the GPU can do.

    python benchmarks/nvidia.py [--quick] [--json FILE] [--fill docs/performance.md] [kernels] [matmul]
                                [attention] [limits] [upload] [decode] [prefill]

kernels, matmul, attention: the text of triton_kernels.py through both compilers, on the same tensors. Each side is one
CUDA graph of many launches that go round among several sets of tensors, together larger than the L2 cache; events
before and after it give the time. Both take turns; medians of the rounds. Both have the same list of block sizes, warps
and stages to choose from, and the better choice of each is shown. First every result is compared with float64.

limits: reading by a tile kernel, PyTorch's matrix product (cuBLAS), the link from pinned memory. upload: a model's file
to the GPU as in a new process, mapped anew, with all that is allocated for it; and the whole of `load`. decode: a
random model of Llama 3 8B's shape, a token at a time with sampling, against the time that reading its weights takes.
prefill: a prompt of 2048 tokens in bf16, and the same in transformers. The model's files take 30 GB, in --models FOLDER
(default: memory, /dev/shm).

Needs torch with its Triton, and nitinol[cuda]; for prefill transformers. Takes some five minutes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from common import NOT_MEASURED, ROOT, command, machine, parser, percent, table, write_json
from run import fill

PARTS = ("kernels", "matmul", "attention", "limits", "upload", "decode", "prefill")
SETS_BYTES = 256 << 20  # of the sets of tensors together, at least: four times the L2 cache of an H200
GRAPH_SECONDS = 4e-3  # that one graph should take: its start is then less than a hundredth
ROUNDS = 9
FORMATS = {"BF16": 0.75, "Q8_0": 0.70, "Q4_K": 0.55}  # and what is aimed at, of the read bandwidth


@dataclass
class Case:
    """One kernel at one size. `make` gives a set of tensors, the last of which is the output; `reference` the output in
    float64; `choices`: constants, warps, stages."""

    name: str
    kernel: str
    make: Callable[[], list[Any]]
    scalars: Sequence[Any]
    grid: Callable[[dict[str, int]], tuple[int, ...]]
    reference: Callable[..., Any]
    choices: list[tuple[dict[str, int], int, int]]
    tolerance: float  # of the largest error, relative to the largest value
    nbytes: int = 0
    operations: int = 0
    torch: Callable[..., Any] | None = None  # PyTorch's own way, of the inputs


@dataclass
class Result:
    name: str
    seconds: dict[str, list[float]] = field(default_factory=dict)  # of a launch, by side, a number a round
    choice: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0
    operations: int = 0
    problem: str = ""

    def median(self, side: str) -> float | None:
        return statistics.median(self.seconds[side]) if self.seconds.get(side) else None


# ------------------------------------------------------------------------------------------------------------- cases


def row_cases(quick: bool) -> list[Case]:
    import torch

    rows, n = (64, 1 << 16) if quick else (8192, 1 << 26)
    vocab, heads, tokens = (4000, 4, 64) if quick else (128256, 32, 8192)
    bf16, f32 = torch.bfloat16, torch.float32
    functional = torch.nn.functional
    blocks = [({"BLOCK": size}, warps, 0) for size, warps in ((1024, 4), (2048, 4), (4096, 8))]
    whole = [({"BLOCK": 4096}, warps, 0) for warps in (4, 8, 16)]

    def random(*shape: int, dtype: Any = f32) -> Any:
        return torch.randn(shape, device="cuda", dtype=dtype)

    def elementwise(c: dict[str, int]) -> tuple[int]:
        return (-(-n // c["BLOCK"]),)

    def turned(x: Any, cos: Any, sin: Any) -> Any:
        a, b = x.double().chunk(2, -1)
        cos, sin = cos.double()[:, None], sin.double()[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    wide = 4096
    return [
        Case(f"vector add, {n >> 20} Mi fp32", "add", lambda: [random(n), random(n), random(n)], (n,), elementwise,
             lambda x, y: x.double() + y.double(), blocks, 1e-6, 12 * n),
        Case(f"softmax, {rows} × {wide} fp32", "softmax", lambda: [random(rows, wide), random(rows, wide)], (wide,),
             lambda c: (rows,), lambda x: torch.softmax(x.double(), -1), whole, 1e-5, 8 * rows * wide),
        Case(f"RMSNorm, {rows} × {wide} bf16", "rms_norm",
             lambda: [random(rows, wide, dtype=bf16), random(wide, dtype=bf16), random(rows, wide, dtype=bf16)],
             (wide, 1e-5), lambda c: (rows,), lambda x, w: functional.rms_norm(x.double(), (wide,), w.double(), 1e-5),
             whole, 4e-3, 4 * rows * wide),
        Case(f"layer norm, {rows} × {wide} bf16", "layer_norm",
             lambda: [random(rows, wide, dtype=bf16), random(wide, dtype=bf16), random(wide, dtype=bf16),
                      random(rows, wide, dtype=bf16)], (wide, 1e-5), lambda c: (rows,),
             lambda x, w, b: functional.layer_norm(x.double(), (wide,), w.double(), b.double(), 1e-5), whole, 4e-3,
             4 * rows * wide),
        Case(f"cross entropy, {rows // 4} × {vocab} bf16", "cross_entropy",
             lambda: [random(rows // 4, vocab, dtype=bf16), torch.randint(vocab, (rows // 4,), device="cuda"),
                      random(rows // 4)], (vocab,), lambda c: (rows // 4,),
             lambda x, target: functional.cross_entropy(x.double(), target, reduction="none"),
             [({"BLOCK": size}, warps, 0) for size, warps in ((4096, 8), (4096, 16), (8192, 16))], 1e-5,
             rows // 4 * vocab * 2),
        Case(f"SwiGLU, {n >> 20} Mi bf16", "swiglu", lambda: [random(n, dtype=bf16) for _ in range(3)], (n,),
             elementwise, lambda g, u: functional.silu(g.double()) * u.double(), blocks, 4e-3, 6 * n),
        Case(f"RoPE, {tokens} × {heads} × 128 bf16", "rope",
             lambda: [random(tokens, heads, 128, dtype=bf16), random(tokens, 64), random(tokens, 64),
                      random(tokens, heads, 128, dtype=bf16)], (heads,),
             lambda c: (tokens, -(-heads // c["BLOCK"])), turned,
             [({"HALF": 64, "BLOCK": block}, warps, 0) for block, warps in ((32, 4), (32, 8), (16, 4), (8, 4))], 4e-3,
             tokens * heads * 128 * 4 + tokens * 128 * 4),
    ]  # fmt: skip


def matmul_cases(quick: bool) -> list[Case]:
    import torch

    def case(size: int) -> Case:
        def make() -> list[Any]:
            return [torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(3)]

        return Case(f"matrix product bf16, {size}³", "matmul", make, (size, size, size),
                    lambda c: (-(-size // c["BLOCK_M"]) * -(-size // c["BLOCK_N"]),),
                    lambda a, b: a.double() @ b.double(), tiles, 4e-3, 6 * size**2, 2 * size**3, torch.matmul)

    tiles = [({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}, warps, stages) for m, n, k, warps, stages in
             ((128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 256, 64, 8, 3), (128, 128, 32, 4, 4))]
    return [case(size) for size in ((256,) if quick else (4096, 8192))]


def attention_cases(quick: bool) -> list[Case]:
    import torch

    def exact(q: Any, k: Any, v: Any) -> Any:
        """Of the first and the last head."""
        picked = [x[[0, -1]].double() for x in (q, k, v)]
        scores = picked[0] @ picked[1].mT * q.shape[-1] ** -0.5
        tokens = q.shape[1]
        unseen = torch.ones(tokens, tokens, dtype=torch.bool, device="cuda").triu_(1)
        return torch.softmax(scores.masked_fill_(unseen, -torch.inf), -1) @ picked[2]

    def case(tokens: int, d: int, heads: int) -> Case:
        def make() -> list[Any]:
            return [torch.randn(heads, tokens, d, device="cuda", dtype=torch.bfloat16) for _ in range(4)]

        return Case(f"causal attention bf16, head dim {d}, {tokens} tokens, {heads} heads", "attention", make,
                    (d**-0.5, tokens), lambda c: (tokens // c["BLOCK_M"], heads), exact,
                    [({"D": d, "BLOCK_M": m, "BLOCK_N": n}, warps, stages) for m, n, warps, stages in
                     ((128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3))], 8e-3,
                    8 * heads * tokens * d, 2 * heads * tokens * tokens * d,
                    lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None],
                                                                                    is_causal=True)[0])  # fmt: skip

    return [case(256, 64, 2)] if quick else [case(tokens, d, 65536 // tokens * 4) for d in (64, 128)
                                            for tokens in (4096, 16384)]  # fmt: skip


# --------------------------------------------------------------------------------------------------------- two sides


def load_kernels(package: str) -> ModuleType:
    """triton_kernels.py as a module that imports "triton", or "nitinol" in its place."""
    text = (Path(__file__).parent / "triton_kernels.py").read_text()
    if package != "triton":
        text = text.replace("import triton\nimport triton.", f"import {package} as triton\nimport {package}.")
    path = Path(tempfile.mkdtemp(prefix="nitinol-")) / f"{package}_kernels.py"  # kernels are read from their files
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Pointer:
    """A torch tensor on the GPU, as Nitinol's kernels see it."""

    def __init__(self, tensor: Any, buffer: Any) -> None:
        from nitinol.language.types import DTYPES

        short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
        name = str(tensor.dtype).removeprefix("torch.")
        self.buffer = buffer
        self.__nitinol_pointer__ = (tensor.data_ptr(), DTYPES[short.get(name, name)])


def nitinol_launch(device: Any, kernel: Any, case: Case, tensors: list[Any], choice: Any) -> tuple[Any, list[Any]]:
    """The executable for one choice, and its arguments."""
    from nitinol.compiler.driver import compile_kernel
    from nitinol.language.jit import specialise
    from nitinol.language.types import PointerType
    from nitinol.runtime.launch import encode

    constants, warps, stages = choice
    pointers = [Pointer(tensor, device.wrap(tensor)) for tensor in tensors]
    bound = kernel.bind([*pointers, *case.scalars], constants)
    signature, values = specialise(kernel, bound, warps, stages)
    arguments = [bound[name].buffer if isinstance(type, PointerType) else encode(value, type)
                 for value, (name, type, _) in zip(values, signature.parameters)]
    return compile_kernel(kernel, signature, (), "cuda"), arguments


def nitinol_graph(device: Any, kernel: Any, case: Case, sets: list[list[Any]], choice: Any, launches: int) -> Any:
    """A command list of so many launches, one after another."""
    commands = device.command_list()
    prepared = [nitinol_launch(device, kernel, case, tensors, choice) for tensors in sets]
    for number in range(launches):
        executable, arguments = prepared[number % len(sets)]
        one = prepared[0][1][0].address - arguments[0].address  # that all write one byte keeps them in order
        commands.launch(executable, case.grid(choice[0]), arguments, writes={0: (one, one + 1)})
    return commands


def compile_all(device: Any, kernel: Any, case: Case, tensors: list[Any]) -> None:
    """Compiles all choices side by side; what goes wrong is told when the choice's turn comes."""
    executables = []
    with contextlib.suppress(Exception):
        for choice in case.choices:
            executables.append(nitinol_launch(device, kernel, case, tensors, choice)[0])
        device.prepare(executables)


def torch_graph(launch: Callable[[int], Any], launches: int) -> Any:
    """A CUDA graph of PyTorch's, of launch(0), launch(1), ..."""
    import torch

    launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(launches):
            launch(number)
    return graph


def timer(device: Any, start: Callable[[], Any], stream: Any) -> Callable[[], float]:
    """Seconds that the GPU takes for what `start` enqueues on the stream."""
    from nitinol.runtime.cuda_driver import call

    first, last = device.event(), device.event()

    def run() -> float:
        call(device.cu.cuEventRecord, first, stream)
        start()
        call(device.cu.cuEventRecord, last, stream)
        call(device.cu.cuEventSynchronize, last)
        return call(device.cu.cuEventElapsedTime, first, last) * 1e-3

    return run


def check(case: Case, expected: Any, tensors: list[Any], who: str) -> str:
    """What is wrong with the output, "" if nothing; the output is poisoned for the next."""
    import torch

    out = tensors[-1].double() if case.kernel != "attention" else tensors[-1][[0, -1]].double()
    error = ((out - expected).abs().max() / expected.abs().max()).item()
    tensors[-1].fill_(torch.nan)
    return "" if error < case.tolerance else f"{who} is wrong by {error:.1e}"


def compare(device: Any, case: Case, official: ModuleType, ours: ModuleType, rounds: int) -> Result:
    """Checks and times both sides."""
    import torch

    torch.manual_seed(time.time_ns())
    result = Result(case.name, nbytes=case.nbytes, operations=case.operations)
    one = case.make()
    count = max(2, -(-SETS_BYTES // sum(t.nbytes for t in one)))
    sets = [one, *(case.make() for _ in range(count - 1))]
    expected = case.reference(*one[:-1])
    estimate = max(case.nbytes / 4e12, case.operations / 5e14, 2e-6)
    launches = count * max(1, round(GRAPH_SECONDS / estimate / count))
    stream = torch.cuda.current_stream().cuda_stream
    one[-1].fill_(torch.nan)

    def of_triton(choice: Any) -> Callable[[], float]:
        kernel, (constants, warps, stages) = getattr(official, case.kernel), choice
        more = {"num_warps": warps, **({"num_stages": stages} if stages else {})}

        def launch(number: int) -> None:
            kernel[case.grid(constants)](*sets[number % count], *case.scalars, **constants, **more)

        graph = torch_graph(launch, launches)
        return timer(device, graph.replay, stream)

    def of_nitinol(choice: Any) -> Callable[[], float]:
        commands = nitinol_graph(device, getattr(ours, case.kernel), case, sets, choice, launches)
        device.run(commands)
        return timer(device, lambda: device.submit(commands), device.stream.handle)

    compile_all(device, getattr(ours, case.kernel), case, one)
    sides: dict[str, Callable[[], float]] = {}
    for who, prepare in (("triton", of_triton), ("nitinol", of_nitinol)):
        best = float("inf")
        for choice in case.choices:
            try:
                run = prepare(choice)
            except Exception as error:
                if "lost" in str(error) or "illegal" in str(error):
                    raise SystemExit(f"{case.name}, {who}, {choice}: {error}") from None
                problem = f"{who} does not run with {choice}: {str(error).splitlines()[0]:.200}"
                print(f"{case.name}: {problem}", file=sys.stderr)
                result.problem = result.problem or problem
                continue
            torch.cuda.synchronize()
            if problem := check(case, expected, one, who):
                print(f"{case.name}: {problem} with {choice}", file=sys.stderr)
                result.problem = problem
                continue
            run()
            seconds = min(run() for _ in range(3))
            if seconds < best:
                best, sides[who] = seconds, run
                result.choice[who] = ", ".join([*(f"{n} {v}" for n, v in choice[0].items()), f"{choice[1]} warps",
                                                *([f"{choice[2]} stages"] if choice[2] else [])])  # fmt: skip
    if case.torch is not None:
        peer = case.torch
        graph = torch_graph(lambda number: peer(*sets[number % count][:-1]), launches)
        sides["torch"] = timer(device, graph.replay, stream)
    order = list(sides)
    result.seconds = {who: [] for who in order}
    for _ in range(rounds):
        for who in order:
            sides[who]()  # wakes the clocks
            result.seconds[who].append(sides[who]() / launches)
        order.append(order.pop(0))
    device.synchronize()
    return result


# ----------------------------------------------------------------------------------------------------------- limits


def limits(device: Any, quick: bool) -> dict[str, float]:
    """GB/s read by a tile kernel, TFLOP/s of cuBLAS on random bf16 matrices, GB/s from pinned memory to the GPU."""
    import torch

    from nitinol.runtime.bandwidth import measure_read_bandwidth

    size = 1024 if quick else 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    graph = torch_graph(lambda number: torch.matmul(a, b), 10)
    run = timer(device, graph.replay, torch.cuda.current_stream().cuda_stream)
    for _ in range(10):  # until the clocks are up
        run()
    seconds = statistics.median(run() for _ in range(7)) / 10
    return {"read_gb_s": measure_read_bandwidth(device), "matmul_tflop_s": 2 * size**3 / seconds / 1e12,
            "link_gb_s": link_bandwidth(device, 64 << 20 if quick else 1 << 30)}


def link_bandwidth(device: Any, nbytes: int) -> float:
    """GB/s of one copy of so many bytes from pinned memory, the median of seven."""
    from nitinol.runtime.cuda_driver import Pinned

    source, target = Pinned(device, nbytes), device.allocate(nbytes)
    run = timer(device, lambda: device.call(device.cu.cuMemcpyHtoDAsync, target.address, source.address, nbytes,
                                            device.stream.handle), device.stream.handle)  # fmt: skip
    run()
    seconds = statistics.median(run() for _ in range(7))
    target.free()
    return nbytes / seconds / 1e9


# ----------------------------------------------------------------------------------------------------------- models


def model_file(folder: Path, preset: str, format: str) -> Path:
    """A random model. To be quick, its matrices are one piece of 16 Mi random weights again and again."""
    sys.path.insert(0, str(ROOT / "tools"))
    import make_random_model as maker

    from nitinol.formats.blocks import FORMATS as LAYOUTS
    from nitinol.formats.gguf_writer import write_gguf

    path = folder / f"{preset}-{format}.gguf"
    if path.exists():
        return path
    print(f"making {path}", file=sys.stderr)
    shape, rng = maker.PRESETS[preset], np.random.default_rng(0)
    made: dict[str, np.ndarray] = {}

    def pieces(format: str, values: int) -> Callable[[], Any]:
        layout = LAYOUTS[format]
        if format not in made:
            made[format] = maker.random_blocks(rng, format, maker.PIECE_VALUES // layout.values)
        data = np.ascontiguousarray(made[format]).reshape(-1).view(np.uint8)
        nbytes = values // layout.values * layout.bytes
        return lambda: (data[:min(data.nbytes, nbytes - start)] for start in range(0, nbytes, data.nbytes))

    sources = [source._replace(data=pieces(source.format, source.shape[0] * source.shape[1]))
               if len(source.shape) == 2 else source for source in maker.tensors(shape, format, 0)]
    part = path.with_suffix(".part")
    write_gguf(part, maker.metadata(shape, format, path.stem), sources)
    part.rename(path)
    return path


def measure_upload(path: Path, rounds: int) -> dict[str, Any]:
    """Seconds that a file's bytes take to the GPU, and that all of `load` takes. Each upload is a process's first: by a
    device of its own, which has no staging buffers yet, from a new mapping into new memory."""
    import nitinol
    from nitinol.formats.gguf import open_gguf
    from nitinol.runtime.cuda import CudaDevice

    uploads, loads = [], []
    for _ in range(rounds):
        device, file = CudaDevice(), open_gguf(path)
        begun = time.perf_counter()
        buffers = [device.wrap(part) for part in file.parts]
        uploads.append(time.perf_counter() - begun)
        del buffers, device, file
        gc.collect()
        begun = time.perf_counter()
        model = nitinol.load(path, device="cuda")
        loads.append(time.perf_counter() - begun)
        del model
        gc.collect()
    return {"bytes": path.stat().st_size, "upload": uploads, "load": loads}


def measure_model(path: Path, prompt: int, gen: int, rounds: int) -> dict[str, Any]:
    """Seconds of a prefill and of a token with sampling; bytes of a token; transfers, waits and allocations."""
    import nitinol
    from nitinol.commands.bench import decode_bytes
    from nitinol.generate.options import Options

    begun = time.perf_counter()
    model = nitinol.load(path, device="cuda", context=prompt + 2 * gen + 8)
    loaded = time.perf_counter() - begun
    ids = np.random.default_rng().integers(256, model.config.vocab - 256, prompt).tolist()
    options = Options(temperature=0.7, seed=1)
    seconds: dict[str, list[float]] = {"prefill": [], "decode": []}
    counted: dict[str, float] = {}
    for number in range(rounds + 1):
        model.session.begin(None)
        model.session.cache.move(0)
        begun = time.perf_counter()
        model.session.prefill(ids, options)
        read = time.perf_counter()
        model.session.step()
        before = vars(model.device.counters).copy()
        started = time.perf_counter()
        for left in reversed(range(gen)):
            model.session.step(more=left > 0)
        ended = time.perf_counter()
        if number:  # the first round compiles
            seconds["prefill"].append(read - begun)
            seconds["decode"].append((ended - started) / gen)
            counted = {name: (value - before[name]) / gen for name, value in vars(model.device.counters).items()}
    return {"seconds": seconds, "bytes_per_token": decode_bytes(model, prompt + 1 + gen / 2), "prompt": prompt,
            "gen": gen, "file_bytes": path.stat().st_size, "load_s": loaded,
            "per_token": {name: counted[name] for name in ("submits", "waits", "dispatches", "allocations")}}


def measure_transformers(preset: str, prompt: int, gen: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """The same shape in PyTorch: prefill with the last token's logits, and greedy decoding, by kind of attention."""
    sys.path.insert(0, str(ROOT / "tools"))
    import make_random_model as maker
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = maker.PRESETS[preset]
    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.ffn, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        max_position_embeddings=shape.context, rms_norm_eps=shape.epsilon, rope_theta=shape.rope_base,
        tie_word_embeddings=shape.tied, dtype="bfloat16")  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cuda").eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02) if parameter.ndim == 2 else parameter.data.fill_(1)
    rotary = model.model.rotary_emb  # a buffer, which to_empty has left undefined
    frequency = shape.rope_base ** -(torch.arange(0, shape.head_dim, 2, device="cuda").float() / shape.head_dim)
    rotary.inv_freq.copy_(frequency)
    ids = torch.randint(shape.vocab, (1, prompt), device="cuda")
    found: dict[str, dict[str, list[float]]] = {}
    for kind in ("eager", "sdpa"):
        model.set_attn_implementation(kind)
        seconds: dict[str, list[float]] = {"prefill": [], "decode": []}
        with torch.inference_mode():
            for number in range(rounds + 1):
                torch.cuda.synchronize()
                begun = time.perf_counter()
                out = model(ids, use_cache=True, logits_to_keep=1)
                token = out.logits[:, -1:].argmax(-1)
                token.item()
                read = time.perf_counter()
                for _ in range(gen):
                    out = model(token, past_key_values=out.past_key_values, use_cache=True)
                    token = out.logits[:, -1:].argmax(-1)
                    token.item()
                if number:
                    seconds["prefill"].append(read - begun)
                    seconds["decode"].append((time.perf_counter() - read) / gen)
        found[kind] = seconds
    return found


# ----------------------------------------------------------------------------------------------------------- tables


def kernel_table(results: list[Result], known: dict[str, float]) -> str:
    rows, ratios = [], []
    for result in results:
        ours, theirs, peer = (result.median(side) for side in ("nitinol", "triton", "torch"))
        if ours and theirs:
            ratios.append(theirs / ours)
        if result.operations > 200 * result.nbytes:
            best, rate = known.get("matmul_tflop_s", 0) * 1e12, result.operations
        else:
            best, rate = known.get("read_gb_s", 0) * 1e9, result.nbytes
        rows.append([
            result.name, *(f"{s * 1e6:.1f}" if s else NOT_MEASURED for s in (ours, theirs)),
            f"{theirs / ours:.2f}×" if ours and theirs else NOT_MEASURED,
            *(percent(rate, s * best) if s and best else NOT_MEASURED for s in (ours, theirs, peer)),
        ])  # fmt: skip
    head = ["case", "Nitinol µs", "Triton µs", "Triton / Nitinol", "Nitinol of the limit", "Triton of it",
            "PyTorch of it"]  # fmt: skip
    lines = [table(head, rows), ""]
    if ratios:
        mean = statistics.geometric_mean(ratios)
        lines.append(f"Geometric mean {mean:.3f}×, smallest {min(ratios):.2f}×. The limit: reading, or cuBLAS's matrix "
                     "product, as measured below.")  # fmt: skip
    lines += [f"{result.name}: {result.problem}." for result in results if result.problem]
    lines += ["", *(f"{result.name}: {side} with {choice}." for result in results
                    for side, choice in result.choice.items())]  # fmt: skip
    return "\n".join(lines)


def model_table(document: dict[str, Any], known: dict[str, float]) -> str:
    rows = []
    best = known.get("read_gb_s", 0) * 1e9
    peers = document.get("transformers", {})
    for format, found in document["models"].items():
        seconds = {what: statistics.median(times) for what, times in found["seconds"].items()}
        counted = found["per_token"]
        rows.append([f"{format}, Nitinol", f"{1 / seconds['decode']:.1f}",
                     percent(found["bytes_per_token"], seconds["decode"] * best) if best else NOT_MEASURED,
                     f"{found['prompt'] / seconds['prefill']:.0f}",
                     f"{counted['submits']:g}, {counted['waits']:g}, {counted['allocations']:g}"])  # fmt: skip
    for kind, found in peers.items():
        seconds = {what: statistics.median(times) for what, times in found.items()}
        read = document["models"].get("BF16", {}).get("bytes_per_token")
        rows.append([f"BF16, transformers {kind}", f"{1 / seconds['decode']:.1f}",
                     percent(read, seconds["decode"] * best) if best and read else NOT_MEASURED,
                     f"{document['prompt'] / seconds['prefill']:.0f}", NOT_MEASURED])  # fmt: skip
    head = ["model", "decode tok/s", "of the read bandwidth", f"prefill of {document['prompt']} tok/s",
            "submits, waits, allocations a token"]  # fmt: skip
    return table(head, rows)


def upload_table(models: dict[str, Any], known: dict[str, float]) -> str:
    link, rows = known["link_gb_s"], []
    for format, found in models.items():
        seconds, loaded = statistics.median(found["upload"]), statistics.median(found["load"])
        rate = found["bytes"] / seconds / 1e9
        rows.append([format, f"{found['bytes'] / 1e9:.2f}", f"{seconds:.3f}", f"{rate:.1f}", f"{link:.1f}",
                     percent(rate, link), f"{loaded:.3f}"])  # fmt: skip
    head = ["model", "GB", "upload s", "GB/s", "link GB/s", "of the link", "all of `load` s"]
    return table(head, rows)


def main() -> None:
    options = parser("Nitinol on an NVIDIA GPU beside Triton, PyTorch and the hardware.", threads=False)
    options.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    options.add_argument("--quick", action="store_true", help="tiny sizes: shows that all of it runs")
    options.add_argument("--only", metavar="KERNEL", help="of the kernels, this one")
    options.add_argument("--formats", nargs="+", default=list(FORMATS), help=f"default: {' '.join(FORMATS)}")
    options.add_argument("--models", type=Path, help="the models' folder (default: /dev/shm, or a temporary one)")
    options.add_argument("--fill", metavar="PAGE", type=Path, help="put the tables into it: docs/performance.md")
    given = options.parse_args()
    if unknown := [part for part in given.parts if part not in PARTS]:
        options.error(f"there is no part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    parts = given.parts or PARTS
    from nitinol.runtime import open_device
    from nitinol.runtime.device import DeviceError

    try:
        device = open_device("cuda")
    except DeviceError as error:
        raise SystemExit(f"no figures for NVIDIA GPUs: {error}") from None
    import torch

    title = f"{device.description}; torch {torch.__version__}, command: `{command()}`"
    print(title, file=sys.stderr, flush=True)
    document: dict[str, Any] = {"gpu": device.description, "machine": machine()}
    tables: list[str] = []

    def say(text: str) -> None:
        tables.append(text)
        print(text + "\n", flush=True)

    known = document["limits"] = limits(device, given.quick)
    say(f"{title}. Limits: reading {known['read_gb_s']:.0f} GB/s, bf16 matrix product "
        f"{known['matmul_tflop_s']:.0f} TFLOP/s, link {known['link_gb_s']:.1f} GB/s.")
    official, ours = load_kernels("triton"), load_kernels("nitinol")
    for part, cases in (("kernels", row_cases), ("matmul", matmul_cases), ("attention", attention_cases)):
        if part in parts:
            results = []
            for case in cases(given.quick):
                if given.only in (None, case.kernel):
                    results.append(compare(device, case, official, ours, 2 if given.quick else ROUNDS))
                    print(f"{case.name} is done", file=sys.stderr, flush=True)
                torch.cuda.empty_cache()
            document[part] = [vars(result) for result in results]
            say(kernel_table(results, known))
    if {"upload", "decode", "prefill"}.intersection(parts):
        preset, prompt = ("tiny", 64) if given.quick else ("llama-3-8b", 2048)
        shared = Path("/dev/shm")
        folder = given.models or (shared if shared.is_dir() else Path(tempfile.mkdtemp(prefix="nitinol-")))
        found = document["language"] = {"prompt": prompt, "upload": {}, "models": {}, "transformers": {}}
        if "prefill" in parts and importlib.util.find_spec("transformers"):
            found["transformers"] = measure_transformers(preset, prompt, 4 if given.quick else 16, 3)
            torch.cuda.empty_cache()
        for format in given.formats if "decode" in parts else ["BF16"]:
            path = model_file(folder, preset, format)
            try:
                if "upload" in parts:
                    found["upload"][format] = measure_upload(path, 3)
                if "decode" in parts or "prefill" in parts:
                    found["models"][format] = measure_model(path, prompt, 4 if given.quick else 64, 3)
            except DeviceError as error:
                print(f"{format}: {error}", file=sys.stderr, flush=True)
            finally:
                if given.models is None:
                    path.unlink()
            if not device.usable:
                break
        if found["upload"]:
            say(upload_table(found["upload"], known))
        if found["models"] or found["transformers"]:
            say(model_table(found, known))
    if given.fill is not None:
        fill(given.fill, "cuda", "\n\n".join(tables))
    write_json(given.json, document)


if __name__ == "__main__":
    main()
