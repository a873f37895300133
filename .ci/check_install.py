"""Run by a Python that has bnorm_ext installed, outside of the source tree: does it compute?

python .ci/check_install.py [FOLDER]    FOLDER: where the copy must be that is imported
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import bnorm_ext


def main() -> None:
    info = bnorm_ext.build_info()
    for key, value in info.items():
        print(f"{key:>15}: {value}")
    assert info["torch"] == torch.__version__, "loaded into another torch"
    for folder in sys.argv[1:]:
        assert Path(folder).resolve() in Path(bnorm_ext.__file__).resolve().parents
    print(bnorm_ext.explain((64, 64, 56, 56), device="H100"))

    x = torch.randn(4, 6, 5, 3, dtype=torch.float64, requires_grad=True)
    ours = bnorm_ext.batch_norm(x, None, None, training=True)
    (gradient,) = torch.autograd.grad(ours.square().sum() + ours[0].sum(), x)
    native = torch.nn.functional.batch_norm(x, None, None, training=True)
    (expected,) = torch.autograd.grad(native.square().sum() + native[0].sum(), x)
    torch.testing.assert_close(ours, native)
    torch.testing.assert_close(gradient, expected)
    print(f"bnorm_ext from {bnorm_ext.__file__}: forward and backward agree with torch")


if __name__ == "__main__":
    main()
