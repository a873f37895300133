"""The smallest kernel as nvcc compiles it, run as PTX: `make test-ptx` does so with all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.common import emulated, ptx

pytestmark = pytest.mark.skipif(ptx.nvcc() is None, reason=ptx.NO_NVCC)


@pytest.fixture
def merge_as_ptx() -> Iterator[None]:
    folder = ptx.folder_of("smoke", ptx.compile_all(["merge"], [80]))
    assert not emulated.library().runner_ptx(str(folder).encode())
    yield
    emulated.library().runner_ptx(b"")
    emulated.use_ptx(emulated.library())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_merged_statistics(merge_as_ptx: None, dtype: torch.dtype) -> None:
    """Statistics of three processes, one of them without a batch, against one whole batch."""
    parts = [torch.randn(n, 37, dtype=torch.float64) + 3 for n in (5, 11)]
    whole = torch.cat(parts)
    nothing = torch.full((37,), torch.nan, dtype=torch.float64)
    means = torch.stack([nothing, *(p.mean(0) for p in parts)])
    variances = torch.stack([nothing, *(p.var(0, unbiased=False) for p in parts)])
    counts = torch.tensor([0, 5, 11], dtype=torch.float64)
    with emulated.session() as s:
        initial = (torch.zeros(37, dtype=dtype), torch.ones(37, dtype=dtype))
        running = [s.copy(t, inout=True) for t in initial]
        counter = s.copy(torch.tensor(2), inout=True)
        given = (s.copy(means), s.copy(variances), s.copy(counts))
        mean, rstd = s.call("batch_norm_merge_stats", *given, *running, counter, None, 1e-5, dtype)
        found = [t.clone() for t in (mean[0], rstd, *running, mean[1])]
        assert counter.item() == 3
    variance = whole.var(0, unbiased=False)
    torch.testing.assert_close(found[0], whole.mean(0).to(dtype), rtol=1e-6, atol=0)
    rest = found[0].double() + found[4].double() - whole.mean(0)
    assert rest.abs().max() < 1e-12 * whole.mean(0).abs().max()
    torch.testing.assert_close(found[1], (variance + 1e-5).rsqrt().to(dtype), rtol=1e-6, atol=0)
    torch.testing.assert_close(found[2].double(), whole.mean(0) / 3, rtol=1e-6, atol=0)
    unbiased = 2 / 3 + whole.var(0) / 3
    torch.testing.assert_close(found[3].double(), unbiased, rtol=1e-6, atol=0)


def test_kernels_that_are_not_there_are_reported(merge_as_ptx: None) -> None:
    """The source never runs in their place."""
    expected = pytest.raises(emulated.Reported, match=r"a kernel .*statistics_kernel.* for sm_80")
    with expected, emulated.session() as s:
        s.call("batch_norm_stats", s.copy(torch.randn(4, 3, 8, 8)))
