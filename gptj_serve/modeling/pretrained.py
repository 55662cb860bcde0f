"""`GPTJPreTrainedModel`: what the model classes have in common: config, initial weights, loading and saving."""

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from gptj_serve.model.config import GPTJConfig
from gptj_serve.modeling.loading import fill_parameters, resolve_device, resolve_dtype
from gptj_serve.modeling.outputs import BaseModelOutputWithPast
from gptj_serve.modeling.saving import DEFAULT_SHARD_SIZE, save_checkpoint


class GPTJPreTrainedModel(nn.Module):
    """Base of the model classes. Parameters are named as in transformers: the backbone's under `transformer.`."""

    head: str | None = None  # the attribute that holds the head
    base_model_prefix = "transformer"

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: GPTJConfig | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        dtype: str | torch.dtype = "auto",
        torch_dtype: str | torch.dtype | None = None,
        device_map: str | int | torch.device | dict[str, Any] | None = None,
        ignore_mismatched_sizes: bool = False,
        low_cpu_mem_usage: bool = True,
        use_safetensors: bool = True,
        **config_values: Any,
    ) -> Self:
        """Load a directory, or a repository of the Hugging Face hub, with safetensors of this or any other head.

        `dtype` (`torch_dtype`, as it was called) "auto" is that of the config, else of the weights. `device_map` is one
        device; "auto" takes a GPU if there is one. Other arguments change the config (`num_labels=3`). A head that the
        checkpoint lacks is initialized and named in a warning; with `ignore_mismatched_sizes`, so is one of another
        size. Raises `CheckpointError` or `ConfigError`. The model comes in eval mode. Little memory is used anyway, so
        `low_cpu_mem_usage` has no effect, and as nothing but safetensors is read, `use_safetensors` must be true.
        """
        if not use_safetensors:
            raise ValueError("use_safetensors=False: only safetensors are read; `gptj-serve convert` makes them")
        from gptj_serve.modeling.hub import checkpoint_directory

        directory = checkpoint_directory(
            pretrained_model_name_or_path, revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
        )
        chosen_dtype = dtype if torch_dtype is None else torch_dtype
        return cls._from_directory(directory, config, chosen_dtype, device_map, ignore_mismatched_sizes, config_values)

    @classmethod
    def _from_directory(
        cls,
        directory: Path,
        config: GPTJConfig | None,
        dtype: str | torch.dtype,
        device_map: str | int | torch.device | dict[str, Any] | None,
        ignore_mismatched_sizes: bool,
        config_values: dict[str, Any],
    ) -> Self:
        from gptj_serve.model.checkpoint import Checkpoint

        device = resolve_device(device_map)
        checkpoint = Checkpoint.open(directory)
        config = (config or checkpoint.config).changed(**config_values)
        with torch.device("meta"):
            model = cls(config)
        fill_parameters(model, checkpoint, resolve_dtype(dtype, checkpoint), device, ignore_mismatched_sizes)
        model.load_generation_config(directory)
        return model.eval()

    def save_pretrained(self, save_directory: str | Path, *, max_shard_size: int | str = DEFAULT_SHARD_SIZE) -> None:
        """Write configs and safetensors that transformers and the service load; files of at most `max_shard_size`.

        All is written aside first, so a full disk leaves the directory as it was.
        """
        save_checkpoint(self, Path(save_directory), max_shard_size)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def base_model(self) -> nn.Module:
        """The bare model, which is this one itself if it has no head."""
        backbone: nn.Module = getattr(self, self.base_model_prefix, self)
        return backbone

    def get_input_embeddings(self) -> nn.Embedding:
        embeddings = self.base_model.wte
        assert isinstance(embeddings, nn.Embedding)
        return embeddings

    def num_parameters(self, only_trainable: bool = False) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    @torch.no_grad()
    def init_weights(self, module: nn.Module) -> None:
        """Weights from N(0, initializer_range), biases 0, LayerNorms the identity, as in transformers."""
        std = self.config.initializer_range or 0.02
        for part in module.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                part.weight.normal_(0.0, std)
            if isinstance(part, nn.Linear) and part.bias is not None:
                part.bias.zero_()

    def tie_weights(self) -> None:
        """Models without tied weights have nothing to do."""

    def load_generation_config(self, directory: Path) -> None:
        """Models that don't generate have none."""

    def run_backbone(self, **inputs: Tensor | Any) -> BaseModelOutputWithPast:
        outputs = self.base_model(**inputs, return_dict=True)
        assert isinstance(outputs, BaseModelOutputWithPast)
        return outputs

    def wants_dict(self, return_dict: bool | None) -> bool:
        return self.config.return_dict if return_dict is None else return_dict
