"""`estimate`: a cost model from what is known of a device and a model, without running anything."""

from gptj_serve.errors import ConfigError
from gptj_serve.pipeline.partition import head_cost
from gptj_serve.planner import Model, Resources, plan
from gptj_serve.simulation.cost_model import CostModel, ModelShape

LAUNCH_S = 1e-3
"""Of a stage's step: what a device waits for this host. A guess, as all here."""

HANDOFF_S = 2e-4
ENGINE_STEP_S = 3e-4
ENGINE_ROW_S = 1e-5
LINK_BYTES_S = 1e9
"""Hidden states go through the hosts, over a network of 10 Gbit/s."""


def estimate(model: Model, name: str, dtype: str, bandwidth_bytes_s: float, operations_s: float) -> CostModel:
    """A roofline: a layer's weights are read once a microbatch, KV once a row; two operations are done for each weight
    and token, and four for each pair of tokens and each of the hidden state's numbers. Both rates are what is reached,
    not what a data sheet has: some 70 % and 50 % of that."""
    if bandwidth_bytes_s <= 0 or operations_s <= 0:
        raise ConfigError("bandwidth and operations per second must be above 0")
    config = model.config
    stages = plan(model, Resources(num_stages=1, dtype=dtype)).stages
    kv_bytes = stages[0].kv_bytes_per_token / config.n_layer
    width = stages[0].kv_bytes_per_token // (2 * config.n_layer * config.n_embd)
    layer_weights = 4 * config.n_embd**2 + 2 * config.n_embd * config.inner_dim
    head_weights = config.vocab_size * config.n_embd
    weights_s = layer_weights * width / bandwidth_bytes_s
    token_s = 2 * layer_weights / operations_s
    return CostModel(
        source="estimated",
        model=ModelShape(
            name=name,
            num_layers=config.n_layer,
            max_sequence_tokens=config.n_positions,
            head_layers=head_cost(config),
        ),
        stage_s=LAUNCH_S,
        weights_s=weights_s,
        token_s=token_s,
        free_tokens=weights_s / token_s,
        context_s=kv_bytes / bandwidth_bytes_s,
        pair_s=4 * config.n_embd / operations_s,
        head_s=head_weights * width / bandwidth_bytes_s,
        sample_s=2 * head_weights / operations_s,
        handoff_s=HANDOFF_S,
        handoff_token_s=config.n_embd * width / LINK_BYTES_S,
        engine_step_s=ENGINE_STEP_S,
        engine_row_s=ENGINE_ROW_S,
        notes={"dtype": dtype, "bandwidth_bytes_s": bandwidth_bytes_s, "operations_s": operations_s},
    )
