"""Tensors that are stored with the opposite sign (``Tensor.is_neg``): read, updated and written
back as any other. Native updates copies of such running statistics and loses the update."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import bnorm_ext

NAMES = ("input", "running_mean", "running_var", "weight", "bias", "residual")


def negated(t):
    view = torch._neg_view(-t)
    assert view.is_neg()
    assert torch.equal(view, t)
    return view


def imaginary(t):
    view = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert view.is_neg()
    assert torch.equal(view, t)
    return view


def tensors():
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.5

    return {name: rand(4, 3, 5, 5) if name in ("input", "residual") else rand(3) for name in NAMES}


def call(given, training, act):
    mean, var = given["running_mean"], given["running_var"]
    leaves = {n: given[n].requires_grad_() for n in ("input", "weight", "bias", "residual")}
    y = bnorm_ext.batch_norm(
        leaves["input"], mean, var, leaves["weight"], leaves["bias"], training,
        residual=leaves["residual"], act=act,
    )  # fmt: skip
    gradients = torch.autograd.grad(y.sin().sum(), tuple(leaves.values()), create_graph=True)
    second = torch.autograd.grad(gradients[0].sin().sum(), leaves["input"])
    return [y, *gradients, *second, mean.clone(), var.clone()]


@pytest.mark.parametrize("act", ["identity", "relu", "silu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("view", [negated, imaginary])
@pytest.mark.parametrize("name", [*NAMES, "all"])
def test_as_without_the_sign(name, view, training, act):
    given = tensors()
    changed = {n: view(t.clone()) if name in (n, "all") else t.clone() for n, t in given.items()}
    expected = call(given, training, act)
    torch.testing.assert_close(call(changed, training, act), expected, rtol=1e-12, atol=1e-12)


def test_counter():
    given = tensors()
    counter = torch._neg_view(torch.tensor(-3))
    args = (given["running_mean"], given["running_var"])
    bnorm_ext.batch_norm(given["input"], *args, None, None, True, num_batches_tracked=counter)
    assert counter == 4


def compiled(backend, act):
    def run(x, mean, var):
        return bnorm_ext.batch_norm(x, mean, var, training=True, act=act)

    results = []
    for function in (run, torch.compile(run, backend=backend, fullgraph=True)):
        given = tensors()
        mean = negated(given["running_mean"])
        y = function(given["input"], mean, given["running_var"])
        results.append((y, mean.clone(), given["running_var"]))
    torch.testing.assert_close(*results)


@pytest.mark.skipif(torch.__version__.startswith("2.8."), reason="refused with torch 2.8")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    """Not with Inductor, whose own operations ignore the sign of what a graph is given."""
    compiled(backend, "relu")


def test_compiled_to_natives_operator():
    """A graph has native's operator where there is no activation. It is refused, not wrong."""
    with pytest.raises(RuntimeError, match="fake tensor"):
        compiled("eager", None)


def test_module_in_training():
    given = tensors()
    nets = [bnorm_ext.BatchNorm2d(3).double() for _ in range(2)]
    nets[0].running_mean = negated(nets[0].running_mean.clone())
    for net in nets:
        net(given["input"])
    torch.testing.assert_close(nets[0].running_mean.clone(), nets[1].running_mean)
    assert nets[0].running_mean.is_neg()


def test_native_loses_the_update():
    given = tensors()
    mean = negated(given["running_mean"])
    before = mean.clone()
    F.batch_norm(given["input"], mean, given["running_var"].clone(), training=True)
    assert torch.equal(mean, before)
