"""Command lists of the Metal driver: what one becomes before it is submitted.

Copies and fills are kernels too. A command is a pipeline with its buffers and its grid; commands are written to an
encoder, or once for all submissions to an indirect command buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from nitinol.compiler.gpu import Executable
from nitinol.language.types import int64, uint32
from nitinol.runtime.device import Buffer, CommandList, Copy, DeviceError, Fill, Launch

MOST_BUFFERS = 31  # of a kernel
CAUSES = {2: "it took too long", 3: "it touched memory that is not its own", 8: "memory ran out",
          9: "a buffer was not resident"}  # fmt: skip  # MTLCommandBufferError
# Copies and fills: 256 elements of 16, 4 or 1 bytes a threadgroup, whichever divides addresses and size.
SOURCE = """#include <metal_stdlib>
using namespace metal;

struct NAME_arguments { long count; uint value; int grid[3]; };

[[kernel]] void NAME(device TYPE *to [[buffer(0)]], const device TYPE *from [[buffer(1)]],
                     constant NAME_arguments &arguments [[buffer(2)]],
                     uint group [[threadgroup_position_in_grid]], uint place [[thread_index_in_threadgroup]]) {
    long i = long(group) * 256 + place;
    if (i < arguments.count) to[i] = VALUE;
}
"""


def _own_kernel(name: str, type: str, value: str) -> Executable:
    source = SOURCE.replace("NAME", name).replace("TYPE", type).replace("VALUE", value)
    return Executable(name, source, 8, 0, 0, (0, 1), ((2, int64), (3, uint32)))


TYPES = {16: "uint4", 4: "uint", 1: "uchar"}
COPY = {unit: _own_kernel(f"copy_{unit}", type, "from[i]") for unit, type in TYPES.items()}
FILL = {unit: _own_kernel(f"fill_{unit}", type, f"{type}(arguments.value)") for unit, type in TYPES.items()}


def lower(entry: Launch | Copy | Fill) -> Launch:
    """Copies and fills are launches of kernels of ours."""
    if isinstance(entry, Launch):
        return entry
    to, value = entry.destination, entry.value * 0x01010101 if isinstance(entry, Fill) else 0
    source = entry.source if isinstance(entry, Copy) else to
    unit = next(unit for unit in TYPES if not (to.address | source.address | to.nbytes) % unit)
    count = to.nbytes // unit
    kernel = (COPY if isinstance(entry, Copy) else FILL)[unit]
    return Launch(kernel, (-(-count // 256), 1, 1), [to, source, count, value], entry.label)


class Command(NamedTuple):
    """One dispatch. `buffers`: MTLBuffer and offset by index; `entry`: its number in the list."""

    pipeline: Any
    buffers: list[tuple[Any, int]]
    groups: Any
    threads: Any
    barrier: bool
    entry: int


class Encoded:
    """A command list ready to be submitted."""

    def __init__(self, commands: CommandList):
        self.labels, self.profile = [entry.label for entry in commands.entries], commands.profile
        self.commands: list[Command] = []
        self.kept: list[Any] = []  # the memory that it uses
        self.logs: list[tuple[Executable, Buffer]] = []  # of kernels that print
        self.status: Buffer | None = None  # where kernels with assertions report; 0 between runs
        self.submits = self.sequence = 0  # how many there were, and the latest
        self.indirect: Any = None
        self.latest: list[Any] = []  # the command buffers of a profiled run, one a command


def check(launch: Launch, device: Any) -> None:
    """Raise DeviceError if a launch does not fit its kernel, or the kernel the device."""
    kernel: Any = launch.executable
    if getattr(kernel, "language", "") != "msl":
        raise DeviceError(f"kernel {kernel.name!r} was compiled for another target; compile it for 'metal'")
    count = len(kernel.pointers) + len(kernel.scalars)
    if len(launch.arguments) != count:
        raise DeviceError(f"kernel {kernel.name!r} was given {len(launch.arguments)} arguments; it takes {count}")
    for index, argument in enumerate(launch.arguments):
        if isinstance(argument, Buffer) != (index in kernel.pointers):
            wanted = "a Buffer" if index in kernel.pointers else "a number"
            raise DeviceError(f"argument {index} of kernel {kernel.name!r} is {argument!r}; it takes {wanted}")
    threads, nbytes = device.maxThreadsPerThreadgroup().width, device.maxThreadgroupMemoryLength()
    buffers = len(kernel.pointers) + 1 + bool(kernel.asserts) + bool(kernel.prints)
    for needed, limit, what, advice in (
            (buffers, MOST_BUFFERS, "buffers", "put arrays together"),
            (kernel.threads, threads, "threads in a threadgroup", "use fewer warps"),
            (kernel.threadgroup_bytes, nbytes, "bytes of threadgroup memory", "use smaller tiles")):
        if needed > limit:
            raise DeviceError(f"kernel {kernel.name!r} needs {needed} {what}, and this GPU has {limit}; {advice}")


def make_indirect(metal: Any, device: Any, commands: Sequence[Command]) -> Any:
    """The commands as an indirect command buffer; None if the system refuses."""
    descriptor = metal.MTLIndirectCommandBufferDescriptor.alloc().init()
    descriptor.setCommandTypes_(metal.MTLIndirectCommandTypeConcurrentDispatch)
    descriptor.setInheritBuffers_(False)
    descriptor.setInheritPipelineState_(False)
    descriptor.setMaxKernelBufferBindCount_(max(len(command.buffers) for command in commands))
    result = device.newIndirectCommandBufferWithDescriptor_maxCommandCount_options_(
        descriptor, len(commands), metal.MTLResourceStorageModeShared)
    for number, command in enumerate(commands if result is not None else ()):
        entry = result.indirectComputeCommandAtIndex_(number)
        entry.setComputePipelineState_(command.pipeline)
        for index, (buffer, offset) in enumerate(command.buffers):
            entry.setKernelBuffer_offset_atIndex_(buffer, offset, index)
        if command.barrier:
            entry.setBarrier()
        entry.concurrentDispatchThreadgroups_threadsPerThreadgroup_(command.groups, command.threads)
    return result


def dispatch(metal: Any, encoder: Any, commands: Sequence[Command]) -> None:
    """The commands, one by one, into a compute encoder."""
    for command in commands:
        if command.barrier:
            encoder.memoryBarrierWithScope_(metal.MTLBarrierScopeBuffers)
        encoder.setComputePipelineState_(command.pipeline)
        for index, (buffer, offset) in enumerate(command.buffers):
            encoder.setBuffer_offset_atIndex_(buffer, offset, index)
        encoder.dispatchThreadgroups_threadsPerThreadgroup_(command.groups, command.threads)


def failure(names: Sequence[str], error: Any) -> str:
    """A command buffer's error as a sentence."""
    names = list(dict.fromkeys(names))
    some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    what = f"kernel {some}" if len(names) == 1 else f"one of the kernels {some} (run with profile=True to see which)"
    cause = f"{CAUSES[error.code()]}: " if error.code() in CAUSES else ""
    return f"the GPU reports an error of {what} ({cause}{error.localizedDescription()}); the results are not valid"
