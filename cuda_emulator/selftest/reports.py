"""What each broken kernel of the self-test must be reported for."""

from __future__ import annotations

import re

THREAD = r"block \(\d,0,0\) thread \(\d+,0,0\)"


def of(thread: int | str, block: int | str = r"\d") -> str:
    return rf"block \({block},0,0\) thread \({thread},0,0\)"


# Case: the kind of a report that must be there, and the rest of its text behind the kernel's name.
BROKEN = {
    "missing_barrier": (
        "race|uninitialised",
        rf"{THREAD} (reads|writes) 8 bytes at shared memory \+\d+, which "
        rf"({THREAD} (wrote|read); nothing orders the two|nobody wrote yet)",
    ),
    "missing_second_barrier": (
        "race",
        rf"{THREAD} (reads|writes) 4 bytes at shared memory \+\d+, "
        rf"which {THREAD} (wrote|read); nothing orders the two",
    ),
    "unwritten_shared": (
        "uninitialised",
        rf"{THREAD} reads 8 bytes at shared memory \+1016, which nobody wrote yet",
    ),
    "shared_outside": (
        "outside",
        rf"{of(5)} writes 8 bytes at shared memory \+8192, but the launch has 8192 bytes of it",
    ),
    "shared_misaligned": (
        "misaligned",
        rf"{of(6)} takes shared memory from byte 12 on for a type that is aligned to 8",
    ),
    "half_word": (
        "race|uninitialised",
        rf"({of(31)} reads 2 bytes at shared memory \+64, which ({of(32)} wrote; nothing|nobody)|"
        rf"{of(32)} writes 2 bytes at shared memory \+64, which {of(31)} read; nothing)",
    ),
    "dropped_fence": (
        "race",
        rf"{of(33)} reads 8 bytes at 'partials' \+\d+, which {of(0)} wrote; nothing orders the two",
    ),
    "dropped_second_fence": (
        "race",
        rf"{of(33)} reads 8 bytes at 'partials' \+\d+, which {of(0)} wrote; nothing orders the two",
    ),
    "late_write": (
        "race",
        rf"{of(0)} reads 8 bytes at 'partials' \+\d+, which {of(1)} wrote; nothing orders the two",
    ),
    "racing_workspace": (
        "race",
        rf"{of(7)} writes 8 bytes at 'partials' \+\d+, which {of(7)} wrote; nothing orders the two",
    ),
    "missing_grid_sync": (
        "race",
        rf"{THREAD} (reads|writes) 8 bytes at 'partials' \+\d+, "
        rf"which {THREAD} (read|wrote); nothing orders the two",
    ),
    "grid_sync_plain": ("grid", rf"{THREAD} calls grid_sync in a launch that is not cooperative"),
    "spins": (
        "livelock",
        r"threads run, but none of them gets anywhere; "
        r"block \(1,0,0\): thread 0 ready to run, threads 1-127 exited",
    ),
    "acquired_but_not_released": (
        "race",
        rf"{of(0, 1)} reads 8 bytes at 'partials' \+0, which {of(0, 0)} wrote; nothing orders",
    ),
    "released_but_not_acquired": (
        "race",
        rf"{of(0, 1)} reads 8 bytes at 'partials' \+0, which {of(0, 0)} wrote; nothing orders",
    ),
    "missing_wait": (
        "async",
        r"(block \(\d,0,0\) thread \(\d+,0,0\)) reads 4 bytes at shared memory \+\d+, "
        r"which an asynchronous copy of \1 still fills: nobody waited for it",
    ),
    "short_wait": (
        "async",
        rf"{THREAD} reads 4 bytes at shared memory \+2\d\d\d, "
        rf"which an asynchronous copy of {THREAD} still fills: nobody waited for it",
    ),
    "wait_without_barrier": (
        "race|async|uninitialised",
        rf"{THREAD} reads 4 bytes at shared memory \+\d+, which "
        rf"({THREAD} filled by an asynchronous copy; nothing orders the two|"
        rf"an asynchronous copy of {THREAD} still fills|nobody wrote yet)",
    ),
    "cluster_peer_exits": (
        "cluster",
        rf"({of('[0-9]+', '[1357]')} exits, the last of its block, and nothing orders that after "
        rf"{of(64, '[0246]')} accessing the shared memory of this block|"
        rf"{of(64, '[0246]')} reads 8 bytes at shared memory of block \([1357],0,0\) \+0, "
        r"which has exited)",
    ),
    "cluster_without_sync": (
        "race|uninitialised",
        rf"({of(0)} reads 8 bytes at shared memory of block \(\d,0,0\) \+0, which "
        rf"({of(0)} wrote; nothing|nobody)|{of(0)} writes 8 bytes at shared memory \+0, which "
        rf"{of(0)} read; nothing)",
    ),
    "cluster_in_plain_launch": (
        "cluster",
        rf"{THREAD} calls cluster_sync in a launch without clusters",
    ),
    "cluster_rank_too_high": ("cluster", rf"{THREAD} asks for block 2 of a cluster of 2"),
    "barrier_after_exit": (
        "barrier",
        rf"({of(40)} has exited, and never reaches __syncthreads, where {THREAD} waits|"
        rf"{THREAD} is at __syncthreads, which {of(40)} never reaches: it has exited)",
    ),
    "barriers_of_two_kinds": (
        "barrier",
        rf"{THREAD} is at (__syncthreads(?:_or)?) while {THREAD} waits at (?!\1 )__syncthreads",
    ),
    "barrier_against_shuffle": (
        "deadlock",
        r"no thread can go on; block \(\d,0,0\): threads 0-15 at __syncthreads, "
        r"threads 16-31 at __syncwarp with mask 0xffffffff",
    ),
    "lane_outside_mask": (
        "warp",
        rf"{of('(15|47|79|111)')} calls __shfl_down_sync with mask 0xffff and reads lane 16, "
        r"which the mask does not name",
    ),
    "mask_without_caller": (
        "warp",
        rf"{THREAD} calls __shfl_xor_sync with mask 0x7fffffff, "
        r"which does not name its own lane 31",
    ),
    "mask_with_exited": (
        "warp",
        rf"({THREAD} calls __shfl_xor_sync with mask 0xffffffff, which names lane 5: exited|"
        rf"{of(37)} has exited, while {THREAD} waits for it at __shfl_xor_sync)",
    ),
    "masks_differ": (
        "warp",
        rf"{THREAD} calls __syncwarp with mask (0xff|0xffffffff) "
        rf"while {THREAD} waits at __syncwarp with mask (?!\1 )0xff",
    ),
    "operations_differ": (
        "warp",
        rf"{THREAD} calls (__shfl_xor_sync|__any_sync) with mask 0xffffffff while {THREAD}, "
        r"which the mask names, waits at (?!\1)__",
    ),
    "types_differ": (
        "warp",
        rf"{THREAD} calls __shfl_xor_sync with mask 0xffffffff while {THREAD}, "
        r"which the mask names, waits at __shfl_xor_sync of another type",
    ),
    "lanes_missing": (
        "warp",
        rf"{THREAD} calls __syncwarp with mask 0xffffffff, which names lanes 16-31: "
        r"the block has no such threads",
    ),
    "width_of_three": ("warp", rf"{THREAD} calls __shfl_down_sync with width 3, which is not"),
    "shuffle_for_barrier": (
        "race|uninitialised",
        rf"{THREAD} (reads|writes) 4 bytes at shared memory \+\d+, which ({THREAD}|nobody)",
    ),
    "tail_too_long": (
        "outside",
        rf"{of(0, 0)} writes 4 bytes at an address directly after the end of 'out'",
    ),
    "tail_too_short": (None, r"4 bytes of 'out' were never written, the first at \+65532"),
    "written_twice": (
        "twice",
        r"(block \(2,0,0\) thread \(9,0,0\) writes 4 bytes at 'out' \+400, "
        r"which block \(0,0,0\) thread \(100,0,0\) wrote already|"
        r"block \(0,0,0\) thread \(100,0,0\) writes 4 bytes at 'out' \+400, "
        r"which block \(2,0,0\) thread \(9,0,0\) wrote already)",
    ),
    "lost_merge": (None, r"4 bytes of 'out' were never written, the first at \+0"),
    "plain_tail": (
        "guard",
        r"a plain store changed memory 0 bytes after the end of 'plain'",
    ),
    "misaligned_load": (
        "misaligned",
        rf"{of(3)} reads 16 bytes at 'in' \+8, which is not a multiple of 16 in memory",
    ),
    "load_outside": (
        "outside",
        rf"{of(3)} reads 4 bytes at an address 4 bytes before the start of 'in'",
    ),
    "prefetch_outside": (
        "outside",
        rf"{of(3)} reads 1 byte at an address 4 bytes before the start of 'in'",
    ),
    "store_to_input": (
        "outside",
        rf"{of(4)} writes 4 bytes at 'in' \+0, which is an input",
    ),
    "in_a_template<3>": (
        "misaligned",
        rf"{of(1)} reads 16 bytes at 'in' \+12, which is not a multiple of 16 in memory",
    ),
}


def expected_report(case: str, seed: str) -> re.Pattern[str]:
    kind, text = BROKEN[case]
    if kind is None:  # found after the launch
        return re.compile(rf"^unwritten: {text}.* \[seed {seed}\]$", re.MULTILINE)
    # References count groups from the text on.
    start = rf"^(?:{kind}): kernel {re.escape(case)}: "
    return re.compile(rf"{start}{text}.* \[seed {seed}, launch 1\]$", re.MULTILINE)
