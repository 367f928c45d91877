"""Drives CMakeLists.txt, which describes the native build; metadata is in pyproject.toml."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "tools"))
from find_torch import torch_folder, torch_versions  # noqa: E402


class CMakeBuild(build_ext):
    """Configure, build and install with CMake into the folder that setuptools asks for."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        folder = torch_folder(os.environ.get("PGLCL_TORCH_DIR"))
        if folder is None:
            raise SystemExit("pglcl-ext: no torch to build against; install torch first, then this package")
        version, _ = torch_versions(folder)
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-torch-{version}"
        build.mkdir(parents=True, exist_ok=True)
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPGLCL_TORCH_DIR={folder}",
            f"-DPGLCL_CUDA={os.environ.get('PGLCL_CUDA', 'AUTO')}",
            f"-DPGLCL_INSTALL_DIR={target}",
        ]
        if os.environ.get("TORCH_CUDA_ARCH_LIST"):
            options.append("-DTORCH_CUDA_ARCH_LIST=" + os.environ["TORCH_CUDA_ARCH_LIST"].replace(" ", ";"))
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options], check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        subprocess.run(["cmake", "--install", str(build)], check=True)
        if self.inplace or getattr(self, "editable_mode", False):
            # setuptools copies the module itself back to the sources, but not what lies beside it.
            self.copy_file(str(target / "_build_config.py"), str(ROOT / "pglcl_ext" / "_build_config.py"))


def torch_requirement() -> str:
    """The binary runs with the minor release it was compiled against, and says so to pip."""
    folder = torch_folder(os.environ.get("PGLCL_TORCH_DIR"))
    if folder is None:
        return "torch>=2.13"
    major, minor = torch_versions(folder)[0].split(".")[:2]
    return f"torch=={major}.{minor}.*"


setup(
    ext_modules=[Extension("pglcl_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    install_requires=[torch_requirement(), "numpy"],
)
