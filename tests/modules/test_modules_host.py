"""What a call costs the host: its operators (`python -m bench.profile` has the time)."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from tests.common.twins import NATIVE, OURS, SHAPES

DIMS = [1, 2, 3]


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dims", DIMS)
def test_forward_is_one_operator(dims, training, momentum):
    """Output, running statistics and counter together; the counter is never read on the host,
    which would be another operator (``aten._local_scalar_dense``)."""
    module = OURS[dims](5, momentum=momentum).train(training)
    x = torch.randn(SHAPES[dims], requires_grad=True)
    with Recorder() as recorder:
        module(x)
    kind = "training" if training else "inference"
    assert recorder.names == [f"bnorm_ext.batch_norm_{kind}.default"]
    assert module.num_batches_tracked.item() == int(training)


@pytest.mark.parametrize("training", [True, False])
def test_backward_only_allocates(training):
    """Its operator calls none of torch's but those that allocate its results: each costs as much as
    a small layer's arithmetic."""
    module = OURS[2](5).train(training)
    x = torch.randn(SHAPES[2], requires_grad=True)
    y = module(x)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        y.backward(torch.ones_like(y))

    def inside(event):
        parent = event.cpu_parent
        return parent is not None and ("batch_norm_backward" in parent.name or inside(parent))

    names = {event.name for event in profiler.events() if inside(event)}
    assert names
    assert names <= {"aten::empty", "aten::empty_like", "aten::empty_strided"}


def test_recorder_sees_natives_operators():
    """The test above can fail: native's counter is an operator of its own."""
    with Recorder() as recorder:
        NATIVE[2](5)(torch.randn(SHAPES[2]))
    assert "aten.add_.Tensor" in recorder.names
