"""bnorm_ext.explain: the launch plan as text, without a GPU."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

from bnorm_ext import explain
from bnorm_ext._gpus import GPUS, resolve_device

# The name of the module is that of the function, too.
explain_module = importlib.import_module("bnorm_ext.explain")


def test_one_launch_each() -> None:
    text = explain((64, 64, 56, 56), dtype=torch.bfloat16, device="H200")
    assert text.splitlines() == [
        "64x64x56x56 bfloat16, channels first, on H200 (sm_90, 132 multiprocessors)",
        "forward: one launch that keeps x on chip: 1 read + 1 write",
        "  64 clusters of 4 blocks, a channel each; 256 threads and 102.7 KB of shared memory a "
        "block, 16-byte accesses",
        "  a team, since a channel is 392 KB, and a block has 113 KB",
        "  predicted: 23.3 us, most of them for moving bytes (12.2), then launches and barriers "
        "(9.0), computing (2.0)",
        "backward: one launch that keeps x and dy on chip: 2 reads + 1 write",
        "  32 clusters of 8 blocks, which take 64 channels in turn; 256 threads and 106.7 KB of "
        "shared memory a block, 16-byte accesses",
        "  a team, since a channel is 784 KB, and a block has 113 KB",
        "  predicted: 33.2 us, most of them for moving bytes (18.4), then launches and barriers "
        "(11.9), computing (2.9)",
        "Predictions are a model's. On an H200, 312 calls took 0.85 to 1.34 times as long as "
        "predicted; other GPUs have not been measured.",
    ]


def test_what_binds() -> None:
    large = explain((64, 256, 56, 56), device="H200", memory_format=torch.channels_last)
    assert large.count(" us, most of them for moving bytes (") == 2
    small = explain((8, 64, 7, 7), device="H200")
    assert small.count(" us, most of them for launches and barriers (") == 2
    few = explain((256, 3, 255, 255), device="H200", memory_format=torch.channels_last)
    assert few.count(" us, most of them for too few loads in flight (") == 2


def test_nothing_is_predicted_without_rates(monkeypatch) -> None:
    """Nor for float64, whose units the model does not know."""
    assert "redict" not in explain((8, 64, 7, 7), dtype=torch.float64, device="H200")
    known = resolve_device("H200")
    for field in ("gigabytes_per_second", "clock_mhz"):
        unknown = known._replace(**{field: 0})
        monkeypatch.setattr(explain_module, "resolve_device", lambda _, gpu=unknown: gpu)
        assert "redict" not in explain((8, 64, 7, 7), device="H200")


def test_two_passes_where_they_are_predicted_to_be_faster() -> None:
    text = explain((128, 192, 14, 14), dtype=torch.bfloat16, device="L4")
    assert text.count("two passes, ") == text.count(": one launch is predicted to take longer") == 2


@pytest.mark.parametrize(
    ("shape", "dtype", "memory_format", "device", "reason"),
    [
        ((32, 64, 8, 8), torch.float64, None, "A100", "float64 is not kept on chip"),
        ((64, 64, 8, 8), torch.float64, torch.channels_last, "A100", "float64 is not kept on chip"),
        ((64, 64, 112, 112), torch.float32, None, "T4", "a group of channels is larger than"),
    ],
)
def test_why_two_passes(shape, dtype, memory_format, device, reason) -> None:
    text = explain(shape, dtype=dtype, memory_format=memory_format, device=device)
    assert f"forward: two passes, 2 reads + 1 write: {reason}" in text
    assert "backward: two passes, 4 reads + 1 write: " in text


@pytest.mark.parametrize("shape", [(64, 512, 7, 7), (64, 256, 56, 56)])
def test_channels_last_is_read_twice_in_one_launch(shape: tuple[int, ...]) -> None:
    """Whatever its size: nothing of it stays on chip."""
    text = explain(shape, memory_format=torch.channels_last, device="H200")
    twice = "twice, the second time partly from the L2"
    assert f"forward: one launch that reads x {twice}: 2 reads + 1 write\n" in text
    assert f"backward: one launch that reads x and dy {twice}: 4 reads + 1 write\n" in text
    assert "on chip" not in text
    assert "a block has" not in text
    assert text.count("blocks in a cooperative grid, ") == text.count(" channels each; ") == 2
    assert text.count("  a team, so that all multiprocessors have work") == 2
    beside = explain(shape, memory_format=torch.channels_last, device="H200", processes=2)
    assert beside.count("two passes, ") == beside.count("would wait for each other") == 2


def test_many_channels_of_few_rows_need_no_team() -> None:
    text = explain((2, 1 << 17, 1, 1), memory_format=torch.channels_last, device="H200")
    assert text.count("one launch that reads x") == 2
    assert text.count("  4096 blocks, 32 channels each; ") == 2
    assert "a team" not in text


def test_channels_last_beyond_the_l2_reads_two_lines_of_a_row() -> None:
    """54 MB: more than an H100 has in its L2, less than an H200 has."""
    x = torch.empty(66, 256, 40, 40, dtype=torch.bfloat16, device="meta")
    x = x.contiguous(memory_format=torch.channels_last)
    for device, channels in (("H200", 64), ("H100", 128)):
        text = explain(x, device=device)
        assert text.count(f", {channels} channels each; ") == 2


@pytest.mark.parametrize("device", GPUS)
def test_every_known_gpu(device: str) -> None:
    for spelled in (device, device.lower(), f"NVIDIA {device}"):
        assert f"on {device} (sm_" in explain((8, 16, 4, 4), device=spelled)
    # Clusters are there from 9.0 on; a cooperative grid everywhere.
    text = explain((64, 64, 56, 56), device=device)
    assert ("clusters" in text) == (GPUS[device][1] >= (9, 0))


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 NVL", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),  # with fewer multiprocessors
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("A100-PCIE-40GB", "A100"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA GH200 144G HBM3e", "GH200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA B300 SXM6 AC", "B300"),
    ],
)
def test_names_as_cuda_reports_them(reported: str, name: str) -> None:
    multiprocessors, (major, minor), *_ = GPUS[name]
    expected = f"on {name} (sm_{major}{minor}, {multiprocessors} multiprocessors)"
    assert expected in explain((8, 16, 4, 4), device=reported)


@pytest.mark.parametrize(
    ("name", "figures"),
    {
        "T4": (40, (7, 5), 64, 64, 4),
        "RTX 3090": (82, (8, 6), 100, 99, 6),
        "A10": (72, (8, 6), 100, 99, 6),
        "RTX 4090": (128, (8, 9), 100, 99, 72),
        "L4": (58, (8, 9), 100, 99, 48),
        "L40S": (142, (8, 9), 100, 99, 96),
        "H200": (132, (9, 0), 228, 227, 60),
        "GH200": (132, (9, 0), 228, 227, 50),
        "B200": (148, (10, 0), 228, 227, 126),
        "B300": (148, (10, 3), 228, 227, 126),
        "RTX 5090": (170, (12, 0), 100, 99, 96),
    }.items(),
)
def test_figures_of_gpus(name: str, figures: tuple[int, tuple[int, int], int, int, int]) -> None:
    """Multiprocessors, compute capability, KB of shared memory of a multiprocessor and a block, MB
    of L2."""
    multiprocessors, capability, of_multiprocessor, of_block, l2 = figures
    assert tuple(resolve_device(name))[:6] == (
        *(name, multiprocessors, capability),
        *(of_multiprocessor << 10, of_block << 10, l2 << 20),
    )


@pytest.mark.parametrize(
    "reported",
    [
        "NVIDIA A10G",
        "NVIDIA GB200",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA",
        "80GB",
        "",
    ],
)
def test_another_gpu_is_not_taken_for_its_namesake(reported: str) -> None:
    with pytest.raises(ValueError, match=f"unknown device '{reported}'; known are T4, A100"):
        explain((8, 16, 4, 4), device=reported)


def test_a_gpu_that_is_here_is_known_by_its_name(monkeypatch) -> None:
    """Also one that is not in the table; and its own figures go before the table's."""
    found = ["NVIDIA XYZ 9", "NVIDIA A100-SXM4-40GB"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: found[index])
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(
            name=found[device.index], multi_processor_count=7, major=9, minor=0,
            shared_memory_per_multiprocessor=228 << 10, shared_memory_per_block_optin=227 << 10,
            L2_cache_size=60 << 20, memory_clock_rate=2_000_000, memory_bus_width=4096,
            clock_rate=1_500_000,
        ),
    )  # fmt: skip
    for name in found:
        assert f"on {name} (sm_90, 7 multip" in explain((8, 16, 4, 4), device=name)
        assert resolve_device(name)[-2:] == (2048, 1500)
    with pytest.raises(ValueError, match="'cuda:2' is no CUDA device of this machine"):
        explain((8, 16, 4, 4), device="cuda:2")


def test_groups_of_channels() -> None:
    """Where one channel's rows are not of whole 16 bytes."""
    text = explain((32, 2048, 7, 7), dtype=torch.bfloat16, device="A100").splitlines()
    assert text[2].startswith("  128 blocks, which take 256 groups of 8 channels in turn; ")
    assert "two passes" not in "".join(text)
    text = explain((64, 768, 17, 17), dtype=torch.bfloat16, device="H200").splitlines()
    taken = "which take 96 groups of 8 channels in turn; "
    assert text[2].startswith(f"  48 clusters of 4 blocks, {taken}")
    assert text[3].startswith("  a team, since 8 channels are 289 KB, and ")


def test_values_one_at_a_time() -> None:
    """Where no rows are of whole 16 bytes."""
    for shape, memory_format in (
        ((8, 255, 7, 7), None),
        ((32, 256, 1, 7), None),
        ((8, 30, 14, 14), torch.channels_last),
    ):
        text = explain(shape, dtype=torch.bfloat16, memory_format=memory_format, device="H200")
        assert text.count("one launch that ") == text.count("2-byte accesses") == 2


def test_a_tensor_says_what_it_is() -> None:
    x = torch.empty(8, 64, 4, 4, dtype=torch.half).to(memory_format=torch.channels_last)
    text = explain(x, device="A100")
    assert text.startswith("8x64x4x4 float16, channels last, on A100")
    assert text == explain(
        x.shape, dtype=torch.half, memory_format=torch.channels_last, device="A100"
    )
    assert explain(x, dtype=torch.float32, device="A100").startswith("8x64x4x4 float32, channels l")


def test_errors() -> None:
    with pytest.raises(ValueError, match="unknown device 'foo'; known are T4, A100"):
        explain((2, 3), device="foo")
    with pytest.raises(ValueError, match=r"'cpu' is no CUDA device of this machine; name one: T4"):
        explain((2, 3), device="cpu")
    for shape in ((3,), (2, 0, 4)):
        with pytest.raises(ValueError, match=r"expected a tensor \(N, C, ...\) with elements"):
            explain(shape, device="A100")
    for processes in (0, -1):
        with pytest.raises(ValueError, match=f"processes must be 1 or more, got {processes}"):
            explain((2, 3), device="A100", processes=processes)
    for processes in (1.5, "2"):
        with pytest.raises(TypeError):
            explain((2, 3), device="A100", processes=processes)
