"""Keeps the sums of a certificate in the making: after an interruption the pass goes on from there.

What the sums are of, the data, is read from its beginning: its digest is that of the certificate.
Batches whose sums are kept are not computed again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from modeconn.connection.data_digest import DataDigest
from modeconn.connection.tally import Tally
from modeconn.errors import ModeconnError
from modeconn.resuming import Record


class UnfinishedSums:
    """The sums over the first batches of a pass.

    Args:
        file: keeps them; None to keep nothing.
        settings: the plain values that decide the sums, beside the data.
    """

    def __init__(self, file: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self._record = Record(file, "unfinished certificate", settings)
        self._rows, self._digest = 0, ""

    def restore(self, tally: Tally) -> None:
        """Adds what is kept to an empty tally.

        Raises:
            ModeconnError: the file is of another certificate, or damaged.
        """
        tensors, state = self._record.read()
        if not tensors:
            return
        try:
            tally.restore(tensors, state["tally"])
            self._rows, self._digest = int(state["rows"]), str(state["digest"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModeconnError(
                f"{self._record.file} is no unfinished certificate: remove it to begin anew "
                f"({error!r})"
            ) from error

    def cover(self, digest: DataDigest) -> bool:
        """Whether the sums of all rows so far are kept.

        Raises:
            ModeconnError: they are sums of other rows.
        """
        if digest.rows > self._rows:
            return False
        if digest.rows == self._rows and digest.finish() != self._digest:
            raise self._foreign()
        return True

    def keep(self, tally: Tally, digest: DataDigest, finished: bool = False) -> None:
        """Writes the sums, where the last time is long enough ago or the pass is finished.

        Raises:
            ModeconnError: the pass has finished with fewer rows than those whose sums are kept.
        """
        if finished and digest.rows < self._rows:
            raise self._foreign()
        if digest.rows > self._rows and (self._record.due or finished):
            tensors, state = tally.state()
            of_data = {"rows": digest.rows, "digest": digest.finish()}
            self._record.write(tensors, {**of_data, "tally": state})
            self._rows = digest.rows

    def _foreign(self) -> ModeconnError:
        return ModeconnError(
            f"{self._record.file} holds sums over other data: remove it to begin anew"
        )
