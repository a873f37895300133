"""A net with our batch norms and its native twin through random lives: training, evaluation, steps,
conversion, fusing, saving and loading, casts, copies, switches. After each event they agree."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import bnorm_ext
from bnorm_ext import fuse
from tests.common.cases import FORMATS, normal
from tests.common.likeness import CLOSE, assert_values
from tests.common.twins import NATIVE, outcome

C = 3
POSITIONS = {1: (4,), 2: (3, 2), 3: (2, 1, 3)}
ACTS = {"relu": nn.ReLU, "silu": nn.SiLU, "hardswish": nn.Hardswish}
KINKS = {"relu": [0.0], "silu": [], "hardswish": [-3.0, 3.0]}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


class Net(nn.Module):
    """act(bn2(act(bn1(x))) + x), with modules for fusing to find."""

    def __init__(self, dims: int, act: str, **kwargs: Any) -> None:
        super().__init__()
        self.bn1 = NATIVE[dims](C, **kwargs)
        self.act1 = ACTS[act]()
        self.bn2 = NATIVE[dims](C, **kwargs)
        self.act2 = ACTS[act]()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(x))
        return self.act2(self.bn2(y) + x)


def through_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Lives(RuleBasedStateMachine):
    """`ours` is what the package makes of a net; `native` is torch's, untouched."""

    ours: nn.Module
    native: Net

    @initialize(
        dims=st.sampled_from([2, 1, 3]),
        act=st.sampled_from(list(ACTS)),
        affine=st.booleans(),
        track=st.sampled_from([True, True, False]),
        momentum=st.sampled_from([0.1, None]),
    )
    def born(self, dims: int, act: str, affine: bool, track: bool, momentum: Any) -> None:
        self.dims, self.act, self.dtype = dims, act, torch.float64
        self.native = Net(
            dims, act, affine=affine, track_running_stats=track, momentum=momentum,
            dtype=torch.float64,
        )  # fmt: skip
        with torch.no_grad():
            for i, p in enumerate(self.native.parameters()):
                p.copy_(normal((C,), i).abs() + 0.2)
        self.ours = bnorm_ext.convert_batchnorm(copy.deepcopy(self.native))
        self.is_fused = False

    def both(self) -> tuple[nn.Module, nn.Module]:
        return self.ours, self.native

    # ---- The package's own operations -----------------------------------------------------------

    @rule()
    def convert(self) -> None:
        bnorm_ext.convert_batchnorm(self.ours)

    @rule()
    def revert(self) -> None:
        bnorm_ext.revert_batchnorm(self.ours)
        assert type(self.ours) is Net
        assert type(self.ours.bn1) is NATIVE[self.dims]
        self.is_fused = False

    @precondition(lambda self: not self.is_fused)
    @rule()
    def fuse(self) -> None:
        fused, report = bnorm_ext.fuse_batchnorm_act(self.ours)
        assert len(report.fused) == 2, str(report)
        assert all(a is b for a, b in zip(fused.parameters(), self.ours.parameters(), strict=True))
        self.ours, self.is_fused = fused, True

    @precondition(lambda self: self.is_fused)
    @rule()
    def unfuse(self) -> None:
        assert isinstance(self.ours, fuse.FusedModule)
        self.ours.unfuse()
        assert type(self.ours) is Net
        self.is_fused = False

    # ---- Running it -----------------------------------------------------------------------------

    @rule(
        seed=st.integers(0, 99),
        N=st.sampled_from([5, 2, 1]),
        layout=st.sampled_from(["contiguous", "channels_last"]),
        mean=st.sampled_from([0.0, 2.0]),
    )
    def step(self, seed: int, N: int, layout: str, mean: float) -> None:
        values = normal((N, C, *POSITIONS[self.dims]), seed, mean).to(self.dtype)
        if layout == "channels_last" and self.dims > 1:
            name = layout if self.dims == 2 else "channels_last_3d"
            values = values.contiguous(memory_format=FORMATS[name])
        sums: list[Tensor] = []
        hooks = [
            act.register_forward_pre_hook(lambda _, args: sums.append(args[0].detach()))
            for act in (self.native.act1, self.native.act2)
        ]
        results = []
        for net in (self.native, self.ours):
            x = values.detach().clone().requires_grad_()
            y = net(x)
            y.backward(torch.ones_like(y) + y.detach().sign())
            results.append({"y": y.detach(), "dx": x.grad})
        for hook in hooks:
            hook.remove()
        near = 10 * CLOSE.get(self.dtype, 1)
        decided = all(
            ((z.double() - kink).abs() > near).all() for z in sums for kink in KINKS[self.act]
        )
        theirs, mine = results
        self.assert_close("y", mine["y"], theirs["y"])
        self.assert_close("dx", mine["dx"], theirs["dx"], values=decided)
        for (name, p), (_, q) in self.named("parameters"):
            assert (p.grad is None) == (q.grad is None), name
            if q.grad is not None:
                self.assert_close(f"d{name}", p.grad, q.grad, values=decided)
                p.grad.copy_(q.grad)

    @rule(channels=st.sampled_from([C - 1, C + 1]), rank=st.sampled_from([-1, 0, 1]))
    def bad_input(self, channels: int, rank: int) -> None:
        shape = (2, channels, *[2] * (self.dims + rank))
        before = {n: b.clone() for n, b in self.ours.named_buffers()}
        x = torch.ones(shape, dtype=self.dtype)
        outcomes = [outcome(lambda net=net: net(x)) for net in self.both()]
        assert outcomes[0] == outcomes[1]
        is_ours = isinstance(self.ours.bn1, bnorm_ext.modules._BatchNormMixin)
        for n, b in self.ours.named_buffers():
            if outcomes[0] is not None and is_ours and n.startswith("bn1"):
                assert torch.equal(b, before[n]), n
        self.follow()

    def follow(self) -> None:
        """What native's modules change before they raise is not compared."""
        with torch.no_grad():
            for (_, b), (_, c) in self.named("buffers"):
                c.copy_(b)

    @rule(lr=st.sampled_from([0.1, 0.01]))
    def optimise(self, lr: float) -> None:
        for net in self.both():
            for p in net.parameters():
                if p.grad is not None and p.requires_grad:
                    p.data.add_(p.grad.clamp(-1, 1), alpha=-lr)

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none: bool) -> None:
        for net in self.both():
            net.zero_grad(set_to_none=to_none)

    # ---- Switches -------------------------------------------------------------------------------

    @rule(training=st.booleans())
    def train(self, training: bool) -> None:
        for net in self.both():
            net.train(training)

    @rule(name=st.sampled_from(["bn1", "bn2"]), training=st.booleans())
    def freeze_one(self, name: str, training: bool) -> None:
        for net in self.both():
            getattr(net, name).train(training)

    @rule(name=st.sampled_from(["bn1", "bn2"]), value=st.sampled_from([0.1, 0.5, 1.0, 0.0, None]))
    def momentum(self, name: str, value: float | None) -> None:
        for net in self.both():
            getattr(net, name).momentum = value

    @rule(name=st.sampled_from(["bn1", "bn2"]), value=st.sampled_from([1e-5, 1e-3, 0.5]))
    def eps(self, name: str, value: float) -> None:
        for net in self.both():
            getattr(net, name).eps = value

    @rule(name=st.sampled_from(["bn1", "bn2"]), value=st.booleans())
    def track(self, name: str, value: bool) -> None:
        for net in self.both():
            getattr(net, name).track_running_stats = value

    @rule(which=st.integers(0, 3), value=st.booleans())
    def requires_grad(self, which: int, value: bool) -> None:
        for net in self.both():
            for p in list(net.parameters())[which : which + 1]:
                p.requires_grad_(value)

    @rule(
        name=st.sampled_from(["bn1", "bn2"]), what=st.sampled_from(["running_stats", "parameters"])
    )
    def reset(self, name: str, what: str) -> None:
        done = [outcome(getattr(getattr(net, name), f"reset_{what}")) for net in self.both()]
        assert done[0] == done[1]

    # ---- Copies ---------------------------------------------------------------------------------

    @rule(dtype=st.sampled_from(DTYPES))
    def cast(self, dtype: torch.dtype) -> None:
        for net in self.both():
            net.to(dtype)
        self.dtype = dtype

    @rule()
    def deepcopy(self) -> None:
        self.ours, self.native = copy.deepcopy(self.ours), copy.deepcopy(self.native)

    @rule()
    def pickled(self) -> None:
        self.ours, self.native = (pickle.loads(pickle.dumps(net)) for net in self.both())

    @rule(strict=st.booleans())
    def exchange_checkpoints(self, strict: bool) -> None:
        states = [through_file(net.state_dict()) for net in self.both()]
        assert list(states[0]) == list(states[1])
        self.ours.load_state_dict(states[1], strict=strict)
        self.native.load_state_dict(states[0], strict=strict)

    @rule()
    def assign_checkpoint(self) -> None:
        for net in self.both():
            net.load_state_dict(through_file(net.state_dict()), assign=True)

    # ---- They agree -----------------------------------------------------------------------------

    def named(self, what: str) -> Any:
        pairs = [list(getattr(net, f"named_{what}")()) for net in self.both()]
        assert [n for n, _ in pairs[0]] == [n for n, _ in pairs[1]]
        return zip(*pairs, strict=True)

    def assert_close(self, name: str, got: Any, right: Any, values: bool = True) -> None:
        assert (got.dtype, got.shape) == (right.dtype, right.shape), name
        if values and self.dtype in CLOSE:
            # Through two batch norms.
            assert_values(name, got, right, CLOSE[self.dtype], right.numel())

    @invariant()
    def same_state(self) -> None:
        if not hasattr(self, "native"):
            return
        for what in ("buffers", "parameters"):
            for (name, a), (_, b) in self.named(what):
                assert a.requires_grad == b.requires_grad, name
                if not b.is_floating_point():
                    assert torch.equal(a, b), f"{name}: {a} {b}"
                    continue
                self.assert_close(name, a, b)
                if not torch.equal(a, b):
                    # So that roundings do not add up over a long life.
                    a.data.copy_(b)
        assert self.ours.training == self.native.training


Lives.TestCase.settings = settings(stateful_step_count=15)
TestLives = Lives.TestCase
