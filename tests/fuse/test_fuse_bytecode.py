"""What the instructions of a function tell, in the instruction sets of all versions of Python."""

from __future__ import annotations

import contextlib
import os
import os.path

import pytest

from bnorm_ext.fuse import bytecode


def named(c):
    y = c()
    if y is None:
        return 1
    return y


def named_otherwise(c):
    y = c()
    return 1 if y is not None else c


def as_value(c):
    y = c()
    absent = y is None
    return c if absent else y


def walrus(c):
    return c if (y := c()) is None else y


def at_once(c):
    return c if c() is None else c.x


def of_a_subscript(c):
    return c if c[0] is None else c.x


def of_an_attribute(c):
    return c if c.x is None else c.x


@pytest.mark.parametrize(
    ("function", "names", "results"),
    [
        (named, {"y"}, False),
        (named_otherwise, {"y"}, False),
        (as_value, {"y"}, False),
        (walrus, {"y"}, False),
        (at_once, set(), True),
        (of_a_subscript, set(), True),
        (of_an_attribute, set(), False),
    ],
)
def test_comparisons_with_none(function, names, results):
    asked = bytecode.questions(function.__code__)
    assert (asked.none, asked.none_of_results) == (names, results)
    assert bool(asked) is (bool(names) or results)


def exact(self, c):
    return type(c) is int


def looked_up(self, c):
    return {int: 1}[c.__class__]


def of_an_expression(self, c):
    return type(c[0]) is int


def exact_self(self, c):
    return type(self) is int


def name_alone(self, c):
    return type(c).__name__, self.__class__.__name__


def attribute_alone(self, c):
    type(self).total += 1


@pytest.mark.parametrize(
    ("function", "asks", "names"),
    [
        (exact, True, {"c"}),
        (looked_up, True, {"c"}),
        (of_an_expression, True, set()),
        (exact_self, True, {"self"}),
        (name_alone, False, {"c", "self"}),
        (attribute_alone, False, {"self"}),
        (of_an_attribute, False, set()),
    ],
)
def test_questions_for_types(function, asks, names):
    assert bytecode.asks_for_types(function.__code__) is asks
    assert bytecode.questions(function.__code__).types == names


def all_exceptions(c):
    try:
        return c()
    except:  # noqa: E722
        return 1


def some_exceptions(c):
    try:
        return c()
    except ValueError as error:
        return error


def in_a_context(c):
    with c() as held:
        try:
            y = c(held)
        except:  # noqa: E722
            y = 1
    return y


def finally_(c):
    try:
        return c()
    finally:
        c.close()


def contexts(c):
    with c() as a, c() as b:
        try:
            y = c(a, b)
        finally:
            c.close()
    with contextlib.nullcontext():
        return y


@pytest.mark.parametrize(
    ("function", "handles"),
    [
        (all_exceptions, True),
        (some_exceptions, True),
        (in_a_context, True),
        (finally_, False),
        (contexts, False),
        (named, False),
    ],
)
def test_exceptions_that_are_handled(function, handles):
    assert bytecode.handles_exceptions(function.__code__) is handles


def at_the_end(c):
    if c:
        return c


def by_name(c):
    y = None
    if c:
        y = c
    return y


@pytest.mark.parametrize(
    ("function", "may"), [(at_the_end, True), (by_name, True), (named, False), (as_value, False)]
)
def test_none_as_a_result(function, may):
    assert bytecode.may_return_none(function.__code__) is may


def joins(x):
    return os.path.join(x, os.sep, x.path, sum(x))


def test_references():
    here = __import__("sys").modules[__name__]
    found = set(bytecode.references(joins.__code__, vars(here), {}))
    assert found == {(here, "os"), (os, "path"), (os.path, "join"), (os, "sep")}
