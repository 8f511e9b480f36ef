"""Results as tables: pandas frames and CSV files of their columns."""

from __future__ import annotations

import csv
import io
import os
from typing import TYPE_CHECKING

import numpy as np

from modeconn.errors import ModeconnError
from modeconn.files.writing import atomic_write

if TYPE_CHECKING:
    import pandas


class Columns:
    """A result whose `_columns` are those of a table, by name and of equal length."""

    def _columns(self) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def to_frame(self) -> pandas.DataFrame:
        """Return a pandas table: coordinates first, then a column for each metric.

        The coordinates are ``t`` (or ``t0``, ``t1``, …) of a path; ``layer`` and ``t`` of layers.

        Raises:
            ModeconnError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise ModeconnError(
                "to_frame() needs pandas, which is not installed: pip install pandas"
            ) from None
        return pandas.DataFrame(self._columns())

    def to_csv(self, file: str | os.PathLike[str]) -> None:
        """Write the table of `to_frame` as text, whole or not at all: a line of names, then rows.

        Numbers have all digits that they need to be read again exactly. `load` reads no CSV.

        Raises:
            ModeconnError: the file cannot be written.
        """
        columns = self._columns()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*(column.tolist() for column in columns.values())))
        atomic_write(file, lambda stream: stream.write(text.getvalue().encode()))
