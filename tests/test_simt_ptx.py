"""The kernels' PTX on the SIMT shim. `make cuda-check` has the shim's other tests run it as well;
here is what it alone shows: of the instructions that keep threads apart none can be left out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import cases
import pytest
from simt import counts
from simt import library as simt
from simt.checks import check_backward, check_forward, check_statistics
from test_simt_on_chip import EVERY_WAY, GRID, PERSISTENT, PERSISTENT_CLUSTER, RESIDENT
from test_simt_shim import RUNS

pytestmark = pytest.mark.skipif(simt.compiler() is None, reason="no C++ compiler here")

ENTRY = re.compile(r"^\.visible \.entry (\w+)\(", re.MULTILINE)
# What goes, and what comes in its place: in one place after the other.
ONE_BY_ONE = {
    "barrier": (r"\tbar\.sync \t0;", ""),
    "arrival at the cluster's barrier": (r"\tbarrier\.cluster\.arrive\.relaxed;", ""),
    "wait at the cluster's barrier": (r"\tbarrier\.cluster\.wait\.acquire;", ""),
    "fence": (r"\tfence\.release\.sync_restrict\S*;", ""),
    "arrival at the grid's barrier": (
        r"\tatom\.add\.release\.gpu\.u32 (%r\d+),\S*;",
        r"\tmov.u32 \1, 0;",
    ),
    "wait at the grid's barrier": (r"\tld\.acquire\.gpu\.u32 (%r\d+),\S*;", r"\tmov.u32 \1, -1;"),
}
# In all places of a kernel: these are in branches and loops of which few runs take all.
ALL_AT_ONCE = {
    "another block's memory": (
        r"mapa\.shared::cluster\.u32 remote, (%r\d+), %r\d+;",
        r"mov.u32 remote, \1;",
    ),
    "wait for copies": (r"\tcp\.async\.wait_group \d;", ""),
    "wait for kernels": (r"\tgriddepcontrol\.wait;", ""),
    "load from L2": (r"\tld\.global\.cg\.u64", "\tld.global.u64"),
    "clear letter": (r"\tst\.global\.v4\.u32\s+\[%rd\d+(?:\+16)?\], \{(%r\d+), \1, \1, \1\};", ""),
}
Run = Callable[[int], object]
SLICES_KEPT = PERSISTENT._replace(threads=512, registers_limit=simt.ALWAYS, shared_bytes=78500)


def all_runs() -> Iterator[Run]:
    """Passes that take each way through the kernels, each for a seed."""
    ways = [
        *EVERY_WAY.values(),
        # planes that share packs, and runs, for blocks that have one slab after the other
        ("nchw", (4, 5, 17, 15), PERSISTENT_CLUSTER),
        ("nchw", (4, 9, 17, 15), GRID._replace(team=2, num_sms=2)),  # half of them late
        ("nchw", (16, 160, 7, 7), GRID._replace(team=2)),
        # runs that are added up in slices
        ("nchw", (40, 4, 7, 7), RESIDENT._replace(threads=512)),
        # the same for persistent blocks, where backward and forward have no room for two of them
        ("nchw", (80, 8, 7, 7), PERSISTENT._replace(threads=512)),
        ("nchw", (160, 8, 7, 7), PERSISTENT._replace(threads=512)),
        ("nchw", (100, 20, 7, 7), SLICES_KEPT),
        *RUNS["streaming"],
        ("nchw", (4, 5, 17, 15), simt.Machine()),
        ("sliced_w", (3, 5, 7, 6), simt.Machine()),
        ("misaligned_channels_last", (3, 5, 7, 6), simt.Machine()),
    ]
    for layout, shape, machine in ways:
        for mode in ("train", "eval") if machine.family == "streaming" else ("train",):
            case = cases.make_case(shape, layout=layout, grad_layout=layout, mode=mode)
            checks = (check_forward, check_backward)
            for check in (*checks, check_statistics) if mode == "eval" else checks:
                yield lambda seed, check=check, case=case, machine=machine: check(
                    case, "", machine=machine, schedule=simt.Schedule(seed)
                )


def goes_wrong(run: Run, seeds: int) -> bool:
    """Whether a result is wrong or the shim reports an error."""
    try:
        for seed in range(seeds):
            run(seed)
    except (AssertionError, simt.ShimError):
        return True
    return False


class Module:
    """The PTX of the kernels of float32, changed here and there."""

    def __init__(self, ptx: str, path: Path) -> None:
        begins = [m.start() for m in ENTRY.finditer(ptx)]
        parts = (ptx[a:b] for a, b in itertools.pairwise([*begins, len(ptx)]))
        named = {ENTRY.match(part)[1]: part for part in parts}
        self.header = ptx[: begins[0]]
        self.kernels = {name: text for name, text in named.items() if "_kernelIf" in name}
        self.path = path
        # Of each kernel: passes that it is part of, and the kernels that take part in those.
        self.runs: dict[str, list[Run]] = {name: [] for name in self.kernels}
        self.together: dict[str, set[str]] = {name: {name} for name in self.kernels}
        unchanged = self.load(self.kernels)
        for run in all_runs():
            with unchanged:
                assert not goes_wrong(run, 4)
                names = simt.kernels_run()
            for name in names:
                self.runs[name].append(run)
                self.together[name].update(names)

    def load(self, kernels: dict[str, str]) -> simt.Ptx:
        self.path.write_text(self.header + "".join(kernels.values()))
        return simt.Ptx(self.path)

    def notices(self, name: str, text: str) -> bool:
        """Whether a run that the kernel is part of goes wrong if this is its text."""
        kernels = {other: self.kernels[other] for other in self.together[name]}
        with self.load(kernels | {name: text}):
            return any(goes_wrong(run, 4) for run in self.runs[name])


@pytest.fixture(scope="module")
def module(ptx: Callable[[int], simt.Ptx], tmp_path_factory: pytest.TempPathFactory) -> Module:
    return Module(ptx(90).path.read_text(), tmp_path_factory.mktemp("ptx") / "mutant.ptx")


def test_the_runs_reach_all_kernels(module: Module) -> None:
    assert [name for name, runs in module.runs.items() if not runs] == []


@pytest.mark.parametrize("what", [*ONE_BY_ONE, *ALL_AT_ONCE])
def test_without_it_results_are_wrong(what: str, module: Module) -> None:
    tried, missed = 0, []
    for name, text in module.kernels.items():
        if what in ALL_AT_ONCE:
            mutant, places = re.subn(*ALL_AT_ONCE[what], text)
            # One load from L2 is that of num_batches_tracked, which no block before has read.
            changed = {0: mutant} if places > (what == "load from L2") else {}
        else:
            pattern, instead = ONE_BY_ONE[what]
            changed = {
                m.start(): text[: m.start()] + m.expand(instead) + text[m.end() :]
                for m in re.finditer(pattern, text)
            }
        for place, mutant in changed.items():
            tried += 1
            if not module.notices(name, mutant):
                missed.append((name, text.count("\n", 0, place) + 1))
    assert tried > 0
    assert missed == []


@pytest.mark.parametrize(
    ("size", "dtypes"), [(7, "float32"), (7, "float16"), (14, "float16"), (28, "float16")]
)
def test_a_blocks_threads_share_the_work(
    size: int, dtypes: str, ptx: Callable[[int], simt.Ptx]
) -> None:
    """In blocks as large as on a GPU: while a few warps add up, the others wait, and so does
    memory. The longest way is 1.5 times as long as the mean at most."""
    machine = simt.Machine(num_sms=132, threads_per_sm=2048, threads=512, family="resident")
    case = cases.make_case((16, 64, size, size), dtypes)
    for check in (check_forward, check_backward):
        with ptx(90):
            call = check(case, "", machine=machine._replace(batches=64)).call
        assert call.run_length > 1 or size == 28
        mean = call.instructions / call.threads_run
        assert call.most_instructions <= 1.5 * mean, call.plan.decode()


@pytest.mark.parametrize("dtypes", ["float32", "float16"])
@pytest.mark.parametrize(
    ("layout", "family", "team"),
    [
        ("channels_last", "resident", 0),
        ("channels_last", "cluster", 4),
        ("channels_last", "grid", 8),
        ("channels_last", "streaming", 0),
        ("nchw", "resident", 0),
        ("nchw", "streaming", 0),
    ],
)
@pytest.mark.parametrize("size", [7, 16])
def test_lanes_find_their_numbers_in_different_banks(
    layout: str, family: str, team: int, size: int, dtypes: str, ptx: Callable[[int], simt.Ptx]
) -> None:
    """A warp waits for the bank that most of its lanes want: sixteen cycles at most. (If the lanes
    of rows of halves found coefficients channel by channel, it would be 170.)"""
    machine = simt.Machine(num_sms=132, threads_per_sm=2048, threads=256, family=family, team=team)
    machine = machine._replace(batches=64)
    case = cases.make_case((16, 64, size, size), dtypes, layout=layout, grad_layout=layout)
    for check in (check_forward, check_backward):
        with ptx(90), simt.watch_banks():
            call = check(case, "", machine=machine).call
            cycles, least = simt.bank_use()
        assert least > 0
        assert cycles - least <= 16 * call.threads_run / 32, call.plan.decode()


def test_operations_are_counted(ptx: Callable[[int], simt.Ptx]) -> None:
    """All that threads execute, by name; and what tests/simt/counts.py makes of it."""
    case = cases.make_case((4, 8, 16, 16))
    with ptx(90):
        call = check_forward(case, "", machine=simt.Machine(family="resident", batches=32)).call
        operations = simt.operations_run()
    assert sum(operations.values()) == call.instructions
    assert operations["shfl.sync.bfly.b32"] % 32 == 0 < operations["shfl.sync.bfly.b32"]
    found = counts.count("nchw", "resident", 0, (16, 2, 32, 32), "float32", True, ptx(90))
    assert found is not None
    assert (
        found.longest > found.rest > found.of_pack > 3 * 4
    )  # additions for each element of a pack
    assert found.shuffles >= 15  # three sums of a warp


def test_cycles_of_banks() -> None:
    """Lanes that ask for neighbours, for the same, or for the same bank."""
    for step, nbytes, cycles, least in (
        *((4, 4, 1, 1), (0, 4, 1, 1), (8, 4, 2, 1), (128, 4, 32, 1), (132, 4, 1, 1)),
        *((8, 8, 2, 2), (128, 8, 32, 2), (16, 16, 4, 4), (64, 16, 16, 4), (128, 16, 32, 4)),
    ):
        assert simt.bank_use_of_lanes(step, nbytes) == (cycles, least), (step, nbytes)


def test_what_it_does_not_know(tmp_path: Path) -> None:
    """An error that names the line."""
    entry = ".target sm_90\n.visible .entry a_kernel(\n.param .b8 a_kernel_param_0[8]\n)\n"
    for statement, error in (
        ("vadd.s32 \t%r1, %r2, %r3", "line 7: does not know the instruction 'vadd.s32'"),
        ("mov.u32 \t%r1, %laneid", "line 7: does not know the operand '%laneid'"),
        ("bra \t$L__BB0_1", "line 8: no label '$L__BB0_1'"),
    ):
        path = tmp_path / "unknown.ptx"
        path.write_text(entry + "{\n\t.reg .b32 \t%r<4>;\n\t" + statement + ";\n}\n")
        with pytest.raises(ValueError, match=re.escape(error)):
            simt.Ptx(path)
    with pytest.raises(ValueError, match="no kernels"):
        simt.Ptx(tmp_path / "missing.ptx")
