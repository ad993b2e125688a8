"""What the store needs of the other ranks: to wait for them and to exchange small objects."""

from __future__ import annotations

from typing import Any


class Coordinator:
    """The only rank there is; a backend with several subclasses this over its collectives.

    Attributes:
        rank: of this process.
        world_size: number of processes.
        threaded: whether the collectives may run on the writer thread of an asynchronous save, which takes a process
            group of its own. Otherwise such saves are committed by the training thread at the next boundary.

    Examples:
        >>> coordinator = Coordinator()
        >>> coordinator.gather_objects("mine"), coordinator.broadcast_object("mine")
        (['mine'], 'mine')
    """

    rank: int = 0
    world_size: int = 1
    threaded: bool = True

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank has come here."""

    def gather_objects(self, obj: Any) -> list[Any]:
        """Give every rank the objects of all ranks, in order of rank."""
        return [obj]

    def broadcast_object(self, obj: Any) -> Any:
        """Give every rank the object of rank 0."""
        return obj
