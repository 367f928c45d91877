"""The build, without our kernels: the choice of torch, build folders that no longer fit, and errors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from find_torch import TORCH_REQUIREMENT

pytest.importorskip("pybind11")
if not all(map(shutil.which, ("cmake", "ninja", "c++"))):
    pytest.skip("cmake, ninja and a compiler are needed", allow_module_level=True)

SITE = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
PROJECT = """
cmake_minimum_required(VERSION 3.25)
project(tiny LANGUAGES CXX)
add_library(_C MODULE tiny.cpp)
file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/_build_config.py "torch = '${PGLCL_TORCH_DIR}'")
install(TARGETS _C LIBRARY DESTINATION ${PGLCL_INSTALL_DIR})
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/_build_config.py DESTINATION ${PGLCL_INSTALL_DIR})
"""
MODULE = "int number() { return 1; }\n"


def fake_torch(environment: Path, version: str = "2.13.0+cpu") -> Path:
    folder = environment / SITE / "torch"
    (folder / "include").mkdir(parents=True)
    (folder / "version.py").write_text(f"__version__ = '{version}'\ncuda: str | None = None\n")
    (environment / "pyvenv.cfg").touch()
    return folder


def fake_programs(folder: Path) -> Path:
    """Puts cmake and ninja into a folder of their own, as in an isolated build."""
    folder.mkdir(parents=True)
    for name in ("cmake", "ninja"):
        (folder / name).symlink_to(shutil.which(name))
    return folder


def tool(code: str, *path: Path, clean: bool = False, **variables: object) -> subprocess.CompletedProcess[str]:
    """Runs `code` in the folder of the build tools. `path` comes before PATH, or with `clean` replaces it."""
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX", "CXX", "PGLCL_CUDA")}
    places = [*map(str, path), *([] if clean else [os.environ["PATH"]])]
    environment |= {"PATH": os.pathsep.join(places)} | {name: str(value) for name, value in variables.items()}
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r})\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode != 0, result.stdout
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A source folder that the build tools accept as ours, and that compiles in seconds."""
    root = tmp_path / "sources"
    root.mkdir()
    (root / "CMakeLists.txt").write_text(PROJECT)
    (root / "tiny.cpp").write_text(MODULE)
    fake_torch(tmp_path / "venv")
    return root


def build(root: Path, *path: Path, **variables: object) -> subprocess.CompletedProcess[str]:
    variables = {"PGLCL_TORCH_DIR": root.parent / "venv" / SITE / "torch"} | variables
    target = root.parent / "target"
    code = (
        f"from pathlib import Path; import native_build; native_build.build(Path({str(root)!r}), Path({str(target)!r}))"
    )
    return tool(code, *path, **variables)


def built(root: Path, *path: Path, **variables: object) -> str:
    target = root.parent / "target"
    shutil.rmtree(target, ignore_errors=True)
    result = build(root, *path, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    assert list(target.glob("*_C*"))
    assert (target / "_build_config.py").is_file()
    return result.stdout


def test_build_folder_outlives_the_programs_that_made_it(project: Path, tmp_path: Path) -> None:
    first = fake_programs(tmp_path / "overlay1")
    assert "Building CXX object" in built(project, first)
    shutil.rmtree(first)  # as pip removes an isolated environment
    again = built(project, fake_programs(tmp_path / "overlay2"))
    assert "Building CXX object" not in again  # and what was compiled is kept
    built(project)


def test_build_folder_of_another_place_is_begun_anew(project: Path, tmp_path: Path) -> None:
    built(project)
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(tmp_path / "venv", tmp_path / "elsewhere" / "venv")
    moved = shutil.move(project, tmp_path / "elsewhere" / "moved")
    assert "Building CXX object" in built(moved)
    copied = shutil.copytree(moved, tmp_path / "elsewhere" / "copied")
    (moved / "tiny.cpp").write_text("#error the copy must not look here")
    assert "Building CXX object" in built(copied)


def test_each_torch_and_compiler_has_what_was_compiled_for_it(project: Path, tmp_path: Path) -> None:
    built(project)
    assert "Building" not in built(project)
    other = fake_torch(tmp_path / "venv2", "2.14.1+cpu")
    assert "Building CXX object" in built(project, PGLCL_TORCH_DIR=other)
    assert str(other) in (tmp_path / "target" / "_build_config.py").read_text()
    assert "Building" not in built(project)  # the first is still there
    moved = fake_torch(tmp_path / "venv3")  # of the same version, elsewhere
    assert "Building CXX object" in built(project, PGLCL_TORCH_DIR=moved)
    assert "Building CXX object" in built(project, PGLCL_TORCH_DIR=moved, CXXFLAGS="-O1")


def test_a_broken_build_folder_is_begun_anew(project: Path) -> None:
    built(project)
    folder = next((project / "build").iterdir())
    (folder / "made_for.json").write_text("{")
    (folder / "CMakeCache.txt").write_bytes(b"\0")
    built(project)


def test_a_missing_tool_gives_an_error_of_one_line(project: Path, tmp_path: Path) -> None:
    (project / "tiny.cpp").write_text("#error no")
    assert "could not compile the native module" in last_line(build(project))
    assert "CXX=no-such-compiler -x names no program" in last_line(build(project, CXX="no-such-compiler -x"))
    assert "no folder of a torch package" in last_line(build(project, PGLCL_TORCH_DIR=tmp_path))
    old = fake_torch(tmp_path / "old", "2.9.1+cpu")
    assert f"needs {TORCH_REQUIREMENT}, found 2.9.1+cpu" in last_line(build(project, PGLCL_TORCH_DIR=old))

    (tmp_path / "bin").mkdir()
    code = "import native_build as n; n._check_compiler()"
    assert "no C++ compiler found" in last_line(tool(code, tmp_path / "bin", clean=True))
    script = tmp_path / "bin" / "cmake"
    script.write_text("#!/bin/sh\necho cmake version 3.18.4\n")
    script.chmod(0o755)
    code = "import native_build as n; n.sysconfig.get_path = lambda name: ''; n._cmake()"
    message = last_line(tool(code, tmp_path / "bin", clean=True))
    assert "needs cmake >= 3.25" in message
    assert f"{script} is 3.18.4" in message
    code = "import native_build as n; n.sysconfig.get_path = lambda name: ''; n._tool('ninja')"
    assert "ninja not found" in last_line(tool(code, tmp_path / "bin", clean=True))
    code = "import sys; sys.modules['pybind11'] = None; import native_build as n; n._pybind11()"
    assert "pybind11 not found" in last_line(tool(code))


def read_only(folder: Path) -> list[str]:
    """The start of a command that must find `folder` read-only. For root, who ignores permissions, it mounts it so."""
    if os.geteuid() != 0:
        for path in (folder, *folder.rglob("*")):
            path.chmod(path.stat().st_mode & ~0o222)
        return []
    mounted = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    prefix = ["unshare", "--mount", "sh", "-c", mounted, str(folder)]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("root writes to every folder, and may not mount one read-only here")
    return prefix


def test_read_only_sources_are_installed_from_a_copy(project: Path, tmp_path: Path) -> None:
    pytest.importorskip("pip")
    pytest.importorskip("ninja")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    for name in ("tools", "pglcl_ext", "python"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("*.so", "_build_config.py", "*.pyc"))
    before = sorted(project.rglob("*"))
    environment = os.environ | {"PGLCL_TORCH_DIR": str(tmp_path / "venv" / SITE / "torch"), "PGLCL_CUDA": "0"}
    prefix = read_only(project)

    def pip(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [*prefix, sys.executable, "-m", "pip", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)

    made = pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path / "wheels", project)
    assert made.returncode == 0, made.stdout + made.stderr
    (wheel,) = (tmp_path / "wheels").glob("pglcl_ext-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.startswith("pglcl_ext/") and "_C." in name]
    assert {"pglcl_ext/_build_config.py", "pglcl_ext/__init__.py", "pglcl/__init__.py"} <= set(names)
    assert sorted(project.rglob("*")) == before
    refused = pip("install", "--no-build-isolation", "--no-deps", "--target", tmp_path / "t", "--editable", project)
    assert refused.returncode != 0
    line = next(line for line in (refused.stdout + refused.stderr).splitlines() if "pglcl-ext:" in line)
    assert f"{project} is read-only, and an editable install compiles into it; use pip install {project}" in line


# An interpreter whose own packages hold no torch, as in the throwaway environments of uv and build.
BARE = (
    "import sys, sysconfig, find_torch; sys.path = [p for p in sys.path if 'site-packages' not in p]\n"
    "sysconfig.get_path = lambda name: '/nowhere'; find_torch._sees_system_packages = lambda: False\n"
)
FIND = BARE + "print(find_torch.find_torch())"


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT", "CONDA_PREFIX"])
def test_torch_of_the_callers_environment_is_found(tmp_path: Path, variable: str) -> None:
    torch = fake_torch(tmp_path / "venv")
    assert tool(FIND, clean=True, **{variable: tmp_path / "venv"}).stdout.strip() == str(torch)


def test_torch_of_an_activated_environment_is_found_on_the_path(tmp_path: Path) -> None:
    (tmp_path / "throwaway").mkdir()
    (tmp_path / "throwaway" / "pyvenv.cfg").touch()
    torch = fake_torch(tmp_path / "venv")
    code = f"{BARE}sys.prefix = {str(tmp_path / 'throwaway')!r}; print(find_torch.find_torch())"
    result = tool(code, tmp_path / "throwaway" / "bin", tmp_path / "venv" / "bin", clean=True)
    assert result.stdout.strip() == str(torch)


def test_torch_of_another_python_is_not_taken(tmp_path: Path) -> None:
    torch = fake_torch(tmp_path / "venv")
    (tmp_path / "venv" / "lib").rename(tmp_path / "venv" / "old")
    shutil.copytree(
        torch.parents[3] / "old" / Path(SITE).relative_to("lib"), tmp_path / "venv/lib/python3.6/site-packages"
    )
    assert tool(FIND, clean=True, VIRTUAL_ENV=tmp_path / "venv").stdout.strip() == "None"


def test_no_front_end_fetches_a_torch_of_its_own() -> None:
    code = "import pglcl_build as b; b.find_torch = lambda wanted: None; print(b._torch_if_missing())"
    assert tool(code, PIP_BUILD_TRACKER="/tmp/tracker").stdout.strip() == f"['{TORCH_REQUIREMENT}']"
    message = last_line(tool(code))
    assert "PGLCL_TORCH_DIR=" in message
    assert "activate" in message


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tarfile.TarFile]:
    folder = tmp_path_factory.mktemp("sdist")
    code = f"import sys; sys.path.insert(0, 'tools'); import pglcl_build; pglcl_build.build_sdist({str(folder)!r})"
    copy = shutil.copytree(ROOT, folder / "sources", ignore=shutil.ignore_patterns("build", ".*", "*.so", "*.egg-info"))
    result = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        yield archive


def test_sdist_holds_every_source(sdist: tarfile.TarFile) -> None:
    names = {name.partition("/")[2] for name in sdist.getnames()}
    kept = ("csrc", "tools", "pglcl_ext", "python", "tests", "docs", "benchmarks")
    wanted = {
        str(path.relative_to(ROOT))
        for folder in kept
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".in", ".typed", ".json", ".png", ".sh", ".toml")
        and path.name != "_build_config.py"
        and "egg-info" not in str(path)
    }
    wanted |= {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile", "CHANGELOG.md"}
    assert len(wanted) > 100
    assert not wanted - names
    assert not [name for name in names if name.endswith((".so", "_build_config.py", ".pyc"))]
