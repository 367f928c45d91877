"""Imports an installed CUDA build of pglcl_ext and checks that every op is registered for CUDA. Needs no GPU."""

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
pglcl_ext.PatchContrastLoss()(z, torch.randint(0, 3, (50,))).backward()  # the CPU kernels of the same build
print(f"{len(schemas)} ops registered for CUDA")
