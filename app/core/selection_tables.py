"""Tables of selections, read from the store once and kept for the next request: a selection never changes."""

from __future__ import annotations

import threading
from collections import OrderedDict

from app.blobs import BlobStore
from app.db.selections import SelectionRecord
from p2d.selection_table import SelectionTable, read_table

KEPT_ROWS = 2_000_000
"""Rows of all tables that are kept: some 105 MB. The newest is kept whatever its size."""


class SelectionTables:
    """The tables that were asked for last."""

    def __init__(self) -> None:
        self._tables: OrderedDict[str, SelectionTable] = OrderedDict()
        self._reading = threading.Lock()

    def get(self, blobs: BlobStore, selection: SelectionRecord) -> SelectionTable:
        """The table of a selection. Raises BlobMissing, BlobCorrupt, StoreUnavailable."""
        with self._reading:  # one at a time: who waits for the same one then finds it
            table = self._tables.get(selection.sha256)
            if table is None:
                table = read_table(line for _, line in blobs.lines(selection.sha256, selection.size_bytes))
                self._tables[selection.sha256] = table
            self._tables.move_to_end(selection.sha256)
            while len(self._tables) > 1 and sum(one.rows for one in self._tables.values()) > KEPT_ROWS:
                self._tables.popitem(last=False)
        return table
