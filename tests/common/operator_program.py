"""``python -m tests.common.operator_program SEED FIRST COUNT``: makes the calls of these numbers.

It prints each number before the call, so that a crash can be told from it, and says what was wrong:
a call accepted that does not fit, one refused that fits, wrong values, or an argument that a
refused call has changed.
"""

from __future__ import annotations

import faulthandler
import sys
from typing import Any

import torch
from torch import Tensor

from tests.common.operator_calls import BUFFERS, Arguments, Maker, ops, text_of
from tests.common.operator_rules import MAY_NOT, expected, refusal

ERRORS = (RuntimeError, ValueError, NotImplementedError, TypeError)
#: Of the largest value.
CLOSE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


def bytes_of(t: Tensor) -> tuple[bytes, int]:
    """All of its memory, and its version."""
    if t.device.type == "meta" or t.layout is not torch.strided:
        return b"", t._version
    memory = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
    return memory.numpy().tobytes(), t._version


def call(seed: int, number: int) -> tuple[Maker, Arguments]:
    maker = Maker(seed, number)
    return maker, maker.spoiled()


def compare(name: str, given: Arguments, right: dict[str, Tensor], results: Any) -> str | None:
    outputs = [r.name for r in getattr(ops, name).default._schema.returns]
    results = results if isinstance(results, (tuple, list)) else [results]
    got = {n: t for n, t in zip(outputs, results, strict=True) if t is not None}
    if "mean" in got and got["mean"].dim() == 2:
        got["mean"] = got["mean"].double().sum(0)  # rounded mean and rest
    got |= {n: given[n] for n in BUFFERS if isinstance(given.get(n), Tensor)}
    for n, expected_values in right.items():
        if n not in got or got[n].numel() != expected_values.numel():
            if n in got and n != "mask":
                return f"{n}: shape {list(got[n].shape)}"
            continue
        a, b = got[n].detach().double().flatten(), expected_values.double().flatten()
        if not torch.equal(a.isnan(), b.isnan()):
            return f"{n}: nan"
        if a.numel() == 0:
            continue
        # The values were made in the dtype of x.
        first = given["x"].dtype if "x" in given else torch.float32
        close = max(CLOSE[first], CLOSE.get(got[n].dtype, 0))
        off = (a - b).nan_to_num().abs().max().item()
        if off > close * max(1.0, b.nan_to_num().abs().max().item()):
            return f"{n}: off by {off:.3g}"
    return None


def check(seed: int, number: int) -> str | None:
    """What is wrong with the outcome of this call."""
    maker, given = call(seed, number)
    mask = given.get("mask")
    hints = {"_mask": maker.made_mask, "_act": maker.made_act, "_residual": maker.made_residual}
    reason = refusal(maker.name, {**given, **hints} if mask is not None else given)
    # A mask belongs to the arguments of its forward pass.
    known = not reason and not (mask is not None and maker.changes)
    fits = expected(maker.name, {**given, **hints}) if known else None
    tensors = {n: t for n, t in given.items() if isinstance(t, Tensor)}
    before = {n: bytes_of(t) for n, t in tensors.items()}
    try:
        results = getattr(ops, maker.name)(**given)
    except ERRORS as error:
        changed = [n for n, t in tensors.items() if bytes_of(t) != before[n]]
        if changed:
            return f"raised, and changed {', '.join(changed)}"
        return None if reason else f"refused: {type(error).__name__}: {error}"
    if reason and not reason.startswith(MAY_NOT):
        return f"accepted, although {reason}"
    written = {n for n in BUFFERS if n in given}
    changed = [n for n, t in tensors.items() if n not in written and bytes_of(t) != before[n]]
    if changed and not reason:
        return f"changed {', '.join(changed)}"
    return compare(maker.name, given, fits, results) if fits is not None else None


def main(seed: int, first: int, count: int) -> int:
    faulthandler.enable()
    torch.set_num_threads(1)
    failed = 0
    for number in range(first, first + count):
        print(number, flush=True)
        wrong = check(seed, number)
        if wrong is not None:
            failed += 1
            print(f"WRONG {wrong}\n      {text_of(*call(seed, number))}", flush=True)
    return min(failed, 100)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
