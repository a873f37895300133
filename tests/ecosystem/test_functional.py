"""Nets under torch.func and forward-mode AD, against native: for functional_call, per-sample
gradients, Jacobians, Hessians, ensembles, double backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    replace_all_batch_norm_modules_,
    stack_module_state,
    vjp,
    vmap,
)

from tests.common.net_kinds import EVERY, MODES, close, images, make, native, pair
from tests.common.twins import outcome

pytestmark = pytest.mark.usefixtures("one_thread")


def tensors(net):
    """Parameters and buffers of their own."""
    copied = copy.deepcopy(net)
    return {n: p.detach() for n, p in copied.named_parameters()}, dict(copied.named_buffers())


def loss_of(net, buffers):
    """The loss as a function of parameters and input; beside it the buffers as they are then."""

    def loss(parameters, x):
        # A transform may not change what it captures.
        changed = {n: b.clone() for n, b in buffers.items()}
        return functional_call(net, (parameters, changed), (x,)).square().sum(), changed

    return loss


@MODES
@EVERY
def test_functional_call_takes_the_given_tensors(kind, training):
    nets = pair(kind, training)
    results = []
    for net in nets:
        before = copy.deepcopy(net.state_dict())
        given = {n: t.clone() for n, t in make("native", seed=1).state_dict().items()}
        y = functional_call(net, given, (images(),))
        results.append({"y": y, **given})
        close(dict(net.state_dict()), dict(before))
    close(*results)
    moved = results[0]["bn1.num_batches_tracked"].item()
    assert moved == (4 if training else 3)


@MODES
@EVERY
def test_gradients(kind, training):
    results = []
    for net in pair(kind, training):
        parameters, buffers = tensors(net)
        (gradients, dx), after = grad(loss_of(net, buffers), (0, 1), has_aux=True)(
            parameters, images()
        )
        results.append({"dx": dx, **gradients, **{f"after {n}": b for n, b in after.items()}})
    close(*results)


@EVERY
def test_gradients_per_sample_in_evaluation(kind):
    """Opacus' recipe; also a loop over the samples."""
    results = []
    x = images()
    for net in pair(kind, training=False):
        parameters, buffers = tensors(net)
        loss = loss_of(net, buffers)

        def one(p, x, loss=loss):
            return grad(loss, has_aux=True)(p, x.unsqueeze(0))[0]

        mapped = vmap(one, (None, 0))(parameters, x)
        loop = [one(parameters, image) for image in x]
        close(mapped, {n: torch.stack([g[n] for g in loop]) for n in parameters})
        results.append(mapped)
    close(*results)


@EVERY
def test_gradients_per_sample_with_statistics_of_the_sample(kind):
    """torch.func's patch for training mode: batch norms that track nothing."""
    results = []
    for net in pair(kind):
        assert replace_all_batch_norm_modules_(net) is net
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        assert [m.running_mean for m in norms] == [None] * 3
        parameters, buffers = tensors(net)
        loss = loss_of(net, buffers)

        def one(p, x, loss=loss):
            return grad(loss, has_aux=True)(p, x.unsqueeze(0))[0]

        results.append(vmap(one, (None, 0))(parameters, images()))
    close(*results)


@EVERY
def test_batches_cannot_share_running_statistics(kind):
    """Native's error and text. Its counter has moved by then, ours has not."""
    ours, plain = pair(kind)
    before = copy.deepcopy(ours.state_dict())
    x = images(count=6).unflatten(0, (2, 3))
    errors = [outcome(lambda net=net: vmap(net)(x)) for net in (ours, plain)]
    assert errors[0] is not None
    assert errors[0] == errors[1]
    close(dict(ours.state_dict()), dict(before))


@MODES
@EVERY
def test_ensemble(kind, training):
    """Stacked parameters and buffers: each net as by itself, running statistics too."""
    x = images()
    for shared in (True, False):
        nets = [make(kind, seed=seed).train(training) for seed in range(3)]
        parameters, buffers = stack_module_state(nets)
        given = x if shared else torch.stack([images(seed) for seed in range(3)])

        def call(p, b, x, net=nets[0]):
            return functional_call(net, (p, b), (x,))

        y = vmap(call, (0, 0, None if shared else 0))(parameters, buffers, given)
        for i in range(len(nets)):
            plain = make("native", seed=i).train(training)
            close(y[i], plain(x if shared else given[i]))
            close({n: b[i] for n, b in buffers.items()}, dict(plain.named_buffers()))


@MODES
@EVERY
def test_forward_mode(kind, training):
    """jvp, linearize and jacfwd by torch.func, and dual numbers; in parameters and input."""
    ours, plain = pair(kind, training)
    x, v = images(), images(1)
    results = []
    for net in (ours, plain):
        parameters, _ = tensors(net)
        directions = {n: torch.linspace(-1, 1, p.numel()).view_as(p).double()
                      for n, p in parameters.items()}  # fmt: skip

        def call(p, x, net=net):
            return functional_call(net, (p, {n: b.clone() for n, b in net.named_buffers()}), (x,))

        by_jvp = jvp(call, (parameters, x), (directions, v))
        results.append(by_jvp)
        y, push = linearize(call, parameters, x)
        close((y, push(directions, v)), by_jvp)
        with forward_ad.dual_level():
            duals = {n: forward_ad.make_dual(p, directions[n]) for n, p in parameters.items()}
            close(tuple(forward_ad.unpack_dual(call(duals, forward_ad.make_dual(x, v)))), by_jvp)
        close(jacfwd(call, 1)(parameters, x[:2]), jacrev(call, 1)(parameters, x[:2]))
        pulled = vjp(call, parameters, x)[1](torch.ones_like(y))
        inner = sum((pulled[0][n] * directions[n]).sum() for n in parameters)
        close(inner + (pulled[1] * v).sum(), by_jvp[1].sum())
    close(*results)


ORDERS = {
    "hessian": lambda f: hessian(f),
    "reverse over reverse": lambda f: jacrev(jacrev(f)),
    "reverse over forward": lambda f: jacrev(jacfwd(f)),
}
SMALL = ("bn1.weight", "bn2.bias", "bn3.weight", "fc.bias")


@pytest.mark.parametrize("order", ORDERS)
@MODES
@EVERY
def test_hessian(kind, training, order):
    """Against plain torch operations, for native's lacks terms in training (test_transforms.py)."""
    results = []
    x = images()
    for net in (make(kind).train(training), make("explicit").train(training)):
        parameters, buffers = tensors(net)
        fixed = {n: parameters.pop(n) for n in list(parameters) if n not in SMALL}

        def loss(chosen, net=net, fixed=fixed, buffers=buffers):
            given = {n: b.clone() for n, b in buffers.items()}
            return (functional_call(net, (fixed | chosen, given), (x,)) ** 3).sum()

        rows = ORDERS[order](loss)(parameters)
        results.append({f"{a} {b}": t for a, row in rows.items() for b, t in row.items()})
    close(*results)
    assert results[0]["bn1.weight bn1.weight"].abs().max() > 1e-3


@MODES
@EVERY
def test_forward_over_reverse_in_the_input(kind, training):
    """A Hessian-vector product three ways: by torch.func, by dual numbers, by double backward."""
    ours, explicit = (make(k).train(training) for k in (kind, "explicit"))
    x, v = images(), images(1)

    def loss_of_input(net):
        parameters, buffers = tensors(net)

        def loss(x):
            given = {n: b.clone() for n, b in buffers.items()}
            return (functional_call(net, (parameters, given), (x,)) ** 3).sum()

        return loss

    _, expected = jvp(grad(loss_of_input(explicit)), (x,), (v,))
    _, by_func = jvp(grad(loss_of_input(ours)), (x,), (v,))
    close(by_func, expected)
    close(torch.autograd.functional.hvp(loss_of_input(ours), x, v)[1], expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), v)
        (dx,) = torch.autograd.grad(loss_of_input(ours)(dual), dual)
        close(forward_ad.unpack_dual(dx).tangent, expected)


@MODES
@EVERY
def test_jacobian_of_torch_autograd_functional(kind, training):
    ours, plain = pair(kind, training)
    x = images(count=2)
    expected = torch.autograd.functional.jacobian(plain, x)
    for vectorize in (False, True):
        close(torch.autograd.functional.jacobian(ours, x, vectorize=vectorize), expected)


@MODES
@EVERY
def test_gradcheck_of_the_whole_net(kind, training):
    """First and second derivatives, with activation and addition, against finite differences."""
    net = make(kind).train(training)
    names = ["conv2.weight", "bn1.weight", "bn2.weight", "bn2.bias", "bn3.weight"]
    parameters, buffers = tensors(net)

    def f(x, *chosen):
        given = parameters | dict(zip(names, chosen, strict=True))
        fixed = {n: b.clone() for n, b in buffers.items()}
        return functional_call(net, (given, fixed), (x,))

    leaves = [t.clone().requires_grad_() for t in (images(), *(parameters[n] for n in names))]
    # fast_mode: along random directions instead of one element after the other.
    assert gradcheck(f, leaves, fast_mode=True)
    assert gradgradcheck(f, leaves, fast_mode=True)


@EVERY
def test_gradient_penalty(kind):
    """WGAN-GP (Gulrajani et al. 2017, arXiv:1704.00028): the gradients of a penalty on gradients,
    in one backward with the critic's loss, are native's."""
    results = []
    for net in pair(kind):
        real, fake = images(1), images(2)
        share = torch.linspace(0.1, 0.9, 4, dtype=torch.float64).view(4, 1, 1, 1)
        mixed = (share * real + (1 - share) * fake).requires_grad_()
        scores = net(mixed)
        (gradient,) = torch.autograd.grad(scores.sum(), mixed, create_graph=True)
        penalty = (gradient.flatten(1).norm(2, 1) - 1).square().mean()
        (net(fake).mean() - net(real).mean() + 10 * penalty).backward()
        found = {f"d{n}": p.grad for n, p in net.named_parameters() if p.grad is not None}
        results.append({"penalty": penalty.detach(), **found, **dict(net.named_buffers())})
    close(*results)
    assert results[0]["dconv1.weight"].abs().max() > 1e-3


def test_the_makes_compute_the_same():
    """Guards the tests above: parameters, buffers and names agree, and the batch matters."""
    plain = native()
    for kind in ("converted", "act", "explicit", "fused"):
        net = make(kind)
        assert list(net.state_dict()) == list(plain.state_dict())
        for training in (False, True):  # which moves the statistics
            close(net.train(training)(images()), copy.deepcopy(plain).train(training)(images()))
    plain.train()
    assert not torch.allclose(plain(images())[:2], plain(images(count=2)))
