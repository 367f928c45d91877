"""Imports an installed CUDA build of pglcl_ext. Checks its ops, and the names it takes from torch. Needs no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess


def unstable_names(module: str) -> list[str]:
    """The names that the compiled module takes from torch outside of the stable interface, which is plain C.

    Args:
        module: its file.

    Raises:
        ValueError: the module takes no name from torch, so it is no build of pglcl_ext.
    """
    command = ["nm", "-DC", "--undefined-only", module]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    if not any("aoti_torch_" in name for name in names):
        raise ValueError(f"{module} asks nothing of torch")
    return [name for name in names if re.search(r"\b(at|c10|torch)::", name)]


def main() -> None:
    import pglcl_ext._C as compiled
    import torch

    import pglcl_ext

    info = pglcl_ext.build_info()
    print(info)
    assert info["cuda_built"], info["cuda_reason"]
    schemas = [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("pglcl_ext::")]
    assert len(schemas) >= 7, schemas
    missing = [name for name in schemas if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, "CUDA")]
    assert not missing, f"not registered for CUDA: {missing}"
    z = torch.randn(50, 8, requires_grad=True)
    loss = pglcl_ext.PatchContrastLoss()(z, torch.randint(0, 3, (50,)))
    loss.backward()  # the CPU kernels of the same build
    assert shutil.which("nm"), "nm is not on the path"
    unstable = unstable_names(compiled.__file__)
    assert not unstable, "not of the stable interface:\n" + "\n".join(unstable)
    print(f"{len(schemas)} ops registered for CUDA; one binary for every torch with CUDA {info['cuda_version']}")


if __name__ == "__main__":
    main()
