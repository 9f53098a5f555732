"""Blocks that share memory's speed, as a fluid: what csrc/cuda/plan_cost.cpp says of blocks of
which half begin late is held against it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

JITTER = 0.1  # of a stop


def simulate(
    sms: int,
    per_sm: int,
    blocks: int,
    threads: int,
    traffic: float,
    stop: float,
    persistent: bool,
    late: float,
    reads: float,
    busy_threads: float,
) -> float:
    """Microseconds that all blocks take, of so many threads, if per_sm of them fit on each SM.

    traffic: microseconds of memory's full speed that all move together, the share `reads` of it
    before it stops for `stop`. persistent: blocks are dealt out to slots at the start; else a slot
    takes the next one that is left. Of those that run at first, the second half begins `late`
    microseconds after the first. With busy_threads on each SM memory moves 0.7 of what it can.
    """
    generator = random.Random(0)
    slots = min(sms * per_sm, blocks)
    left, move = iter(range(blocks)), traffic / blocks

    def steps(slot: int) -> Iterator[tuple[bool, float]]:
        """Whether it moves data, and how much, or waits, and how long."""
        yield False, late if slot >= (slots + 1) // 2 else 0.0
        for _ in range(slot, blocks, slots) if persistent else left:
            yield True, move * reads
            yield False, stop * generator.uniform(1 - JITTER, 1 + JITTER)
            yield True, move * (1 - reads)

    running = {slot: steps(slot) for slot in range(slots)}
    now, todo = 0.0, {slot: next(running[slot]) for slot in running}
    while todo:
        # What all ask for, and what each gets of it.
        moving = sum(moves for moves, _ in todo.values())
        asked = moving * threads / (busy_threads * sms)
        each = asked / math.hypot(1, asked) / max(1, moving)
        speed = {slot: each if moves else 1.0 for slot, (moves, _) in todo.items()}
        elapsed = min(amount / speed[slot] for slot, (_, amount) in todo.items())
        now += elapsed
        for slot, (moves, amount) in list(todo.items()):
            rest = amount - elapsed * speed[slot]
            if rest > 1e-9:
                todo[slot] = moves, rest
            elif (following := next(running[slot], None)) is not None:
                todo[slot] = following
            else:
                del todo[slot]
    return now
