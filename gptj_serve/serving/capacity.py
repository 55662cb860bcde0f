"""`num_that_fit`: how many more placement groups of one shape a cluster has room for."""

from collections.abc import Mapping, Sequence

Resources = Mapping[str, float]

_TOLERANCE = 1e-6  # Ray counts in steps of 1e-4


def num_that_fit(bundles: Sequence[Resources], strategy: str, nodes: Sequence[Resources], at_most: int) -> int:
    """By first fit, the largest bundle first; `nodes` are what each node has free. Where it errs, it is too low."""
    free = [dict(node) for node in nodes]
    ordered = sorted(bundles, key=lambda bundle: sorted(bundle.items()), reverse=True)
    for num_placed in range(at_most):
        left = _placed(ordered, strategy, free)
        if left is None:
            return num_placed
        free = left
    return at_most


def surge_percent(num_fitting: int, num_replicas: int, num_running: int) -> int:
    """Serve's `max_surge_percent`, such that no more than `num_fitting` replicas are started beside the old ones.

    Serve counts those that it starts since `num_replicas` has grown on top.
    """
    surge = min(max(0, num_fitting - max(0, num_replicas - num_running)), num_replicas)
    return 100 * surge // num_replicas or min(surge, 1)  # Serve rounds up to whole replicas


def _placed(bundles: Sequence[Resources], strategy: str, free: list[dict[str, float]]) -> list[dict[str, float]] | None:
    """What is left free after one group, or None if it does not fit."""
    if strategy == "STRICT_PACK":
        bundles = [_sum(bundles)]
    free = [dict(node) for node in free]
    used: set[int] = set()
    for bundle in bundles:
        for index, node in enumerate(free):
            if strategy == "STRICT_SPREAD" and index in used:
                continue
            if all(node.get(resource, 0.0) + _TOLERANCE >= amount for resource, amount in bundle.items()):
                for resource, amount in bundle.items():
                    node[resource] = node.get(resource, 0.0) - amount
                used.add(index)
                break
        else:
            return None
    return free


def _sum(bundles: Sequence[Resources]) -> Resources:
    return {
        resource: sum(bundle.get(resource, 0.0) for bundle in bundles)
        for resource in {resource for bundle in bundles for resource in bundle}
    }
