"""Batch normalisation for PyTorch as a compiled extension, a drop-in replacement of PyTorch's own.

Replace the batch norms of a model in place::

    import bnorm_ext

    model = bnorm_ext.convert_batchnorm(model)

:func:`convert_batchnorm` and :func:`revert_batchnorm` replace modules; :func:`fuse_batchnorm_act`
also fuses batch norms with the additions and activations that follow them. The modules
(:class:`BatchNorm2d`, :class:`BatchNormAct2d` and so on) and the function :func:`batch_norm` can be
used directly. :func:`build_info` says how this copy was compiled, :func:`explain` how the CUDA
kernels would run a shape.
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
