"""Processes of one process group, which run functions on request and return what these return."""

from __future__ import annotations

import io
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

#: A collective that waits longer fails; so does a test whose processes do not answer.
TIMEOUT_S = 60


class RankFailed(AssertionError):
    """A function has raised in a process: which, what type, and where."""

    def __init__(self, rank: int, name: str, text: str) -> None:
        super().__init__(f"rank {rank} raised {name}:\n{text}")
        self.rank, self.name, self.text = rank, name, text


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _serve(rank: int, world: int, rendezvous: str, timeout_s: float, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # no name of this host is looked up
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout_s),
    )
    while True:
        request = pipe.recv()
        if request is None:
            break
        function, arguments = request
        try:
            answer = ("returned", _packed(function(rank, *arguments)))
        except BaseException as error:
            answer = ("raised", (type(error).__name__, f"{error}\n{traceback.format_exc()}"))
        pipe.send(answer)
    dist.destroy_process_group()


class Ranks:
    """``ranks(function, *arguments)`` runs ``function(rank, *arguments)`` in every process.

    ``function`` is found by its name in its module, so it must not be a local one."""

    def __init__(self, world: int, folder: Any, timeout_s: float = TIMEOUT_S) -> None:
        self.world = world
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        rendezvous = f"{folder}/rendezvous-{time.monotonic_ns()}"
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world, rendezvous, timeout_s, theirs), daemon=True
            )
            process.start()
            theirs.close()  # so that the end of the process is seen
            self.pipes.append(ours)
            self.processes.append(process)

    def send(self, function: Callable[..., Any], *arguments: Any) -> None:
        for pipe in self.pipes:
            pipe.send((function, arguments))

    def answer(self, rank: int, within_s: float = 2 * TIMEOUT_S) -> Any:
        """What the function returned there; raises RankFailed where it raised."""
        deadline = time.monotonic() + within_s
        try:
            while not self.pipes[rank].poll(0.1):
                if time.monotonic() > deadline:
                    raise RankFailed(rank, "no answer", f"within {within_s} s")
            kind, value = self.pipes[rank].recv()
        except EOFError:
            self.processes[rank].join(5)
            code = self.processes[rank].exitcode
            raise RankFailed(rank, "exit", f"code {code}") from None
        if kind == "raised":
            raise RankFailed(rank, *value)
        return torch.load(io.BytesIO(value), weights_only=False)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        self.send(function, *arguments)
        answers: list[Any] = []
        failures: list[RankFailed] = []
        for rank in range(self.world):
            try:
                answers.append(self.answer(rank))
            except RankFailed as failure:
                failures.append(failure)
        if failures:
            raise failures[0]
        return answers

    def failures(self, function: Callable[..., Any], *arguments: Any) -> list[RankFailed]:
        """What the function raised in each process; it must raise in every one."""
        self.send(function, *arguments)
        found = []
        for rank in range(self.world):
            try:
                value = self.answer(rank)
            except RankFailed as failure:
                found.append(failure)
            else:
                raise AssertionError(f"rank {rank} returned {value}")
        return found

    def end(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            try:
                pipe.send(None)
            except OSError:
                continue
            process.join(0.5 if process.is_alive() else 0)
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()


@contextmanager
def ranks(world: int, folder: Any, timeout_s: float = TIMEOUT_S) -> Iterator[Ranks]:
    started = Ranks(world, folder, timeout_s)
    try:
        yield started
    finally:
        started.end()
