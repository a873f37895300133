"""Synchronised batch norm between processes: what it costs, and what it sends.

Starts its processes itself: on the CPU with Gloo on loopback, on CUDA with NCCL and one GPU each.

call: forward and backward of one layer: this package's local batch norm, its SyncBatchNorm, and on
CUDA torch.nn.SyncBatchNorm, which refuses CPU tensors.
step: a training step of a net in DistributedDataParallel: native batch norm unsynchronised, this
package's unsynchronised (converted) and synchronised, also fused; on CUDA torch's synchronised.

All start each call together and take turns; a sample is the time of the slowest process, a time the
median. x: over the first line's time. Bytes that batch norm's collectives leave on a rank, and
messages (collectives), are counted in one call or step, beside what the formula says
(bnorm_ext/distributed/collectives.py); DistributedDataParallel's own traffic is not among them.

--traffic measures nothing: the formula, for all batch norms of a net, on 2 to 4,096 ranks.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from . import machine, nets, report, traffic
from .options import DAY, Parser, check_output, device_of, first_line, positive, shape_of, whole
from .options import threads as threads_type
from .sync_ranks import Plan, work
from .train import check

SHAPES = ("8x64x56x56", "8x256x14x14", "8x2048x7x7")


def parser(command: str) -> Parser:
    p = Parser(prog=command, description=__doc__,
               formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = p.add_argument
    add("--processes", type=whole(2, 64), default=2, metavar="N", help="default: 2")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there are N GPUs")
    add("--shape", nargs="+", default=SHAPES, metavar="N,C,H,W",
        help=f"of one process's input of a layer; default: {' '.join(SHAPES)}")  # fmt: skip
    add("--model", choices=tuple(nets.NETS),
        help="default: resnet18, with --traffic resnet50")  # fmt: skip
    add("--batch", type=whole(1), default=8, help="images of one process in a step; default: 8")
    add("--size", type=whole(32), default=64, help="height and width of an image; default: 64")
    add("--threads", type=threads_type, default=1, metavar="K",
        help="of each process on the CPU; default: 1")  # fmt: skip
    add("--time-budget", type=positive(DAY), default=60.0, metavar="SECONDS",
        help="of timed calls and steps; default: 60")  # fmt: skip
    add("--traffic", action="store_true", help="only what is sent, by the formula")
    add("--json", type=Path, metavar="FILE")
    return p


def plan_of(o: argparse.Namespace) -> Plan:
    """Raises ValueError where it cannot be run."""
    if not dist.is_available():
        raise ValueError("this torch is built without torch.distributed")
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= o.processes
    device = device_of(o.device or ("cuda" if enough else "cpu"))
    if device.type == "cuda" and not enough:
        raise ValueError(
            f"--processes {o.processes}: more than CUDA devices, {torch.cuda.device_count()}"
        )
    backend = "NCCL" if device.type == "cuda" else "Gloo"
    if not getattr(dist, f"is_{backend.lower()}_available")():
        raise ValueError(f"this torch is built without {backend}")
    shapes = tuple(shape_of(text) for text in o.shape)
    for text, shape in zip(o.shape, shapes, strict=True):
        if len(shape) != 4 or min(shape) < 1:
            raise ValueError(f"--shape {text}: must be four positive numbers, N,C,H,W")
        if shape[0] * shape[2] * shape[3] == 1:
            raise ValueError(f"--shape {text}: one value per channel cannot be normalised")
    model = o.model or "resnet18"
    check(model, o.batch, o.size, device)
    layers = sum(4 * 4 * torch.Size(shape).numel() for shape in shapes)
    machine.check_memory("the inputs of --shape", o.processes * layers, device)
    return Plan(
        o.processes, device.type, shapes, model, o.batch, o.size, o.threads, o.time_budget
    )  # fmt: skip


def measure(plan: Plan) -> list[dict[str, Any]]:
    """Rows of calls and steps. Raises what a process has raised."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (plan, folder), plan.world, daemon=True)
        rows: list[dict[str, Any]] = json.loads(Path(folder, "rows.json").read_text())
    return rows


def _title(row: dict[str, Any]) -> str:
    if row["what"] == "call":
        return f"call, {'x'.join(map(str, row['shape']))}"
    return f"step, {row['model']}, {row['batch']} of {row['size']}x{row['size']}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [["what, for each process", "variant", "ms", "p10", "p90", "x", "bytes", "formula",
              "messages", "formula", "rounds"]]  # fmt: skip
    for r in rows:
        times = [f"{r[name] / 1e3:.3g}" for name in ("median_us", "p10_us", "p90_us")]
        sent = [f"{r[name]:,}" for name in ("bytes", "formula_bytes", "messages")]
        ratio = f"{r['ratio']:.2f}{'~' if r['noisy'] else ''}"
        lines.append([_title(r), r["variant"], *times, ratio, *sent, f"{r['formula_messages']}",
                      str(r["rounds"])])  # fmt: skip
    text = report.aligned(lines, left=2)
    if any(r["noisy"] for r in rows):
        text += ["", "~  the two halves of the samples differ by more than the claimed difference"]
    return "\n".join(text)


def show_traffic(net: str) -> list[dict[str, Any]]:
    """Prints the table; rows for JSON."""
    channels = traffic.channels_of(net)
    print(f"{net}: {len(channels)} batch norms, {sum(channels):,} channels; a training step, what")
    print("each rank receives; torch's: torch.nn.SyncBatchNorm\n")
    print("\n".join(report.aligned(traffic.lines(net), left=0)))
    return [
        {"what": "traffic", "model": net, "ranks": world, "variant": name, "bytes": sent.sent_bytes,
         "messages": sent.messages}
        for world in traffic.WORLDS
        for name, sent in (("synchronised", traffic.ours(world, channels)),
                           ("torch synchronised", traffic.torchs(world, channels)))
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None, command: str | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = command or f"python -m {__package__}.sync"
    p = parser(command)
    o = p.parse_args(arguments)
    try:
        check_output(o.json, "--json")
        plan = None if o.traffic else plan_of(o)
    except ValueError as error:
        p.error(str(error))
    device = torch.device(plan.device if plan else "cpu")
    header = machine.header(device, command, arguments) | {"method": __doc__}
    if plan is None:
        rows = show_traffic(o.model or "resnet50")
    else:
        header |= {"processes": plan.world, "threads": plan.threads}
        try:
            rows = measure(plan)
        except KeyboardInterrupt:
            return 130
        except Exception as why:  # a process that died, or raised
            last = str(why).strip().splitlines()[-1:] or [first_line(why)]
            print(f"{command}: a process failed: {last[0]}", file=sys.stderr)
            return 1
        print(f"{plan.world} processes\n{report.title(header)}\n\n{table(rows)}")
    if o.json is not None:
        try:
            report.write_json(o.json, header, rows)
        except OSError as error:  # a full disk: what was measured is on the screen
            print(f"{command}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
