"""Blocks that share memory's speed, as a fluid: what csrc/cuda/plan_cost.cpp says of blocks of
which half begin late is held against it."""

from __future__ import annotations

import random
from collections.abc import Iterator

BUSY_SHARE = 0.6  # of the SMs: as many as it takes to keep memory busy, as in plan_cost.cpp
JITTER = 0.1  # of a stop


def simulate(
    sms: int, per_sm: int, turns: float, traffic: float, stop: float, late: float, reads: float
) -> float:
    """Microseconds that all blocks take, if per_sm of them run on each SM at once.

    turns: how many there are, over those that run at once. traffic: microseconds of memory's full
    speed that they move together, the share `reads` of it before the stop. Of those that run at
    first, the second half begins `late` microseconds after the first.
    """
    generator = random.Random(0)
    slots = sms * per_sm
    blocks = left = round(slots * turns)
    move = traffic / blocks

    def steps(slot: int) -> Iterator[tuple[bool, float]]:
        """Whether it moves data, and how much, or waits, and how long."""
        nonlocal left
        yield False, late if slot >= slots // 2 else 0.0
        while left:
            left -= 1
            yield True, move * reads
            yield False, stop * generator.uniform(1 - JITTER, 1 + JITTER)
            yield True, move * (1 - reads)

    running = {slot: steps(slot) for slot in range(slots)}
    now, todo = 0.0, {slot: next(running[slot]) for slot in running}
    while todo:
        moving = [0] * sms
        for slot, (moves, _) in todo.items():
            moving[slot % sms] += moves
        # SMs have the same share of it, up to what one can take.
        of_sm = 1 / max(sms * BUSY_SHARE, sum(map(bool, moving)))
        speed = {s: of_sm / moving[s % sms] if moves else 1.0 for s, (moves, _) in todo.items()}
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
