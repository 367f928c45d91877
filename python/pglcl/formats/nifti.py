"""NIfTI, .nii and .nii.gz, with nibabel's headers. Compressed files are read to the end, where their checksum is."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling

from pglcl.errors import UserError, first_line
from pglcl.formats.source import Source, check_affine, check_shape, reading
from pglcl.memory import check_claim

LONGEST_HEADER = 540  # of NIfTI-2; NIfTI-1 has 348
GZIP_MAGIC = b"\x1f\x8b"
IN_MM = {"meter": 1000.0, "mm": 1.0, "micron": 0.001}


def read_source(path: Path) -> Source:
    """The source, without reading voxels."""
    with reading(path, "not readable as NIfTI"), _opened(path) as (file, _):
        return _source(_header(file.read(LONGEST_HEADER), path), path)


def read(path: Path) -> tuple[Source, np.ndarray]:
    """The source, and voxels (X, Y, Z, C) in the axes of the file, scaled as the header says."""
    with reading(path, "not readable as NIfTI"), _opened(path) as (file, compressed):
        start = file.read(LONGEST_HEADER)
        header = _header(start, path)
        source = _source(header, path)
        offset = int(header["vox_offset"]) or len(header.binaryblock) + 4
        count = int(np.prod(source.shape, dtype=object)) * source.channels
        claimed = offset + count * source.dtype.itemsize
        check_claim(path, claimed, path.stat().st_size)
        content = _content(file, start, claimed, path, compressed=compressed)
        stored = np.ndarray(
            (*source.shape, source.channels), source.dtype, buffer=content.data, offset=offset, order="F"
        )
        slope, intercept = header.get_slope_inter()
        return source, stored if slope is None else apply_read_scaling(stored, slope, intercept)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[io.BufferedIOBase, bool]]:
    """The file, decompressed if its first bytes are those of gzip; and whether it was compressed."""
    with path.open("rb") as file:
        compressed = file.read(2) == GZIP_MAGIC
        file.seek(0)
        if not compressed and path.name.lower().endswith(".gz"):
            raise UserError(f"{path}: not readable as NIfTI: its name ends in .gz, but it is not a gzip file")
        try:
            yield (gzip.GzipFile(fileobj=file), True) if compressed else (file, False)
        except (zlib.error, EOFError, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: truncated or damaged: {first_line(error)}") from error


def _header(start: bytes, path: Path) -> nib.Nifti1Header:
    for kind in (nib.Nifti2Header, nib.Nifti1Header):
        size = kind.sizeof_hdr
        if len(start) >= size and size in (int.from_bytes(start[:4], order) for order in ("little", "big")):
            header = kind(start[:size], check=False)  # type: ignore[no-untyped-call]
            break
    else:
        raise UserError(f"{path}: not readable as NIfTI: it does not begin with a NIfTI header")
    magic = header["magic"].item()
    if magic[:3] in (b"ni1", b"ni2"):
        raise UserError(f"{path}: must be NIfTI in one file, got a header whose voxels are in another file (.img)")
    if magic[:3] not in (b"n+1", b"n+2"):
        raise UserError(f"{path}: not readable as NIfTI: the header has no magic string")
    if not 1 <= int(header["dim"][0]) <= 7:
        raise UserError(f"{path}: not readable as NIfTI: the header claims {int(header['dim'][0])} axes")
    if header["pixdim"][0] == 0:
        header["pixdim"][0] = 1  # the standard's meaning of a handedness that is not given
    offset = float(header["vox_offset"])
    if offset and not (size + 4 <= offset < 2**40 and offset == int(offset)):
        raise UserError(f"{path}: truncated or damaged: vox_offset must be at least {size + 4}, got {offset:g}")
    return header


def _source(header: nib.Nifti1Header, path: Path) -> Source:
    shape = [int(n) for n in header.get_data_shape()]
    check_shape(tuple(shape), path)
    axes = len(shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if len(shape) == 5 and shape[3] == 1:  # a vector of each voxel: NIfTI's fifth axis
        del shape[3]
    if axes < 2 or len(shape) > 4:
        raise UserError(f"{path}: must have three axes, or a fourth for channels, got shape {tuple(shape)}")
    try:
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError) as error:
        raise UserError(f"{path}: unknown datatype, number {int(header['datatype'])}") from error
    if dtype.fields is not None:
        raise UserError(f"{path}: must have one number per voxel, got {''.join(dtype.names).upper()} colours")
    if dtype.kind == "c":
        raise UserError(f"{path}: must have real numbers, got complex voxels ({dtype.name})")
    if dtype.kind not in "iuf":
        raise UserError(f"{path}: unknown datatype: {dtype}")
    shape += [1] * (4 - len(shape))
    with reading(path, "the affine is not usable"):
        affine = np.asarray(header.get_best_affine(), np.float64)
    spatial = (shape[0], shape[1], shape[2])
    scale = IN_MM.get(_units(header)[0], 1.0)
    return Source(
        path, "nifti", spatial, min(axes, 3), shape[3], dtype, check_affine(affine, path), scale=scale, native=header
    )


def _units(header: nib.Nifti1Header) -> tuple[str, str]:
    try:
        space, time = header.get_xyzt_units()
        return str(space), str(time)
    except KeyError:  # a code that NIfTI does not know
        return "unknown", "unknown"


def names_time(source: Source) -> bool:
    """Whether the header of a NIfTI file gives its fourth axis a unit of time."""
    return isinstance(source.native, nib.Nifti1Header) and _units(source.native)[1] in ("sec", "msec", "usec")


def says_orientation(source: Source) -> bool:
    """Whether the header of a NIfTI file says which way its axes point; without, they are taken as L, A, S."""
    header = source.native
    return isinstance(header, nib.Nifti1Header) and bool(header["sform_code"] > 0 or header["qform_code"] > 0)


def _content(file: io.BufferedIOBase, start: bytes, claimed: int, path: Path, *, compressed: bool) -> np.ndarray:
    """The first `claimed` bytes. The system gives memory only as they are read. The rest is read for the checksum."""
    content = np.empty(max(claimed, len(start)), np.uint8)
    content[: len(start)] = np.frombuffer(start, np.uint8)
    filled = len(start)
    view = memoryview(content.data)
    while filled < claimed:
        got = file.readinto(view[filled : filled + (1 << 24)])
        if not got:
            raise UserError(f"{path}: truncated or damaged: its header claims {claimed} bytes, {filled} are there")
        filled += got
    more = max(0, filled - claimed)
    while chunk := file.read(1 << 24):
        more += len(chunk)
    if more and not compressed:  # no checksum tells whether the header is right
        raise UserError(f"{path}: damaged: it has {more} bytes more than its header claims")
    return content


def write(data: np.ndarray, source: Source, path: Path) -> None:
    """Writes (X, Y, Z) or (X, Y, Z, C) in the axes of the source, with its affine and header geometry."""
    old = source.native if isinstance(source.native, nib.Nifti1Header) else None
    if source.axes == 2 and data.ndim == 3:
        data = data[..., 0]
    wide = isinstance(old, nib.Nifti2Header) or max(data.shape) > 32767  # the largest side of NIfTI-1
    kind = nib.Nifti2Image if wide else nib.Nifti1Image
    image = kind(data, source.affine)  # type: ignore[no-untyped-call]
    header = image.header
    if old is None:
        header.set_qform(source.affine, 1)
        header.set_sform(source.affine, 1)
        header.set_xyzt_units("mm" if source.unit == "mm" else "unknown")
    else:
        _copy_geometry(old, header, source)
    nib.save(image, path)


def _copy_geometry(old: nib.Nifti1Header, header: nib.Nifti1Header, source: Source) -> None:
    try:
        header.set_qform(old.get_qform(), int(old["qform_code"]))
    except Exception:  # nibabel raises several kinds of errors for a damaged qform; the affine comes from the sform
        header.set_qform(source.affine, 0)
    try:
        header.set_sform(source.affine if old["sform_code"] <= 0 else old.get_sform(), int(old["sform_code"]))
    except KeyError:  # a code that NIfTI does not know
        header.set_sform(source.affine, 1)
    spatial = np.asarray(old["pixdim"][1:4], np.float64)
    if not (np.isfinite(spatial).all() and (spatial > 0).all()):
        spatial = voxel_sizes(source.affine)
    header.set_zooms([*spatial, *[1.0] * 4][: len(header.get_data_shape())])
    header.set_xyzt_units(*_units(old))
