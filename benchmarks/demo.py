"""The loss on real patches: entropies, disparity, positives and negatives of one image, and a few steps of descent.

Uses the slices of MRI volumes under PGLCL_DATA or ../shared/data where there are any; else a synthetic image.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F

from pglcl_ext import PatchContrastLoss, build_info, patch_statistics, reference

ROOT = Path(__file__).parent.parent


def load_slice() -> tuple[str, torch.Tensor, torch.Tensor]:
    """(source, image (H, W) with unit variance, labels (H, W))."""
    for folder in (os.environ.get("PGLCL_DATA"), ROOT.parent / "shared" / "data"):
        files = sorted(Path(folder).glob("ACDC/training/*/*_gt.nii.gz")) if folder else []
        if files:
            import nibabel

            labels = torch.from_numpy(nibabel.load(files[0]).get_fdata()).long()
            image_file = files[0].with_name(files[0].name.replace("_gt", ""))
            image = torch.from_numpy(nibabel.load(image_file).get_fdata()).float()
            z = int((labels > 0).sum((0, 1)).argmax())
            image, labels = image[..., z], labels[..., z]
            return image_file.name, (image - image.mean()) / image.std(), labels
    y, x = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    radius = ((y - 64) ** 2 + (x - 60) ** 2).float().sqrt()
    labels = (radius < 40).long() + (radius < 25).long()
    return "a synthetic disc (no volumes found)", labels + 0.3 * torch.randn(128, 128), labels


def main() -> None:
    torch.manual_seed(0)
    source, image, labels = load_slice()
    classes = int(labels.max()) + 1
    print(f"pglcl_ext {build_info()['version']} on {build_info()['cpu_instruction_set']}, image: {source}")

    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 32, 5, padding=2), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 5, padding=2), torch.nn.ReLU()
    )
    head, project = torch.nn.Conv2d(32, classes, 1), torch.nn.Conv2d(32, 64, 1)
    loss_function = PatchContrastLoss(0.1, max_positive_disparity=0.3)
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters(), *project.parameters()], lr=1e-3)
    for step in range(30):
        features = network(image[None, None])
        logits = head(features)
        statistics = patch_statistics(logits, 8)
        embeddings = F.avg_pool2d(project(features), 8).flatten(2)[0].t()
        confidence = F.avg_pool2d(F.one_hot(labels, classes).permute(2, 0, 1)[None].float(), 8)
        patch_labels = confidence.argmax(1).flatten()
        contrast = loss_function(embeddings, patch_labels, statistics.entropy.detach().flatten())
        loss = F.cross_entropy(logits, labels[None]) + 0.5 * contrast
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == 29:
            entropy = statistics.entropy
            print(
                f"step {step:2d}: contrast {contrast.item():.3f} over {int(loss_function.num_valid)} anchors, "
                f"patch entropy {entropy.min():.3f} to {entropy.max():.3f} nats"
            )
    z = F.normalize(embeddings, dim=1)
    h = statistics.entropy.detach().flatten()
    ours = loss_function(embeddings, patch_labels, h)
    plain = reference.patch_contrast_loss(z, patch_labels, h, max_positive_disparity=0.3)
    print(f"fused {ours.item():.6f}, plain PyTorch {plain.item():.6f}")


if __name__ == "__main__":
    main()
