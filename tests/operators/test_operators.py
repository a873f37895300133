"""The registered operators: schemas, fakes, autograd registration, version counters."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

import bnorm_ext  # noqa: F401  (registers the operators)

ops = torch.ops.bnorm_ext
ALL = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
SHAPES = [(4, 3), (4, 3, 5), (4, 3, 5, 5), (2, 3, 2, 3, 4)]


class Arguments:
    """Tensors for one call, in the shapes that the operators take."""

    def __init__(self, shape, device="cpu", grad=False, channels_last=False):
        def randn(*size, **options):
            return torch.randn(*size, device=device, **options)

        self.x, self.dy = randn(*shape), randn(*shape)
        if channels_last:
            self.x = self.x.contiguous(memory_format=torch.channels_last)
        C = shape[1]
        self.weight, self.bias, self.mean = randn(C), randn(C), randn(C)
        self.rstd = torch.rand(C, device=device) + 0.5
        self.running_mean, self.running_var = randn(C), torch.rand(C, device=device) + 0.5
        self.counter = torch.tensor(3, device=device)
        for t in (self.x, self.dy, self.weight, self.bias):
            t.requires_grad_(grad)


def check(op, *arguments):
    assert opcheck(op.default, arguments) == dict.fromkeys(ALL, "SUCCESS")


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_opcheck_forward_and_backward(shape, grad, device):
    a = Arguments(shape, device, grad)
    buffers = (a.running_mean, a.running_var)
    check(ops.batch_norm_training, a.x, None, a.weight, a.bias, *buffers, a.counter, 0.1, 1e-5)
    check(ops.batch_norm_inference, a.x, None, a.weight, a.bias, *buffers, 1e-5)
    given = (a.dy, a.x, None, a.weight, a.bias)
    rest = (None, "identity", 0.0, [True, False, True, True])
    check(ops.batch_norm_backward, *given, None, None, a.mean, a.rstd, True, 1e-5, *rest)
    check(ops.batch_norm_backward, *given, *buffers, None, None, False, 1e-5, *rest)


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_with_options(grad, device):
    a = Arguments((4, 3, 5, 5), device, grad, channels_last=True)
    check(ops.batch_norm_training, a.x, None, None, None, None, None, None, 0.1, 1e-5)
    check(
        ops.batch_norm_training,
        *(a.x, None, a.weight, None, a.running_mean, a.running_var, a.counter, None, 1e-5),
    )
    only_dx = (None, "identity", 0.0, [True, False, False, False])
    train = (None, None, a.mean, a.rstd, True, 1e-5)
    check(ops.batch_norm_backward, a.dy, a.x, None, None, None, *train, *only_dx)


def test_opcheck_pieces_of_synchronised_training(device):
    a = Arguments((4, 3, 5, 5), device)
    double = {"dtype": torch.float64, "device": device}
    check(ops.batch_norm_stats, a.x)
    check(
        ops.batch_norm_merge_stats,
        torch.randn(2, 3, **double),
        torch.rand(2, 3, **double),
        torch.tensor([4.0, 6.0], **double),
        *(a.running_mean, a.running_var, a.counter, 0.1, 1e-5, torch.float32),
    )
    affine = (None, a.weight, a.bias, a.mean, a.rstd)
    check(ops.batch_norm_apply, a.x, *affine)
    check(ops.batch_norm_backward_reduce, a.dy, a.x, *affine, None)
    check(ops.batch_norm_backward_apply, a.dy, a.x, *affine, None, a.mean, a.rstd)


def test_pieces_make_the_whole(device):
    """Two processes with half a batch each, statistics merged, are one process with all of it.
    What sums in float lose depends on which values stand together: a unit in the last place of
    the variance. Everything that follows from equal statistics is equal to the bit."""
    x, dy = torch.randn(6, 5, 7, 3, device=device) + 3, torch.randn(6, 5, 7, 3, device=device)
    weight, bias = torch.randn(5, device=device), torch.randn(5, device=device)
    whole = [torch.zeros(5, device=device), torch.ones(5, device=device)]
    merged = [t.clone() for t in whole]
    given = (x, None, weight, bias)
    y, mean, rstd, _ = ops.batch_norm_training(*given, *whole, None, 0.1, 1e-5)
    activated = ops.batch_norm_training(*given, None, None, None, 0.1, 1e-5, "relu")[0]

    halves = [half.contiguous() for half in x.chunk(2)]
    statistics = [ops.batch_norm_stats(half) for half in halves]
    mean2, rstd2 = ops.batch_norm_merge_stats(
        *(torch.stack(t) for t in zip(*statistics, strict=True)),
        torch.full((2,), 63.0, dtype=torch.float64, device=device),
        *(*merged, None, 0.1, 1e-5, torch.float32),
    )
    unit = torch.finfo(torch.float32).eps
    for one, two in ((mean[0], mean2[0]), (rstd, rstd2), *zip(whole, merged, strict=True)):
        torch.testing.assert_close(one, two, rtol=unit, atol=0)
    # With what rounding has left out, means of 3 are known to a hundredth of a unit.
    for t in (mean, mean2):
        assert (t.double().sum(0) - x.double().mean((0, 2, 3))).abs().max() < 3 * unit / 100
    for act, right in (("relu", activated), ("identity", y)):
        pieces = torch.cat(
            [ops.batch_norm_apply(h, None, weight, bias, mean, rstd, act)[0] for h in halves]
        )
        assert torch.equal(pieces, right)

    dx, _, dweight, dbias = ops.batch_norm_backward(
        *(dy, x, None, weight, bias, None, None, mean, rstd, True, 1e-5),
        *(None, "identity", 0.0, [True, False, True, True]),
    )
    sums = [
        ops.batch_norm_backward_reduce(g.contiguous(), h, None, weight, bias, mean, rstd, None)
        for g, h in zip(dy.chunk(2), halves, strict=True)
    ]
    sum_dy, sum_dy_xhat = (a + b for a, b in zip(*sums, strict=True))
    # The sums are rounded to float once more than in one process: a few units in the last place.
    torch.testing.assert_close(sum_dy, dbias, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(sum_dy_xhat, dweight, rtol=1e-6, atol=1e-5)
    dx2 = ops.batch_norm_backward_apply(
        *(dy, x, None, weight, bias, mean, rstd, None),
        # Divided by a tensor: by a number, torch multiplies with its reciprocal on a GPU.
        *(t / torch.full_like(t, 126) for t in (dbias, dweight)),
    )[0]
    assert torch.equal(dx, dx2)


def test_gradients_that_are_not_asked_for_are_not_made(device):
    a = Arguments((4, 3, 5, 5), device)
    for wanted in range(8):
        mask = [bool(wanted & 1), False, bool(wanted & 2), bool(wanted & 4)]
        given = (a.dy, a.x, None, a.weight, a.bias)
        for out in (
            ops.batch_norm_backward(
                *(*given, None, None, a.mean, a.rstd, True, 1e-5, None, "identity", 0.0, mask)
            ),
            ops.batch_norm_backward(
                *(*given, a.running_mean, a.running_var, None, None, False, 1e-5),
                *(None, "identity", 0.0, mask),
            ),
        ):
            assert [t is not None for t in out] == mask


def test_in_place_update_counts_as_one(device):
    a = Arguments((4, 3, 5, 5), device)
    buffers = (a.running_mean, a.running_var, a.counter)
    before = [t._version for t in buffers]
    ops.batch_norm_training(a.x, None, None, None, *buffers, 0.1, 1e-5)
    assert [t._version for t in buffers] == [v + 1 for v in before]


def test_mean_with_and_without_what_rounding_has_left_out(device):
    """Both forms are taken; the second row changes what x - mean gives."""
    a = Arguments((4, 3, 5, 5), device)
    zeros = torch.zeros_like(a.mean)
    rest = torch.full_like(a.mean, 2**-30)

    def results(mean):
        given = (a.weight, a.bias, mean, a.rstd)
        y, _ = ops.batch_norm_apply(a.x, None, *given)
        sums = ops.batch_norm_backward_reduce(a.dy, a.x, None, *given, None)
        dx, _ = ops.batch_norm_backward_apply(a.dy, a.x, None, *given, None, *sums)
        return y, *sums, dx

    alone, exact = results(a.mean), results(torch.stack([a.mean, zeros]))
    assert all(map(torch.equal, alone, exact))
    moved = results(torch.stack([a.mean, 2**20 * rest]))
    for one, other in zip(moved, results(a.mean + 2**20 * rest), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    both = torch.stack([a.mean, zeros])
    for wrong in (both.repeat(2, 1), both[:, :-1], both[None], both.t().contiguous().t(),
                  both.half(), a.mean[None]):  # fmt: skip
        with pytest.raises(RuntimeError, match="mean must be 3 contiguous values"):
            results(wrong)
