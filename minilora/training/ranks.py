"""Processes that train together: each takes its share of a batch, and the gradients are summed.

A single process is a `Ranks`, whose sums are its own values. Several, started by `mpiexec`, are
`MPIRanks` (extra `mpi`); mpi4py is imported only if a launcher started several.
"""

from __future__ import annotations

import functools
import io
import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from typing import Any, TypeVar

from minilora import tree
from minilora.backend import namespace, to_host
from minilora.errors import MiniloraError
from minilora.tree import Tree
from minilora.workers import cores, own_cores

# Environment variables in which launchers pass a process its rank and the number of processes.
LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # Open MPI
    ("PMI_RANK", "PMI_SIZE"),  # MPICH, Intel MPI, Microsoft MPI
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),  # Slurm's srun
)
LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
HEAD_START = 2.0  # seconds for the first rank to report an error that all ranks have
TO_FORWARD = 0.5  # seconds for the launcher to forward output before Abort

Value = TypeVar("Value")


class Ranks:
    """The processes that train together, numbered from 0; this class is for one that trains alone.

    Every method but `threads` and `share` waits until all ranks have called it.
    """

    rank = 0
    size = 1

    def threads(self) -> int:
        """How many threads this rank has cores for."""
        return cores()

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, in order of rank."""
        return [value]

    def sum(self, arrays: Tree) -> Tree:
        """Every array of a tree summed over the ranks, bit for bit the same on each of them."""
        return arrays

    def share(self, items: int) -> slice:
        """This rank's part of so many items: consecutive, and of equal size to within one item."""
        return slice(items * self.rank // self.size, items * (self.rank + 1) // self.size)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        return any(self.gather(flag))

    def of_first(self, make: Callable[[], Value]) -> Value:
        """What the first rank makes; the others wait for it."""
        return self.gather(make() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def check_equal(self, values: Mapping[str, Any]) -> None:
        """Raise MiniloraError naming a value in which a rank differs from the first."""
        first, *others = self.gather(values)
        for (rank, other), name in itertools.product(enumerate(others, 1), first):
            if other.get(name) != first[name]:
                raise MiniloraError(
                    f"{name} is {first[name]} on rank 0 but {other.get(name)} on rank {rank}; "
                    "all ranks need the same files, software and kind of processor"
                )


class MPIRanks(Ranks):
    """The processes of an MPI communicator, each computing on its share of the cores."""

    def __init__(self, comm: Any) -> None:
        from mpi4py import MPI
        from threadpoolctl import threadpool_limits

        self.comm = comm
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        neighbours = comm.Split_type(MPI.COMM_TYPE_SHARED)
        together = set().union(*neighbours.allgather(own_cores()))
        self._threads = max(1, len(together) // neighbours.Get_size())
        threadpool_limits(self._threads, user_api="blas")  # which by default uses all the cores

    def threads(self) -> int:
        """The cores that the ranks on this machine may use, divided among them."""
        return self._threads

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, in order of rank."""
        values: list[Value] = self.comm.allgather(value)
        return values

    def sum(self, arrays: Tree) -> Tree:
        """Every array summed over the ranks, by one all-reduce, on the host, of all in a row."""
        from mpi4py import MPI

        leaves = list(tree.flatten(arrays).values())
        xp = namespace(leaves[0])
        buffer = to_host(xp.concatenate([leaf.ravel() for leaf in leaves]))
        self.comm.Allreduce(MPI.IN_PLACE, buffer)
        total = xp.asarray(buffer)
        ends = itertools.accumulate(leaf.size for leaf in leaves)
        parts = (
            total[end - leaf.size : end].reshape(leaf.shape)
            for leaf, end in zip(leaves, ends, strict=True)
        )
        return tree.map_leaves(lambda _: next(parts), arrays)


def launched() -> tuple[int, int]:
    """(rank, size) from the environment variables of this process's launcher, else (0, 1)."""
    for rank, size in LAUNCHERS:
        if os.environ.get(rank, "").isdecimal() and os.environ.get(size, "").isdecimal():
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1


@functools.cache
def find_ranks() -> Ranks:
    """The ranks that this process's launcher started; `Ranks()` if there is only one.

    Raises MiniloraError if there are several but mpi4py does not work or does not see them.
    """
    _, size = launched()
    if size == 1:
        return Ranks()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: it finds no MPI library
        problem = str(error).splitlines()[0]
        raise MiniloraError(
            f"the launcher started {size} processes, and they need mpi4py and an MPI library "
            f"({problem}): pip install mpi4py mpich"
        ) from error
    if MPI.COMM_WORLD.Get_size() != size:
        raise MiniloraError(
            f"the launcher started {size} processes, but mpi4py sees {MPI.COMM_WORLD.Get_size()}: "
            "its MPI library is not the launcher's"
        )
    return MPIRanks(MPI.COMM_WORLD)


def check_alone() -> None:
    """Raise MiniloraError if a launcher started several processes; for commands that run in one."""
    _, size = launched()
    if size > 1:
        raise MiniloraError(
            f"{size} processes were started, but only adapt and pretrain share their work; "
            "start one"
        )


def as_one(command: Callable[[], int]) -> int:
    """The exit status of `command`, which every rank runs: one that fails ends all.

    Only the first rank prints, and it alone reports an error that all have.
    """
    rank, size = launched()
    if size == 1:
        return command()
    try:
        find_ranks()
    except MiniloraError as error:
        if all(os.environ.get(name, "0") == "0" for name in LOCAL_RANKS):  # once on each machine
            print(f"minilora: {error}", file=sys.stderr)
        return 2
    printed = io.StringIO()
    with ExitStack() as silence:
        if rank > 0:
            silence.enter_context(redirect_stdout(printed))
            silence.enter_context(redirect_stderr(printed))
        try:
            status = command()
        except Exception:  # a mistake in the program
            traceback.print_exc()
            status = 1
    if status != 0:
        if rank > 0:
            time.sleep(HEAD_START)
            print(f"rank {rank}: {printed.getvalue().strip()}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(TO_FORWARD)
        sys.modules["mpi4py.MPI"].COMM_WORLD.Abort(status)  # the others may wait for this rank
    return status
