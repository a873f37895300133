"""What a forward changes outside of the model is put back, whatever it is: random number
generators, the process, objects that have no dictionary, parts of shared objects."""

from __future__ import annotations

import copy
import itertools
import os
import random

import numpy as np
import pytest
import torch
from torch import nn

from bnorm_ext import fuse_batchnorm_act
from tests.common.fuse_nets import Around, Inner, fuse_separately, images

RNG = np.random.default_rng(0)
OLD_RNG = np.random.RandomState(0)
PYTHON_RNG = random.Random(0)
COUNTER = itertools.count()
COUNTERS = {"forward": itertools.count(), "of": [0]}
INNER = [0]
OUTER = {"inner": INNER, "open": open}
TENSOR = torch.zeros(2)


def numbers():
    count = 0
    while True:
        count += 1
        yield count


NUMBERS = numbers()
next(NUMBERS)


class Slots:
    __slots__ = ("__hidden", "count")

    def __init__(self):
        self.count, self.__hidden = 0, 0

    def add(self):
        self.count += 1
        self.__hidden += 1

    def state(self):
        return self.count, self.__hidden


class WithBoth(Slots):
    def add(self):
        super().add()
        self.late = True


SLOTS, BOTH = Slots(), WithBoth()


def new_global(m, x):
    global LATE
    LATE = 1


def numpy_generator(m, x):
    RNG.standard_normal()


def numpy_legacy_generator(m, x):
    OLD_RNG.rand()


def python_generator(m, x):
    PYTHON_RNG.random()


def counter(m, x):
    next(COUNTER)


def counter_in_a_dictionary(m, x):
    next(COUNTERS["forward"])
    COUNTERS["of"][0] += 1


def shared_part(m, x):
    OUTER["inner"][0] += 1


def slots(m, x):
    SLOTS.add()
    BOTH.add()


def tensor(m, x):
    TENSOR.add_(1)


def generator(m, x):
    next(NUMBERS)


def attribute_of_a_function(m, x):
    attribute_of_a_function.calls = getattr(attribute_of_a_function, "calls", 0) + 1


def keyword_default(m, x, *, seen=[]):  # noqa: B006
    seen.append(1)


def new_class_attribute(m, x):
    type(m).late = 1


def fails_afterwards(m, x):
    INNER[0] += 1
    if x.sum() > 0:
        raise ValueError


def of_torch(m, x):
    torch.manual_seed(3)


def anew(m, x):
    torch.seed()


def state_of_torch(m, x):
    torch.set_rng_state(torch.get_rng_state() * 0 + 1)


def forked(m, x):
    with torch.random.fork_rng():
        torch.manual_seed(1)


def default_generator(m, x):
    torch.default_generator.manual_seed(1)


def of_python(m, x):
    random.seed(1)


def fresh_generator(m, x):
    np.random.default_rng().standard_normal()


def directory(m, x):
    os.chdir("/")


def environment(m, x):
    os.environ["BNORM_EXT_OF_A_TEST"] = "1"


def put_environment(m, x):
    os.putenv("BNORM_EXT_OF_A_TEST", "1")


def file(m, x):
    os.mkdir("bnorm_ext_of_a_test")


def ignoring(change):
    """Goes on after whatever is raised."""

    def ignores(m, x):
        for _ in range(2):
            try:  # noqa: SIM105  # `suppress` is noticed
                change(m, x)
            except BaseException:
                pass

    ignores.__name__ = f"{change.__name__}_ignoring"
    return ignores


CHANGES = [
    new_global,
    numpy_generator,
    numpy_legacy_generator,
    python_generator,
    counter,
    counter_in_a_dictionary,
    shared_part,
    slots,
    tensor,
    generator,
    attribute_of_a_function,
    keyword_default,
    new_class_attribute,
    fails_afterwards,
    of_torch,
    anew,
    state_of_torch,
    forked,
    default_generator,
    of_python,
    fresh_generator,
    directory,
    environment,
    put_environment,
    file,
    *map(ignoring, (of_torch, anew, of_python, directory, environment)),
]


def state_of_the_process(cls):
    return repr(
        (
            "LATE" in globals(),
            RNG.bit_generator.state,
            OLD_RNG.get_state(),
            PYTHON_RNG.getstate(),
            COUNTER,
            COUNTERS,
            INNER,
            OUTER["inner"] is INNER,
            SLOTS.state(),
            BOTH.state(),
            vars(BOTH),
            TENSOR.tolist(),
            NUMBERS.gi_frame.f_locals,
            vars(attribute_of_a_function),
            keyword_default.__kwdefaults__,
            sorted(vars(cls)),
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002
            os.getcwd(),
            dict(os.environ),
        )
    )


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_the_process_is_as_before(change, tmp_path, monkeypatch):
    class Changes(Inner):
        def do(self, x):
            change(self, x)
            return x

    monkeypatch.chdir(tmp_path)
    plain = Around(Changes()).double()
    before = state_of_the_process(Changes)
    _, report = fuse_batchnorm_act(plain)
    assert state_of_the_process(Changes) == before
    assert list(tmp_path.iterdir()) == []
    assert [path for path, _ in report.not_traced] == ["inner"]
    assert {name for name, *_ in report.fused} >= {"before.1", "after.1", "inner.stack.0.1"}


def test_generators_of_the_module_itself():
    """Tracing runs on a copy: those of the model stay where they are, and go on in each call."""

    class Draws(Inner):
        def __init__(self):
            super().__init__()
            self.rng, self.slots = np.random.default_rng(0), Slots()

        def do(self, x):
            self.slots.add()
            return x * self.rng.uniform(1, 2)

    plain = Around(Draws()).double().eval()
    before = copy.deepcopy(plain)
    fused, report = fuse_separately(plain)
    assert "changes attributes" in dict(report.not_traced)["inner"]
    for net in (plain, fused):
        assert net.inner.rng.bit_generator.state == before.inner.rng.bit_generator.state
        assert net.inner.slots.state() == (0, 0)
    for _ in range(2):
        x = images(0)
        torch.testing.assert_close(fused(x), plain(x), rtol=0, atol=1e-10)
    assert fused.inner.slots.state() == (2, 2)


def test_results_of_autograd_that_a_module_holds():
    """The copy that is traced holds the very same, since they cannot be copied."""

    class Holds(Inner):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1)) * 2

        def do(self, x):
            self.scale.add_(1)
            return x * self.scale

    net = Around(Holds())
    _, report = fuse_batchnorm_act(net)
    assert [path for path, _ in report.not_traced] == ["inner"]
    assert net.inner.scale.tolist() == [2]
