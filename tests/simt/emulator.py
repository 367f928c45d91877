"""Builds and loads the emulated device: host and device code of csrc/cuda, the very files that nvcc compiles."""

from __future__ import annotations

import ctypes
import functools
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_bool, c_char_p, c_int, c_int64
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests import native

HERE = Path(__file__).parent
# They run as `pytest --emulated 80 FILE`, in a process where the emulated ops replace those of the CPU (test_host.py).
TESTS = sorted(str(path.relative_to(native.ROOT)) for path in HERE.glob("emulated_*.py"))
HEADERS = [*HERE.glob("*.h"), HERE / "library.cpp", Path(native.__file__)]


@dataclass(frozen=True)
class Device:
    """The properties of a device that the host code asks for.

    Attributes:
        capability: such as 80.
        compiled_for: the capability for which the running code was compiled, never above the device's.
        shared_bytes: the largest shared memory of a block.
        multiprocessors: the host code takes this as the number of blocks that run at the same time.
    """

    capability: int
    compiled_for: int
    shared_bytes: int
    multiprocessors: int = 4


# https://docs.nvidia.com/cuda/cuda-c-programming-guide, table of technical specifications per compute capability
DEVICES = {
    75: Device(75, 75, 64 * 1024),
    80: Device(80, 80, 163 * 1024),
    86: Device(86, 86, 99 * 1024),
    90: Device(90, 90, 227 * 1024),
}


def build(csrc: Path = native.CSRC) -> Path:
    """The library with the ops of a csrc folder for the emulated device. It is built once for the present sources."""
    sources = [*csrc.glob("*.h"), *csrc.glob("shared/*"), *(p for p in csrc.glob("cuda/**/*") if p.is_file())]
    folder = native.cache(f"emulated_{native.digest([*sources, *HEADERS])}")
    target = folder / "ops.so"
    if not target.exists():
        ops = [*sorted(csrc.glob("cuda/*.cu")), HERE / "library.cpp"]
        prefix = native.torch_includes([*ops, *csrc.glob("*.h"), *csrc.glob("cuda/*.h")]) + '#include "simt.h"\n'
        flags = ["-O1", f"-I{HERE}", f"-I{csrc}", *native.STABLE]
        native.build(folder / "objects", ops, target, prefix=prefix, flags=flags, shared=True)
    return target


_loaded: list[ctypes.CDLL] = []


def load(csrc: Path = native.CSRC) -> ctypes.CDLL:
    """Replaces the CPU's ops by the emulated ones until this process ends; the `csrc` of the first call stays."""
    if _loaded:
        return _loaded[0]
    import pglcl_ext  # noqa: F401  the schemas, and the ops that give way

    path = build(csrc)
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    library.simt_set_device.argtypes = [c_int, c_int, c_int64, c_int]
    library.simt_take_launches.restype = c_char_p
    _loaded.append(library)
    return library


def use(device: Device) -> None:
    """Makes the ops run on this device from now on."""
    load().simt_set_device(device.capability, device.compiled_for, device.shared_bytes, device.multiprocessors)


@contextmanager
def on(device: Device, back_to: Device = DEVICES[80]) -> Iterator[None]:
    """Makes the ops run on `device` in the block, and on `back_to` afterwards."""
    use(device)
    try:
        yield
    finally:
        use(back_to)


def plant(fault: int) -> None:
    """Switches on one of the faults that tests/mutants has planted; 0: none."""
    load().simt_plant(c_int(fault))


def take_reached(count: int) -> set[int]:
    """The numbers, below `count`, of the planted faults that the code has reached since the last call."""
    reached = (ctypes.c_ubyte * count)()
    load().simt_take_reached(reached, c_int(count))
    return {number for number in range(count) if reached[number]}


def take_grids() -> list[tuple[str, int, int]]:
    """The kernels launched since the last call: name, blocks in x, blocks in y."""
    lines = [line.split() for line in load().simt_take_launches().decode().splitlines()]
    return [(name, int(x), int(y)) for name, x, y in lines]


def take_launches() -> list[str]:
    """The names of the kernels launched since the last call."""
    return [name for name, _, _ in take_grids()]


# --- planted faults -------------------------------------------------------------------------------------------------


@functools.cache
def faults() -> ctypes.CDLL:
    """faults.cpp, which needs no torch."""
    sources = [HERE / "faults.cpp", *native.CSRC.glob("cuda/kernels/*.h"), *native.CSRC.glob("shared/*")]
    target = native.cache(f"faults_{native.digest([*sources, *HEADERS])}") / "faults.so"
    if not target.exists():
        command = [native.compiler(), "-std=c++20", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas", f"-I{HERE}"]
        command += [f"-I{native.CSRC}", "-o", f"{target}.partial", str(HERE / "faults.cpp")]
        subprocess.run(command, check=True)
        Path(f"{target}.partial").rename(target)
    return ctypes.CDLL(str(target))


def fault_names() -> list[str]:
    faults().fault_name.restype = c_char_p
    return [faults().fault_name(i).decode() for i in range(faults().fault_count())]


def run_fault(index: int, bad: bool) -> str | None:
    """The emulator's message about the planted fault, or about its correct counterpart; None if it finds nothing."""
    faults().run_fault.restype = c_char_p
    message = faults().run_fault(c_int(index), c_bool(bad))
    return None if message is None else message.decode()


def run_votes(bits: int) -> tuple[int, int]:
    votes, total = ctypes.c_uint32(), c_int()
    faults().run_votes(ctypes.c_uint32(bits), byref(votes), byref(total))
    return votes.value, total.value


def run_mma(kind: int, rows: Tensor, columns: Tensor) -> Tensor:
    result = torch.empty(16, 8)
    f = faults().run_mma
    f.argtypes = [c_int, *[POINTER(ctypes.c_float)] * 3]
    f(kind, *(ctypes.cast(t.data_ptr(), POINTER(ctypes.c_float)) for t in (rows, columns, result)))
    return result
