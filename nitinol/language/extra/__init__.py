"""Functions that Triton keeps apart by vendor; here they are the language's own."""

from nitinol.language.extra import cuda as cuda
from nitinol.language.extra import libdevice as libdevice
