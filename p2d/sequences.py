"""Sequences whose items are made when they are looked at, so that none of a million is held."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TypeVar, overload

Item = TypeVar("Item", covariant=True)


class MadeSequence(Sequence[Item]):
    """A sequence by its length and the item at a place; slices are lists of items."""

    @abstractmethod
    def at(self, place: int) -> Item:
        """The item at a place, 0 <= place < length."""

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        places = range(len(self))[index]
        return self.at(places) if isinstance(places, int) else [self.at(place) for place in places]

    def __iter__(self) -> Iterator[Item]:
        return (self.at(place) for place in range(len(self)))
