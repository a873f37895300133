"""Hooks that are registered on the modules of a fused net fire as on those of the plain one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bnorm_ext
from bnorm_ext.fuse.call import batch_norm_add_act
from tests.common.fuse_nets import assert_trains_alike, build, fuse_separately, images

KINDS = {
    "forward": lambda m, f: m.register_forward_hook(lambda m, a, y: f("forward")),
    "pre": lambda m, f: m.register_forward_pre_hook(lambda m, a: f("pre")),
    "backward": lambda m, f: m.register_full_backward_hook(lambda m, i, o: f("backward")),
    "backward pre": lambda m, f: m.register_full_backward_pre_hook(lambda m, o: f("backward pre")),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "path", ["stem", "stem.1", "stem.2", "layer1", "layer1.0", "layer1.0.relu"]
)
def test_hooks_registered_after_fusing_fire(path, kind):
    plain = build("resnet")
    fused, _ = fuse_separately(plain)
    seen = []
    for net in (plain, fused):
        calls = []
        handle = KINDS[kind](net.get_submodule(path), calls.append)
        try:
            net(images(0)).square().mean().backward()
        except RuntimeError as error:  # torch's, of an activation in place after such a hook
            calls.append(str(error))
        seen.append(calls)
        handle.remove()
        net(images(0))
        assert calls == seen[-1]
    assert seen[0] == seen[1]
    assert seen[0]
    assert_trains_alike(fused, plain, [images(1)])


def test_hooks_of_all_modules_fire():
    plain = build("resnet")
    fused, _ = fuse_separately(plain)
    seen = []
    for net in (plain, fused):
        names = {module: name for name, module in net.named_modules()}
        calls = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, a, y, names=names, calls=calls: calls.append(names[m])
        )
        try:
            net(images(0))
        finally:
            handle.remove()
        seen.append(calls)
    assert seen[0] == seen[1]


def test_hooks_of_all_modules_fire_in_the_fused_call():
    """As when somebody runs `fused_graph`, without the module that looks for hooks before."""
    bn, act, seen = bnorm_ext.BatchNorm2d(3), nn.ReLU(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(m))
    try:
        batch_norm_add_act(bn, torch.randn(2, 3, 4, 4), act=act)
    finally:
        handle.remove()
    assert seen == [bn, act]
