"""What SECURITY.md says: using the package opens no socket, writes no file, starts no process, and
a checkpoint of its modules is tensors alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bnorm_ext
from tests.common.net_kinds import KINDS, images, make

# Events of Python's audit hooks. Of `open` those that write are kept.
PROGRAM = """
import json, os, sys
import torch, torch.distributed, torch.fx
import torch._dynamo  # makes a folder for the cache of torch.compile
from torch import nn

events = []
UNWANTED = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork",
            "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.link",
            "os.symlink", "os.chmod", "os.putenv", "os.unsetenv", "shutil.", "tempfile.",
            "urllib.", "http.", "ftplib.", "smtplib.")

def hook(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        written = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        if written:
            events.append([event, str(path)])
    elif event.startswith(UNWANTED):
        events.append([event, repr(arguments)[:200]])

sys.addaudithook(hook)
import bnorm_ext

net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
bnorm_ext.convert_batchnorm(net)
fused, _ = bnorm_ext.fuse_batchnorm_act(net)
for module in (net, fused):
    for training in (True, False):
        y = module.train(training)(torch.randn(2, 3, 8, 8))
        y.sum().backward()
    module.load_state_dict(module.state_dict())
str(bnorm_ext.explain((8, 6, 8, 8), device="H200")), bnorm_ext.build_info()
bnorm_ext.revert_batchnorm(net)
seen = list(events)
open(sys.argv[1], "w").close()  # the hook sees such things
print(json.dumps([seen, events[len(seen):]]))
"""


def test_no_socket_no_file_no_process(tmp_path):
    canary = tmp_path / "canary"
    done = subprocess.run(
        [sys.executable, "-B", "-c", PROGRAM, str(canary)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(bnorm_ext.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen, after = json.loads(done.stdout.splitlines()[-1])
    assert after == [["open", str(canary)]]
    assert seen == []
    assert list(tmp_path.iterdir()) == [canary]


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_tensors_alone(kind, tmp_path):
    """So that ``torch.load`` with ``weights_only=True``, its default, takes it."""
    net = make(kind).train()
    net(images()).sum().backward()
    state = net.state_dict()
    assert all(type(t) is torch.Tensor for t in state.values())
    torch.save(state, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=True)
    make("native").load_state_dict(loaded, strict=True)
    make(kind).load_state_dict(loaded, strict=True)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("made by a checkpoint",)


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path, monkeypatch):
    """By torch, also where the names are those of our modules."""
    monkeypatch.chdir(tmp_path)
    state = make("converted").state_dict()
    state["bn1.weight"] = Bomb()
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        make("converted").load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    assert not (tmp_path / "made by a checkpoint").exists()
