"""What the functions of Python and torch do that a graph would not repeat, or answer with what
tracing would freeze: what a forward does that calls them, as text."""

from __future__ import annotations

import builtins
import contextlib
import io
import logging
import os
import queue
import subprocess
import threading
import time
import types
import warnings
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from .process_state import DRAWS

_CHECKPOINTS = "checkpoints, or hooks the tensors saved for backward"
_GRADIENTS = "switches gradients on or off"
SEEDS = "seeds a random number generator"
CLOCK = "reads the clock, which tracing would freeze"
_FILES = "changes files or starts processes"
_ENVIRONMENT = "changes environment variables"
_SETTINGS = "changes settings of torch"
_MODES = "enters a mode that torch's functions or operators go through"
_THREAD = "asks in which thread it runs"
HANDLES = "handles exceptions of what it calls, which a graph would not do"
EXACT_TYPE = "asks for the exact type of a value or a module, which tracing would decide"


def code_of(function: Any) -> types.CodeType | None:
    function = getattr(function, "__wrapped__", function)
    return getattr(function, "__code__", None)


# Code of Python functions -> what a forward does that calls them.
CALLS: dict[types.CodeType | None, str] = {
    code_of(torch.autocast.__enter__): "enters the context autocast",
    code_of(checkpoint): _CHECKPOINTS,
    code_of(saved_tensors_hooks.__enter__): _CHECKPOINTS,
    code_of(torch.no_grad.__enter__): _GRADIENTS,
    code_of(torch.enable_grad.__enter__): _GRADIENTS,
    code_of(torch.set_grad_enabled.__init__): _GRADIENTS,
    code_of(torch.inference_mode.__enter__): _GRADIENTS,
    code_of(torch.nn.Module.train): "switches modules between training and evaluation",
    code_of(torch.manual_seed): SEEDS,
    code_of(torch.seed): SEEDS,
    code_of(torch.set_rng_state): SEEDS,
    code_of(torch.random.fork_rng): SEEDS,
    code_of(torch.cuda.manual_seed): SEEDS,
    code_of(torch.cuda.manual_seed_all): SEEDS,
    code_of(torch.cuda.set_rng_state): SEEDS,
    code_of(torch.set_default_dtype): "changes torch's default dtype",
    code_of(torch.set_default_device): "changes torch's default device",
    code_of(torch.use_deterministic_algorithms): "switches determinism on or off",
    code_of(torch.save): "writes a file, which a graph would not do",
    code_of(torch.load): "reads a file, which a graph would not do",
    code_of(contextlib.suppress.__enter__): HANDLES,
    code_of(subprocess.Popen.__init__): _FILES,
    code_of(logging.Logger._log): "logs, which a graph would not do",
    code_of(type(os.environ).__setitem__): _ENVIRONMENT,
    code_of(type(os.environ).__delitem__): _ENVIRONMENT,
}
CALLS.pop(None, None)
BUILTINS: dict[Any, str] = {
    builtins.print: "prints, which a graph would not do",
    builtins.open: "opens a file, which a graph would not do",
    builtins.input: "reads input, which a graph would not do",
    os.urandom: DRAWS,
}
# As above, unless a function of torch calls it: the graph will call that function.
BUILTINS_OF_OTHERS: dict[Any, str] = {
    warnings.warn: "warns, which a graph would not do",
    os.chdir: "changes the working directory",
    os.putenv: _ENVIRONMENT,
    os.unsetenv: _ENVIRONMENT,
    **dict.fromkeys((os.open, os.remove, os.unlink, os.rename, os.replace), _FILES),
    **dict.fromkeys((os.mkdir, os.rmdir, os.system, os.write), _FILES),
    os.stat: "asks for a file, which tracing would decide",
    builtins.callable: "asks whether a value can be called, which tracing would decide",
    time.sleep: "waits, which a graph would not do",
    torch.set_num_threads: _SETTINGS,
    torch.set_flush_denormal: _SETTINGS,
    **{
        getattr(time, name): CLOCK
        for name in (
            *("time", "monotonic", "perf_counter", "process_time", "thread_time", "ctime"),
            *("localtime", "gmtime", "strftime", "asctime"),
        )
        for name in (name, f"{name}_ns")
        if hasattr(time, name)
    },
}
NOW = ("now", "utcnow", "today")
SEEDING = ("manual_seed", "seed", "set_state")
_ASKS = "asks whether gradients, autocast, inference mode or determinism are on"
_ASKS_OTHERWISE = "asks for torch's default dtype or device, its settings or its processes"
_COMPILERS = ("is_compiling", "is_dynamo_compiling", "is_exporting")
_COMPILING = "asks whether it is being compiled or exported"
# Written in C, or the code of those in Python.
QUESTIONS: dict[Any, str] = {
    held: what
    for what, functions in {
        _ASKS: (
            torch.is_grad_enabled,
            torch.is_inference_mode_enabled,
            torch.is_autocast_enabled,
            torch.is_autocast_cache_enabled,
            torch.get_autocast_dtype,
            torch.is_anomaly_enabled,
            torch.are_deterministic_algorithms_enabled,
            torch.is_deterministic_algorithms_warn_only_enabled,
            torch.get_deterministic_debug_mode,
            # Deprecated.
            *(
                getattr(torch, name, None)
                for name in (
                    *("is_autocast_cpu_enabled", "get_autocast_cpu_dtype"),
                    *("get_autocast_gpu_dtype", "get_autocast_ipu_dtype"),
                )
            ),
        ),
        _THREAD: (
            threading.current_thread,
            threading.main_thread,
            threading.get_ident,
            threading.get_native_id,
        ),
        _ASKS_OTHERWISE: (
            torch.get_default_dtype,
            torch.get_num_threads,
            torch.get_float32_matmul_precision,
            torch.is_warn_always_enabled,
            torch.initial_seed,
            *(
                getattr(torch.backends.cuda, name)
                for name in dir(torch.backends.cuda)
                if name.endswith("_enabled")
            ),
            *(
                getattr(type(settings), "__getattr__", None)
                for settings in vars(torch.backends.cuda).values()
                if type(settings).__module__ == "torch.backends.cuda"
            ),
            getattr(torch, "get_default_device", None),
            *(
                getattr(torch.distributed, name, None)
                for name in ("is_initialized", "get_rank", "get_world_size")
            ),
        ),
        _COMPILING: (getattr(torch.compiler, name, None) for name in _COMPILERS),
    }.items()
    for function in functions
    for held in (function, code_of(function))
    if held is not None
}
CALLS_MODULE = code_of(torch.nn.Module.__call__)
MAKES_MODULE = code_of(torch.nn.Module.__init__)
READS_MODULE = code_of(torch.nn.Module.__getattr__)
READS_ENVIRONMENT = code_of(type(os.environ).__getitem__)
#: Code of functions that ask of what type a value is.
TYPE_QUESTIONS = (
    code_of(torch.is_tensor),
    code_of(torch.is_storage),
    code_of(torch.jit.isinstance),
)

#: Packages written in C whose objects are there for what a graph would not do.
OUTPUT: dict[str, str] = {
    "_csv": "writes a table, which a graph would not do",
    "sqlite3": "uses a database, which a graph would not do",
    "_socket": "uses a socket, which a graph would not do",
    "socket": "uses a socket, which a graph would not do",
    "mmap": "uses a file in memory, which a graph would not do",
}

#: What a forward does that calls Python code of torch: by its module, and its name, None for any.
#: Not by the functions, of which some are private.
PLACES: dict[tuple[str, str | None], str] = {
    ("torch.utils._pytree", None): "goes through a structure of values, which tracing would freeze",
    ("torch.utils._python_dispatch", "__enter__"): _MODES,
    ("torch.overrides", "__enter__"): _MODES,
    ("torch.nn.attention", "sdpa_kernel"): "chooses the kernels of attention",
    ("torch.autograd.profiler", "__enter__"): "labels a region for profilers, or profiles",
    ("torch._dynamo.external_utils", "is_compiling"): _COMPILING,
    ("torch", "set_float32_matmul_precision"): _SETTINGS,
    ("torch.backends", "__set__"): _SETTINGS,
    ("torch.backends.cuda", "sdp_kernel"): _SETTINGS,
    ("torch.backends.cudnn", "flags"): _SETTINGS,
    ("torch.backends.mkldnn", "flags"): _SETTINGS,
}

# Objects that cannot be copied, or that are for what a graph would not do.
_SHARED: dict[type, str] = {
    types.GeneratorType: "a generator",
    threading.local: "variables of its thread",
    type(threading.Lock()): "a lock",
    type(threading.RLock()): "a lock",
    threading.Event: "an event",
    threading.Condition: "a condition",
    threading.Semaphore: "a semaphore",
    queue.Queue: "a queue",
    queue.SimpleQueue: "a queue",
    io.IOBase: "a file",
    ContextVar: "a context variable",
}
_SHARED_TYPES = tuple(_SHARED)


def shared(value: Any) -> str | None:
    """What kind of object this is, if it is one whose use a graph would not repeat."""
    cls = type(value)  # isinstance would ask the object for its class, which may run its code
    if not issubclass(cls, _SHARED_TYPES):
        return None
    return next(name for kind, name in _SHARED.items() if issubclass(cls, kind))
