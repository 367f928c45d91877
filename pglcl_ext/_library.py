"""Loads the compiled module, which registers the ops as ``torch.ops.pglcl_ext``."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import torch

REBUILD = "pip install --force-reinstall --no-deps --no-build-isolation ."
# The binary uses only the stable interface of this version. The build reads it from here (tools/find_torch.py).
OLDEST_TORCH = "2.13"


def _release(version: str) -> tuple[int, ...]:
    """(2, 14) for 2.14.1+cu130, or for 2.14."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def _major(version: str | None) -> str:
    """ "13" for "13.0", "none" without a version."""
    return (version or "none").partition(".")[0]


def _load() -> Any:
    try:
        from pglcl_ext import _build_config
    except ImportError as error:
        raise ImportError(_why_not_built()) from error
    # An editable install of another checkout also has a _build_config, which is not ours.
    if not Path(__file__).with_name("_build_config.py").exists():
        raise ImportError(_why_not_built())
    if _release(torch.__version__) < _release(OLDEST_TORCH):
        raise ImportError(f"pglcl_ext needs torch {OLDEST_TORCH} or later, but torch {torch.__version__} is running")
    # A CUDA runtime cannot use a stream of another major version.
    if _build_config.cuda_built and _major(_build_config.cuda_version) != _major(torch.version.cuda):
        running = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        raise ImportError(
            f"pglcl_ext was built with CUDA {_build_config.cuda_version}, but torch {torch.__version__} with {running} "
            f"is running. Rebuild it from its source folder: {REBUILD}"
        )
    try:
        return importlib.import_module("pglcl_ext._C")
    except ModuleNotFoundError as error:
        raise ImportError(_why_not_built()) from error


def _why_not_built() -> str:
    """The reason why no compiled module lies beside this file, and what to do."""
    here = Path(__file__).resolve().parent
    editable = f"pip install --editable {here.parent}"
    built = sorted(path.name for path in here.glob("_C.*"))
    if built:
        return f"pglcl_ext in {here} is built for another Python ({built[0]}). Build it for this one: {editable}"
    for entry in sys.path:
        installed = Path(entry or ".").resolve() / "pglcl_ext"
        if installed != here and (installed / "_build_config.py").is_file():
            return (
                f"import pglcl_ext finds the sources in {here}, which hold no compiled module, before the installed "
                f"package in {installed}. Start Python in another folder, or build in place: {editable}"
            )
    return f"pglcl_ext in {here} is not built. Install it from its source folder: pip install {here.parent}"


compiled = _load()
ops = torch.ops.pglcl_ext


def allow_tf32() -> bool:
    """Whether float32 products on a GPU may use TF32. This is PyTorch's own switch, in whatever way it was set.

    A change of the switch makes torch.compile compile again. An exported program keeps the setting of its export.
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


# The mark of torch.compiler.assume_constant_result, which itself would import the compiler and take as long as torch.
allow_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def build_info() -> dict[str, Any]:
    """What this installation was built with and what it uses.

    Returns:
        A dict. Its values are str, unless another type is named:

        - ``version``: of pglcl-ext;
        - ``torch_built`` and ``torch_running``: the torch of the build, and the one in use;
        - ``cuda_built``: a bool, whether the build has CUDA kernels;
        - ``cuda_version``: of the torch of the build, or "none";
        - ``cuda_reason``: why the build has no CUDA kernels; empty if it has them;
        - ``cuda_architectures``: a list of str;
        - ``cpu_instruction_sets``: a list of str, those that the kernels are compiled for, from the least to the most
          demanding;
        - ``cpu_instruction_set``: the one in use.

        The instruction set is the fastest one of the processor, or the one of ``cpu_instruction_sets`` that the
        environment variable ``PGLCL_CPU_ISA`` names, lowered to what the processor has. With any other value, the
        import fails. The fastest of Intel's processors is ``avx512`` even where they have ``avx512_bf16``.
    """
    from pglcl_ext import _build_config

    return {
        "version": importlib.metadata.version("pglcl-ext"),
        "torch_built": _build_config.torch_version,
        "torch_running": torch.__version__,
        "cuda_built": _build_config.cuda_built,
        "cuda_version": _build_config.cuda_version,
        "cuda_reason": _build_config.cuda_reason,
        "cuda_architectures": list(_build_config.cuda_architectures),
        "cpu_instruction_sets": list(compiled.INSTRUCTION_SETS),
        "cpu_instruction_set": compiled.cpu_instruction_set(),
    }
