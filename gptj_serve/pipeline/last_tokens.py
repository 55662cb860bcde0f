"""`LastTokens`: what the last microbatch chose, for rows of the next one that were made ahead of it."""

from collections.abc import Sequence

from gptj_serve.steps import Row, RowResult


class LastTokens:
    """A single stage's: only it both chooses tokens and reads them."""

    def __init__(self) -> None:
        self._token_ids: list[int | None] | None = None

    def keep(self, results: Sequence[RowResult | None]) -> None:
        """Those of a microbatch's rows, in their order."""
        self._token_ids = [result.tokens[0].token_id if result and result.tokens else None for result in results]

    def forget(self) -> None:
        """The next microbatch has no row that was made ahead."""
        self._token_ids = None

    def fill_in(self, rows: Sequence[Row]) -> list[int]:
        """The tokens of all rows, one after the other."""
        return [token_id for row in rows for token_id in self._of_row(row)]

    def _of_row(self, row: Row) -> list[int]:
        if row.fed_from is None:
            return row.token_ids
        assert self._token_ids is not None, f"a row is fed from row {row.fed_from}, but nothing was computed before"
        token_id = self._token_ids[row.fed_from]
        return row.token_ids if token_id is None else [token_id]  # of a row that failed any will do
