"""Runs the native build, which CMakeLists.txt describes. Metadata is in pyproject.toml."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "tools"))
import native_build  # noqa: E402
from find_torch import TORCH_REQUIREMENT  # noqa: E402


class FreshPackages(build_py):
    """Empties build/lib first. setuptools does not, so a deleted module would stay in every wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            for package in self.packages:
                shutil.rmtree(Path(self.build_lib) / package, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Builds into the folder that setuptools asks for."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        native_build.build(ROOT, target)
        if self.inplace or getattr(self, "editable_mode", False):
            # setuptools copies the module itself back to the sources, but not what lies beside it.
            self.copy_file(str(target / "_build_config.py"), str(ROOT / "pglcl_ext" / "_build_config.py"))


setup(
    ext_modules=[Extension("pglcl_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": FreshPackages},
    install_requires=[TORCH_REQUIREMENT, "numpy"],
)
