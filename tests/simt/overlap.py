"""Blocks that share memory's speed, as a fluid: what csrc/cuda/plan_cost.cpp says of blocks of
which half begin late is held against it."""

from __future__ import annotations

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
    later: float,
    persistent: bool,
    late: float,
    reads: float,
    busy: tuple[float, int],
) -> float:
    """Microseconds that all blocks take, of so many threads, if per_sm of them fit on each SM.

    traffic: microseconds of memory's full speed that all move together, the share `reads` of it
    before the stop. The first stop in a slot is `stop` long, later ones `later`. persistent: blocks
    are dealt out to slots at the start; else a slot takes the next one that is left. Of those that
    run at first, the second half begins `late` microseconds after the first. busy: the share of the
    SMs, and the threads on each, that keep memory busy.
    """
    generator = random.Random(0)
    busy_share, busy_threads = busy
    slots = min(sms * per_sm, blocks)
    left, move = iter(range(blocks)), traffic / blocks

    def steps(slot: int) -> Iterator[tuple[bool, float]]:
        """Whether it moves data, and how much, or waits, and how long."""
        yield False, late if slot >= (slots + 1) // 2 else 0.0
        length = stop
        for _ in range(slot, blocks, slots) if persistent else left:
            yield True, move * reads
            yield False, length * generator.uniform(1 - JITTER, 1 + JITTER)
            yield True, move * (1 - reads)
            length = later

    running = {slot: steps(slot) for slot in range(slots)}
    now, todo = 0.0, {slot: next(running[slot]) for slot in running}
    while todo:
        moving = [0] * sms
        for slot, (moves, _) in todo.items():
            moving[slot % sms] += moves
        # What each SM can ask for, and what it gets of it.
        wanted = [min(1, n * threads / busy_threads) / (busy_share * sms) for n in moving]
        share = 1 / max(1, sum(wanted))
        speed = {
            slot: share * wanted[slot % sms] / moving[slot % sms] if moves else 1.0
            for slot, (moves, _) in todo.items()
        }
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
