"""NRRD, MetaImage and folders of DICOM slices, with SimpleITK.

ITK does not compare the checksum of a compressed file, and reads a truncated file without an error. So both are checked
here first.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import locale
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes

from pglcl.errors import UserError
from pglcl.formats.names import is_hidden, suffix_of
from pglcl.formats.source import Source, check_affine, check_shape, library, reading
from pglcl.memory import check_claim

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
LONGEST_HEADER = 1 << 16  # bytes of a .mhd file that are searched
UNEVEN = 0.01  # share of the slice distance by which distances may differ
SHIFTED = 0.1  # pixels by which slices may be shifted within their plane


def _sitk(path: Path) -> Any:
    sitk = library("SimpleITK", "SimpleITK", path)
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    return sitk


@contextlib.contextmanager
def locale_kept() -> Iterator[None]:
    """Restores the locale. ITK's DICOM library leaves the C locale, in which Python reads and writes text as ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


@locale_kept()
def read_source(path: Path) -> Source:
    """The source, without reading voxels."""
    if path.is_dir():
        return _read_series(path, voxels=False)[0]
    with reading(path, "not readable"):
        return _source(_information(path), path)


@locale_kept()
def read(path: Path) -> tuple[Source, np.ndarray]:
    """The source, and voxels (X, Y, Z, C) in the axes of the file."""
    if path.is_dir():
        return _read_series(path, voxels=True)
    with reading(path, "truncated or damaged"):
        reader = _information(path)
        source = _source(reader, path)
        _check_content(path, _claimed(reader, source.dtype))
        array = _sitk(path).GetArrayFromImage(reader.Execute())
    if reader.GetNumberOfComponents() == 1 and len(reader.GetSize()) < 4:
        array = array[..., None]
    elif len(reader.GetSize()) == 4:
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3:  # (Y, X, C)
        array = array[None]
    return source, array.transpose(2, 1, 0, 3)


def _information(path: Path, io: str = "") -> Any:
    if not path.is_file():
        raise FileNotFoundError(path)
    reader = _sitk(path).ImageFileReader()
    reader.SetFileName(str(path))
    if io:
        reader.SetImageIO(io)
    reader.ReadImageInformation()
    return reader


def _source(reader: Any, path: Path) -> Source:
    size = [int(n) for n in reader.GetSize()]
    check_shape(tuple(size), path)
    dtype, components = _dtype(reader, path), int(reader.GetNumberOfComponents())
    if len(size) not in (2, 3, 4) or (len(size) == 4 and components > 1):
        raise UserError(f"{path}: must have three axes, or a fourth for channels, got shape {tuple(size)}")
    channels = size[3] if len(size) == 4 else components
    check_claim(path, _claimed(reader, dtype), _bytes_of(path))
    axes = min(len(size), 3)
    affine = np.eye(4)
    direction = np.array(reader.GetDirection()).reshape(len(size), len(size))[:axes, :axes]
    affine[:axes, :axes] = direction * np.array(reader.GetSpacing())[:axes]
    affine[:axes, 3] = reader.GetOrigin()[:axes]
    shape = (size[0], size[1], size[2] if axes == 3 else 1)
    return Source(path, "itk", shape, axes, channels, dtype, check_affine(LPS_TO_RAS @ affine, path))


def _dtype(reader: Any, path: Path) -> np.dtype:
    sitk = _sitk(path)
    name = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if "complex" in name.lower():
        raise UserError(f"{path}: must have real numbers, got {name} voxels")
    word = name.replace("vector of ", "")
    kinds = {
        "8-bit unsigned integer": np.uint8,
        "8-bit signed integer": np.int8,
        "16-bit unsigned integer": np.uint16,
        "16-bit signed integer": np.int16,
        "32-bit unsigned integer": np.uint32,
        "32-bit signed integer": np.int32,
        "64-bit unsigned integer": np.uint64,
        "64-bit signed integer": np.int64,
        "32-bit float": np.float32,
        "64-bit float": np.float64,
    }
    if word not in kinds:
        raise UserError(f"{path}: must have numbers as voxels, got {name}")
    return np.dtype(kinds[word])


def _claimed(reader: Any, dtype: np.dtype) -> int:
    """The number of bytes that the voxels have by the header."""
    return int(np.prod(reader.GetSize(), dtype=object)) * int(reader.GetNumberOfComponents()) * dtype.itemsize


def _check_content(path: Path, claimed: int) -> None:
    """Checks that all voxels of a header are there, and those of a compressed file by its checksum."""
    content = path.read_bytes()
    end = re.search(
        rb"\r?\n\r?\n" if suffix_of(path) == ".nrrd" else rb"ElementDataFile\s*=\s*([^\r\n]*)\r?\n?", content
    )
    if not end:
        return
    header = content[: end.start()].decode("latin-1")
    if suffix_of(path) == ".nrrd":
        if re.search(r"(?im)^(byte ?skip|line ?skip):", header):
            return  # at an offset
        encoding = re.search(r"(?im)^encoding:\s*(\w+)", header)
        kind = {"gz": "gzip", "bz2": "bzip2"}.get(encoding[1].lower(), encoding[1].lower()) if encoding else "raw"
        voxels = content[end.end() :] if not (beside := voxel_files(path)) else beside[0].read_bytes()
    else:
        kind = "zlib" if re.search(r"(?im)^CompressedData\s*=\s*True", header) else "raw"
        if re.search(r"(?im)^HeaderSize\s*=\s*-?[1-9]", header):
            return
        voxels = content[end.end() :] if not (beside := voxel_files(path)) else beside[0].read_bytes()
    del content
    if kind not in ("raw", "gzip", "bzip2", "zlib"):
        return
    there = len(voxels) if kind == "raw" else _decompressed_size(kind, voxels)
    if there != claimed:
        raise UserError(f"{path}: truncated or damaged: its header claims {claimed} bytes of voxels, {there} are there")


def _decompressed_size(kind: str, voxels: bytes) -> int:
    """The number of bytes after decompression. Voxels are read to the end, where the checksum is."""
    if kind == "zlib":
        stream, size = zlib.decompressobj(), 0
        for first in range(0, len(voxels), 1 << 20):
            size += len(stream.decompress(voxels[first : first + (1 << 20)]))
        if not stream.eof:
            raise EOFError("the compressed voxels end too early")
        return size
    compressed = io.BytesIO(voxels)
    with gzip.GzipFile(fileobj=compressed) if kind == "gzip" else bz2.BZ2File(compressed) as file:
        return sum(len(chunk) for chunk in iter(lambda: file.read(1 << 20), b""))


def voxel_files(path: Path) -> list[Path]:
    """The files beside a header (.mhd; also .mha and .nrrd may be one) that hold its voxels."""
    name = _voxel_file(path)
    return [path.parent / name] if name else []


def _voxel_file(path: Path) -> str:
    """The file of the voxels, as the header names it; empty if the voxels follow the header."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        start = file.read(LONGEST_HEADER)
        if suffix_of(path) == ".nrrd":
            header = re.split(rb"\r?\n\r?\n", start, maxsplit=1)[0]
            named = re.search(rb"(?im)^data ?file:[ \t]*([^\r\n]*)", header)
        else:
            named = re.search(rb"(?m)^ElementDataFile[ \t]*=[ \t]*([^\r\n]*)", start)
        name = os.fsdecode(named[1].strip()) if named else ""
        return "" if name.upper() == "LOCAL" else name
    return ""


def _bytes_of(path: Path) -> int:
    """The size of the file, and of the one beside it that holds its voxels."""
    size, name = path.stat().st_size, _voxel_file(path)
    if name.startswith("LIST") or "%" in name:  # such files cannot be checked to be complete
        field = "data file:" if suffix_of(path) == ".nrrd" else "ElementDataFile ="
        raise UserError(f"{path}: must have its voxels in one file, got {field} {name}")
    for file in voxel_files(path):
        if not file.is_file():
            raise UserError(f"{path}: its voxels must be in {file}, which is not a file")
        size += file.stat().st_size
    return size


# --- DICOM ----------------------------------------------------------------------------------------------------------


def _read_series(folder: Path, *, voxels: bool) -> tuple[Source, np.ndarray]:
    """One volume: slices in the order of their positions, each scaled by its own slope and intercept."""
    sitk = _sitk(folder)
    with reading(folder, "not readable as a DICOM series"):
        series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
        if len(series) != 1:
            raise UserError(f"{folder}: must hold one DICOM series, got {len(series)}")
        names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])
        files = [path for path in map(Path, names) if not is_hidden(path)]
        return _stack(folder, files, [_information(path, "GDCMImageIO") for path in files], voxels=voxels)


def _stack(folder: Path, files: list[Path], slices: list[Any], *, voxels: bool) -> tuple[Source, np.ndarray]:
    first = slices[0]
    size, direction = first.GetSize(), np.array(first.GetDirection()).reshape(3, 3)
    for file, one in zip(files, slices):
        if len(one.GetSize()) != 3 or one.GetSize()[2] != 1:
            raise UserError(f"{file}: must hold one slice, got shape {one.GetSize()}; multi-frame DICOM is not read")
        if one.GetNumberOfComponents() != 1:
            raise UserError(f"{file}: must have one number per voxel, got {one.GetNumberOfComponents()}")
        if one.GetSize() != size:
            raise UserError(f"{file}: must have the shape of the other slices, {size[:2]}, got {one.GetSize()[:2]}")
        same = np.allclose(np.array(one.GetDirection()).reshape(3, 3), direction, atol=1e-3)
        if not same or not np.allclose(one.GetSpacing()[:2], first.GetSpacing()[:2], rtol=1e-3):
            raise UserError(f"{file}: must have the orientation and pixel spacing of the other slices")
    positions = np.array([np.dot(one.GetOrigin(), direction[:, 2]) for one in slices])
    order = np.argsort(positions, kind="stable")
    distance = _slice_distance(folder, positions[order], float(first.GetSpacing()[2]))
    origins = np.array([slices[index].GetOrigin() for index in order]) - slices[order[0]].GetOrigin()
    shifted = origins - np.outer(origins @ direction[:, 2], direction[:, 2])
    if (shift := np.linalg.norm(shifted, axis=1).max()) > SHIFTED * min(first.GetSpacing()[:2]):
        raise UserError(
            f"{folder}: slices must lie straight behind each other, but are shifted by up to {shift:.3g} mm, as with a "
            "tilted gantry; convert the series first, for example with dcm2niix"
        )
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array([*first.GetSpacing()[:2], distance])
    affine[:3, 3] = slices[order[0]].GetOrigin()
    shape = (int(size[0]), int(size[1]), len(slices))
    dtype = np.dtype(np.float32)
    check_claim(folder, int(np.prod(shape, dtype=object)) * 4, sum(file.stat().st_size for file in files))
    source = Source(folder, "dicom", shape, 3, 1, dtype, check_affine(LPS_TO_RAS @ affine, folder))
    if not voxels:
        return source, np.empty(0, np.float32)
    sitk = _sitk(folder)
    data = np.empty((*shape, 1), np.float32)
    for z, index in enumerate(order):
        with reading(files[index], "truncated or damaged"):
            slices[index].SetOutputPixelType(sitk.sitkFloat32)
            data[:, :, z, 0] = sitk.GetArrayFromImage(slices[index].Execute())[0].T
    return source, data


def _slice_distance(folder: Path, positions: np.ndarray, alone: float) -> float:
    """The distance between slices, in mm; `alone` if there is only one slice."""
    if len(positions) == 1:
        return alone
    steps = np.diff(positions)
    usual = float(np.median(steps))
    if usual <= 0 or steps.min() <= 0:
        raise UserError(f"{folder}: two slices have the same position; a folder must hold one volume")
    if np.abs(steps - usual).max() > UNEVEN * usual + 1e-3:
        raise UserError(
            f"{folder}: slices must be evenly spaced, got distances from {steps.min():g} to {steps.max():g} mm; "
            "is one missing?"
        )
    return float((positions[-1] - positions[0]) / (len(positions) - 1))


# --- writing --------------------------------------------------------------------------------------------------------


@locale_kept()
def write(data: np.ndarray, source: Source, path: Path) -> None:
    """Writes (X, Y, Z) or (X, Y, Z, C) in the axes of the source, compressed."""
    sitk = _sitk(path)
    vector = data.ndim == 4
    array = data.transpose(2, 1, 0, *([3] if vector else []))
    if source.axes == 2:
        array = array[0]
    image = sitk.GetImageFromArray(np.ascontiguousarray(array), isVector=vector)
    affine = LPS_TO_RAS @ source.affine
    spacing = voxel_sizes(affine)
    axes = source.axes
    image.SetSpacing([float(s) for s in spacing[:axes]])
    image.SetOrigin([float(x) for x in affine[:axes, 3]])
    image.SetDirection([float(x) for x in (affine[:3, :3] / spacing)[:axes, :axes].ravel()])
    sitk.WriteImage(image, str(path), True)
