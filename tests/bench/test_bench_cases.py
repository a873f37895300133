"""What the benchmark measures: bytes of a case, nets, suites."""

from __future__ import annotations

import pytest
import torch

from bnorm_ext.bench import cases, nets
from bnorm_ext.bench.cases import Case

SMALL = (4, 3, 5, 6)


@pytest.mark.parametrize(
    ("op", "pass_", "tensors", "masks"),
    [
        ("bn", "fwd", 2, 0),
        ("bn", "eval", 2, 0),
        ("bn", "bwd", 3, 0),
        ("bn", "fwd+bwd", 5, 0),
        ("bn_relu", "fwd", 2, 0),
        ("bn_relu", "eval", 2, 0),
        ("bn_relu", "bwd", 3, 0),
        ("bn_relu", "fwd+bwd", 5, 0),
        ("bn_add_relu", "fwd", 3, 1),
        ("bn_add_relu", "eval", 3, 0),
        ("bn_add_relu", "bwd", 4, 1),
        ("bn_add_relu", "fwd+bwd", 7, 2),
    ],
)
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float64", 8)])
def test_bytes_at_the_floor(op, pass_, tensors, masks, dtype, size):
    elements = 8 * 16 * 4 * 4
    case = Case((8, 16, 4, 4), dtype, op=op, pass_=pass_)
    assert cases.bytes_floor(case) == tensors * elements * size + masks * elements // 8
    assert cases.ceiling_bytes(case) == tensors * elements * size


def test_a_mask_takes_whole_bytes():
    one = Case((3, 3), op="bn_add_relu")
    assert cases.bytes_floor(one) == 3 * 9 * 4 + 2


# Parameters and batch norms: torchvision's own figures.
@pytest.mark.parametrize(
    ("name", "parameters", "norms", "shapes"),
    [
        ("resnet18", 11_689_512, 20, 5),
        ("resnet50", 25_557_032, 53, 12),
        ("mobilenet_v2", 3_504_872, 52, 19),
        ("densenet121", 7_978_856, 121, 65),
    ],
)
def test_nets_are_what_their_names_say(name, parameters, norms, shapes):
    with torch.device("meta"):
        net = nets.NETS[name]()
    assert sum(p.numel() for p in net.parameters()) == parameters
    seen = nets.batch_norm_inputs(name, batch=2)
    assert len(seen) == norms
    assert len({shape for _, shape in seen}) == shapes


def test_first_and_last_layers_of_resnet50():
    seen = nets.batch_norm_inputs("resnet50", batch=2)
    assert seen[0] == ("bn1", (2, 64, 112, 112))
    assert seen[-1][1] == (2, 2048, 7, 7)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", cases.SUITES)
def test_suites_name_each_case_once_and_possible_ones_only(name, device):
    found = cases.suite(name, device, 32)
    assert len(set(found)) == len(found) > 5
    for case in found:
        cases.check(case)
    assert set(cases.expand(found)) == set(found)


def test_a_net_suite_counts_layers():
    found = cases.suite("resnet50", "cpu", 32)
    assert sum(c.count for c in found if c.pass_ == "fwd") == 53


def test_options_take_the_place_of_what_the_suite_says():
    base = [Case(SMALL), Case(SMALL, "bfloat16"), Case(SMALL, pass_="bwd")]
    found = cases.expand(base, dtypes=["float64"])
    assert found == [Case(SMALL, "float64"), Case(SMALL, "float64", pass_="bwd")]
    assert len(cases.expand(base, ops=cases.OPS, passes=cases.PASSES)) == 2 * 3 * 4


def test_cases_that_share_tensors_stand_together():
    base = [Case(SMALL), Case((8, 2)), Case(SMALL, pass_="bwd")]
    assert [c.shape for c in cases.expand(base)] == [SMALL, SMALL, (8, 2)]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case((4,)), "N,C"),
        (Case((4, 0, 3)), "positive"),
        (Case((1, 5)), "one value per channel"),
        (Case((4, 5), layout="channels_last"), "channels_last"),
    ],
)
def test_impossible_cases(case, message):
    with pytest.raises(cases.ImpossibleCase, match=message):
        cases.check(case)
