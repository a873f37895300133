"""Random calls that are right: the promise of docs/numerics.md beside native and float64, whatever
the shape, the strides, the signs in memory, the dtypes and the flags."""

from __future__ import annotations

from hypothesis import assume, given

from tests.common import cases, fused_cases
from tests.common.strategies import HARD, ORDINARY, Call, calls


def case_of(call: Call) -> cases.Case:
    assume(call.momentum is not None)
    names = ("x", "dy", "running_mean", "running_var", "weight", "bias")
    tensors = {name: call.tensor(name) for name in names}
    return cases.Case(**tensors, training=call.training, momentum=call.momentum, eps=call.eps)


@given(calls(values=(*ORDINARY, *HARD), empty=False, fused=False, overlapping_buffers=False))
def test_batch_norm(call):
    cases.assert_promise(case_of(call))


@given(calls(empty=False, overlapping_buffers=False))
def test_addition_and_activation(call):
    assume(call.weight is not None and call.bias is not None)
    f = fused_cases.Fused(case_of(call), call.tensor("residual"), call.act or "identity")
    z = fused_cases.pre_activation(f)
    for kink in fused_cases.KINKS.get(f.act, []):  # on which side z falls, rounding decides
        f.c.dy = f.c.dy.masked_fill((z - kink).abs() < 1e-3, 0)
    fused_cases.assert_close(f)
