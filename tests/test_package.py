"""The package as installed: what it says of itself, and what it says when it cannot work."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pglcl_ext
from pglcl_ext import build_info
from pglcl_ext._library import INSTRUCTION_SETS, compiled
from tests.conftest import ROOT


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_build_info() -> None:
    info = build_info()
    assert info["torch_running"] == torch.__version__
    assert info["torch_built"]
    assert info["cpu_instruction_set"] in INSTRUCTION_SETS
    assert info["cuda_built"] == bool(info["cuda_architectures"])
    assert info["cuda_built"] or info["cuda_reason"]


def test_an_older_torch_is_refused_by_name() -> None:
    result = run_python("import torch; torch.__version__ = '2.9.1'; import pglcl_ext")
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert message == "ImportError: pglcl_ext needs torch 2.13 or later, but torch 2.9.1 is running"


@pytest.mark.skipif(build_info()["cuda_built"], reason="the CUDA ops are bound to one version of torch")
def test_a_later_torch_is_accepted() -> None:
    result = run_python("import torch; torch.__version__ = '2.99.0+cu150'; import pglcl_ext")
    assert result.returncode == 0, result.stderr


def test_the_binary_uses_the_stable_interface_alone() -> None:
    if build_info()["cuda_built"]:
        pytest.skip("the CUDA ops use interfaces of one version of torch")
    if not shutil.which("nm"):
        pytest.skip("needs nm")
    names = subprocess.run(["nm", "-DC", "--undefined-only", compiled.__file__], capture_output=True, text=True).stdout
    assert "aoti_torch_" in names
    assert not [line for line in names.splitlines() if re.search(r"\b(at|c10|torch)::", line)]


def copy_of_the_sources(folder: Path) -> Path:
    ignored = shutil.ignore_patterns("_C*", "_build_config.py", "__pycache__")
    return shutil.copytree(ROOT / "pglcl_ext", folder / "pglcl_ext", ignore=ignored)


def import_from(folder: Path, *path: Path) -> str:
    """The last line of what `import pglcl_ext` says in `folder`, with `path` behind it."""
    places = os.pathsep.join(map(str, [folder, *path]))
    result = subprocess.run(
        [sys.executable, "-c", "import pglcl_ext"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": places},
    )
    assert result.returncode != 0
    return result.stderr.strip().splitlines()[-1]


def test_sources_without_a_module_say_what_to_do(tmp_path: Path) -> None:
    here, installed = copy_of_the_sources(tmp_path / "checkout"), copy_of_the_sources(tmp_path / "installed")
    (installed / "_build_config.py").touch()
    message = import_from(here.parent, installed.parent)
    assert message.startswith("ImportError")
    assert f"finds the sources in {here}" in message
    assert f"the installed package in {installed}" in message
    assert f"pip install --editable {here.parent}" in message
    (here / "_C.cpython-36m-x86_64-linux-gnu.so").touch()
    assert "built for another Python (_C.cpython-36m-x86_64-linux-gnu.so)" in import_from(here.parent)


def test_instruction_set_is_chosen_by_the_environment() -> None:
    code = "from pglcl_ext import build_info; print(build_info()['cpu_instruction_set'])"
    assert run_python(code, PGLCL_CPU_ISA="baseline").stdout.strip() == "baseline"
    assert run_python(code, PGLCL_CPU_ISA="").stdout.strip() == build_info()["cpu_instruction_set"]
    result = run_python("import pglcl_ext", PGLCL_CPU_ISA="sse9")
    assert result.returncode != 0
    assert f"PGLCL_CPU_ISA must be one of {', '.join(INSTRUCTION_SETS)}, got 'sse9'" in result.stderr


def test_core_needs_only_torch_and_numpy() -> None:
    blocked = ["monai", "nibabel", "scipy", "typer", "rich", "matplotlib", "tensorboard", "hypothesis", "psutil"]
    code = f"import sys; sys.modules.update({{m: None for m in {blocked!r}}}); import pglcl_ext; print('fine')"
    assert run_python(code).stdout.strip() == "fine"


def test_every_package_of_the_sources_is_installed() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = (ROOT, ROOT / "python")
    found = {
        ".".join(file.parent.relative_to(folder).parts)
        for folder, name in zip(folders, ("pglcl_ext", "pglcl"))
        for file in (folder / name).rglob("__init__.py")
    }
    assert set(listed) == found


def test_public_names() -> None:
    for name in pglcl_ext.__all__:
        assert getattr(pglcl_ext, name).__doc__, f"{name} has no docstring"
    twins = set(pglcl_ext.reference.__all__)
    ending = ("_loss", "_statistics", "_entropy", "_disparity")
    functions = {name for name in pglcl_ext.__all__ if name.endswith(ending)}
    assert functions - {"hard_negative_statistics"} <= twins  # which draws numbers


@pytest.mark.parametrize(
    "op", [n for n in dir(torch.ops.pglcl_ext) if n.startswith(("patch", "semantic", "disparity", "gaussian"))]
)
def test_every_op_has_an_implementation_per_device(op: str) -> None:
    keys = ["CPU", "Meta"] + (["CUDA"] if build_info()["cuda_built"] else [])
    for key in keys:
        found = torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"pglcl_ext::{op}", key)
        assert found, f"{op} on {key}"
