"""Runs the CUDA kernels under the emulator: compiles them with g++, hands them tensors, raises what it finds."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import shutil
import subprocess
import tempfile
from ctypes import POINTER, byref, c_bool, c_char_p, c_double, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


class SimtError(Exception):
    """What the emulator found wrong in a kernel."""


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """The compiled `name`.cpp, built once for the sources as they are."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("the emulator needs a C++ compiler: neither g++ nor clang++ is on the path")
    sources = sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp"), *CSRC.glob("shared/*"), *CSRC.glob("cuda/kernels/*")])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    built = Path(tempfile.gettempdir()) / f"pglcl_simt_{name}_{digest}.so"
    if not built.exists():
        command = [compiler, "-std=c++20", "-O2", "-fPIC", "-shared", "-Wno-unknown-pragmas", "-I", str(HERE)]
        partial = built.with_suffix(f".{id(command)}")
        subprocess.run([*command, "-I", str(CSRC), "-o", str(partial), str(HERE / f"{name}.cpp")], check=True)
        partial.rename(built)
    return ctypes.CDLL(str(built))


class Launch:
    """One call of a kernel: announces the tensors it may touch, and keeps them alive."""

    def __init__(self) -> None:
        self.library = library("kernels")
        self.library.simt_clear()
        self.library.simt_announce.argtypes = [c_void_p, c_size_t, c_char_p, c_bool]
        self.tensors: list[Tensor] = []

    def announce(self, name: str, t: Tensor | None, written: bool) -> int | None:
        if t is None:
            return None
        assert t.device.type == "cpu"
        self.tensors.append(t)
        pointer = t.untyped_storage().data_ptr()
        self.library.simt_announce(pointer, t.untyped_storage().nbytes(), name.encode(), written)
        return t.data_ptr()

    def input(self, name: str, t: Tensor | None) -> int | None:
        return self.announce(name, t, True)

    def output(self, name: str, t: Tensor) -> int | None:
        return self.announce(name, t, False)

    def call(self, function: str, *arguments: Any) -> None:
        f = getattr(self.library, function)
        f.restype = c_char_p
        message = f(*arguments)
        if message is not None:
            raise SimtError(message.decode())


# --- patch statistics -----------------------------------------------------------------------------------------------


class Grid(ctypes.Structure):
    _fields_ = [
        ("batch", c_int64),
        ("classes", c_int64),
        *((name, c_int64 * 3) for name in ("image", "patch", "stride", "grid")),
    ]


class Placed(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64 * 5)]


class Statistics(ctypes.Structure):
    _fields_ = [
        *((name, Placed) for name in ("input", "grad_entropy", "grad_confidence", "grad_class_entropy", "grad_input")),
        *((name, c_void_p) for name in ("entropy", "confidence", "class_entropy", "gamma", "kappa")),
        ("grid", Grid),
        ("log_classes", c_double),
        ("probabilities", c_bool),
        ("normalize", c_bool),
    ]


def patch_statistics(
    x: Tensor, patch: list[int], stride: list[int], grads: list[Tensor] | None, *, probabilities: bool, normalize: bool
) -> tuple[list[Tensor], Tensor | None]:
    """(entropy, confidence, class entropy) and, from their gradients, that of the input."""
    batch, classes, *image = x.shape
    cells = [(s - p) // t + 1 for s, p, t in zip(image, patch, stride)]
    lead = [1] * (3 - len(image))
    three = c_int64 * 3
    grid = Grid(batch, classes, *(three(*lead, *v) for v in (image, patch, stride, cells)))
    s = Statistics(grid=grid, log_classes=math.log(classes), probabilities=probabilities, normalize=normalize)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32

    def place(t: Tensor, data: int | None) -> Placed:
        strides = list(t.stride()) if t.dim() == x.dim() else [t.stride(0), 0, *t.stride()[1:]]
        return Placed(data, (c_int64 * 5)(*strides[:2], *[0] * (5 - len(strides)), *strides[2:]))

    out = [x.new_empty(batch, *cells), x.new_empty(batch, classes, *cells), x.new_empty(batch, classes, *cells)]
    run = Launch()
    s.input = place(x, run.input("input", x))
    s.entropy, s.confidence, s.class_entropy = (
        run.output(n, t) for n, t in zip(("entropy", "confidence", "class_entropy"), out)
    )
    run.call("statistics", DTYPES[x.dtype], byref(s), c_bool(False))
    if grads is None:
        return out, None
    run, grad_input = Launch(), torch.empty_like(x)
    gamma, kappa = (torch.empty(batch, classes, math.prod(cells), dtype=wide) for _ in range(2))
    for name, t in zip(("input", "grad_entropy", "grad_confidence", "grad_class_entropy"), (x, *grads)):
        setattr(s, name, place(t, run.input(name, t)))
    s.gamma, s.kappa = run.output("gamma", gamma), run.output("kappa", kappa)
    s.grad_input = place(grad_input, run.output("grad_input", grad_input))
    run.call("statistics", DTYPES[x.dtype], byref(s), c_bool(True))
    return out, grad_input


# --- semantic disparity ---------------------------------------------------------------------------------------------


def semantic_disparity(a: Tensor, b: Tensor) -> Tensor:
    a, b = (t[:, None] if t.dim() == 1 else t for t in (a, b))
    out, run = a.new_empty(len(a), len(b)), Launch()
    pointers = [run.input("a", a), run.input("b", b), run.output("out", out)]
    sizes = [c_int64(v) for v in (len(a), len(b), a.shape[1])]
    run.call("disparity_forward", c_bool(a.dtype == torch.float64), *map(c_void_p, pointers), *sizes)
    return out


def semantic_disparity_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    results = []
    n, m, c = len(a), len(b), a.shape[1]
    for own, other, sizes in ((a, b, (n, m, c, m, 1)), (b, a, (m, n, c, 1, m))):
        out, run = torch.empty_like(own), Launch()
        pointers = [run.input(name, t) for name, t in (("grad", grad), ("own", own), ("other", other))]
        pointers.append(run.output("out", out))
        wide = c_bool(a.dtype == torch.float64)
        run.call("disparity_backward", wide, *map(c_void_p, pointers), *(c_int64(v) for v in sizes))
        results.append(out)
    return results[0], results[1]


class Bounds(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("descriptors", "key_descriptors", "labels", "key_labels")),
        *((name, c_int64) for name in ("anchors", "keys", "channels", "count", "ignore_index", "self_offset")),
        *((name, c_void_p) for name in ("value", "label", "place", "member_of", "total", "bounds")),
        ("positives", c_bool),
        ("wide", c_bool),
    ]


def disparity_bounds(
    a: Tensor, y: Tensor, b: Tensor, z: Tensor, count: int, *, positives: bool, self_offset: int, select: bool
) -> Tensor:
    """By selection, or by searching keys sorted as csrc/cuda/semantic_disparity.cu sorts them."""
    out, run = a.new_empty(len(a)), Launch()
    s = Bounds(anchors=len(a), keys=len(b), channels=a.shape[1], count=count, ignore_index=-1, self_offset=self_offset)
    s.positives, s.wide = positives, a.dtype == torch.float64
    inputs = {"descriptors": a, "key_descriptors": b, "labels": y, "key_labels": z}
    if not select:
        ignored = z == -1
        value, order = b.flatten().masked_fill(ignored, math.inf).sort(stable=True)
        label, place = z.masked_fill(ignored, 2**63 - 1)[order].sort(stable=True)
        member_of = torch.full_like(z, -1).scatter(0, order[place], torch.arange(len(z))).masked_fill(ignored, -1)
        inputs |= {"value": value, "label": label, "place": place, "member_of": member_of, "total": (~ignored).sum()}
    for name, t in inputs.items():
        setattr(s, name, run.input(name, t))
    s.bounds = run.output("bounds", out)
    run.call("bounds", byref(s))
    return out


# --- contrast -------------------------------------------------------------------------------------------------------


class Contrast(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("anchors", "keys")),
        *((name, c_int64) for name in ("n", "m", "depth")),
        *((name, c_void_p) for name in ("labels", "key_labels", "descriptors", "key_descriptors")),
        ("channels", c_int64),
        ("positive_bound", c_double),
        ("negative_bound", c_double),
        *((name, c_void_p) for name in ("positive_bounds", "negative_bounds", "positive_mask", "negative_mask")),
        ("positive_stride", c_int64 * 2),
        ("negative_stride", c_int64 * 2),
        ("temperature", c_double),
        ("negative_weight", c_double),
        ("ignore_index", c_int64),
        ("self_offset", c_int64),
        *(
            (name, c_void_p)
            for name in ("max_logit", "log_sum", "logit", "count", "losses", "loss", "num_valid", "grad", "grad_rows")
        ),
        ("capability", c_int64),
        ("shared_bytes", c_int64),
        ("multiprocessors", c_int64),
        *((name, c_bool) for name in ("per_anchor", "mean", "own_anchor", "own_key", "allow_tf32")),
    ]


def patch_contrast(
    anchors: Tensor,
    labels: Tensor,
    descriptors: Tensor | None = None,
    *,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    key_descriptors: Tensor | None = None,
    temperature: float = 0.1,
    max_positive_disparity: float | Tensor | None = None,
    min_negative_disparity: float | Tensor | None = None,
    positive_mask: Tensor | None = None,
    negative_mask: Tensor | None = None,
    negative_weight: float = 1.0,
    reduction: str = "mean",
    capability: int = 80,
    shared_bytes: int = 160 * 1024,
    allow_tf32: bool = False,
    multiprocessors: int = 1,
    upstream: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradients to anchors and keys for an upstream gradient, which counts up from 1/2 to 3/2."""
    symmetric = keys is None
    wide = torch.float64 if anchors.dtype == torch.float64 else torch.float32
    other, other_labels = (anchors, labels) if keys is None else (keys, key_labels)
    n, m = len(anchors), len(other)
    descriptors = None if descriptors is None else descriptors.to(wide)
    others = descriptors if symmetric else None if key_descriptors is None else key_descriptors.to(wide)
    inputs: dict[str, Tensor | None] = {
        "anchors": anchors,
        "keys": other,
        "labels": labels,
        "key_labels": other_labels,
        "descriptors": descriptors,
        "key_descriptors": others,
        "positive_mask": positive_mask,
        "negative_mask": negative_mask,
    }
    s = Contrast(n=n, m=m, depth=anchors.shape[1], channels=1, ignore_index=-1, self_offset=0 if symmetric else -1)
    if descriptors is not None and descriptors.dim() == 2:
        s.channels = descriptors.shape[1]
    s.temperature, s.negative_weight = temperature, negative_weight
    s.positive_bound, s.negative_bound = math.inf, 0.0
    for name, bound in (("positive", max_positive_disparity), ("negative", min_negative_disparity)):
        if isinstance(bound, Tensor):
            inputs[f"{name}_bounds"] = bound.to(wide)
        elif bound is not None:
            setattr(s, f"{name}_bound", bound)
    if positive_mask is not None and negative_mask is not None:
        s.positive_stride = (c_int64 * 2)(*positive_mask.stride())
        s.negative_stride = (c_int64 * 2)(*negative_mask.stride())
    s.capability, s.shared_bytes, s.allow_tf32 = capability, shared_bytes, allow_tf32
    s.multiprocessors = multiprocessors
    s.per_anchor, s.mean = reduction == "none", reduction == "mean"

    max_logit, log_sum, logit = (torch.empty(n, dtype=wide) for _ in range(3))
    count, num_valid = torch.empty(n, dtype=torch.int32), torch.empty((), dtype=torch.int64)
    losses = torch.empty(n, dtype=wide)
    loss = losses if reduction == "none" else torch.empty((), dtype=wide)
    results = {"max_logit": max_logit, "log_sum": log_sum, "logit": logit, "count": count, "num_valid": num_valid}
    run = Launch()
    for name, t in inputs.items():
        setattr(s, name, run.input(name, t))
    for name, t in (results | {"losses": losses, "loss": loss}).items():
        setattr(s, name, run.output(name, t))
    run.call("contrast", DTYPES[anchors.dtype], byref(s), c_bool(False))

    if upstream is None:
        upstream = torch.linspace(0.5, 1.5, max(loss.numel(), 1), dtype=torch.float64)[: loss.numel()]
    upstream = upstream.to(wide)
    grads = []
    for own_anchor, own_key in ((True, symmetric), (False, True)):
        if not own_anchor and symmetric:
            continue
        run, grad = Launch(), torch.empty_like(anchors if own_anchor else other)
        for name, t in (inputs | results | {"grad": upstream}).items():
            setattr(s, name, run.input(name, t))
        s.grad_rows = run.output("grad_rows", grad)
        s.own_anchor, s.own_key = own_anchor, own_key
        run.call("contrast", DTYPES[anchors.dtype], byref(s), c_bool(True))
        grads.append(grad)
    return loss, grads


# --- the Gaussian contrastive loss ------------------------------------------------------------------------------------


class Gaussian(ctypes.Structure):
    _fields_ = [
        ("anchors", c_void_p),
        *((name, c_int64) for name in ("n", "depth", "classes")),
        *((name, c_void_p) for name in ("labels", "order", "means", "covariances", "counts")),
        *((name, c_double) for name in ("temperature", "covariance_scale", "negative_weight")),
        *((name, c_int64) for name in ("ignore_index", "shared_bytes")),
        *((name, c_void_p) for name in ("count", "losses", "gradients", "loss", "num_valid")),
        *((name, c_bool) for name in ("pairwise", "per_anchor", "mean")),
    ]


def gaussian_contrast(
    anchors: Tensor,
    labels: Tensor,
    means: Tensor,
    covariances: Tensor,
    counts: Tensor,
    *,
    temperature: float = 0.2,
    covariance_scale: float = 4.0,
    negative_weight: float = 4096.0,
    ignore_index: int = -1,
    reduction: str = "mean",
    shared_bytes: int = 160 * 1024,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradients, num_valid), prepared as csrc/cuda/gaussian_contrast.cu prepares them."""
    wide = torch.float64 if anchors.dtype == torch.float64 else torch.float32
    covariances = covariances.to(wide)
    pairwise = means.dim() == 3
    n, depth = anchors.shape
    inputs = {
        "anchors": anchors,
        "labels": labels,
        "order": labels.argsort(stable=True) if pairwise else None,
        "means": means.to(wide).contiguous(),
        "covariances": ((covariances + covariances.mT) / 2).contiguous(),
        "counts": counts,
    }
    losses, gradients = torch.empty(n, dtype=wide), torch.empty(n, depth, dtype=wide)
    loss = losses if reduction == "none" else torch.empty((), dtype=wide)
    num_valid = torch.empty((), dtype=torch.int64)
    outputs = {"count": torch.empty(n, dtype=torch.int32), "losses": losses, "gradients": gradients, "loss": loss}
    s = Gaussian(n=n, depth=depth, classes=len(counts), ignore_index=ignore_index, shared_bytes=shared_bytes)
    s.temperature, s.covariance_scale, s.negative_weight = temperature, covariance_scale, negative_weight
    s.pairwise, s.per_anchor, s.mean = pairwise, reduction == "none", reduction == "mean"
    run = Launch()
    for name, t in inputs.items():
        setattr(s, name, run.input(name, t))
    for name, t in (outputs | {"num_valid": num_valid}).items():
        setattr(s, name, run.output(name, t))
    run.call("gaussian", DTYPES[anchors.dtype], byref(s))
    return loss, gradients, num_valid


# --- planted faults -------------------------------------------------------------------------------------------------


def fault_names() -> list[str]:
    faults = library("faults")
    faults.fault_name.restype = c_char_p
    return [faults.fault_name(i).decode() for i in range(faults.fault_count())]


def run_fault(index: int, bad: bool) -> str | None:
    faults = library("faults")
    faults.run_fault.restype = c_char_p
    message = faults.run_fault(c_int(index), c_bool(bad))
    return None if message is None else message.decode()


def run_votes(bits: int) -> tuple[int, int]:
    votes, total = ctypes.c_uint32(), c_int()
    library("faults").run_votes(ctypes.c_uint32(bits), byref(votes), byref(total))
    return votes.value, total.value


def run_mma(kind: int, rows: Tensor, columns: Tensor) -> Tensor:
    result = torch.empty(16, 8)
    f = library("faults").run_mma
    f.argtypes = [c_int, *[POINTER(ctypes.c_float)] * 3]
    f(kind, *(ctypes.cast(t.data_ptr(), POINTER(ctypes.c_float)) for t in (rows, columns, result)))
    return result
