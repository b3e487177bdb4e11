"""Contents of a save: the tensors that this rank writes into each folder.

    checkpoint/             weights and optimizer state; weights alone with `save_optimizer: False`
    checkpoint_network/     weights alone, with `save_network_params: True`
    checkpoint_trainable/   trained weights alone, with `save_trainable_params: True`

With `remove_redundancy: True` each tensor is written by one of the ranks that hold a replica of it,
on each file system.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from launcher.checkpoint.integrated import FULL
from launcher.checkpoint.savable import Savable
from launcher.checkpoint.store import Store
from launcher.config.schema import CheckpointMonitorSection
from launcher.layout.box import Shape
from launcher.layout.replicas import Ranks
from launcher.layout.shard import Shard
from launcher.weights.ranks.redundancy import writers_of

NETWORK, TRAINABLE = "checkpoint_network", "checkpoint_trainable"


class Contents:
    """What a run with this configuration saves. The writer of each tensor is chosen once."""

    def __init__(self, config: CheckpointMonitorSection) -> None:
        self._config = config
        self._written: dict[str, tuple[frozenset[str], frozenset[str]]] = {}
        """Folder to the tensors of this rank, and those of them that it writes."""

    @property
    def folders(self) -> list[str]:
        """The folders that get saves."""
        enabled = {FULL: True, NETWORK: self._config.save_network_params,
                   TRAINABLE: self._config.save_trainable_params}  # fmt: skip
        return [folder for folder, is_enabled in enabled.items() if is_enabled]

    def shapes(self, run: Savable, folder: str) -> Mapping[str, Shape]:
        """The shapes of all tensors, of all ranks, in a folder."""
        shapes = run.shapes_in_files(optimizer=folder == FULL and self._config.save_optimizer)
        return {n: shapes[n] for n in run.state_names()} if folder == TRAINABLE else shapes

    def shards(self, run: Savable, stores: Mapping[str, Store]) -> dict[str, dict[str, Shard]]:
        """The current tensors that this rank writes, by folder."""
        weights = run.weights()
        optimizer = run.optimizer_state() if self._config.save_optimizer else {}
        trained = run.state_names()
        held = {
            FULL: {**weights, **optimizer},
            NETWORK: weights,
            TRAINABLE: {name: shard for name, shard in weights.items() if name in trained},
        }
        return {name: self._own(run, stores[name], name, held[name]) for name in self.folders}

    def nbytes(self, run: Savable, stores: Mapping[str, Store]) -> int:
        """Bytes that this rank will write in a save. Optimizer state, which may not exist yet, has
        the shape of its weight."""
        total = 0
        weights, states = run.weights(), run.state_names()
        for folder in self.folders:
            held = self._own(run, stores[folder], folder, weights)
            trained = {name: shard for name, shard in held.items() if name in states}
            total += _nbytes(trained if folder == TRAINABLE else held)
            if folder == FULL and self._config.save_optimizer:
                for name, shard in trained.items():
                    itemsize = run.state_itemsize(shard.tensor.element_size())
                    total += len(states[name]) * shard.tensor.numel() * itemsize
        if self._config.integrated_save and run.world.is_main:
            numbers = sum(map(math.prod, run.shapes_in_files(optimizer=False).values()))
            first = next(iter(weights.values()), None)
            total += numbers * (first.tensor.element_size() if first is not None else 0)
        return total

    def snapshot_nbytes(self, run: Savable, stores: Mapping[str, Store]) -> int:
        """Bytes of the tensors that this rank writes in a save, each once. Optimizer state, which
        may not exist yet, is as large as its weight."""
        weights, states, sizes = run.weights(), run.state_names(), dict[str, int]()
        moments = {
            prefix + name: shard._replace(tensor=shard.tensor.to("meta"))
            for name, shard in weights.items()
            for prefix in states.get(name, ())
        }
        for folder in self.folders:
            has_state = folder == FULL and self._config.save_optimizer
            held = self._own(
                run, stores[folder], folder, weights | moments if has_state else weights
            )
            sizes |= {name: shard.tensor.nbytes for name, shard in held.items()}
        return sum(sizes.values())

    def _own(
        self, run: Savable, store: Store, folder: str, held: Mapping[str, Shard]
    ) -> dict[str, Shard]:
        """Those of `held` that this rank writes. Chosen again only for other tensors."""
        if not self._config.remove_redundancy:
            return dict(held)
        known, own = self._written.get(folder, (frozenset(), frozenset()))
        if known != held.keys():
            writer = writers_of(held, _replica_ranks(run, store))
            own = frozenset(name for name in held if writer[name] == run.world.rank)
            self._written[folder] = frozenset(held), own
        return {name: shard for name, shard in held.items() if name in own}


def constant_between_updates(run: Savable) -> set[str]:
    """The tensors of the model and its optimizer, in files, that only an update changes; buffers,
    for one, may change in any forward pass."""
    return {
        prefix + name for name, prefixes in run.state_names().items() for prefix in ("", *prefixes)
    }


def _replica_ranks(run: Savable, store: Store) -> Mapping[str, Ranks]:
    """The ranks with a replica of each tensor, on the file system of this rank."""
    peers = set(store.filesystems.peers(run.world))
    return {
        name: tuple(rank for rank in ranks if rank in peers)
        for name, ranks in run.replica_ranks().items()
    }


def _nbytes(shards: Mapping[str, Shard]) -> int:
    return sum(shard.tensor.nbytes for shard in shards.values())
