"""What is trained when: phases of mixed batches and a learning rate, both functions of the progress 0 … 1."""

from dataclasses import dataclass

from gptj_serve.model.config import GPTJConfig
from training.tokenizer import VOCAB_SIZE


@dataclass(frozen=True, slots=True)
class Phase:
    """One optimiser step: `lm` and `qa` are shapes (rows, tokens) of a batch each, summed into one gradient."""

    until: float
    lm: tuple[tuple[int, int], ...]
    qa: tuple[tuple[int, int], ...]
    squad_share: float  # of the questions; the rest are cloze questions
    intent_tokens: int
    lm_weight: float
    intent_weight: float


@dataclass(frozen=True, slots=True)
class Plan:
    phases: tuple[Phase, ...] = (
        Phase(0.50, ((8, 512),), ((16, 192),), 0.1, 512, lm_weight=1.0, intent_weight=0.3),
        Phase(0.84, ((4, 512),), ((12, 256),), 0.75, 1024, lm_weight=0.7, intent_weight=1.0),
        Phase(1.00, ((4, 1024),), ((8, 384),), 0.75, 512, lm_weight=1.0, intent_weight=1.0),
    )
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    weight_decay: float = 0.02
    warm_up_steps: int = 40
    decay_from: float = 0.4
    decay_power: float = 1.5
    embedding_dropout: float = 0.1  # of intent batches
    score_dropout: float = 0.3

    def phase(self, progress: float) -> Phase:
        return next(phase for phase in self.phases if progress < phase.until)

    def lr_factor(self, step: int, progress: float) -> float:
        """Linear warm-up, level, then a power of the remaining share, down to zero."""
        remaining = (1 - progress) / (1 - self.decay_from)
        decay: float = remaining**self.decay_power
        return min(1.0, (step + 1) / self.warm_up_steps, decay)


def demo_config(labels: tuple[str, ...]) -> GPTJConfig:
    return GPTJConfig(
        vocab_size=VOCAB_SIZE,
        n_positions=1024,
        n_embd=256,
        n_layer=6,
        n_head=8,
        rotary_dim=16,
        bos_token_id=VOCAB_SIZE - 1,
        eos_token_id=VOCAB_SIZE - 1,
        id2label=dict(enumerate(labels)),
    )
