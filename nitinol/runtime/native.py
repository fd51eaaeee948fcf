"""Writing native functions by hand: a small layer over llvmlite for the runtime's own code (not for tile kernels)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

I1, I32, I64, VOID = ir.IntType(1), ir.IntType(32), ir.IntType(64), ir.VoidType()
Value = Any  # ir.Value; llvmlite has no stubs
PREFIX = "nitinol_"  # of our functions' symbols; `wait` and `stop` could be the C library's

if hasattr(os, "register_at_fork"):
    # LLVM is used by one thread at a time, under llvmlite's lock. A child forked in the middle of another thread's use
    # would wait for that lock for ever, and find LLVM's own data half changed: so forking waits for the use to end.
    _llvm_in_use = llvm.ffi.lib._lock
    os.register_at_fork(before=_llvm_in_use.__enter__, after_in_parent=_llvm_in_use.__exit__,
                        after_in_child=_llvm_in_use.__exit__)  # fmt: skip


def constant(value: int) -> Value:
    return ir.Constant(I64, value)


class Body:
    """Writes one function in which everything is an i64: numbers, addresses, variables, words of memory."""

    def __init__(self, module: ir.Module, name: str, parameters: str = "", result: Any = VOID):
        names = parameters.split()
        self.module = module
        self.function = ir.Function(module, ir.FunctionType(result, [I64] * len(names)), PREFIX + name)
        self.parameters = list(self.function.args)
        self.b = ir.IRBuilder(self.function.append_basic_block("entry"))
        for argument, argument_name in zip(self.parameters, names):
            argument.name = argument_name

    def value(self, x: int | Value) -> Value:
        return constant(x) if isinstance(x, int) else x

    def word(self, base: Value, index: int) -> Value:
        """The pointer to word `index` behind the address `base`."""
        return self.b.inttoptr(self.b.add(base, constant(8 * index)), I64.as_pointer())

    def get(self, base: Value, index: int) -> Value:
        return self.b.load_atomic(self.word(base, index), "seq_cst", 8, typ=I64)

    def put(self, base: Value, index: int, x: int | Value) -> None:
        self.b.store_atomic(self.value(x), self.word(base, index), "seq_cst", 8)

    def increment(self, base: Value, index: int, x: int | Value) -> Value:
        """Add atomically and return the sum."""
        return self.b.add(self.b.atomic_rmw("add", self.word(base, index), self.value(x), "seq_cst"), self.value(x))

    def swap(self, base: Value, index: int, old: int | Value, new: int | Value) -> Value:
        """Compare and swap; whether it happened."""
        pair = self.b.cmpxchg(self.word(base, index), self.value(old), self.value(new), "seq_cst", "seq_cst")
        return self.b.extract_value(pair, 1)

    def variable(self, x: int | Value) -> Value:
        with self.b.goto_entry_block():
            place = self.b.alloca(I64)
        self.b.store(self.value(x), place)
        return place

    def read(self, variable: Value) -> Value:
        return self.b.load(variable, typ=I64)

    def step(self, variable: Value, by: int = 1) -> Value:
        """Add to a variable and return the sum."""
        total = self.b.add(self.read(variable), constant(by))
        self.b.store(total, variable)
        return total

    def test(self, x: Value, operator: str, y: int | Value) -> Value:
        return self.b.icmp_signed(operator, x, self.value(y))

    def call(self, name: str, *arguments: int | Value, result: Any = VOID) -> Value:
        """Call a function of this module or of the C library; addresses go as integers of 8 bytes, as do counts."""
        function = self.module.globals.get(PREFIX + name) or self.module.globals.get(name)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(result, [I64] * len(arguments)), name)
        return self.b.call(function, [self.value(argument) for argument in arguments])

    def at(self, base: Value, index: int) -> Value:
        return self.b.add(base, constant(8 * index))

    @contextmanager
    def loop(self) -> Iterator[tuple[ir.Block, ir.Block]]:
        """An endless loop; yields (head, end) for `jump_if`."""
        head, end = self.function.append_basic_block(), self.function.append_basic_block()
        self.b.branch(head)
        self.b.position_at_end(head)
        yield head, end
        if not self.b.block.is_terminated:
            self.b.branch(head)
        self.b.position_at_end(end)

    def jump_if(self, condition: Value, target: ir.Block) -> None:
        after = self.function.append_basic_block()
        self.b.cbranch(condition, target, after)
        self.b.position_at_end(after)

    def when(self, condition: Value) -> Any:
        return self.b.if_then(condition)

    def finish(self, *results: Value) -> None:
        if results:
            self.b.ret(results[0])
        else:
            self.b.ret_void()


def target_machine(level: int) -> Any:
    """The host's LLVM target machine for optimisation level 0 to 3; an engine made with it owns it."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(),
                                        opt=level, reloc="pic", codemodel="jitdefault", jit=True)


def compile_module(module: ir.Module, level: int = 0) -> Any:
    """Machine code for the host: an execution engine, whose `get_function_address(name)` is valid while it lives.

    Level 0 is right for the executor: it takes 20 ms instead of 110 and makes a barrier 10 ns slower (160 ns).
    """
    machine = target_machine(level)
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    if level:
        passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(level))
        passes.getModulePassManager().run(parsed, passes)
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    return engine
