"""Trains a segmentation model from a folder of medical images, few of them labelled.

Training is semi-supervised, with patch-wise contrast (Basak and Yin, CVPR 2023), on MONAI and :mod:`pglcl_ext`.

The command line is ``pglcl``; see ``pglcl --help``.
"""

from __future__ import annotations

import importlib.util

INSTALL = "pip install 'pglcl-ext[train]'"
_NEEDED = ("monai", "nibabel", "scipy", "typer", "rich", "tensorboard", "matplotlib")


class MissingPackages(ImportError):
    """Packages of the extra `train`, or `demo`, are not installed."""


def require_packages(*more: str) -> None:
    """Raises :class:`MissingPackages` where a package is missing; the message names the command that installs it."""
    missing = [name for name in (*_NEEDED, *more) if importlib.util.find_spec(name) is None]
    if missing:
        extra = INSTALL.replace("train", "demo") if more else INSTALL
        raise MissingPackages(
            f"pglcl needs {', '.join(missing)}. From the source folder: {extra.replace('pglcl-ext', '.')}"
        )
