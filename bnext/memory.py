"""The memory that large outputs on a CPU come from."""

from bnext._extension import _C


def empty_cache() -> None:
    """Give memory that bnext keeps for its next large outputs on a CPU back to the system.

    Outputs of 2 MB and more that were freed leave their memory behind for the next ones, which then
    take no page faults: at most 1 GiB or a sixteenth of the machine's memory, whichever is less, or
    what ``BNEXT_CPU_CACHE_MB`` says when the first such output is made; 0 keeps nothing. What has
    not been used for a second is marked, when another output is freed, as memory that the system
    may take when it is short of it. Memory on a GPU is torch's: :func:`torch.cuda.empty_cache`.
    """
    _C.empty_output_cache()
