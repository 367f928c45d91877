"""The installed package: its information, and its errors when it cannot work."""

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
from pglcl_ext._library import OLDEST_TORCH, compiled
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from check_cuda_build import unstable_names


def run_python(code: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env={**os.environ, **environment}
    )


def test_build_info_describes_build_and_machine() -> None:
    info = build_info()
    assert info["torch_running"] == torch.__version__
    assert info["torch_built"]
    assert info["cpu_instruction_sets"] == list(compiled.INSTRUCTION_SETS)
    assert info["cpu_instruction_set"] in compiled.INSTRUCTION_SETS
    assert info["cuda_built"] == bool(info["cuda_architectures"])
    assert info["cuda_built"] or info["cuda_reason"]


def test_an_older_torch_is_refused_by_name() -> None:
    result = run_python("import torch; torch.__version__ = '2.9.1'; import pglcl_ext")
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert message == f"ImportError: pglcl_ext needs torch {OLDEST_TORCH} or later, but torch 2.9.1 is running"


def test_a_later_torch_is_accepted() -> None:
    result = run_python("import torch; torch.__version__ = '2.99.0'; import pglcl_ext")
    assert result.returncode == 0, result.stderr


def test_another_major_version_of_cuda_is_refused_by_name(tmp_path: Path) -> None:
    sources = copy_of_the_sources(tmp_path)
    (sources / "_build_config.py").write_text(
        "torch_version, cuda_version, cuda_built = '2.13.0+cu130', '13.0', True\n"
        "cuda_reason, cuda_architectures = '', ['8.0']\n"
    )
    for running, words in (("12.8", "CUDA 12.8"), (None, "no CUDA")):
        code = f"import torch; torch.__version__, torch.version.cuda = '2.14.0', {running!r}; import pglcl_ext"
        result = run_python(code, tmp_path, PYTHONPATH=str(tmp_path))
        assert result.returncode != 0
        message = result.stderr.strip().splitlines()[-1]
        assert message.startswith(
            f"ImportError: pglcl_ext was built with CUDA 13.0, but torch 2.14.0 with {words} is running. Rebuild it"
        )


def test_the_switch_for_tf32_is_read_in_each_way_of_setting_it() -> None:
    code = """
import torch
from pglcl_ext._library import allow_tf32
matmul = torch.backends.cuda.matmul
assert not allow_tf32()
matmul.allow_tf32 = True
assert allow_tf32()
matmul.allow_tf32 = False
torch.set_float32_matmul_precision("high")
assert allow_tf32()
matmul.fp32_precision = "ieee"  # the new way, after which the old one cannot be read
assert not allow_tf32()
matmul.fp32_precision = "tf32"
assert allow_tf32()
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_the_binary_uses_the_stable_interface_alone() -> None:
    if not shutil.which("nm"):
        pytest.skip("needs nm")
    assert unstable_names(compiled.__file__) == []


def copy_of_the_sources(folder: Path) -> Path:
    ignored = shutil.ignore_patterns("_C*", "_build_config.py", "__pycache__")
    return shutil.copytree(ROOT / "pglcl_ext", folder / "pglcl_ext", ignore=ignored)


def import_from(folder: Path, *path: Path) -> str:
    """The last line that `import pglcl_ext` prints in `folder`, with `path` after it on the module path."""
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


def test_an_import_of_sources_without_a_compiled_module_says_what_to_do(tmp_path: Path) -> None:
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
    assert f"PGLCL_CPU_ISA must be one of {', '.join(compiled.INSTRUCTION_SETS)}, got 'sse9'" in result.stderr


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
        for folder, name in zip(folders, ("pglcl_ext", "pglcl"), strict=True)
        for file in (folder / name).rglob("__init__.py")
    }
    assert set(listed) == found


def test_every_public_name_has_a_docstring_and_every_function_a_twin() -> None:
    for name in pglcl_ext.__all__:
        assert getattr(pglcl_ext, name).__doc__, f"{name} has no docstring"
    twins = set(pglcl_ext.reference.__all__)
    ending = ("_loss", "_statistics", "_entropy", "_disparity")
    functions = {name for name in pglcl_ext.__all__ if name.endswith(ending)}
    assert functions - {"hard_negative_statistics"} <= twins  # which draws numbers


OPS = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc" / "pglcl.cpp").read_text())


def test_the_registered_ops_are_those_of_the_sources() -> None:
    schemas = (s.name.split("::") for s in torch._C._jit_get_all_schemas())
    registered = {name for space, name in schemas if space == "pglcl_ext"}
    assert {name for name in registered if not name.endswith("_traced")} == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_an_implementation_per_device(op: str) -> None:
    keys = ["CPU", "Meta"] + (["CUDA"] if build_info()["cuda_built"] else [])
    for key in keys:
        found = torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"pglcl_ext::{op}", key)
        assert found, f"{op} on {key}"
