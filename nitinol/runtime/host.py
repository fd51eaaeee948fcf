"""Facts about this machine: processors, instruction set, memory, and how fast memory can be read."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path


def processor_name() -> str:
    """The processor's model name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()


def logical_cores() -> int:
    """Hardware threads that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_threads() -> int:
    """Physical cores that this process may use: by affinity, without SMT siblings, within a container's quota."""
    if sys.platform == "darwin":  # the performance cores: one slow core would hold up the rest
        return int(_sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu") or logical_cores())
    if not hasattr(os, "sched_getaffinity"):
        return logical_cores()
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:
            cores.add(str(cpu))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        limit = len(cores) if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        limit = len(cores)
    return min(len(cores), limit)


def simd_level() -> str:
    """The widest vector instruction set, with the dot-product extensions: 'avx512 vnni bf16', 'neon dotprod'."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    base = next((name for feature, name in (("avx512f", "avx512"), ("avx2", "avx2"), ("avx", "avx"),
                                            ("sve", "sve"), ("neon", "neon"), ("sse2", "sse2"))
                 if features.get(feature)), "scalar")
    extras = {"avx512vnni": "vnni", "avxvnni": "vnni", "avx512bf16": "bf16", "bf16": "bf16", "dotprod": "dotprod",
              "i8mm": "i8mm", "amx-int8": "amx"}
    return " ".join([base, *dict.fromkeys(name for feature, name in extras.items() if features.get(feature))])


def _sysctl(name: str) -> str:
    if sys.platform != "darwin":
        return ""
    answer = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
    return answer.stdout.strip()
