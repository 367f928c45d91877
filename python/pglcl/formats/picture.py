"""PNG, BMP, TIFF and JPEG with Pillow: grey or RGB, one picture or a stack of pages."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from pglcl.errors import UserError
from pglcl.formats.names import suffix_of
from pglcl.formats.source import Source, library, reading
from pglcl.memory import check_claim

GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F")
COLOUR = ("RGB", "RGBA")
ORIENTATION, PHOTOMETRIC, WHITE_IS_ZERO = 274, 262, 0  # tags of EXIF and TIFF, and a value
# Formats, and compressions of TIFF, that can change values; their files often have the suffix of another format.
LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
COMPRESSION = 259
LOSSY_COMPRESSIONS = {6: "JPEG", 7: "JPEG", 33003: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000", 50001: "WebP"}
# Pillow stretches grey values of 2 and 4 bits to 0..255; labels want what was stored.
STRETCHED = {"L;2": 85, "L;4": 17}


def read_source(path: Path, *, label: bool = False) -> Source:
    """The source, without reading voxels."""
    with reading(path, "not readable as a picture"), _opened(path, label=label) as image:
        return _source(image, path, label=label)


def read(path: Path, *, label: bool = False) -> tuple[Source, np.ndarray]:
    """The source, and voxels (rows, columns, pages, C). Transparency is left out; a label has one channel."""
    if suffix_of(path) == ".png":
        with reading(path, "truncated or damaged"), _opened(path, label=label) as image:
            image.verify()  # compares the checksums, which decoding does not
    with reading(path, "truncated or damaged"), _opened(path, label=label) as image:
        source = _source(image, path, label=label)
        pages = []
        for page in range(source.shape[2]):
            if page:
                image.seek(page)
                if _source(image, path, label=label).shape[:2] != source.shape[:2]:
                    raise UserError(f"{path}: page {page} must have the size of the first, {source.shape[:2]}")
            pages.append(_pixels(image, path, label=label))
        if len({p.shape for p in pages}) > 1:
            raise UserError(f"{path}: its pages have different numbers of channels")
        return source, np.stack(pages, axis=2)


def _opened(path: Path, *, label: bool) -> Any:
    if label and suffix_of(path) in (".jpg", ".jpeg"):
        raise UserError(f"{path}: JPEG changes values and cannot be a label; labels are PNG, BMP or TIFF")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # Pillow also raises the errors that it logs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about large pictures, which check_claim compares with the memory
        return library("PIL.Image", "Pillow", path).open(path)


def _source(image: Any, path: Path, *, label: bool) -> Source:
    columns, rows = image.size
    pages = getattr(image, "n_frames", 1)
    if pages > 1 and suffix_of(path) not in (".tif", ".tiff"):
        raise UserError(f"{path}: must be one picture, got an animation of {pages}")
    raw = _raw_mode(image)
    colour = image.mode in COLOUR or (image.mode == "P" and not label)
    if image.mode not in (*GREY, *COLOUR, "P"):
        raise UserError(f"{path}: must be grey or RGB, got mode {image.mode}")
    turned = _orientation(image)
    if turned != 1:
        raise UserError(
            f"{path}: is stored turned or mirrored (EXIF orientation {turned}), so programs disagree on where its mask "
            "lies; store it upright, for example with ImageMagick's mogrify -auto-orient"
        )
    lossy = image.format if image.format in LOSSY else LOSSY_COMPRESSIONS.get(_tag(image, COMPRESSION), "")
    if label and lossy:
        raise UserError(f"{path}: is stored as {lossy}, which can change values, and cannot be a label")
    if label and _tag(image, PHOTOMETRIC) == WHITE_IS_ZERO:
        raise UserError(f"{path}: stores white as 0, so programs disagree on its values; store black as 0")
    if "16" in raw and image.mode in (*COLOUR, "LA"):
        raise UserError(
            f"{path}: has several channels of 16 bits ({raw}), of which Pillow keeps only 8 bits; store it with 8 bits"
        )
    dtype = {"F": np.float32, "I": np.int32}.get(image.mode, np.uint16 if image.mode.startswith("I;16") else np.uint8)
    channels = 3 if colour and not label else 1
    size = rows * columns * pages * channels * np.dtype(dtype).itemsize
    deflated = suffix_of(path) in (".png", ".bmp")
    check_claim(path, size, path.stat().st_size if deflated else None)
    return Source(
        path, "picture", (rows, columns, pages), 2 if pages == 1 else 3, channels, np.dtype(dtype), np.eye(4), "pixel"
    )


def _tag(image: Any, number: int) -> Any:
    """A tag of a TIFF; None where there is none."""
    return getattr(image, "tag_v2", {}).get(number)


def _orientation(image: Any) -> int:
    """The EXIF orientation of a picture; 1 if it is upright. Pillow itself turns a TIFF, but no other file."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # getexif would read all pixels to look for it behind them
    found = int(image.getexif().get(ORIENTATION, 1))
    return found if 2 <= found <= 8 else 1  # other numbers mean nothing, and 0 is often written


def _raw_mode(image: Any) -> str:
    """The mode in which the file stores pixels; Pillow decodes them to `image.mode`."""
    arguments = image.tile[0][3] if image.tile else ""
    return arguments if isinstance(arguments, str) else str(arguments[0]) if arguments else ""


def _pixels(image: Any, path: Path, *, label: bool) -> np.ndarray:
    """(rows, columns, C)."""
    raw = _raw_mode(image)
    if image.mode == "P" and not label:
        image = image.convert("RGB")
    data = np.asarray(image)
    data = data.astype(np.uint8) if data.dtype == bool else data
    data = data[..., None] if data.ndim == 2 else data
    if image.mode in ("LA", "RGBA"):
        if label and _transparency_matters(data[..., :-1], data[..., -1]):
            raise UserError(
                f"{path}: is partly transparent, so programs disagree on its values; store it without transparency"
            )
        data = data[..., :-1]
    if raw in STRETCHED:
        data = data // STRETCHED[raw]
    if label and data.shape[-1] > 1:
        if (data != data[..., :1]).any():
            raise UserError(f"{path}: a label must have one channel, got colours; write classes as grey values")
        data = data[..., :1]
    return data


def _transparency_matters(colours: np.ndarray, alpha: np.ndarray) -> bool:
    """Whether transparent pixels hide values, or whether the transparency alone tells pixels apart."""
    return bool(colours[alpha < 255].any() or (alpha.min() < alpha.max() and not colours.any()))


def write(data: np.ndarray, source: Source, path: Path) -> None:
    """Writes a mask as a grey picture of 8 or 16 bits, and floats (rows, columns, 1, C) as TIFF, a page per channel."""
    image_of = library("PIL.Image", "Pillow", path).fromarray
    if data.ndim == 4:
        data = data.reshape(*data.shape[:2], -1)
    pages = [image_of(np.ascontiguousarray(data[:, :, page])) for page in range(data.shape[2])]
    more = {"save_all": True, "append_images": pages[1:]} if len(pages) > 1 else {}
    compression = {"compression": "tiff_deflate"} if suffix_of(path) in (".tif", ".tiff") else {}
    pages[0].save(path, **more, **compression)
