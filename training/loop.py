"""The training loop: mixed batches in; a log and checkpoints, from which a restart goes on, in the run directory."""

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from gptj_serve.model.config import GPTJConfig
from training.batches import Batch, BatchMaker, IntentBatch, LanguageBatch
from training.evaluate import measure_answers, measure_intents, measure_perplexity
from training.muon import Muon
from training.network import DemoModel
from training.plan import Phase, Plan, demo_config
from training.sources import read_intents, read_questions, read_texts
from training.tokenizer import train_tokenizer

CHECKPOINT = "checkpoint.pt"
TOKENIZER = "tokenizer.json"
COMPILED_SHAPES = 24


@dataclass(frozen=True, slots=True)
class Settings:
    data: Path
    run: Path
    num_steps: int
    max_seconds: float  # of training, all resumed runs together
    seed: int
    device: torch.device
    compile: bool
    checkpoint_every: int
    evaluate_every: int


@dataclass(slots=True)
class State:
    """What a checkpoint holds besides weights and optimisers."""

    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Training:
    settings: Settings
    model: DemoModel
    optimisers: list[torch.optim.Optimizer]
    plan: Plan = field(default_factory=Plan)
    state: State = field(default_factory=State)

    def run(self, batches: BatchMaker) -> None:
        settings, state = self.settings, self.state
        bar = tqdm(total=settings.num_steps, initial=state.step, dynamic_ncols=True)
        while (progress := self.progress()) < 1:
            began = time.monotonic()
            phase = self.plan.phase(progress)
            factor = self.plan.lr_factor(state.step, progress)
            step_batches = batches.step_batches(state.step, phase)
            losses = self.train_step(step_batches, phase, factor)
            num_tokens = sum(batch.ids.numel() for batch in step_batches)
            seconds = time.monotonic() - began
            state.step += 1
            state.num_tokens += num_tokens
            state.seconds += seconds
            bar.set_postfix(losses, lr=f"{factor * self.plan.muon_lr:.4f}", tok_s=round(num_tokens / seconds))
            bar.update()
            is_last = self.progress() >= 1
            if state.step % settings.checkpoint_every == 0 or is_last:
                save_checkpoint(self)
            if state.step % settings.evaluate_every == 0 or is_last:
                with torch.compiler.set_stance("force_eager"):  # many shapes, each of them rare
                    figures = quick_figures(self.model, batches.tokenizer, settings)
                self.log({**asdict(state), **losses, **figures})

    def progress(self) -> float:
        """0 … 1 through the schedule: by steps or by time, whichever is further."""
        return max(self.state.step / self.settings.num_steps, self.state.seconds / self.settings.max_seconds)

    def train_step(self, batches: list[Batch], phase: Phase, factor: float) -> dict[str, float]:
        """One update from the sum of the batches' gradients; returns each task's loss."""
        losses: dict[str, float] = {}
        weights = {"lm": phase.lm_weight, "qa": 1.0, "intent": phase.intent_weight}
        num_batches = {"lm": len(phase.lm) + len(phase.qa), "qa": len(phase.qa), "intent": 1}
        for batch in batches:
            means = {task: loss / num_batches[task] for task, loss in self.losses(batch).items()}
            torch.stack([weights[task] * mean for task, mean in means.items()]).sum().backward()  # type: ignore[no-untyped-call]
            for task, mean in means.items():
                losses[task] = losses.get(task, 0.0) + mean.item()
        torch.nn.utils.clip_grad_norm_(self.optimisers[1].param_groups[0]["params"], 1.0)
        for optimiser, peak in zip(self.optimisers, (self.plan.muon_lr, self.plan.adam_lr), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = peak * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return {task: round(loss, 3) for task, loss in losses.items()}

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        model, device = self.model, self.settings.device
        ids = batch.ids.to(device)
        if isinstance(batch, LanguageBatch):
            return {"lm": model.language_loss(model.transformer(ids), batch.targets.to(device))}
        if isinstance(batch, IntentBatch):
            hidden = model.transformer(ids, self.plan.embedding_dropout)
            logits = model.intent_logits(hidden, batch.last.to(device), self.plan.score_dropout)
            return {"intent": F.cross_entropy(logits, batch.labels.to(device))}
        hidden = model.transformer(ids)
        start, end = model.span_logits(hidden, batch.is_context.to(device))
        span_loss = (F.cross_entropy(start, batch.start.to(device)) + F.cross_entropy(end, batch.end.to(device))) / 2
        return {"lm": model.language_loss(hidden, batch.targets.to(device)), "qa": span_loss}

    def log(self, figures: dict[str, float]) -> None:
        line = json.dumps(figures)
        tqdm.write(line)
        with (self.settings.run / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(line + "\n")


def start_or_resume(settings: Settings) -> tuple[Training, BatchMaker]:
    settings.run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    tokenizer_file = settings.run / TOKENIZER
    if not tokenizer_file.exists():
        train_tokenizer(settings.data).save(str(tokenizer_file), pretty=False)
    batches = BatchMaker(settings.data, Tokenizer.from_file(str(tokenizer_file)), settings.seed)
    model = DemoModel(demo_config(read_intents(settings.data).labels)).to(settings.device)
    training = Training(settings, model, make_optimisers(model, Plan()))
    load_checkpoint(training)
    if settings.compile:
        torch._dynamo.config.recompile_limit = COMPILED_SHAPES
        for block in model.transformer.h:
            block.compile(dynamic=False)
    return training, batches


def make_optimisers(model: DemoModel, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, heads, norms and biases."""
    matrices: list[Tensor] = [param for param in model.transformer.h.parameters() if param.ndim == 2]
    chosen = {id(param) for param in matrices}
    others = [param for param in model.parameters() if id(param) not in chosen]
    return [
        Muon(matrices, lr=plan.muon_lr, weight_decay=plan.weight_decay),
        torch.optim.AdamW(others, lr=plan.adam_lr, betas=(0.9, 0.95), weight_decay=plan.weight_decay),
    ]


def save_checkpoint(training: Training) -> None:
    """Written beside and moved into place: a run that is stopped half-way keeps its last checkpoint."""
    path = training.settings.run / CHECKPOINT
    unfinished = path.with_suffix(".tmp")
    torch.save(
        {
            "config": training.model.config.model_dump(),
            "model": training.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in training.optimisers],
            "state": asdict(training.state),
            "torch_rng": torch.get_rng_state(),
        },
        unfinished,
    )
    os.replace(unfinished, path)


def load_checkpoint(training: Training) -> None:
    path = training.settings.run / CHECKPOINT
    if not path.exists():
        return
    saved = torch.load(path, map_location=training.settings.device, weights_only=True)
    training.model.load_state_dict(saved["model"])
    for optimiser, state in zip(training.optimisers, saved["optimisers"], strict=True):
        optimiser.load_state_dict(state)
    training.state = State(**saved["state"])
    torch.set_rng_state(saved["torch_rng"].cpu())


def load_trained(run: Path) -> tuple[DemoModel, Tokenizer]:
    """The model of a run's last checkpoint, for export."""
    saved = torch.load(run / CHECKPOINT, map_location="cpu", weights_only=True)
    model = DemoModel(GPTJConfig(**saved["config"]))
    model.load_state_dict(saved["model"])
    return model, Tokenizer.from_file(str(run / TOKENIZER))


def quick_figures(model: DemoModel, tokenizer: Tokenizer, settings: Settings) -> dict[str, float]:
    """Development figures on small parts; the test sets stay untouched."""
    model.eval()
    texts = read_texts(settings.data)[::4]
    intents = read_intents(settings.data)
    _, questions = read_questions(settings.data)
    perplexity = measure_perplexity(model, tokenizer, texts, settings.device)
    scores = measure_intents(model, tokenizer, intents, intents.val, settings.device)
    answers = measure_answers(model, tokenizer, questions[:160], settings.device)
    model.train()
    return {
        "perplexity": round(perplexity.per_token, 2),
        "intent_val": round(scores.in_scope_accuracy, 4),
        "oos_val": round(scores.out_of_scope_recall, 4),
        "dev_em": round(answers.exact_match, 2),
        "dev_f1": round(answers.f1, 2),
    }
