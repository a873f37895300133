"""Nets under the tools that save memory: checkpointing of all kinds, hooks on saved tensors."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from tests.common.net_kinds import EVERY, MODES, backward, close, images, make, native, pair

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved tensors"])
@MODES
@EVERY
def test_checkpointed(kind, training, reentrant):
    """Running statistics move once in each of the two forward passes, natively too."""
    ours, plain = pair(kind, training)
    results = [
        backward(net, images(), lambda x, net=net: checkpoint(net, x, use_reentrant=reentrant))
        for net in (ours, plain)
    ]
    close(*results)
    assert ours.bn1.num_batches_tracked == (5 if training else 3)
    unchecked = backward(make(kind).train(training), images())
    close({n: t for n, t in results[0].items() if n[0] == "d"},
          {n: t for n, t in unchecked.items() if n[0] == "d"})  # fmt: skip


class Stage(nn.Module):
    """An image from an image."""

    def __init__(self, kind, seed):
        super().__init__()
        self.net = make(kind, seed=seed)

    def forward(self, x):
        return x + self.net(x).mean(1).view(-1, 1, 1, 1)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved tensors"])
@EVERY
def test_checkpoint_sequential(kind, reentrant):
    results = []
    for name in (kind, "native"):
        stages = nn.Sequential(*(Stage(name, seed) for seed in range(3))).train()

        def call(x, stages=stages):
            return checkpoint_sequential(stages, 2, x, use_reentrant=reentrant)

        results.append(backward(stages, images(), call))
    close(*results)


@pytest.mark.parametrize("kept", ["convolutions", "norms"])
@EVERY
def test_selectively_checkpointed(kind, kept):
    """A policy sees one operator for each batch norm, with what was fused into it. Kept norms
    are not computed again: their running statistics move once, and so does our counter."""
    results, calls = [], []
    model = native()
    model.relu = nn.ReLU()  # what is kept must not be changed in place
    for net in (make(kind, model), make("native", model)):
        seen: Counter[str] = Counter()

        def policy(context, op, *args, seen=seen, **kwargs):
            if not context.is_recompute:
                seen[str(op)] += 1
            name = "convolution" if kept == "convolutions" else "batch_norm"
            save = name in str(op)
            return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.MUST_RECOMPUTE

        def contexts(policy=policy):
            return create_selective_checkpoint_contexts(policy)

        def call(x, net=net, contexts=contexts):
            return checkpoint(net, x, use_reentrant=False, context_fn=contexts)

        results.append(backward(net, images(), call))
        calls.append(seen)
    assert calls[0]["bnorm_ext.batch_norm_training.default"] == 3
    assert sum(n for name, n in calls[0].items() if name.startswith("bnorm_ext")) == 3
    if kind != "converted":
        assert not any("relu" in name or "hardswish" in name for name in calls[0])
    if kept == "norms":
        for result in results:
            # Natively a separate addition, computed again.
            moved = {int(result.pop(f"bn{i}.num_batches_tracked")) for i in (1, 2, 3)}
            assert moved == {4 if result is results[0] else 5}
    close(*results)


@EVERY
def test_saved_tensors_on_the_cpu(kind):
    results = []
    for net in pair(kind):

        def call(x, net=net):
            with save_on_cpu():
                return net(x)

        results.append(backward(net, images(), call))
    close(*results)


@MODES
@EVERY
def test_saved_tensor_hooks(kind, training):
    """What is saved goes through the hooks; the statistics are not kept beside them, so that what
    is wrong there is wrong in the gradients."""
    ours, plain = pair(kind, training)
    packed = []

    def pack(t):
        packed.append(t)
        return t.detach().clone().numpy()

    def call(x, net=ours):
        with saved_tensors_hooks(pack, lambda array: torch.from_numpy(array)):
            return net(x)

    close(backward(ours, images(), call), backward(plain, images()))
    shapes = Counter(tuple(t.shape) for t in packed)
    assert shapes[4, 6, 5, 5] >= 3  # the inputs of three batch norms

    def vectors_doubled(t):
        return t + t if t.shape == (6,) else t  # statistics and weights of the batch norms alone

    x = images().requires_grad_()
    expected = torch.autograd.grad(make(kind).train(training)(x).sum(), x)
    with saved_tensors_hooks(lambda t: t, vectors_doubled):
        found = torch.autograd.grad(make(kind).train(training)(x).sum(), x)
    assert not torch.allclose(*found, *expected)
