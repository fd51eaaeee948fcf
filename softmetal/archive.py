"""Binary archives: machine code of pipelines in one file, so that a later process need not compile.

The file is a zip of libraries as the cache on disk names them, by everything they depend on; from there what an
archive has is used. A file made by another version of the compiler has nothing that fits."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softmetal import compile
from softmetal.objects import Labelled, NSError

if TYPE_CHECKING:
    from softmetal.device import Device
DOMAIN, INVALID_FILE, UNEXPECTED = "MTLBinaryArchiveDomain", 1, 2


class NSURL:
    """A file's address; pyobjc's `Metal` has it from Foundation."""

    def __init__(self, path: str) -> None:
        self._path = path

    @classmethod
    def fileURLWithPath_(cls, path: str) -> NSURL:
        return cls(os.path.abspath(path))

    def path(self) -> str:
        return self._path


class BinaryArchive(Labelled):
    _protocol = "MTLBinaryArchive"

    def __init__(self, device: Device, files: dict[str, bytes]) -> None:
        self._device, self._files = device, files

    def addComputePipelineFunctionsWithDescriptor_error_(self, descriptor: Any, error: Any) -> tuple[bool, Any]:
        pipeline, problem = self._device.newComputePipelineStateWithDescriptor_options_reflection_error_(
            descriptor, 0, None, None)  # fmt: skip
        if pipeline is None:
            return False, problem
        for code in pipeline._codes.values():
            path = Path(code.path)
            self._files[path.name] = path.read_bytes()
        return True, None

    def serializeToURL_error_(self, url: NSURL, error: Any) -> tuple[bool, Any]:
        part = f"{url.path()}.{os.getpid()}.part"
        try:
            with zipfile.ZipFile(part, "w") as archive:
                for name, code in self._files.items():
                    archive.writestr(name, code)
            os.replace(part, url.path())
        except OSError as e:
            return False, NSError(DOMAIN, INVALID_FILE, f"the binary archive cannot be written: {e}")
        return True, None

    def _unpack(self, path: Path) -> bool:
        """Puts a library into the cache; whether it is here."""
        if path.name in self._files and not path.exists():
            compile.replace(path, self._files[path.name])
        return path.name in self._files


def read(device: Device, url: NSURL | None) -> tuple[BinaryArchive | None, NSError | None]:
    """The archive in a file, or without one an empty archive."""
    try:
        files = {}
        if url is not None:
            with zipfile.ZipFile(url.path()) as archive:
                files = {name: archive.read(name) for name in archive.namelist()}
        return BinaryArchive(device, files), None
    except (OSError, zipfile.BadZipFile) as e:
        return None, NSError(DOMAIN, INVALID_FILE, f"the binary archive cannot be read: {e}")
