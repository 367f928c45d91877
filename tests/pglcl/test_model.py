"""The network and the projection."""

from __future__ import annotations

import pytest
import torch
from pglcl.model import Projection, SegmentationNetwork, update_teacher


@pytest.mark.parametrize("count", [0, 1, 5])
def test_the_projection_takes_any_number_of_patches(count: int) -> None:
    projection = Projection(6, 4).train()
    x = torch.randn(count, 6, requires_grad=True)
    z = projection(x)
    assert z.shape == (count, 4)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(count))
    z.sum().backward()  # also without patches: the projection stays in the graph
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in projection.parameters())


NETWORKS = [
    ("unet", [4, 8, 8]), ("unet", [4, 8]), ("unet", [4, 6, 8, 10]), ("basicunet", [4, 6, 8, 8, 10]),
    ("dynunet", [4, 6, 8]), ("dynunet", [4, 6, 8, 10]),
    ("segresnet", [8, 16, 32]), ("segresnet", [8, 16]), ("segresnet", [8, 16, 32, 64]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "channels"), NETWORKS, ids=str)
@pytest.mark.parametrize("dims", [2, 3])
def test_features_are_those_of_the_logits(dims: int, name: str, channels: list[int]) -> None:
    network = SegmentationNetwork(dims, 2, 3, channels, 5, name)
    side = 2 * network.stride
    x = torch.randn(2, 2, *[side] * dims)
    logits, features = network.with_features(x)
    torch.testing.assert_close(network(x), logits)
    assert logits.shape == (2, 3, *[side] * dims)
    assert features.shape == (2, network.feature_channels, *[side // 2] * dims)
    assert network.projection(features.flatten(2).mean(2)).shape == (2, 5)
    # Everything except the last block of the decoder lies before the features. So their gradient reaches most weights,
    # and the output of the network depends on them.
    gradients = torch.autograd.grad(features.square().sum(), list(network.unet.parameters()), allow_unused=True)
    reached = sum(
        p.numel() for p, g in zip(network.unet.parameters(), gradients, strict=True) if g is not None and g.any()
    )
    assert reached > 0.5 * sum(p.numel() for p in network.unet.parameters())
    (of_features,) = torch.autograd.grad(network.with_features(x)[0].square().sum(), [features], allow_unused=True)
    assert of_features is None  # they are of another call: nothing is kept between calls
    logits, features = network.with_features(x)
    (of_features,) = torch.autograd.grad(logits.square().sum(), [features])
    assert of_features.any()
    nothing, same = network.with_features(x, torch.zeros(2, network.feature_channels, *[1] * dims))
    torch.testing.assert_close(same, features)
    assert not torch.allclose(nothing, logits)  # the logits do not depend on dropped channels
    again = SegmentationNetwork(**network.arguments)
    again.load_state_dict(network.state_dict())
    torch.testing.assert_close(again(x), logits)


def test_teacher_is_a_moving_average() -> None:
    student, teacher = (SegmentationNetwork(2, 1, 2, [4, 8], 4) for _ in range(2))
    update_teacher(teacher, student, 0.9, 0)  # the first step copies
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(t, s)
    before = [p.detach().clone() for p in teacher.parameters()]
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    update_teacher(teacher, student, 0.9, 1000)
    for t, b in zip(teacher.parameters(), before, strict=True):
        torch.testing.assert_close(t, b + 0.1)
