"""The models with a head: language modelling, sequence classification, extractive question answering.

Heads, losses and pooling equal those of transformers' classes of the same names. Shapes: `B` rows, `T` tokens, `D`
n_embd, `V` vocab_size.
"""

import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptj_serve.errors import InvalidOptionError
from gptj_serve.model.config import GPTJConfig
from gptj_serve.modeling.attention import Cache
from gptj_serve.modeling.backbone import GPTJModel
from gptj_serve.modeling.former_name import takes_former_name
from gptj_serve.modeling.generation import generate
from gptj_serve.modeling.generation_config import GENERATION_CONFIG_FILE, GenerationConfig
from gptj_serve.modeling.generation_inputs import GenerationInputs
from gptj_serve.modeling.generation_outputs import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from gptj_serve.modeling.generation_params import chosen_options
from gptj_serve.modeling.generation_run import Streamer
from gptj_serve.modeling.outputs import (
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
)
from gptj_serve.modeling.pretrained import GPTJPreTrainedModel
from gptj_serve.modeling.stop_strings import Decoder

logger = logging.getLogger(__name__)


class GPTJForCausalLM(GPTJPreTrainedModel):
    """The model with its language modelling head (with a bias; tied to the embedding if the config says so)."""

    head = "lm_head"

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__(config)
        self.transformer = GPTJModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)
        self.generation_config = GenerationConfig.for_model(config)
        self.init_weights(self.lm_head)
        self.tie_weights()

    @takes_former_name
    def forward(
        self,
        input_ids: Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,  # [B, T], not shifted; -100 is ignored
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,  # the last so many positions (0: all), or indices [N] or [B, N], or a mask
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Next-token logits; with `labels`, the cross-entropy of each token's successor."""
        outputs = self.run_backbone(
            input_ids=input_ids,
            cache=cache,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        logits: Tensor = self.lm_head(_kept(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            successors = F.pad(labels, (0, 1), value=-100)[..., 1:].to(logits.device)
            loss = F.cross_entropy(logits.float().view(-1, self.config.vocab_size), successors.reshape(-1))
        output = CausalLMOutputWithPast(loss, logits, outputs.cache, outputs.hidden_states, outputs.attentions)
        return output if self.wants_dict(return_dict) else output.to_tuple()

    def generate(
        self,
        inputs: Tensor | None = None,  # the same as input_ids
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: Tensor | None = None,  # [B, T]; default: one row with the bos token
        attention_mask: Tensor | None = None,  # [B, T]; default: what is not padding, if that can be told
        negative_prompt_ids: Tensor | None = None,  # [B, N], for guidance_scale; default: each prompt's last token
        negative_prompt_attention_mask: Tensor | None = None,  # [B, N]
        tokenizer: Decoder | None = None,  # needed for stop_strings
        streamer: Streamer | None = None,
        **options: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput:
        """Prompts and what continues them, [B * num_return_sequences, T + new], padded on the right.

        `options` are those of `GenerationConfig`; they mean what they do in transformers, and greedy and beam search
        give the same tokens. Sampling draws with noise of its own, which `seed` fixes. Tokens hidden by the mask are
        no part of a prompt, on whichever side they are: each row comes out as if it were alone and without padding,
        so after right padding it goes on from its last real token. With `return_dict_in_generate` the sequences are
        in an output with `scores`, `logits` or, of beams, `sequences_scores`.

        Raises `InvalidOptionError`, a ValueError, for what can't be followed, and `RequestFailedError` where nothing
        can be generated. Dropout is off, whatever the mode.
        """
        if inputs is not None and input_ids is not None:
            raise InvalidOptionError("inputs", list(inputs.shape), "is another name of input_ids: pass one of them")
        tensors = GenerationInputs(
            inputs if input_ids is None else input_ids,
            attention_mask,
            negative_prompt_ids,
            negative_prompt_attention_mask,
        )
        chosen = chosen_options(self.generation_config, generation_config, options)
        return generate(self, tensors, chosen, tokenizer, streamer)

    def load_generation_config(self, directory: Path) -> None:
        """The checkpoint's, if it has one, counts alone, as in transformers."""
        if (path := directory / GENERATION_CONFIG_FILE).is_file():
            self.generation_config = GenerationConfig.from_file(path)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def tie_weights(self) -> None:
        """Make the head's weight the embedding's, if the config ties them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight


class GPTJForSequenceClassification(GPTJPreTrainedModel):
    """The model with a linear classifier, without bias, on the last token that is not padding."""

    head = "score"

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = GPTJModel(config)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        self.init_weights(self.score)
        self._warned_of_embeds = False

    @takes_former_name
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,  # [B]; [B, num_labels] for multi-label and for regression with several outputs
        use_cache: bool | None = None,
        token_type_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Logits [B, num_labels]; with `labels`, the loss of `config.problem_type`, which the first labels decide."""
        outputs = self.run_backbone(
            input_ids=input_ids,
            cache=cache,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        hidden = outputs.last_hidden_state
        assert hidden is not None
        rows = torch.arange(len(hidden), device=hidden.device)
        logits: Tensor = self.score(hidden[rows, self._last_tokens(input_ids, hidden)])
        loss = None if labels is None else self._loss(logits, labels.to(logits.device))
        output = SequenceClassifierOutputWithPast(
            loss, logits, outputs.cache, outputs.hidden_states, outputs.attentions
        )
        return output if self.wants_dict(return_dict) else output.to_tuple()

    def _last_tokens(self, input_ids: Tensor | None, hidden: Tensor) -> Tensor | int:
        """Each row's rightmost token that is not `pad_token_id`, by id and not by mask: left padding works too."""
        pad_token_id = self.config.pad_token_id
        if pad_token_id is None and len(hidden) != 1:
            raise ValueError("Cannot handle batch sizes > 1 if no padding token is defined.")
        if pad_token_id is None:
            return -1
        if input_ids is None:
            if not self._warned_of_embeds:
                logger.warning("no padding can be seen in inputs_embeds: each row's last token is classified")
                self._warned_of_embeds = True
            return -1
        places = torch.arange(input_ids.shape[-1], device=hidden.device)
        return ((input_ids != pad_token_id).to(hidden.device) * places).argmax(-1)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.config.problem_type is None:
            if self.num_labels == 1:
                self.config.problem_type = "regression"
            elif labels.dtype in (torch.long, torch.int):
                self.config.problem_type = "single_label_classification"
            else:
                self.config.problem_type = "multi_label_classification"
        if self.config.problem_type == "regression":
            return (
                F.mse_loss(logits.squeeze(), labels.squeeze()) if self.num_labels == 1 else F.mse_loss(logits, labels)
            )
        if self.config.problem_type == "single_label_classification":
            return F.cross_entropy(logits.view(-1, self.num_labels), labels.view(-1))
        return F.binary_cross_entropy_with_logits(logits, labels)


class GPTJForQuestionAnswering(GPTJPreTrainedModel):
    """The model with two linear outputs per token: how well the answer starts and ends there."""

    head = "qa_outputs"

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__(config)
        if config.num_labels != 2:
            raise ValueError(
                f"num_labels={config.num_labels}: question answering has two outputs, start and end; pass num_labels=2"
            )
        self.num_labels = config.num_labels
        self.transformer = GPTJModel(config)
        self.qa_outputs = nn.Linear(config.n_embd, 2)
        self.init_weights(self.qa_outputs)

    @takes_former_name
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,  # [B]; outside the sequence they are ignored
        end_positions: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """Start and end logits [B, T]; with both positions, the mean of the two cross-entropies."""
        outputs = self.run_backbone(
            input_ids=input_ids,
            cache=cache,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        start, end = (logits.contiguous() for logits in self.qa_outputs(outputs.last_hidden_state).unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (_span_loss(start, start_positions) + _span_loss(end, end_positions)) / 2
        output = QuestionAnsweringModelOutput(loss, start, end, outputs.hidden_states, outputs.attentions)
        return output if self.wants_dict(return_dict) else output.to_tuple()


def _span_loss(logits: Tensor, positions: Tensor) -> Tensor:
    num_tokens = logits.shape[1]
    positions = positions.to(logits.device).view(-1).clamp(0, num_tokens)
    return F.cross_entropy(logits, positions, ignore_index=num_tokens)


def _kept(hidden: Tensor | None, keep: int | Tensor) -> Tensor:
    """The positions that get logits, as transformers' `slice_logits_to_keep`: [B, N, D], or [N, D] by a 2-D mask."""
    assert hidden is not None
    if isinstance(keep, int):
        return hidden[:, -keep:] if keep else hidden
    if keep.dim() == 2:
        return hidden[keep] if keep.dtype == torch.bool else hidden.take_along_dim(keep[..., None], dim=1)
    return hidden[:, keep]
