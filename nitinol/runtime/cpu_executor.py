"""The native executor of the CPU device, written as LLVM IR: workers run command lists with no Python in between.

How a run works. A submission gets the next sequence number and a place in the ring. When its predecessor is done,
whoever notices first (`advance`) resets the list's counters and publishes the number as CURRENT. Workers walk the
entries in order. An entry's programs are cut into units; a worker takes the next few (a share of what is left, so
that first pieces are large and last ones small) by compare-and-swap on the entry's TICKET, and when an entry has none
left it adds what it did to the list's COMPLETED and goes on. An entry with a barrier may begin once COMPLETED has
reached the number of units before it, so nobody waits for a worker that holds no work: a thread that the system has
put to sleep delays nothing but its own piece. Whoever completes the last unit marks the run DONE and starts the next.
What kernels reported in the list's STATUS is moved before to the submission's place in FAILED, and no submission gets a
place with a report that Python has not taken: so a report belongs to one submission, and none is lost.

TICKET and COMPLETED carry the sequence number above 24 bits of count, so a worker that comes late, even into a later
run of the same list, can neither take a piece nor pass a barrier by mistake. The list's memory must outlive such a
worker: it notes the list in its INSIDE word before checking that the run is not done, and the owner frees the
memory only when the run is done and no INSIDE word names it.

Workers 0 to T-1 each have a slot (scratch and INSIDE word). A thread that calls `run` or `wait` works itself, in
slot 0, if that is free; otherwise pool thread 0, the stand-in, has it. Idle threads spin for a moment and then sleep
on a condition variable. Every shared word is accessed sequentially consistent: these are a few accesses a piece.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from collections.abc import Callable
from typing import Any

from llvmlite import ir

from nitinol.runtime.native import I1, I32, I64, PREFIX, VOID, Body, Value, compile_module, constant

# Layouts in words of 8 bytes; words that different threads write are 64 bytes apart.
CURRENT, STOP, DONE, SUBMITTED, STARTED, SLEEPERS, WAITERS, FAILURES = 0, 1, 8, 16, 17, 24, 25, 32
MUTEX, WORK, STAND_IN, FINISHED = 40, 56, 72, 88  # pthread objects: at most 64 bytes anywhere, 128 reserved
RING, RING_SIZE = 104, 64
FAILED = 168  # what kernels of a submission reported, by its place in the ring; FAILURES counts the reports
WORKERS, WORKER_WORDS, OWNED, INSIDE = 232, 8, 0, 1

LIST_WORDS = 16
LIST_ENTRIES, LIST_COUNT, LIST_UNITS, LIST_PARALLEL, LIST_PROFILE, LIST_SCRATCH, LIST_STRIDE, LIST_SHARE = range(8)
# STATUS: where the kernels of the list report an error, 0 between runs; SEQUENCE: of the latest submission.
LIST_COMPLETED, LIST_STATUS, LIST_SEQUENCE = 8, 9, 10

ENTRY_WORDS = 16
FUNCTION, ARGUMENTS, GRID, PROGRAMS, UNIT, UNITS, REQUIRED = 0, 1, 2, 4, 5, 6, 7  # GRID: int32[3] in two words
TICKET, COMPLETE, START, END = 8, 9, 10, 11

COUNT_BITS = 24  # of TICKET and COMPLETED; the other 40 hold sequence numbers for weeks of continuous submitting
NEVER = 2**63 - 1  # a deadline
COPY_CHUNK = 1 << 18  # bytes that one program of the copy and fill kernels moves

# Waiting: pause (about 25 ns each) for some 25 us, then let others run, then sleep, so that more threads than
# cores slow things down but do not bring them to a halt.
SPINS, YIELDS, NAP_US = 1000, 1500, 50
MONOTONIC = 6 if sys.platform == "darwin" else 1


def build() -> ir.Module:
    """The executor as a module."""
    module = ir.Module("nitinol_cpu_executor")
    _clock(module)
    _relax(module)
    _wake(module)
    _advance(module)
    _walk(module)
    _worker(module)
    _submit(module)
    _wait(module)
    _help(module)
    _small(module)
    _copy_and_fill(module)
    return module


def _clock(module: ir.Module) -> None:
    for name, clock in (("now", MONOTONIC), ("wall_clock", 0)):
        f = Body(module, name, "", I64)
        with f.b.goto_entry_block():
            spec = f.b.ptrtoint(f.b.alloca(ir.ArrayType(I64, 2)), I64)
        f.call("clock_gettime", clock, spec)
        f.finish(f.b.add(f.b.mul(f.get(spec, 0), constant(10**9)), f.get(spec, 1)))


def _relax(module: ir.Module) -> None:
    """relax(spins): wait a little, more politely the longer it has taken."""
    f = Body(module, "relax", "spins")
    (spins,) = f.parameters
    with f.b.if_else(f.test(spins, "<", SPINS)) as (early, late):
        with early:
            machine = platform.machine().lower()
            if machine in ("x86_64", "amd64"):
                pause = ir.Function(module, ir.FunctionType(VOID, []), "llvm.x86.sse2.pause")
                f.b.call(pause, [])
            elif machine in ("arm64", "aarch64"):
                hint = ir.Function(module, ir.FunctionType(VOID, [I32]), "llvm.aarch64.isb")
                f.b.call(hint, [ir.Constant(I32, 15)])
        with late, f.b.if_else(f.test(spins, "<", YIELDS)) as (soon, later):
            with soon:
                f.call("sched_yield")
            with later:
                f.call("usleep", NAP_US)
    f.finish()


def _wake(module: ir.Module) -> None:
    """wake(state, parallel): wake sleeping workers; only one thread if the list has nothing to share out."""
    f = Body(module, "wake", "state parallel")
    state, parallel = f.parameters
    with f.when(f.test(f.b.add(f.get(state, SLEEPERS), f.get(state, WAITERS)), ">", 0)):
        f.call("pthread_mutex_lock", f.at(state, MUTEX))  # a worker about to sleep holds it until it sleeps
        f.call("pthread_mutex_unlock", f.at(state, MUTEX))
        with f.when(f.test(parallel, "!=", 0)):
            f.call("pthread_cond_broadcast", f.at(state, WORK))
        with f.when(f.test(f.get(state, WORKERS + OWNED), "==", 0)):
            f.call("pthread_cond_broadcast", f.at(state, STAND_IN))
        with f.when(f.test(f.get(state, WAITERS), ">", 0)):
            f.call("pthread_cond_broadcast", f.at(state, FINISHED))  # a waiter in slot 0 has work again
    f.finish()

    f = Body(module, "mark_done", "state sequence")
    state, sequence = f.parameters
    f.put(state, DONE, sequence)
    with f.when(f.test(f.get(state, WAITERS), ">", 0)):
        f.call("pthread_mutex_lock", f.at(state, MUTEX))
        f.call("pthread_mutex_unlock", f.at(state, MUTEX))
        f.call("pthread_cond_broadcast", f.at(state, FINISHED))
    f.finish()


def _advance(module: ir.Module) -> None:
    """advance(state): if there is a next submission and its predecessor is done, start it (exactly one caller)."""
    f = Body(module, "advance", "state")
    (state,) = f.parameters
    with f.loop() as (head, end):
        started = f.get(state, STARTED)
        f.jump_if(f.test(f.get(state, SUBMITTED), "<=", started), end)
        f.jump_if(f.test(f.get(state, DONE), "<", started), end)
        sequence = f.b.add(started, constant(1))
        f.jump_if(f.b.not_(f.swap(state, STARTED, started, sequence)), head)
        commands = _ring(f, state, sequence)
        tag = f.b.shl(sequence, constant(COUNT_BITS))
        entry = f.variable(f.get(commands, LIST_ENTRIES))
        left = f.variable(f.get(commands, LIST_COUNT))
        with f.loop() as (_, finished):
            f.jump_if(f.test(f.read(left), "<=", 0), finished)
            f.put(f.read(entry), TICKET, tag)
            f.put(f.read(entry), COMPLETE, 0)
            f.step(entry, 8 * ENTRY_WORDS)
            f.step(left, -1)
        f.put(commands, LIST_COMPLETED, tag)
        parallel = f.get(commands, LIST_PARALLEL)  # read before publishing: an unpublished list cannot vanish
        empty = f.test(f.get(commands, LIST_UNITS), "==", 0)
        f.put(state, CURRENT, sequence)
        with f.b.if_else(empty) as (nothing, something):
            with nothing:
                f.call("mark_done", state, sequence)
            with something:
                f.call("wake", state, parallel)
                f.b.branch(end)
    f.finish()


def _ring(f: Body, state: Value, sequence: Value) -> Value:
    return f.get(_place(f, state, sequence), RING)


def _place(f: Body, state: Value, sequence: Value) -> Value:
    """The address whose words RING and FAILED are the submission's."""
    return f.b.add(state, f.b.shl(f.b.and_(sequence, constant(RING_SIZE - 1)), constant(3)))


def _walk(module: ir.Module) -> None:
    """walk(state, slot, sequence, deadline): work on a run until nothing is left to take, or the deadline passes."""
    f = Body(module, "walk", "state slot sequence deadline")
    state, slot, sequence, deadline = f.parameters
    worker = f.b.add(f.at(state, WORKERS), f.b.mul(slot, constant(8 * WORKER_WORDS)))
    commands = _ring(f, state, sequence)
    f.put(worker, INSIDE, commands)
    leave = f.function.append_basic_block("leave")
    f.jump_if(f.test(f.get(state, DONE), ">=", sequence), leave)

    tag = f.b.shl(sequence, constant(COUNT_BITS))
    scratch = f.b.add(f.get(commands, LIST_SCRATCH), f.b.mul(slot, f.get(commands, LIST_STRIDE)))
    profile, share = f.test(f.get(commands, LIST_PROFILE), "!=", 0), f.get(commands, LIST_SHARE)
    place = f.variable(f.get(commands, LIST_ENTRIES))
    left = f.variable(f.get(commands, LIST_COUNT))
    kernel = ir.FunctionType(VOID, [I64] * 5)
    with f.loop() as (_, end):
        f.jump_if(f.test(f.read(left), "<=", 0), end)
        entry = f.read(place)
        required = f.b.add(tag, f.get(entry, REQUIRED))
        spins = f.variable(0)
        with f.loop() as (_, passed):
            f.jump_if(f.test(f.get(commands, LIST_COMPLETED), ">=", required), passed)
            f.call("relax", f.step(spins))
            f.jump_if(_must_leave(f, state, deadline), leave)

        taken, hurry = f.variable(0), f.variable(0)
        units, unit, programs = f.get(entry, UNITS), f.get(entry, UNIT), f.get(entry, PROGRAMS)
        with f.loop() as (head, exhausted):
            ticket = f.get(entry, TICKET)
            index = f.b.sub(ticket, tag)
            f.jump_if(f.b.icmp_unsigned(">=", index, units), exhausted)  # also when the ticket is of another run
            piece = f.b.udiv(f.b.sub(units, index), share)
            piece = f.b.select(f.test(piece, ">", 1), piece, constant(1))
            f.jump_if(f.b.not_(f.swap(entry, TICKET, ticket, f.b.add(ticket, piece))), head)
            with f.when(f.b.and_(profile, f.test(index, "==", 0))):
                f.put(entry, START, f.call("now", result=I64))
            first = f.b.mul(index, unit)
            last = f.b.add(first, f.b.mul(piece, unit))
            last = f.b.select(f.test(last, "<", programs), last, programs)
            function = f.b.inttoptr(f.get(entry, FUNCTION), kernel.as_pointer())
            f.b.call(function, [f.get(entry, ARGUMENTS), scratch, f.at(entry, GRID), first, last])
            f.b.store(f.b.add(f.read(taken), piece), taken)
            f.b.store(f.b.zext(_must_leave(f, state, deadline), I64), hurry)
            f.jump_if(f.test(f.read(hurry), "!=", 0), exhausted)

        with f.when(f.test(f.read(taken), ">", 0)):
            with f.when(profile):
                complete = f.increment(entry, COMPLETE, f.read(taken))
                with f.when(f.test(complete, "==", units)):
                    f.put(entry, END, f.call("now", result=I64))
            completed = f.increment(commands, LIST_COMPLETED, f.read(taken))
            with f.when(f.test(completed, "==", f.b.add(tag, f.get(commands, LIST_UNITS)))):
                status = f.get(commands, LIST_STATUS)
                with f.when(f.test(status, "!=", 0)):
                    f.put(commands, LIST_STATUS, 0)
                    f.put(_place(f, state, sequence), FAILED, status)
                    f.increment(state, FAILURES, 1)
                f.call("mark_done", state, sequence)
                f.call("advance", state)
        f.jump_if(f.test(f.read(hurry), "!=", 0), leave)
        f.step(place, 8 * ENTRY_WORDS)
        f.step(left, -1)
    f.b.branch(leave)
    f.b.position_at_end(leave)
    f.put(worker, INSIDE, 0)
    f.finish()


def _must_leave(f: Body, state: Value, deadline: Value) -> Value:
    """Whether the device stops or the deadline is over; pool threads have none and never ask the clock."""
    late = f.variable(0)
    with f.when(f.test(deadline, "!=", NEVER)):
        f.b.store(f.b.zext(f.test(f.call("now", result=I64), ">=", deadline), I64), late)
    return f.test(f.b.or_(f.get(state, STOP), f.read(late)), "!=", 0)


def _worker(module: ir.Module) -> None:
    """available(state, index, last): whether a run newer than `last` has begun and slot `index` is free."""
    f = Body(module, "available", "state index last", I1)
    state, index, last = f.parameters
    worker = f.b.add(f.at(state, WORKERS), f.b.mul(index, constant(8 * WORKER_WORDS)))
    newer = f.b.and_(f.test(f.get(state, CURRENT), ">", last), f.test(f.get(state, DONE), "<", f.get(state, CURRENT)))
    work = f.b.and_(newer, f.test(f.get(worker, OWNED), "==", 0))
    f.finish(f.b.or_(work, f.test(f.get(state, STOP), "!=", 0)))

    # worker(state, index): the life of a pool thread.
    f = Body(module, "worker", "state index")
    state, index = f.parameters
    worker = f.b.add(f.at(state, WORKERS), f.b.mul(index, constant(8 * WORKER_WORDS)))
    last, spins = f.variable(0), f.variable(0)
    with f.loop() as (head, end):
        f.b.store(constant(0), spins)
        with f.loop() as (_, found):
            f.jump_if(f.call("available", state, index, f.read(last), result=I1), found)
            with f.when(f.test(f.step(spins), ">=", SPINS)):
                f.call("pthread_mutex_lock", f.at(state, MUTEX))
                f.increment(state, SLEEPERS, 1)
                bell = f.b.select(f.test(index, "==", 0), f.at(state, STAND_IN), f.at(state, WORK))
                with f.loop() as (_, awake):
                    f.jump_if(f.call("available", state, index, f.read(last), result=I1), awake)
                    f.call("pthread_cond_wait", bell, f.at(state, MUTEX))
                f.increment(state, SLEEPERS, -1)
                f.call("pthread_mutex_unlock", f.at(state, MUTEX))
            f.call("relax", 0)
        f.jump_if(f.test(f.get(state, STOP), "!=", 0), end)
        f.jump_if(f.b.not_(f.swap(worker, OWNED, 0, 1)), head)
        f.b.store(f.get(state, CURRENT), last)
        f.call("walk", state, index, f.read(last), NEVER)
        f.put(worker, OWNED, 0)
    f.finish()


def _submit(module: ir.Module) -> None:
    """enqueue(state, list): the new submission's sequence number, or 0 when the ring is full or a report in the way.
    Starts nothing yet."""
    f = Body(module, "enqueue", "state commands", I64)
    state, commands = f.parameters
    answer = f.variable(0)
    f.call("pthread_mutex_lock", f.at(state, MUTEX))
    sequence = f.b.add(f.get(state, SUBMITTED), constant(1))
    place = _place(f, state, sequence)
    room = f.test(f.b.sub(sequence, f.get(state, DONE)), "<", RING_SIZE)
    with f.when(f.b.and_(room, f.test(f.get(place, FAILED), "==", 0))):
        f.put(place, RING, commands)
        f.put(commands, LIST_SEQUENCE, sequence)
        f.put(state, SUBMITTED, sequence)
        f.b.store(sequence, answer)
    f.call("pthread_mutex_unlock", f.at(state, MUTEX))
    f.finish(f.read(answer))

    f = Body(module, "submit", "state commands", I64)
    state, commands = f.parameters
    sequence = f.call("enqueue", state, commands, result=I64)
    f.call("advance", state)
    f.finish(sequence)


def _wait(module: ir.Module) -> None:
    """doze(state, sequence, last, deadline): sleep until the submission is done, there may be work, or it is late."""
    f = Body(module, "doze", "state sequence last deadline")
    state, sequence, last, deadline = f.parameters
    with f.b.goto_entry_block():
        spec = f.b.ptrtoint(f.b.alloca(ir.ArrayType(I64, 2)), I64)
    until = f.b.add(f.call("wall_clock", result=I64), f.b.sub(deadline, f.call("now", result=I64)))
    f.put(spec, 0, f.b.sdiv(until, constant(10**9)))
    f.put(spec, 1, f.b.srem(until, constant(10**9)))
    f.call("pthread_mutex_lock", f.at(state, MUTEX))
    f.increment(state, WAITERS, 1)
    pending = f.b.and_(f.test(f.get(state, DONE), "<", sequence), f.test(f.get(state, STOP), "==", 0))
    with f.when(f.b.and_(pending, f.test(f.get(state, CURRENT), "<=", last))):
        f.call("pthread_cond_timedwait", f.at(state, FINISHED), f.at(state, MUTEX), spec)
    f.increment(state, WAITERS, -1)
    f.call("pthread_mutex_unlock", f.at(state, MUTEX))
    f.finish()


def _help(module: ir.Module) -> None:
    """help(state, sequence, deadline, owns): wait for a submission, working in slot 0 if `owns`; then leave it."""
    f = Body(module, "help", "state sequence deadline owns")
    state, sequence, deadline, owns = f.parameters
    last, spins = f.variable(0), f.variable(0)
    with f.loop() as (_, end):
        f.jump_if(f.test(f.get(state, DONE), ">=", sequence), end)
        f.jump_if(_must_leave(f, state, deadline), end)
        current = f.get(state, CURRENT)
        work = f.b.and_(f.test(owns, "!=", 0), f.test(current, ">", f.read(last)))
        with f.when(work):
            f.b.store(current, last)
            f.b.store(constant(0), spins)
            f.call("walk", state, 0, current, deadline)
        f.call("relax", 0)
        with f.when(f.test(f.step(spins), ">=", SPINS)):
            f.b.store(constant(0), spins)
            f.call("doze", state, sequence, f.b.select(f.test(owns, "!=", 0), f.read(last), constant(NEVER)), deadline)
    with f.when(f.test(owns, "!=", 0)):
        f.put(state, WORKERS + OWNED, 0)
        with f.when(f.test(f.get(state, DONE), "<", f.get(state, SUBMITTED))):
            f.call("wake", state, 0)  # the stand-in takes over
    f.finish()

    # run(state, list, nanoseconds): submit, work, wait; the sequence number, negative if not done by then.
    f = Body(module, "run", "state commands nanoseconds", I64)
    state, commands, nanoseconds = f.parameters
    deadline = f.b.add(f.call("now", result=I64), nanoseconds)
    owns = f.b.zext(f.swap(state, WORKERS + OWNED, 0, 1), I64)
    sequence = f.call("enqueue", state, commands, result=I64)
    f.call("advance", state)
    f.call("help", state, sequence, deadline, owns)
    done = f.test(f.get(state, DONE), ">=", sequence)
    f.finish(f.b.select(done, sequence, f.b.neg(sequence)))

    # wait(state, sequence, nanoseconds, work)
    f = Body(module, "wait", "state sequence nanoseconds work")
    state, sequence, nanoseconds, work = f.parameters
    deadline = f.b.add(f.call("now", result=I64), nanoseconds)
    owns = f.variable(0)
    with f.when(f.test(work, "!=", 0)):
        f.b.store(f.b.zext(f.swap(state, WORKERS + OWNED, 0, 1), I64), owns)
    f.call("help", state, sequence, deadline, f.read(owns))
    f.finish()


def _small(module: ir.Module) -> None:
    f = Body(module, "start", "state")
    (state,) = f.parameters
    f.call("pthread_mutex_init", f.at(state, MUTEX), 0)
    for bell in (WORK, STAND_IN, FINISHED):
        f.call("pthread_cond_init", f.at(state, bell), 0)
    f.finish()

    f = Body(module, "stop", "state")
    (state,) = f.parameters
    f.call("pthread_mutex_lock", f.at(state, MUTEX))
    f.put(state, STOP, 1)
    f.call("pthread_mutex_unlock", f.at(state, MUTEX))
    for bell in (WORK, STAND_IN, FINISHED):
        f.call("pthread_cond_broadcast", f.at(state, bell))
    f.finish()

    # inside(state, list, workers): whether a worker may still look at the list.
    f = Body(module, "inside", "state commands workers", I64)
    state, commands, workers = f.parameters
    index, found = f.variable(0), f.variable(0)
    with f.loop() as (_, end):
        f.jump_if(f.test(f.read(index), ">=", workers), end)
        worker = f.b.add(f.at(state, WORKERS), f.b.mul(f.read(index), constant(8 * WORKER_WORDS)))
        with f.when(f.test(f.get(worker, INSIDE), "==", commands)):
            f.b.store(constant(1), found)
        f.step(index)
    f.finish(f.read(found))


def _copy_and_fill(module: ir.Module) -> None:
    """Kernels like any other. Program p of copy(destination, source, nbytes) and fill(destination, value, nbytes)
    does the p-th COPY_CHUNK bytes."""
    for name, routine in (("copy", "memcpy"), ("fill", "memset")):
        f = Body(module, name, "args scratch grid first last")
        args, _, _, first, last = f.parameters
        total = f.get(args, 2)
        begin, end = (f.b.mul(x, constant(COPY_CHUNK)) for x in (first, last))
        end = f.b.select(f.test(end, "<", total), end, total)
        destination = f.b.add(f.get(args, 0), begin)
        source = f.b.add(f.get(args, 1), begin) if name == "copy" else f.get(args, 1)
        f.call(routine, destination, source, f.b.sub(end, begin), result=I64)
        f.finish()


class Executor:
    """The compiled executor: its functions as Python callables that release the interpreter lock."""

    def __init__(self) -> None:
        self._engine = compile_module(build())
        self.start = self._function("start", 1, None)
        self.stop = self._function("stop", 1, None)
        self.worker = self._function("worker", 2, None)
        self.submit = self._function("submit", 2)
        self.run = self._function("run", 3)
        self.wait = self._function("wait", 4, None)
        self.inside = self._function("inside", 3)
        self.copy = self._engine.get_function_address(PREFIX + "copy")
        self.fill = self._engine.get_function_address(PREFIX + "fill")

    def _function(self, name: str, parameters: int, result: Any = ctypes.c_int64) -> Callable[..., int]:
        prototype = ctypes.CFUNCTYPE(result, *[ctypes.c_int64] * parameters)
        return prototype(self._engine.get_function_address(PREFIX + name))


@functools.cache
def executor() -> Executor:
    """The executor of this process, compiled at first use."""
    return Executor()
