"""`surges`: how many new replicas a cluster has room for beside those that they replace."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

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


class Group(NamedTuple):
    """The replicas of one deployment, of one shape."""

    bundles: Sequence[Resources]
    num_replicas: int  # that are to run
    num_running: int

    @property
    def num_added(self) -> int:
        """Serve starts those that are new in number beside its surge."""
        return max(0, self.num_replicas - self.num_running)

    def num_surging(self, num_fitting: int) -> int:
        return min(max(0, num_fitting - self.num_added), self.num_replicas)


def surges(ingresses: Group, pipelines: Group, strategy: str, nodes: Sequence[Resources]) -> tuple[int, int]:
    """How many ingresses and how many pipelines may start beside the old ones, such that all have room together.

    New ingresses may wait for a new pipeline, and keep their room meanwhile: if one pipeline can be placed beside one
    ingress, then so it can beside as many as are said here. An ingress may land on any node that has all it needs, so
    its share is taken from each of them. `strategy` is that of the pipelines.
    """

    def num_pipelines(num_ingresses: int) -> int:
        taken = _sum(ingresses.bundles)
        num_taken = ingresses.num_added + num_ingresses
        free = [
            {resource: amount - num_taken * taken.get(resource, 0.0) for resource, amount in node.items()}
            if all(node.get(resource, 0.0) > 0 for resource, amount in taken.items() if amount > 0)
            else node
            for node in nodes
        ]
        at_most = pipelines.num_added + pipelines.num_replicas
        return pipelines.num_surging(num_that_fit(pipelines.bundles, strategy, free, at_most))

    at_most = ingresses.num_added + ingresses.num_replicas
    most = ingresses.num_surging(num_that_fit(ingresses.bundles, "PACK", nodes, at_most))
    for num in range(most, 0, -1):
        if (beside := num_pipelines(num)) > 0:
            return num, beside
    return most, num_pipelines(most)


def surge_percent(num_surging: int, num_replicas: int) -> int:
    """Serve's `max_surge_percent`, which it rounds up to whole replicas."""
    return 100 * num_surging // num_replicas or min(num_surging, 1)


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
