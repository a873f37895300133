"""Subclasses of batch norm that conversion does not know: left as they are, and named."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from bnorm_ext.convert import convert_batchnorm, revert_batchnorm
from tests.common.twins import OURS

pytestmark = pytest.mark.usefixtures("no_stray_warnings")


class BatchNormAct(nn.BatchNorm2d):
    """A subclass whose forward does more."""

    def forward(self, x):
        return torch.relu(super().forward(x))


class OwnSubclass(OURS[2]):
    """A subclass of ours: converted already, but no plain one either."""


class Positive(nn.Module):
    def forward(self, weight):
        return weight.abs()


def foreign_net():
    net = nn.Sequential(BatchNormAct(3), nn.BatchNorm2d(3), nn.SyncBatchNorm(3))
    net.append(nn.Sequential(BatchNormAct(3), nn.BatchNorm2d(3), OwnSubclass(3)))
    net.append(nn.InstanceNorm2d(3, affine=True))
    parametrize.register_parametrization(net[3][1], "weight", Positive())
    return net


def test_foreign_subclasses_are_left_and_named_in_one_warning():
    net = foreign_net()
    before = [type(module) for module in net.modules()]
    with pytest.warns(UserWarning, match="convert_batchnorm left these") as caught:
        assert convert_batchnorm(net) is net
    assert [type(module) for module in net.modules()] == [
        OURS[2] if cls is nn.BatchNorm2d else cls for cls in before
    ]
    assert len(caught) == 1
    text = str(caught[0].message)
    assert f"{BatchNormAct.__module__}.BatchNormAct: 0, 3.0;" in text
    assert "SyncBatchNorm: 2;" in text
    assert "ParametrizedBatchNorm2d: 3.1" in text
    assert "OwnSubclass" not in text
    assert "InstanceNorm" not in text
    assert caught[0].filename == __file__  # points at the caller


def test_foreign_root_is_named():
    module = BatchNormAct(3)
    with pytest.warns(UserWarning, match=r"BatchNormAct: \(root\)"):
        assert convert_batchnorm(module) is module
    assert type(module) is BatchNormAct


def test_revert_leaves_and_names_subclasses_of_ours():
    net = nn.Sequential(OURS[2](3), OwnSubclass(3), nn.BatchNorm2d(3))
    with pytest.warns(UserWarning, match="revert_batchnorm left.*OwnSubclass: 1") as caught:
        revert_batchnorm(net)
    assert len(caught) == 1
    assert [type(module) for module in net] == [nn.BatchNorm2d, OwnSubclass, nn.BatchNorm2d]
