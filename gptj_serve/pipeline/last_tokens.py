"""`LastTokens`: what the last microbatch chose, for rows of the next one that were made ahead of it."""

from collections.abc import Sequence

from gptj_serve.steps import Row, RowResult


class LastTokens:
    """A single stage's: only it both chooses tokens and reads them."""

    def __init__(self) -> None:
        self._results: Sequence[RowResult | None] | None = None

    def keep(self, results: Sequence[RowResult | None]) -> None:
        """Those of a microbatch's rows, in their order."""
        self._results = results

    def forget(self) -> None:
        """The next microbatch has no row that was made ahead."""
        self._results = None

    def fill_in(self, rows: Sequence[Row]) -> list[int]:
        """The tokens of all rows, one after the other."""
        return [token_id for row in rows for token_id in self._token_ids(row)]

    def _token_ids(self, row: Row) -> list[int]:
        if row.fed_from is None:
            return row.token_ids
        assert self._results is not None, f"a row is fed from row {row.fed_from}, but nothing was computed before"
        result = self._results[row.fed_from]
        assert result is not None, f"a row is fed from row {row.fed_from}, which had nothing to choose"
        if result.failure is not None:
            return row.token_ids  # any will do
        return [result.tokens[0].token_id]
