"""The world: rank, size and device of this process, and its host-side collectives.

Owns the process groups of `torch.distributed`: one for the run, with a store prefix for each
restart attempt, destroyed at the end. Collectives need no group when there is one process. The
first communication of a group is a collective of all its ranks (`first_collective`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from launcher.environment import ProcessEnvironment, process_environment
from launcher.errors import UserError
from launcher.parallel import peers
from launcher.parallel.failure import job_prefix

GROUP_TIMEOUT = timedelta(minutes=30)
SERVED_TIMEOUT = timedelta(minutes=1)
"""To connect to a store that was started before this process."""
LONG_TIMEOUT = timedelta(days=1)


@dataclass(frozen=True)
class World:
    """This process among its peers. `rank` and `size` are global."""

    rank: int
    size: int
    device: torch.device
    long_timeout_group: dist.ProcessGroup | None = None
    """A group with a timeout of a day, for waits while the main process prepares data."""
    group: dist.ProcessGroup | None = None
    """The group of `barrier`, `gather` and `from_main`; None: the default group."""
    store: dist.Store | None = None
    """The key-value store of the job, with a prefix for each restart attempt; None in one
    process."""

    def with_new_group(self) -> World:
        """The same world with a new group and a long timeout, for collectives in another thread
        during training. Called by all processes together."""
        if self.size == 1:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=LONG_TIMEOUT))

    def with_long_timeout(self) -> World:
        """The same world with a timeout of a day, for work that may take hours."""
        return replace(self, group=self.group or self.long_timeout_group)

    @property
    def is_main(self) -> bool:
        """Whether this process logs and writes for the job."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, in rank order, on every process. For small host objects."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_main(self, value: Any) -> Any:
        """The value of the main process, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over all processes in place, asynchronously on CUDA."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def start(*, force_cpu: bool = False, ends_with_peers: bool = False) -> World:
    """Join the job given by the environment variables of `torchrun`, if any.

    `ends_with_peers`: this process ends soon after another rank fails (see `peers`), and not only
    at its next collective. A group is created even for one process, because FSDP2 needs one for
    mixed precision. Raises `UserError` for wrong environment variables.
    """
    environment = process_environment()
    rank, size = environment.rank, environment.world_size
    store: dist.Store | None = None
    device = torch.device("cpu")
    if torch.cuda.is_available() and not force_cpu:
        device = _cuda_device(environment.local_rank)
    if not dist.is_initialized():
        store = _store(environment)
        if ends_with_peers and size > 1:
            peers.watch(environment)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=GROUP_TIMEOUT
        )
    group: Any = None
    if size > 1:
        group = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)
        first_collective(device)
    return World(rank, size, device, long_timeout_group=group, store=store if size > 1 else None)


def first_collective(device: torch.device, group: dist.ProcessGroup | None = None) -> None:
    """Connect `group` (None: the default one) by a collective of all its ranks, who call this
    together. Does not wait on CUDA.

    For groups whose first communication would be point-to-point: `batch_isend_irecv` of some of the
    ranks is not allowed as the first call of a NCCL group, and hangs. Not `device_id` of
    `init_process_group`, by which groups of a part of the ranks become splits of one communicator:
    even creating a group of gloo in a thread beside training is then a call to NCCL.
    """
    dist.all_reduce(torch.zeros(1, device=device), group=group)


def _cuda_device(local_rank: int) -> torch.device:
    """The GPU of this rank. Raises `UserError`."""
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"LOCAL_RANK = {local_rank}",
            where="environment variable",
            rule=f"this machine has {count} visible GPU{'' if count == 1 else 's'}",
            advice="Start at most one process per GPU, or set context.device_target: CPU",
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _store(environment: ProcessEnvironment) -> dist.Store:
    if environment.world_size == 1:
        return dist.HashStore()
    serves = environment.rank == 0 and not environment.uses_agent_store
    timeout = SERVED_TIMEOUT if environment.uses_agent_store else GROUP_TIMEOUT
    # Not waiting for all processes here: one may have failed, which `peers` then reports.
    try:
        store = dist.TCPStore(
            environment.master_addr, environment.master_port, environment.world_size,
            is_master=serves, timeout=timeout, wait_for_workers=False,
        )  # fmt: skip
    except dist.DistError as error:
        raise _no_store(environment, error, serves=serves) from error
    store.set_timeout(GROUP_TIMEOUT)
    # The prefix separates restart attempts (else connections are refused, or hang).
    return dist.PrefixStore(job_prefix(environment.restart_count), store)


def _no_store(environment: ProcessEnvironment, error: Exception, *, serves: bool) -> UserError:
    address = f"{environment.master_addr}:{environment.master_port}"
    return UserError(
        f"MASTER_ADDR:MASTER_PORT = {address}",
        where="environment variables",
        rule=f"rank 0 {'listens' if serves else 'is reached'} there; {str(error).splitlines()[0]}",
        advice="Give the address of the machine of rank 0 and a free port",
    )


def stop(world: World | None = None) -> None:
    """Leave the job; with `world` all ranks together, as the store by which a slower one still
    connects a group may be in the process of rank 0. The group is destroyed, so that its threads
    end before the interpreter."""
    if world is not None and world.size > 1 and dist.is_initialized():
        world.gather(None)
    watching = peers.watching()
    if watching is not None:
        watching.close()
    if dist.is_initialized():
        dist.destroy_process_group()
