"""Blocks that share memory's speed, as a fluid: what csrc/cuda/plan_cost.cpp says of blocks of
which half begin late is held against it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

JITTER = 0.1  # of a stop
L2_TIME = 0.4  # as Costs has it


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
    early: float = 0.0,
) -> float:
    """Microseconds that all blocks take, of so many threads, if per_sm of them fit on each SM.

    traffic: microseconds of memory's full speed that all move together, the share `reads` of it
    before it stops for `stop`. persistent: blocks are dealt out to slots at the start; else a slot
    takes the next one that is left. Of those that run at first, the second half begins `late`
    microseconds after the first. With busy_threads on each SM memory moves 0.7 of what it can.
    early: while a slot stops, memory moves this share of what it reads next to L2. From there it
    takes L2_TIME of the time.
    """
    generator = random.Random(0)
    slots = min(sms * per_sm, blocks)
    left, move = iter(range(blocks)), traffic / blocks

    fetched = dict.fromkeys(range(slots), 0.0)  # what is still on its way to L2

    def steps(slot: int) -> Iterator[tuple[bool, float]]:
        """Whether it moves data, and how much, or waits, and how long."""
        yield False, late if slot >= (slots + 1) // 2 else 0.0
        early_part = 0.0
        for block in range(slot, blocks, slots) if persistent else left:
            missing, fetched[slot] = fetched[slot], 0.0
            yield True, move * reads - early_part + missing
            yield False, L2_TIME * (early_part - missing) * slots
            early_part = early * move * reads if block + slots < blocks else 0.0
            fetched[slot] = early_part
            yield False, stop * generator.uniform(1 - JITTER, 1 + JITTER)
            yield True, move * (1 - reads)

    running = {slot: steps(slot) for slot in range(slots)}
    now, todo = 0.0, {slot: next(running[slot]) for slot in running}
    while todo:
        # What all ask for, and what each gets of it.
        fetching = {slot for slot, amount in fetched.items() if amount > 0}
        moving = sum(moves for moves, _ in todo.values()) + len(fetching)
        asked = moving * threads / (busy_threads * sms)
        each = asked / math.hypot(1, asked) / max(1, moving)
        speed = {slot: each if moves else 1.0 for slot, (moves, _) in todo.items()}
        elapsed = min(amount / speed[slot] for slot, (_, amount) in todo.items())
        elapsed = min([elapsed, *(fetched[slot] / each for slot in fetching)])
        now += elapsed
        for slot in fetching:
            rest = fetched[slot] - elapsed * each
            fetched[slot] = rest if rest > 1e-9 else 0.0
        for slot, (moves, amount) in list(todo.items()):
            rest = amount - elapsed * speed[slot]
            if rest > 1e-9:
                todo[slot] = moves, rest
            elif (following := next(running[slot], None)) is not None:
                todo[slot] = following
            else:
                del todo[slot]
    return now
