"""`check_wait`: who would wait too long is refused; the rule of everyone who knows how long a queue is."""

from gptj_serve.errors import OverloadedError


def check_wait(wait_s: float, max_wait_s: float | None, time_left_s: float | None) -> None:
    """Raises `OverloadedError` if `wait_s` is longer than the service lets anybody wait, or than the request can.

    Seconds; None stands for no limit.
    """
    for limit_s, words in (
        (max_wait_s, "the service's limit of {:g} s"),
        (time_left_s, "the time of {:.3g} s that it has"),
    ):
        if limit_s is not None and wait_s > limit_s:
            message = f"the request would wait for about {wait_s:.0f} s, longer than {words.format(limit_s)}"
            raise OverloadedError(message, wait_s - limit_s)
