"""Images that cannot be prepared for a network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pglcl.errors import UserError
from pglcl.inspection import survey
from pglcl.intensity import Channel, Intensity
from pglcl.layouts import Case, open_folder
from pglcl.prepare import decide_slices, prepare
from pglcl.training_data import load_training_data

from tests.pglcl.folders import pictures, plain, save, ssl4mis, tiny, volume


def test_images_that_do_not_suit_the_options_are_refused(tmp_path: Path) -> None:
    """They would be padded to a volume, or resampled as if a voxel without a size had 1 mm, without a word."""
    root = ssl4mis(tmp_path / "ssl4mis")
    with pytest.raises(UserError, match=r"\.h5: cannot be resampled to --spacing 2 mm: its format does not say how"):
        survey(open_folder(root), tiny(spatial_dims=3, image_size="16", spacing="2", validation=-1, test=-1))
    image = volume(0)[0]
    flat = Case("flat", "p", (save(tmp_path / "flat.nii.gz", image[:, :, 2]),), None)
    grey = Intensity((Channel("percentile"),), "")
    with pytest.raises(UserError, match=r"flat\.nii\.gz: is a 2-D image; --spatial-dims 3 needs volumes"):
        prepare(flat, tiny(spatial_dims=3, image_size="16"), None, grey)
    assert prepare(flat, tiny(), 2, grey).image.shape == (1, 32, 32, 1)
    colours = np.stack([image / image.max()] * 3, axis=-1)
    shares = Case("shares", "p", (save(tmp_path / "shares.nii.gz", colours),), None)
    rgb = Intensity((Channel("rgb", 0, 255, 124, 58),) * 3, "")
    with pytest.raises(
        UserError, match=r"shares\.nii\.gz: channel 0 must have values from 0 to 255 for --normalise rgb"
    ):
        prepare(shares, tiny(), 2, rgb)


def test_pages_of_a_tiff_are_slices_of_a_volume(tmp_path: Path) -> None:
    image_of = pytest.importorskip("PIL.Image").fromarray
    pages = [image_of(np.full((8, 6), i, np.uint8)) for i in range(3)]
    for name, more in (("one", []), ("stack", pages[1:])):
        path = tmp_path / f"{name}.tif"
        pages[0].save(path, save_all=True, append_images=more)
        case = Case(name, name, (path,), None)
        assert decide_slices(tiny(), [case]).slices == ("crop" if more else "whole")
    (tmp_path / "broken.tif").write_bytes(b"no picture")  # it is named where it is read
    assert decide_slices(tiny(), [Case("b", "b", (tmp_path / "broken.tif",), None)]).slices == "whole"


def test_pictures_are_seen_whole_and_volumes_in_parts(tmp_path: Path) -> None:
    of = [open_folder(root).cases for root in (pictures(tmp_path / "p"), plain(tmp_path / "v"))]
    assert [decide_slices(tiny(), cases).slices for cases in of] == ["whole", "crop"]
    assert [decide_slices(tiny(slices="crop"), cases).slices for cases in of] == ["crop", "crop"]
    assert [decide_slices(tiny(slices="whole"), cases).slices for cases in of] == ["whole", "whole"]
    assert decide_slices(tiny(), [*of[0], *of[1]]).slices == "crop"
    volumes = tiny(spatial_dims=3, image_size="16")
    assert decide_slices(volumes, of[0]) == volumes
    for cases, said in zip(of, ("whole, scaled to 32x32 pixels", "parts of 32x32 pixels, at their own"), strict=True):
        data = load_training_data(cases[0].images[0].parents[1], tiny())
        assert any(note.startswith(f"slices: {said}") for note in data.survey.notes)
