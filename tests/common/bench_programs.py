"""How the benchmark's programs are called by its tests."""

from __future__ import annotations

import pytest
import torch

from bnorm_ext.bench import profile, run, steps

QUICKLY = ["--shape", "4,3,5,6", "--provider", "bnorm_ext,torch", "--time-budget", "0.01",
           "--device", "cpu"]  # fmt: skip


def refused(program, arguments, capsys) -> str:
    """The line. Nothing is measured before, and the process stays as it was."""

    def measure(*_, **__):
        raise AssertionError("measured something")

    threads = torch.get_num_threads()
    made = [(steps, "training_step"), (steps, "inference_step")]
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((run, "measure"), *made, (profile, "examine")):
            patch.setattr(module, name, measure)
        with pytest.raises(SystemExit) as ended:
            program.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert len(err) < 500
    assert err.startswith(("python -m bnorm_ext.bench:", "python -m bnorm_ext.bench."))
    assert torch.get_num_threads() == threads
    return err
