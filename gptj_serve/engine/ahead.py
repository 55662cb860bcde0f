"""Scheduling ahead: rows of a microbatch whose tokens the one before it is still choosing.

With a single stage nothing would be computed while the engine takes a step's results and makes the next microbatch. So
that is made while the step runs, with a row for each sequence that will go on: the row says which row of the step its
token comes from, and the stage, which has just chosen it, puts it in. At most two microbatches are in flight, so what
a row is fed with is always the token that its sequence gets next: the results of all steps before are here.

Only jobs take part that know how a token is chosen whatever the one before it is (`Job.spec_ahead`). As soon as another
one decodes, steps are made one by one, as without all this: made ahead, a microbatch would have to leave it out, and
it would get half as many tokens.

What may happen to a sequence while a row of its own is in flight that was made ahead:

- It ends, by a token, a stop string, an abort or a failure. Then the row was for nothing; its result is dropped, since
  its request is gone. By length no sequence ends so: that is known before.
- It gives up its blocks, then or because others need them. The row still writes to one, the block of its position.
  Whoever gets that block is scheduled later, and the stage runs microbatches in order, copies of blocks included: so
  the new owner's writes come after, and of a block that is not published its owner reads only what it has written.
- It is preempted. The row was fed and computed before that took effect, so its token is the right one, and counts.

Blocks are published only when all their tokens are known (`Sequence.publish`), so nobody finds one under a key of
tokens that did not come, and no row made ahead writes to a published block.
"""

from gptj_serve.engine.step import Entry, Feed, Step
from gptj_serve.steps import PLACEHOLDER_TOKEN_ID, Row


def feeds_of(last: Step) -> dict[Entry, Feed] | None:
    """The tokens of the step in flight that rows of the next one can be fed with.

    None if somebody waits for a token of it who can't be fed.
    """
    feeds: dict[Entry, Feed] = {}
    for entry, index in last.sampling.items():
        job = entry.job
        if not entry.is_running or any(sequence.num_uncomputed for sequence in job.sequences):
            continue  # it has ended, or lost its KV; or its next token is known
        if job.work_left.new <= len(job.sequences):
            continue  # this is its last step
        spec = job.spec_ahead
        if spec is None:
            return None
        feeds[entry] = Feed(index, spec)
    return feeds


def is_fed(entry: Entry, step: Step) -> bool:
    """Its next row is to be made ahead. After a preemption it is not: then all its tokens are to be computed again."""
    return entry in step.feeding and not entry.job.sequences[0].num_uncomputed


def fed_row(entry: Entry, step: Step) -> Row:
    """For the token after those that are known; its block table has a block for it."""
    (sequence,) = entry.job.sequences
    feed = step.feeding[entry]
    assert sequence.num_computed == len(sequence.token_ids)
    return Row(
        token_ids=[PLACEHOLDER_TOKEN_ID],
        start=sequence.num_computed,
        block_table=sequence.block_table.copy(),
        samples=[feed.spec],
        fed_from=feed.row_index,
    )
