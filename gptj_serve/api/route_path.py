"""The path of a request as routes know it."""

from starlette.types import Scope


def route_path(scope: Scope) -> str:
    """Below the prefix that the application is mounted at (`root_path`): servers leave that in the path, or not."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    below = path.removeprefix(root)
    return below if below[:1] in ("", "/") else path
