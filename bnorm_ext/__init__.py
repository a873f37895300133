"""Batch normalisation for PyTorch: exactly substitutable, more accurate, faster.

Three lines replace ``nn.BatchNorm2d`` in a network::

    import bnorm_ext

    model = bnorm_ext.convert_batchnorm(model)
"""

from ._load import build_info
from ._version import __version__
from .convert import convert_batchnorm, revert_batchnorm
from .distributed import SyncBatchNorm
from .explain import explain
from .functional import batch_norm
from .fuse import FusionReport, fuse_batchnorm_act
from .modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
)
from .modules_act import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "FusionReport",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "SyncBatchNorm",
    "__version__",
    "batch_norm",
    "build_info",
    "convert_batchnorm",
    "explain",
    "fuse_batchnorm_act",
    "revert_batchnorm",
]
