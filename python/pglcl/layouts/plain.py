"""Images beside labels: two folders whose files have the same names."""

from __future__ import annotations

from pathlib import Path

from pglcl.formats import itk
from pglcl.formats.names import inputs_in, is_dicom_folder, list_folder, suffix_of
from pglcl.layouts.data_folder import Case, DataFolder
from pglcl.layouts.folders import holds_images, is_there, refuse_lonely
from pglcl.layouts.grouping import group_files, require_numbers, unique_names


def read(root: Path) -> DataFolder:
    images, labels = root / "images", root / "labels"
    return DataFolder(root, "plain", pair(images, labels), notes=not_read(images, labels))


def not_read(*folders: Path) -> list[str]:
    """Lines about files beside images and labels that are not read: of other formats, or in folders of their own.

    A label among them would make its image count as unlabelled.
    """
    lines = []
    for folder in folders:
        found = list_folder(folder) if folder.is_dir() else []
        voxels = {file.name for path in found if suffix_of(path) == ".mhd" for file in itk.voxel_files(path)}
        others = [path.name for path in found if path.is_file() and not suffix_of(path) and path.name not in voxels]
        below = [path.name for path in found if path.is_dir() and not is_dicom_folder(path) and holds_images(path)]
        for names, why in (
            (others, "unknown suffix"),
            (below, "folders of images; images and labels must not lie in folders below"),
        ):
            if names:
                some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                lines.append(f"{folder}: {some} ({len(names)}): not read, {why}")
    return lines


def pair(images: Path, labels: Path, channels: int = 0) -> list[Case]:
    """Cases of a folder of images and a folder of labels with the same names; `channels` of each case, 0: unknown."""
    by_name = unique_names(inputs_in(labels)) if is_there(labels, folder=True) else {}
    files = inputs_in(images)
    if channels:
        require_numbers(files, channels)
    groups = group_files(files, () if channels else by_name)
    cases = [Case(name, name, paths, by_name.pop(name, None)) for name, paths in groups.items()]
    refuse_lonely(by_name.values(), images)
    return cases
