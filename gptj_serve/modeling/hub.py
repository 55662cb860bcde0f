"""Where a checkpoint or tokenizer lies: a directory, or a repository of the Hugging Face hub brought into its cache."""

from pathlib import Path

from gptj_serve.errors import CheckpointError

CHECKPOINT_FILES = ["config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json"]
TOKENIZER_FILES = ["tokenizer*.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"]


def checkpoint_directory(
    name: str | Path,
    revision: str | None = None,
    *,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    files: list[str] = CHECKPOINT_FILES,
) -> Path:
    """The directory `name`, or else a local snapshot of the repository `name` ("owner/model").

    Raises `CheckpointError` if there is no such directory, or if the repository can't be had.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory
    if isinstance(name, Path) or not _may_be_repository(name):
        raise CheckpointError(f"{name}: no such directory")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{name}: no such directory; to fetch it from the Hugging Face hub, install huggingface_hub"
        ) from None
    try:
        snapshot = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=files,
        )
    except Exception as error:  # of the hub, of httpx, of the disk: they have no common base
        raise CheckpointError(
            f"{name}: no such directory, and it can't be had from the Hugging Face hub "
            f"(revision {revision or 'main'}): {error}"
        ) from error
    return Path(snapshot)


def _may_be_repository(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and "\\" not in name and name != ""
