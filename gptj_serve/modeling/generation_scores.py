"""The logits and scores behind generated tokens, computed again in one pass over the finished text.

The engine returns the tokens alone. Logits are a function of the tokens before, so these are the ones that it chose
by, but for rounding. Shapes: `S` steps, `V` vocab_size.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptj_serve.engine.logit_editor import LogitEditor
from gptj_serve.engine.logit_edits import apply_edits
from gptj_serve.engine.ranking import rows_where
from gptj_serve.engine.warpers import Knobs, narrowed
from gptj_serve.modeling.generation_run import sampling_of
from gptj_serve.types import EngineRequest, Warpers

if TYPE_CHECKING:
    from gptj_serve.modeling.heads import GPTJForCausalLM


@torch.no_grad()
def step_logits(model: "GPTJForCausalLM", prompt: list[int], output: list[int]) -> Tensor:
    """[S, V] in fp32, of an output that may have been padded: after a text's end, those of the padding."""
    input_ids = torch.tensor([[*prompt, *output[:-1]]], device=model.device)
    outputs = model(input_ids, use_cache=False, return_dict=True, logits_to_keep=len(output))
    logits: Tensor = outputs.logits[0].float()
    return logits


def step_scores(
    model: "GPTJForCausalLM",
    request: EngineRequest,
    output: list[int],
    eos_token_ids: frozenset[int],
    logits: Tensor,
) -> Tensor:
    """What guidance, processors and warpers make of `logits` [S, V]; -inf for tokens that they rule out."""
    sampling, prompt = sampling_of(request), request.prompt_token_ids
    scores = logits.clone()
    if sampling.guidance_scale != 1:
        base = step_logits(model, sampling.negative_prompt_token_ids or prompt[-1:], output).log_softmax(dim=-1)
        scores = sampling.guidance_scale * (scores.log_softmax(dim=-1) - base) + base
    editor = LogitEditor(sampling, prompt, eos_token_ids)
    entries = []
    for step, token_id in enumerate(output):
        if (edits := editor.edits()) is not None:
            entries.append((step, edits))
        editor.push(token_id)
    apply_edits(scores, entries)
    return scores if sampling.warpers.temperature == 0 else _warped(scores, sampling.warpers)


def _warped(scores: Tensor, warpers: Warpers) -> Tensor:
    """Also where nothing is possible, as may be after the end of a text: there all stays as it is."""
    rows = rows_where(scores.amax(dim=-1) > -torch.inf)
    knobs = Knobs.of([warpers] * len(rows))
    warped = scores / warpers.temperature
    if knobs.narrows(scores.shape[1]).any():
        for part in narrowed(scores[rows], knobs):
            is_kept = torch.zeros(len(part.rows), scores.shape[1], dtype=torch.bool, device=scores.device)
            is_kept.scatter_(1, part.token_ids, part.x.isfinite())
            steps = [rows[row] for row in part.rows]
            warped[steps] = warped[steps].masked_fill(~is_kept, -torch.inf)
    return warped
