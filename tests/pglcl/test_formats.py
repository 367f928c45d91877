"""Each kind of file: read, refused where it is damaged, and written back in the geometry of its image."""

from __future__ import annotations

import gzip
import locale
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pglcl import formats
from pglcl.errors import UserError
from pglcl.labels import LabelMap
from pglcl.training_data import files_of
from pglcl.volumes import read_label_values, read_volume, write_like

from tests.pglcl.folders import OBLIQUE, STRAIGHT, dicom, save, volume, write

VOXELS = (volume(0)[0] * 10 - 1000).round().astype(np.int16)


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_volume([path])
    (line,) = error.value.lines
    assert path.name.split("_0")[0] in line
    assert "\n" not in line
    return line


# --- NIfTI ----------------------------------------------------------------------------------------------------------


def test_one_flipped_bit_of_a_compressed_file_is_refused_or_harmless(tmp_path: Path) -> None:
    good = save(tmp_path / "a.nii.gz", VOXELS[:12, :10], OBLIQUE)
    content, expected = good.read_bytes(), read_volume([good])
    random = np.random.default_rng(0)
    places = [*range(80), *random.integers(80, 8 * len(content), 250).tolist()]  # the whole gzip header, and a draw
    places += range(8 * (len(content) - 8), 8 * len(content))  # checksum and length
    harmless = 0
    for place in places:
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        (tmp_path / "b.nii.gz").write_bytes(changed)
        try:
            read = read_volume([tmp_path / "b.nii.gz"])
        except UserError:
            continue
        harmless += 1  # the time, the system and the name in the gzip header
        np.testing.assert_array_equal(read.data, expected.data)
        np.testing.assert_array_equal(read.source.affine, expected.source.affine)
    assert harmless < 80


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd", ".png", ".tif", ".h5"])
def test_an_empty_file_is_called_empty(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"case{suffix}"
    path.write_bytes(b"")
    for read in (formats.read, formats.read_source):
        with pytest.raises(UserError, match=r"case\.\S+: the file is empty \(0 bytes\)"):
            read(path)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_a_file_truncated_anywhere_is_refused(ending: str, tmp_path: Path) -> None:
    content = save(tmp_path / f"a{ending}", VOXELS[:12, :10], OBLIQUE).read_bytes()
    for length in {0, 1, 10, 100, 347, 348, 352, 400, len(content) // 2, len(content) - 9, len(content) - 1}:
        if length < len(content):
            (tmp_path / f"b{ending}").write_bytes(content[:length])
            refused(tmp_path / f"b{ending}")


def header_change(**fields: object) -> Callable[[nib.Nifti1Header], None]:
    def change(header: nib.Nifti1Header) -> None:
        for name, value in fields.items():
            header[name] = value

    return change


BAD_HEADERS = {
    "unknown datatype, number 77": header_change(datatype=77),
    "complex": header_change(datatype=32, bitpix=64),
    "RGB": header_change(datatype=128, bitpix=24),
    "RGBA": header_change(datatype=2304, bitpix=32),
    "vox_offset must be at least 352, got -8": header_change(vox_offset=-8),
    "vox_offset must be at least 352, got nan": header_change(vox_offset=np.nan),
    "vox_offset must be at least 352, got 100": header_change(vox_offset=100),
    "NaN or infinite": header_change(srow_x=[np.nan, 0, 0, 0]),
    "affine is singular": header_change(srow_x=[0, 0, 0, 0]),
    "affine is not usable": header_change(sform_code=0, qform_code=1, quatern_b=7.0),
    "NaN or infinite ": header_change(sform_code=0, qform_code=0, pixdim=[1, np.nan, 1, 1, 1, 1, 1, 1]),
    "has no voxels": header_change(dim=[3, 30, 0, 5, 1, 1, 1, 1]),
    "has no voxels, ": header_change(dim=[3, 30, -4, 5, 1, 1, 1, 1]),
    "axes": header_change(dim=[9, 30, 26, 5, 1, 1, 1, 1]),
    "must have three axes": header_change(dim=[6, 30, 1, 1, 2, 13, 5, 1]),
    "its header claims": header_change(dim=[3, 3000, 26, 5, 1, 1, 1, 1]),
    "bytes more than its header claims": header_change(dim=[3, 29, 26, 5, 1, 1, 1, 1]),
    "no magic string": header_change(magic=b"abc"),
    "a header whose voxels are in another file": header_change(magic=b"ni1"),
}


def rewritten(path: Path, change: Callable[[nib.Nifti1Header], None]) -> Path:
    content = bytearray(path.read_bytes())
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    change(header)
    content[:348] = header.binaryblock
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("message", BAD_HEADERS)
def test_headers_that_are_refused(message: str, tmp_path: Path) -> None:
    path = rewritten(save(tmp_path / "a.nii", VOXELS, OBLIQUE), BAD_HEADERS[message])
    assert message.strip() in refused(path)


HARMLESS = {
    "a qform of garbage beside a good sform": header_change(qform_code=1, quatern_b=np.nan, quatern_c=8),
    "NaN pixdim beside a good sform": header_change(pixdim=[np.nan] * 8),
    "a code for the sform that is unknown": header_change(sform_code=77),
    "a code for units that is unknown": header_change(xyzt_units=37),
    "a NaN slope, which means none": header_change(scl_slope=np.nan),
    "vox_offset 0, which means after the header": header_change(vox_offset=0),
    "bitpix of another type": header_change(bitpix=8),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_headers_that_are_read_and_written(case: str, tmp_path: Path) -> None:
    path = rewritten(save(tmp_path / "a.nii", VOXELS, OBLIQUE), HARMLESS[case])
    read = read_volume([path])
    np.testing.assert_allclose(read.source.affine, OBLIQUE, atol=1e-6)
    write_like(read.data[0], read.source, tmp_path / "b.nii.gz")
    back = nib.load(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(np.asarray(back.dataobj), VOXELS)
    np.testing.assert_allclose(back.affine, OBLIQUE, atol=1e-5)
    assert np.isfinite(back.header["pixdim"]).all()


def test_a_qform_without_a_handedness_is_read_as_the_standard_says(tmp_path: Path) -> None:
    """pixdim[0] is 0 in many old files; by the standard, it then counts as 1."""
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    path = rewritten(save(tmp_path / "a.nii", VOXELS, affine), header_change(sform_code=0, qform_code=1))
    zooms = [0, 2, 3, 4, 1, 1, 1, 1]
    rewritten(path, header_change(pixdim=zooms))
    read = read_volume([path])
    np.testing.assert_allclose(read.source.affine, affine, atol=1e-6)
    write_like(read.data[0], read.source, tmp_path / "b.nii.gz")
    np.testing.assert_allclose(nib.load(tmp_path / "b.nii.gz").affine, affine, atol=1e-6)


def test_a_small_file_with_a_large_claim_allocates_nothing(tmp_path: Path) -> None:
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((1500, 1500, 1500))
    header["vox_offset"], header["magic"] = 352, b"n+1"
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(bytes(header.binaryblock)))
    assert path.stat().st_size < 200
    tracemalloc.start()
    assert "its header claims 6.29 GiB of voxels" in refused(path)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_scaled_values_and_shapes_of_two_to_four_axes_are_read(tmp_path: Path) -> None:
    image = nib.Nifti1Image(VOXELS, OBLIQUE)
    image.header.set_slope_inter(0.5, -3)
    nib.save(image, tmp_path / "a.nii.gz")
    stored = np.asarray(nib.as_closest_canonical(nib.load(tmp_path / "a.nii.gz")).dataobj, dtype=np.float32)
    np.testing.assert_array_equal(read_volume([tmp_path / "a.nii.gz"]).data[0], stored)
    for shape in ((30, 26), (30, 26, 1), (30, 26, 1, 1)):
        path = save(tmp_path / "b.nii.gz", VOXELS[:, :, 2].reshape(shape), np.eye(4))
        assert read_volume([path]).data.shape == (1, 30, 26, 1)
    vectors = save(tmp_path / "c.nii.gz", np.stack([VOXELS, VOXELS + 1], axis=-1)[:, :, :, None], np.eye(4))
    assert read_volume([vectors]).data.shape == (2, 30, 26, 5)
    flat = read_volume([save(tmp_path / "d.nii.gz", VOXELS[:, :, 2], np.eye(4))])
    write_like(flat.data[0], flat.source, tmp_path / "e.nii.gz")
    assert nib.load(tmp_path / "e.nii.gz").shape == (30, 26)
    double = save(tmp_path / "f.nii.gz", np.full((4, 4, 4), 1e200), np.eye(4))
    assert "64 voxels beyond the range of float32" in refused(double)
    nib.save(nib.Nifti2Image(VOXELS, OBLIQUE), tmp_path / "g.nii.gz")
    second = read_volume([tmp_path / "g.nii.gz"])
    write_like(second.data[0], second.source, tmp_path / "h.nii.gz")
    assert isinstance(nib.load(tmp_path / "h.nii.gz"), nib.Nifti2Image)


def test_spacing_in_microns_is_read_as_mm(tmp_path: Path) -> None:
    image = nib.Nifti1Image(VOXELS, np.diag([500.0, 700, 900, 1]))
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "a.nii")
    np.testing.assert_allclose(read_volume([tmp_path / "a.nii"]).spacing, (0.5, 0.7, 0.9))


# --- the others -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".mhd"])
def test_a_volume_is_read_equally_in_every_format(ending: str, tmp_path: Path) -> None:
    expected = read_volume([save(tmp_path / "a.nii.gz", VOXELS, STRAIGHT)])
    path = write(tmp_path / f"b{ending}", VOXELS, STRAIGHT)
    read = read_volume([path])
    np.testing.assert_array_equal(read.data, expected.data)
    np.testing.assert_allclose(read.source.affine, expected.source.affine, atol=1e-5)
    np.testing.assert_allclose(read.spacing, expected.spacing, rtol=1e-6)
    mask = (read.data[0] > 0).astype(np.uint8)
    suffix = formats.result_suffix(path, mask.dtype)
    assert suffix == {".mhd": ".mha"}.get(ending, ending)
    write_like(mask, read.source, tmp_path / f"c{suffix}")
    back = read_volume([tmp_path / f"c{suffix}"])
    np.testing.assert_array_equal(back.data[0], mask)
    np.testing.assert_allclose(back.source.affine, read.source.affine, atol=1e-6)
    chances = np.stack([read.data[0], -read.data[0]], axis=-1)
    write_like(chances, read.source, tmp_path / f"d{suffix}")
    np.testing.assert_array_equal(read_volume([tmp_path / f"d{suffix}"]).data, np.moveaxis(chances, -1, 0))


def test_a_renamed_file_of_voxels_is_found_by_its_header(tmp_path: Path) -> None:
    """A run knows the hash of the file that holds the voxels, whatever its name."""
    path = write(tmp_path / "a.mhd", VOXELS, STRAIGHT)
    (voxels,) = files_of(path)[1:]
    expected, renamed = read_volume([path]).data, tmp_path / f"voxels{voxels.suffix}"
    voxels.rename(renamed)
    header = path.read_text().replace(voxels.name, renamed.name)
    path.write_text(header)
    np.testing.assert_array_equal(read_volume([path]).data, expected)
    assert files_of(path) == [path, renamed]
    for name in ("LIST", "slice%03d.raw 1 5 1"):
        path.write_text(header.replace(renamed.name, name))
        assert refused(path).endswith(f"must have its voxels in one file, got ElementDataFile = {name}")
    path.write_text(header.replace(renamed.name, "gone.raw"))
    assert refused(path).endswith("gone.raw, which is not a file")


@pytest.mark.parametrize("ending", [".mha", ".nrrd"])
def test_voxels_in_a_file_beside_mha_and_nrrd_are_checked(ending: str, tmp_path: Path) -> None:
    """Otherwise a run would not see that they change, nor a reader that half of them is gone."""
    voxels, path = tmp_path / "voxels.raw", tmp_path / f"a{ending}"
    whole = write(tmp_path / "whole.nii.gz", VOXELS, np.diag([-1.0, -1, 1, 1]))
    voxels.write_bytes(VOXELS.tobytes(order="F"))
    size = " ".join(map(str, VOXELS.shape))
    text = {
        ".mha": f"ObjectType = Image\nNDims = 3\nDimSize = {size}\nElementType = MET_SHORT\nElementDataFile = FILE\n",
        ".nrrd": "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\n"
        f"sizes: {size}\nspace directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\nendian: little\n"
        "encoding: raw\ndata file: FILE\n\n",
    }[ending]
    path.write_text(text.replace("FILE", "voxels.raw"))
    np.testing.assert_array_equal(read_volume([path]).data, read_volume([whole]).data)
    assert files_of(path) == [path, voxels]
    voxels.write_bytes(VOXELS.tobytes(order="F")[:-100])
    assert "damaged" in refused(path)
    path.write_text(text.replace("FILE", "LIST"))
    refused(path)
    path.write_text(text.replace("FILE", "gone.raw"))
    assert "gone.raw" in refused(path)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".png", ".h5"])
def test_a_pipe_is_refused_in_every_format(ending: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"a{ending}")
    assert refused(tmp_path / f"a{ending}").endswith("must be a file, is a named pipe")


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_damaged_compressed_voxels_are_refused(ending: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a{ending}", VOXELS, STRAIGHT)
    content = path.read_bytes()
    for place in range(len(content) - 1500, len(content), 37):
        changed = bytearray(content)
        changed[place] ^= 16
        path.write_bytes(changed)
        assert "damaged" in refused(path)
    path.write_bytes(content[:-600])
    refused(path)


def test_dicom_slices_are_ordered_by_position_and_scaled(tmp_path: Path) -> None:
    folder = dicom(tmp_path / "scan", 2 * VOXELS - 100, STRAIGHT, slope=2, intercept=-100)
    (folder / "._000.dcm").write_bytes(b"macOS")
    expected = read_volume([save(tmp_path / "a.nii.gz", VOXELS, STRAIGHT)])
    before = locale.setlocale(locale.LC_ALL)
    read = read_volume([folder])
    assert locale.setlocale(locale.LC_ALL) == before  # ITK's DICOM library changes it
    np.testing.assert_array_equal(read.data, 2 * expected.data - 100)
    np.testing.assert_allclose(read.spacing, expected.spacing, rtol=1e-5)
    assert formats.result_suffix(folder, np.dtype(np.uint8)) == ".nii.gz"
    mask = (read.data[0] > 0).astype(np.uint8)
    write_like(mask, read.source, tmp_path / "mask.nii.gz")
    back = nib.as_closest_canonical(nib.load(tmp_path / "mask.nii.gz"))
    np.testing.assert_array_equal(np.asarray(back.dataobj), mask)
    np.testing.assert_allclose(back.affine, nib.as_closest_canonical(nib.load(tmp_path / "a.nii.gz")).affine, atol=1e-4)
    assert (read_label_values(tmp_path / "mask.nii.gz", folder) == mask).all()


def test_dicom_folders_that_are_refused(tmp_path: Path) -> None:
    folder = dicom(tmp_path / "scan", VOXELS, STRAIGHT)
    files = sorted(folder.iterdir())
    inner = [f for f in files if formats.itk._information(f, "GDCMImageIO").GetMetaData("0020|0013")][2]
    content = inner.read_bytes()
    twin = folder / "twin.dcm"
    twin.write_bytes(content)
    assert "two slices have the same position" in refused(folder)
    twin.unlink()
    other = dicom(tmp_path / "another", VOXELS[:20, :20], STRAIGHT)
    copied = folder / "other.dcm"
    copied.write_bytes((other / "000.dcm").read_bytes())
    assert "must hold one DICOM series, got 2" in refused(folder)
    copied.unlink()
    positions = {f: np.dot(formats.itk._information(f, "GDCMImageIO").GetOrigin(), [0, 0, 1]) for f in files}
    middle = sorted(files, key=positions.__getitem__)[2]
    middle.unlink()
    assert "is one missing?" in refused(folder)


def test_dicom_of_a_tilted_gantry_is_refused(tmp_path: Path) -> None:
    """Read as straight, its last slice would lie beside its place; a mask as well."""
    tilted = STRAIGHT.copy()
    tilted[:3, 2] += 0.3 * STRAIGHT[:3, 0]
    assert "slices must lie straight behind each other, but are shifted by up to 1.68 mm" in refused(
        dicom(tmp_path / "scan", VOXELS, tilted)
    )


def test_hidden_files_of_a_dicom_folder_are_not_read(tmp_path: Path) -> None:
    """A file manager may leave one at any time, for example between the start of a run and its resume."""
    folder = dicom(tmp_path / "scan", VOXELS, STRAIGHT)
    before = files_of(folder)
    (folder / ".DS_Store").write_bytes(b"macOS")
    (folder / ".copy.dcm").write_bytes((folder / "000.dcm").read_bytes())
    assert sorted(files_of(folder)) == sorted(before)
    assert read_volume([folder]).data.shape == (1, 26, 30, 5)


PICTURES = {
    ("grey.png", "L"): np.arange(48, dtype=np.uint8).reshape(6, 8),
    ("wide.png", "I;16"): np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000,
    ("colour.png", "RGB"): np.arange(144, dtype=np.uint8).reshape(6, 8, 3),
    ("colour.bmp", "RGB"): np.arange(144, dtype=np.uint8).reshape(6, 8, 3),
    ("colour.tif", "RGB"): np.arange(144, dtype=np.uint8).reshape(6, 8, 3),
    ("float.tiff", "F"): np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8),
    ("wide.tif", "I;16"): np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000,
}


@pytest.mark.parametrize("case", PICTURES, ids=lambda c: c[0])
def test_pictures_are_read_and_written(case: tuple[str, str], tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    data = PICTURES[case]
    path = tmp_path / case[0]
    image.fromarray(data).save(path)
    read = read_volume([path])
    assert read.data.shape == (1 if data.ndim == 2 else 3, 6, 8, 1)
    np.testing.assert_array_equal(np.moveaxis(read.data[..., 0], 0, -1).squeeze(), data.astype(np.float32))
    assert (read.source.unit, read.spacing) == ("pixel", (1, 1, 1))
    for values in ((0, 85, 255), (0, 500, 600)):
        mask = np.array(values, np.uint8 if values[-1] < 256 else np.uint16)[np.arange(48).reshape(6, 8, 1) % 3]
        suffix = formats.result_suffix(path, mask.dtype)
        assert suffix == (
            ".tif" if "tif" in path.suffix else ".bmp" if path.suffix == ".bmp" and values[-1] < 256 else ".png"
        )
        write_like(mask, read.source, tmp_path / f"mask{suffix}")
        np.testing.assert_array_equal(read_label_values(tmp_path / f"mask{suffix}", path), mask)
    for values in ((0, 1, 70000), (-1, 0, 3)):  # PNG cannot hold these
        kept = LabelMap(tuple((value,) for value in values), ("a", "b", "c"))
        mask = kept.decode(np.arange(48).reshape(6, 8, 1) % 3)
        assert formats.result_suffix(path, mask.dtype) == ".tif"
        write_like(mask, read.source, tmp_path / "mask.tif")
        np.testing.assert_array_equal(read_label_values(tmp_path / "mask.tif", path), mask)
    chances = np.random.default_rng(0).random((6, 8, 1, 4), np.float32)
    assert formats.result_suffix(path, chances.dtype) == ".tif"
    write_like(chances, read.source, tmp_path / "p.tif")
    np.testing.assert_array_equal(read_volume([tmp_path / "p.tif"]).data[0], chances[:, :, 0])


def test_label_pictures_keep_their_numbers_and_jpeg_labels_are_refused(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    image.fromarray(grey).save(tmp_path / "image.png")
    image.fromarray(grey).save(tmp_path / "label.jpg")
    with pytest.raises(UserError, match="JPEG changes values and cannot be a label"):
        read_label_values(tmp_path / "label.jpg", tmp_path / "image.png")
    assert read_volume([tmp_path / "label.jpg"]).data.shape == (1, 6, 8, 1)
    assert formats.result_suffix(tmp_path / "label.jpg", np.dtype(np.uint8)) == ".png"
    image.fromarray(np.stack([grey, grey, grey[::-1]], axis=-1)).save(tmp_path / "colours.png")
    with pytest.raises(UserError, match="a label must have one channel, got colours"):
        read_label_values(tmp_path / "colours.png", tmp_path / "image.png")
    image.fromarray(np.stack([grey] * 3, axis=-1)).save(tmp_path / "same.png")
    np.testing.assert_array_equal(read_label_values(tmp_path / "same.png", tmp_path / "image.png")[..., 0], grey)
    palette = image.fromarray((grey % 3).astype(np.uint8))
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_label_values(tmp_path / "palette.png", tmp_path / "image.png")[..., 0], grey % 3)
    two_bits = image.fromarray(grey % 3)
    two_bits.save(tmp_path / "bits.png", bits=2)
    np.testing.assert_array_equal(read_label_values(tmp_path / "bits.png", tmp_path / "image.png")[..., 0], grey % 3)
    one_bit = image.fromarray(grey % 2 == 1)
    one_bit.save(tmp_path / "bit.png")
    np.testing.assert_array_equal(read_label_values(tmp_path / "bit.png", tmp_path / "image.png")[..., 0], grey % 2)
    with_alpha = image.fromarray(np.stack([grey, grey, grey, np.full_like(grey, 255)], axis=-1))
    with_alpha.save(tmp_path / "alpha.png")
    assert read_volume([tmp_path / "alpha.png"]).data.shape == (3, 6, 8, 1)
    image.fromarray(grey[:, :5]).save(tmp_path / "small.png")
    with pytest.raises(UserError, match="must have the shape of its image"):
        read_label_values(tmp_path / "small.png", tmp_path / "image.png")


@pytest.mark.parametrize("ending", [".jpg", ".png", ".tif"])
def test_pictures_that_are_stored_turned_are_refused(ending: str, tmp_path: Path) -> None:
    """A camera's turn: programs that heed it and those that do not draw masks in two ways."""
    image = pytest.importorskip("PIL.Image")
    picture = image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8))
    path = tmp_path / f"a{ending}"
    for orientation in (0, 1, 3, 6):
        exif = image.Exif()
        exif[274] = orientation
        picture.save(path, exif=exif)
        if orientation < 2:
            assert read_volume([path]).data.shape == (1, 6, 8, 1)
        else:
            assert f"is stored turned or mirrored (EXIF orientation {orientation})" in refused(path)


def test_a_mask_whose_white_is_0_is_refused(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    mask = np.arange(48, dtype=np.uint8).reshape(6, 8) % 2 * 255
    image.fromarray(mask).save(tmp_path / "image.png")
    image.fromarray(mask).save(tmp_path / "mask.tif", tiffinfo={262: 0})
    with pytest.raises(UserError, match=r"mask\.tif: stores white as 0"):
        read_label_values(tmp_path / "mask.tif", tmp_path / "image.png")
    np.testing.assert_array_equal(read_volume([tmp_path / "mask.tif"]).data[0, ..., 0], mask)


@pytest.mark.parametrize("ending", [".png", ".tif", ".bmp"])
def test_a_jpeg_mask_with_another_suffix_is_refused(ending: str, tmp_path: Path) -> None:
    """JPEG turns a mask of 0 and 200 into many values near them, which would be classes."""
    image = pytest.importorskip("PIL.Image")
    mask = image.fromarray((np.arange(48, dtype=np.uint8).reshape(6, 8) % 2) * 200)
    mask.save(tmp_path / "image.png")
    mask.save(tmp_path / "mask.jpg")
    (tmp_path / "mask.jpg").rename(tmp_path / f"mask{ending}")
    with pytest.raises(UserError, match="is stored as JPEG, which can change values, and cannot be a label"):
        read_label_values(tmp_path / f"mask{ending}", tmp_path / "image.png")
    assert read_volume([tmp_path / f"mask{ending}"]).data.shape == (1, 6, 8, 1)


def test_a_mask_in_a_tiff_with_jpeg_compression_is_refused(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    mask = image.fromarray((np.arange(48, dtype=np.uint8).reshape(6, 8) % 2) * 200)
    mask.save(tmp_path / "image.png")
    mask.save(tmp_path / "mask.tif", compression="jpeg")
    with pytest.raises(UserError, match="is stored as JPEG, which can change values"):
        read_label_values(tmp_path / "mask.tif", tmp_path / "image.png")
    mask.save(tmp_path / "mask.tif", compression="tiff_lzw")
    assert set(read_label_values(tmp_path / "mask.tif", tmp_path / "image.png").flat) == {0, 200}


def test_a_mask_whose_transparency_matters_is_refused(tmp_path: Path) -> None:
    """A mask that was painted on a transparent layer may have its shape in the transparency alone."""
    image = pytest.importorskip("PIL.Image")
    inside = np.arange(48).reshape(6, 8) % 3 == 0
    image.fromarray(inside).save(tmp_path / "image.png")

    def read(value: int, alpha: np.ndarray) -> np.ndarray:
        grey = np.where(inside, 200, value)
        layers = np.stack([grey, grey, grey, alpha], axis=-1).astype(np.uint8)
        image.fromarray(layers, "RGBA").save(tmp_path / "mask.png")
        return read_label_values(tmp_path / "mask.png", tmp_path / "image.png")[..., 0]

    for value, alpha in ((0, np.full((6, 8), 255)), (0, inside * 255)):
        np.testing.assert_array_equal(read(value, alpha), inside * 200)
    for value, alpha in ((200, inside * 255), (0, ~inside * 255), (0, inside * 100)):
        with pytest.raises(UserError, match="is partly transparent"):
            read(value, alpha)
    image.fromarray(np.stack([inside * 0, inside * 255], axis=-1).astype(np.uint8), "LA").save(tmp_path / "mask.png")
    with pytest.raises(UserError, match="is partly transparent"):
        read_label_values(tmp_path / "mask.png", tmp_path / "image.png")


def png_of_16_bit_colours(path: Path) -> Path:
    """Pillow can read such a file, but not write it."""
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + bytes(range(24)) for _ in range(4))
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    return path


def test_colours_of_16_bits_are_refused_by_name(tmp_path: Path) -> None:
    assert "several channels of 16 bits" in refused(png_of_16_bit_colours(tmp_path / "a.png"))


def test_one_flipped_bit_of_a_png_is_refused_or_harmless(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "a.png"
    image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20), dtype=np.uint8)).save(path)
    content, expected = path.read_bytes(), read_volume([path]).data
    for place in range(0, 8 * len(content), 41):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            read = read_volume([path])
        except UserError:
            continue
        assert place // 8 >= len(content) - 12  # the end marker, after all bytes that are read
        np.testing.assert_array_equal(read.data, expected)


def test_a_missing_reader_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.nrrd", VOXELS, STRAIGHT)
    monkeypatch.setitem(__import__("sys").modules, "SimpleITK", None)
    with pytest.raises(UserError, match=r'read with SimpleITK, which is missing; pip install "\.\[formats\]"'):
        read_volume([path])


def test_channels_must_share_a_grid(tmp_path: Path) -> None:
    first = save(tmp_path / "a_0000.nii.gz", VOXELS, OBLIQUE)
    shifted = OBLIQUE.copy()
    shifted[0, 3] += 3
    with pytest.raises(UserError, match=r"must have the affine of the first channel, a_0000\.nii\.gz: corners"):
        read_volume([first, save(tmp_path / "a_0001.nii.gz", VOXELS, shifted)])
    shifted[0, 3] = OBLIQUE[0, 3] + 0.01
    assert read_volume([first, save(tmp_path / "a_0001.nii.gz", VOXELS, shifted)]).data.shape[0] == 2
