"""What a conversion keeps on every single module: modes, flags, attributes, hooks, and the
mechanisms that other tools have put into it."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from bnorm_ext.convert import convert_batchnorm, revert_batchnorm
from tests.common.twins import FLOAT64, NATIVE, NO_BIAS, OURS, assert_same, step

SHAPE = (4, 3, 2, 5)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)


def norm(**kwargs):
    return nn.BatchNorm2d(3, dtype=torch.float64, **kwargs)


def test_modes_per_module():
    net = nn.Sequential(norm(), norm(), nn.Sequential(norm()))
    net[1].eval()
    net[2][0].eval()
    for change in (convert_batchnorm, revert_batchnorm):
        change(net)
        assert [module.training for module in (net, net[0], net[1], net[2], net[2][0])] == [
            True,
            True,
            False,
            True,
            False,
        ]


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"momentum": None},
        {"momentum": 0.3, "eps": 1e-3},
        {"affine": False},
        {"track_running_stats": False},
        *NO_BIAS,
    ],
)
def test_configuration(kwargs):
    native = norm(**kwargs)
    text = repr(native)
    ours = convert_batchnorm(copy.deepcopy(native))
    assert repr(ours) == text
    x, dy = batch()
    for training in (True, False):
        ours.train(training), native.train(training)
        assert_same(step(ours, x, dy), step(native, x, dy))
    assert repr(revert_batchnorm(ours)) == text


def test_requires_grad_grad_dtype_and_device():
    net = nn.Sequential(norm().bfloat16(), nn.BatchNorm2d(3, device="meta"), norm())
    net[0].weight.requires_grad_(False)
    net[2].bias.grad = torch.ones(3, dtype=torch.float64)
    grad = net[2].bias.grad
    convert_batchnorm(net)
    assert not net[0].weight.requires_grad
    assert net[0].bias.requires_grad
    assert net[0].running_mean.dtype == torch.bfloat16
    assert net[1].running_var.is_meta
    assert net[2].bias.grad is grad


def test_extra_attributes_and_slots_of_any_kind():
    module = norm()
    module.note = ["mine"]
    module.register_buffer("extra", torch.arange(3.0), persistent=False)
    module.register_parameter("scale", nn.Parameter(torch.ones(1)))
    module.child = nn.BatchNorm1d(2)
    note = module.note
    convert_batchnorm(module)
    assert module.note is note
    assert "extra" not in module.state_dict()
    assert "scale" in module.state_dict()
    assert type(module.child) is OURS[1]
    assert type(revert_batchnorm(module).child) is NATIVE[1]
    assert module.note is note


def test_forward_replaced_on_the_instance_stays_replaced():
    module = norm()
    module.forward = lambda x: x + 1
    x, _ = batch()
    assert torch.equal(convert_batchnorm(module)(x), x + 1)


def register_all(module, log):
    """One hook of every kind; returns the handles by name."""

    def always(m, args, y):
        log.append("always")

    return {
        "pre": module.register_forward_pre_hook(lambda m, a: log.append("pre")),
        "pre-kw": module.register_forward_pre_hook(
            lambda m, a, k: log.append("pre-kw"), with_kwargs=True
        ),
        "forward": module.register_forward_hook(lambda m, a, y: log.append("forward")),
        "forward-kw": module.register_forward_hook(
            lambda m, a, k, y: log.append("forward-kw"), with_kwargs=True
        ),
        "always": module.register_forward_hook(always, always_call=True),
        "backward": module.register_full_backward_hook(lambda m, i, o: log.append("backward")),
        "backward-pre": module.register_full_backward_pre_hook(
            lambda m, o: log.append("backward-pre")
        ),
        "save-pre": module.register_state_dict_pre_hook(lambda m, p, k: log.append("save-pre")),
        "save": module.register_state_dict_post_hook(lambda m, s, p, d: log.append("save")),
        "load-pre": module.register_load_state_dict_pre_hook(lambda m, *a: log.append("load-pre")),
        "load": module.register_load_state_dict_post_hook(lambda m, k: log.append("load")),
    }


def exercise(module):
    x, dy = batch()
    x.requires_grad_()
    module(x).backward(dy)
    module.load_state_dict(module.state_dict())


def test_hooks_of_every_kind():
    module, log = norm(), []
    handles = register_all(module, log)
    exercise(module)
    expected = list(log)
    assert sorted(expected) == sorted(handles)
    for change in (convert_batchnorm, revert_batchnorm):
        change(module)
        gc.collect()  # hooks may hold the module weakly
        log.clear()
        exercise(module)
        assert log == expected


def test_always_called_hook_sees_a_failing_call():
    module, log = norm(), []
    register_all(module, log)
    convert_batchnorm(module)
    with pytest.raises(ValueError, match="expected 4D input"):
        module(torch.zeros(3))
    assert log[-1] == "always"


@pytest.mark.parametrize("again", [False, True])
def test_handles_from_before_remove_their_hooks(again):
    module, log = norm(), []
    handles = register_all(module, log)
    convert_batchnorm(module)
    if again:
        revert_batchnorm(module)
    for handle in handles.values():
        handle.remove()
    exercise(module)
    assert log == []


def test_tensor_hooks_on_parameters():
    module, log = norm(), []
    module.weight.register_hook(lambda g: log.append("weight"))
    convert_batchnorm(module)
    exercise(module)
    assert log == ["weight"]


def test_weak_references_stay_alive():
    """Tools that remember modules weakly (profilers, EMA) find the converted one."""
    net = nn.Sequential(norm())
    reference = weakref.ref(net[0])
    convert_batchnorm(net)
    gc.collect()
    assert reference() is net[0]


def pruned(module):
    prune.random_unstructured(module, "weight", 1)


def weight_normed(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(module, "weight", dim=None)


def spectral_normed(module):
    module.weight = nn.Parameter(module.weight.detach()[:, None])
    nn.utils.spectral_norm(module, "weight")
    module.register_forward_pre_hook(lambda m, a: setattr(m, "weight", m.weight.reshape(-1)))


@pytest.mark.parametrize("prepare", [pruned, weight_normed, spectral_normed])
def test_reparametrisation_by_hooks(prepare):
    """These leave the exact native type and put the weight together in a pre-hook."""
    torch.manual_seed(0)
    native = norm()
    prepare(native)
    torch.manual_seed(0)
    ours = norm()
    prepare(ours)
    for module in (native, ours):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(1.5)
    convert_batchnorm(ours)
    assert type(ours) is OURS[2]
    x, dy = batch()
    assert_same(step(ours, x, dy), step(native, x, dy))


def test_parametrised_after_conversion():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    native, ours = norm(), convert_batchnorm(norm())
    for module in (native, ours):
        nn.utils.parametrize.register_parametrization(module, "weight", Double())
    x, dy = batch()
    assert_same(step(ours, x, dy), step(native, x, dy))
    nn.utils.parametrize.remove_parametrizations(ours, "weight")
    assert type(ours) is OURS[2]
    assert torch.equal(ours.weight, torch.full((3,), 2.0, dtype=torch.float64))


def test_compiled_net_notices_the_conversion():
    """The compiled code is guarded by the module's type."""
    torch._dynamo.reset()
    net = nn.Sequential(norm(), nn.ReLU())
    native = copy.deepcopy(net)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(net, backend=backend, fullgraph=True)
    x, _ = batch()
    for expected in (1, 2):
        torch.testing.assert_close(compiled(x), native(x), **FLOAT64)
        assert len(graphs) == expected
        convert_batchnorm(net)


def test_data_parallel_and_nested_wrappers():
    wrapped = nn.DataParallel(nn.Sequential(norm()))
    convert_batchnorm(wrapped)
    assert type(wrapped.module[0]) is OURS[2]
