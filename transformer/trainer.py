"""The loop of training: steps, held-out losses, metrics, checkpoints.

A run that is resumed gives the losses that it would have given uninterrupted, bit for bit on a CPU:
batch number n, its random masks and its dropout are functions of (seed, n) alone, and everything
else is in the checkpoint.
"""

import contextlib
import dataclasses
import itertools
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from fusedformer.transformer import checkpoint
from fusedformer.transformer.data import generator
from fusedformer.transformer.presets import TrainConfig
from fusedformer.transformer.train_flops import matmul_ceiling
from fusedformer.transformer.train_log import Metrics, Progress, draw_losses, summary
from fusedformer.transformer.train_parallel import World, layers, part_like, whole
from fusedformer.transformer.train_tasks import Batch, Task, fingerprint

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # what AdamW keeps of each parameter


def learning_rate(config: TrainConfig, step: int) -> float:
    """That of a step, 1 the first.

    It rises in proportion to the step up to ``warmup``; then it stays, falls as 1 / sqrt(step)
    (Vaswani et al. 2017, section 5.3) or as half a cosine down to its part ``final_rate`` at the
    last step.
    """
    if step < config.warmup:
        return config.learning_rate * step / config.warmup
    if config.schedule == "inverse_sqrt":
        return config.learning_rate * math.sqrt(max(config.warmup, 1) / step)
    if config.schedule == "cosine":
        done = min(1.0, (step - config.warmup) / max(1, config.steps - config.warmup))
        low = config.final_rate
        return config.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * done)) / 2)
    return config.learning_rate


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) with decay on matrices alone, not on biases and norms."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() >= 2]
    others = [parameter for parameter in trained if parameter.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


class Trainer:
    """Trains a model on a task, writing metrics and checkpoints into a folder.

    Args:
        model: on the CPU; it is moved to the device, and trained in place.
        task: gives the batches, see train_tasks.py.
        config: how.
        folder: where checkpoints (``step-...``), metrics.jsonl and loss.png go.
        tokenizer: is saved with each checkpoint.
        about: more for each checkpoint's config.json.
        world: the processes; None is this one alone.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: TrainConfig,
        folder: "str | Path",
        tokenizer: "Tokenizer | None" = None,
        about: "Mapping[str, Any] | None" = None,
        world: "World | None" = None,
    ) -> None:
        self.model, self.task, self.config, self.folder = model, task, config, Path(folder)
        self.tokenizer, self.about, self.world = tokenizer, dict(about or {}), world or World()
        self.step = self.position = 0  # steps done; number of the next batch
        self._fingerprint = fingerprint(task)
        device = self.world.device
        model.to(device)
        if config.checkpoint_activations:
            for layer in layers(model):
                layer.forward = _recomputed(layer.forward)
        self._loss, self._held_out_loss = self.world.wrap(model, task.loss)
        if config.compile:
            self._loss.compile()
        self.optimizer = adamw(model, config)
        # Of the steps since the last line of metrics. On the device, so that nothing waits for it.
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self._steps, self._tokens, self._flops = 0, 0, 0.0
        self._since, self._norm = 0.0, torch.zeros(())
        self._stop = False

    # --- The loop ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Trains up to ``config.steps``, from where the folder's newest checkpoint is, if any.

        Interrupted (SIGINT, SIGTERM), it finishes the step, saves, and raises KeyboardInterrupt.

        Raises:
            ValueError: the newest checkpoint is of other data or another model, or the loss is no
                longer finite.
        """
        config, world = self.config, self.world
        found = checkpoint.steps(self.folder)
        if found:
            self._restore(found[-1])
        first = world.rank == 0
        self.folder.mkdir(parents=True, exist_ok=True)
        metrics = Metrics(self.folder / "metrics.jsonl", self.step) if first else None
        self._ceiling = matmul_ceiling(world.device, getattr(torch, config.dtype)) * world.size
        with self._interruptible(), Progress(config.steps, self.step, shown=first) as progress:
            if found:
                progress.say(f"goes on from {found[-1]}")
            self._since = time.perf_counter()
            while self.step < config.steps and not self._stop:
                self.train_step()
                progress.step(self.step)
                last = self.step == config.steps
                if last or self.step % config.log_every == 0:
                    line = self._log()
                    if metrics:
                        metrics.write(**line)
                    progress.metrics(self.step, summary(line, self.task.unit))
                paused = time.perf_counter()
                if last or self.step % config.evaluate_every == 0:
                    held_out = self.evaluate(config.evaluate_batches)
                    if metrics:
                        metrics.write(step=self.step, held_out_loss=held_out)
                    progress.say(f"[{self.step}/{config.steps}] held-out loss {held_out:.3f}")
                if last or self._stop or self.step % config.save_every == 0:
                    self.save()
                    if metrics:
                        draw_losses(self.folder)
                # Metrics are of training alone.
                self._since += time.perf_counter() - paused
            if self._stop:
                progress.say(f"interrupted after step {self.step}, which is saved: resume goes on")
        if self._stop:
            raise KeyboardInterrupt

    def train_step(self) -> None:
        """One step of the optimizer: ``accumulate`` batches on each device.

        The gradient is that of the mean over all terms of all these batches, however they are
        spread over batches and devices.
        """
        config, world, task = self.config, self.world, self.task
        numbers = range(self.position, self.position + config.accumulate * world.size)
        total = sum(map(task.terms, numbers)) if len(numbers) > 1 else None
        own = numbers[world.rank :: world.size]
        for number in own:
            batch = task.batch(number)
            # Dropout is a function of the batch alone, not of what ran before.
            torch.manual_seed(generator(config.seed, number).initial_seed())
            with world.synchronised(self._loss, number == own[-1]):
                loss = self._loss_of(self._loss, batch, config.label_smoothing)
                share = batch.terms / total if total else 1.0
                # The devices' gradients are averaged, so their sum needs this factor.
                (loss * (share * world.size)).backward()
            self._sum += loss.detach() * share
            self._tokens, self._flops = self._tokens + batch.tokens, self._flops + batch.flops
        self._norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step + 1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step, self._steps = self.step + 1, self._steps + 1
        self.position = numbers.stop

    def _loss_of(self, loss: Callable[..., Tensor], batch: Batch, smoothing: float) -> Tensor:
        device = self.world.device
        inputs = {
            name: (tensor.pin_memory() if device.type == "cuda" else tensor).to(
                device, non_blocking=True
            )
            for name, tensor in batch.inputs.items()
        }
        low = self.config.dtype == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            return loss(**inputs, label_smoothing=smoothing)

    @torch.no_grad()
    def evaluate(self, batches: "int | None" = None) -> float:
        """The mean loss over what is held out, in nats a term; every process computes it."""
        self._held_out_loss.eval()
        total, terms = torch.zeros((), dtype=torch.float64, device=self.world.device), 0
        for batch in itertools.islice(self.task.held_out_batches(), batches):
            total += self._loss_of(self._held_out_loss, batch, 0.0) * batch.terms
            terms += batch.terms
        self._held_out_loss.train()
        return float(total) / terms

    def _log(self) -> dict[str, Any]:
        """The metrics since the last time; waits for the device."""
        own = torch.tensor((0.0, self._tokens, self._flops), dtype=torch.float64)
        sums = own.to(self.world.device)
        sums[0] = self._sum
        loss, tokens, flops = self.world.sum(sums).tolist()
        loss /= self._steps
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {self.step}: lower learning_rate, or raise warmup"
            )
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self._sum.zero_()
        self._steps, self._tokens, self._flops = 0, 0, 0.0
        return {
            "step": self.step,
            "epoch": self.position / len(self.task.batches),
            "loss": loss,
            "learning_rate": learning_rate(self.config, self.step),
            "gradient_norm": float(whole(self._norm)),
            "tokens_per_second": tokens / seconds,
            "utilisation": flops / seconds / self._ceiling,
        }

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """A first SIGINT or SIGTERM lets the step end; a second one ends the process at once."""

        def stop(number: int, frame: object) -> None:
            self._stop = True
            signal.signal(number, before[number])

        # Many processes would not stop at the same step, and only the main thread gets signals.
        before: dict[Any, Any] = {}
        if not self.world.many:
            with contextlib.suppress(ValueError):
                for caught in (signal.SIGINT, signal.SIGTERM):
                    before[caught] = signal.signal(caught, stop)
        try:
            yield
        finally:
            for caught, handler in before.items():
                signal.signal(caught, handler)

    # --- Checkpoints ------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes the checkpoint of this step, if there is none, and deletes the oldest."""
        folder = checkpoint.step_folder(self.folder, self.step)
        first = self.world.rank == 0
        if not folder.exists():
            # Each process takes part in bringing tensors together; the first writes them.
            weights = self._gathered(self.model.state_dict())
            parameters = dict(self.model.named_parameters())
            state = self._gathered(
                {
                    f"{moment}.{name}": self.optimizer.state[parameter][moment]
                    for name, parameter in parameters.items()
                    if parameter in self.optimizer.state
                    for moment in _MOMENTS
                }
            )
            state["loss_sum"] = self.world.sum(self._sum)
            numbers = {
                "step": self.step,
                "position": self.position,
                "steps_in_loss_sum": self._steps,
                "fingerprint": self._fingerprint,
                "training": dataclasses.asdict(self.config),
            }
            if first:
                checkpoint.write(
                    folder, self.model, weights, self.tokenizer, self.about, (state, numbers)
                )
        if first:
            checkpoint.keep_newest(self.folder, self.config.keep)
        self.world.wait()

    def _gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in tensors.items():
            value = whole(tensor)
            if self.world.rank == 0:
                found[name] = value.cpu()
        return found

    def _restore(self, folder: Path) -> None:
        tensors, numbers = checkpoint.read_state(folder)
        if numbers["fingerprint"] != self._fingerprint:
            raise ValueError(f"{folder} was trained on other data; a run goes on with its own")
        weights = checkpoint.matching_weights(self.model, folder)
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(part_like(weights[name], tensor))
        for name, parameter in self.model.named_parameters():
            if f"step.{name}" in tensors:
                # The count of steps is the same for all parts of a parameter.
                self.optimizer.state[parameter] = {
                    "step": tensors[f"step.{name}"].to(parameter.device),
                    "exp_avg": part_like(tensors[f"exp_avg.{name}"], parameter),
                    "exp_avg_sq": part_like(tensors[f"exp_avg_sq.{name}"], parameter),
                }
        self.step, self.position = numbers["step"], numbers["position"]
        self._steps = numbers["steps_in_loss_sum"]
        if self.world.rank == 0:
            self._sum.copy_(tensors["loss_sum"])


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return recompute(forward, *args, use_reentrant=False, **kwargs)

    return run
