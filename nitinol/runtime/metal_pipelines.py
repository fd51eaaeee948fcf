"""Metal itself, and what its compiler makes of a kernel's source."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from nitinol.runtime.device import DeviceError


def framework() -> Any:
    """pyobjc's Metal, or on Linux the software device that stands in for it."""
    try:
        import Metal
    except ImportError:
        if sys.platform == "darwin":
            raise DeviceError("device 'metal' needs a package that is not installed; "
                              "pip install pyobjc-framework-Metal") from None
        try:
            import softmetal

            softmetal.install()
        except (ImportError, RuntimeError):
            raise DeviceError("this system has no Metal, and its software device is not installed; "
                              "pip install 'nitinol[softmetal]'") from None
        Metal = sys.modules["Metal"]
    return Metal


def autorelease() -> Any:
    """What calls leave for later goes at the end of this block, not of the thread."""
    return getattr(sys.modules.get("objc"), "autorelease_pool", contextlib.nullcontext)()


def make_pipeline(metal: Any, device: Any, indirect: bool, kernel: tuple[str, str]) -> Any:
    """The pipeline of a kernel (name, source). Raises DeviceError with the compiler's message."""
    name, source = kernel
    with autorelease():
        options = metal.MTLCompileOptions.alloc().init()
        if hasattr(options, "setMathMode_"):
            options.setMathMode_(metal.MTLMathModeSafe)  # masks and reductions rely on infinities and NaN
        else:  # before macOS 15
            options.setFastMathEnabled_(False)
        bfloat = "bfloat" in source
        options.setLanguageVersion_(metal.MTLLanguageVersion3_1 if bfloat else metal.MTLLanguageVersion3_0)
        library, error = device.newLibraryWithSource_options_error_(source, options, None)
        pipeline = None
        if library is not None:
            descriptor = metal.MTLComputePipelineDescriptor.alloc().init()
            descriptor.setComputeFunction_(library.newFunctionWithName_(name))
            descriptor.setSupportIndirectCommandBuffers_(indirect)
            descriptor.setLabel_(name)
            pipeline, error = device.newComputePipelineStateWithDescriptor_options_reflection_error_(
                descriptor, 0, None, None)
        if pipeline is None:
            hint = " (bfloat needs macOS 14; on an older system use float16)" if bfloat else ""
            raise DeviceError(f"kernel {name!r} does not compile on {device.name()}{hint}: "
                              f"{error.localizedDescription()}")
        return pipeline
