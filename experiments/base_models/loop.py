"""One resumable training loop for all models: AdamW, warm-up, a constant rate that falls at the end, EMA; no pickle."""

import copy
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

LOG = logging.getLogger("base_models")
SAVE_SECONDS = 120.0
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLOCK = time.monotonic if DEVICE.type == "cuda" else time.process_time  # a busy machine must not shorten a training


@dataclass
class Budget:
    """Where training ends: at `steps`, or at `minutes` of computing summed over all resumed pieces."""

    minutes: float
    steps: int = 10**9


@dataclass
class Progress:
    step: int = 0
    seconds: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)  # running means


class Training:
    """The state of one training run; `run` goes on from the saved state if there is one."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        work_dir: Path,
        *,
        budget: Budget,
        lr: float,
        ema: float = 0.999,
        half: bool = False,
        state: dict[str, Tensor] | None = None,
    ) -> None:
        """`state`: tensors of the task's own that a resumed run needs; they are updated in place."""
        self.state = state or {}
        self.name, self.module, self.budget, self.lr, self.decay = name, module.to(DEVICE), budget, lr, ema
        self.folder = work_dir / "training"
        self.parameters = {key: p for key, p in module.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.average = copy.deepcopy(module).eval().requires_grad_(False)
        self.progress = Progress()
        if (self.folder / f"{name}.json").exists():
            self.load()
        # the optimizer keeps fp32 weights and moments
        self.worker = copy.deepcopy(self.module).to(torch.bfloat16) if half and bf16_is_fast() else self.module
        self.refresh_worker()

    def refresh_worker(self) -> None:
        """Round the fp32 weights into the bf16 copy that computes, if there is one."""
        if self.worker is not self.module:
            with torch.no_grad():
                torch._foreach_copy_([*self.worker.parameters()], [*self.module.parameters()])

    def collect_gradients(self) -> None:
        """Hand the bf16 copy's gradients to the fp32 weights."""
        if self.worker is not self.module:
            for weight, rounded in zip(self.module.parameters(), self.worker.parameters(), strict=True):
                if weight.requires_grad:
                    weight.grad, rounded.grad = rounded.grad.float(), None

    def done(self) -> float:
        """Share of the budget used, 0 to 1."""
        by_time = self.progress.seconds / (60 * self.budget.minutes)
        return min(1.0, max(by_time, self.progress.step / self.budget.steps))

    def rate(self) -> float:
        """Learning rate: 100 steps of warm-up, constant, then straight down to 2 % over the last quarter of the budget.

        A constant middle lets a larger budget be given later without a step of training lost.
        """
        warm = min(1.0, (self.progress.step + 1) / 100)
        return self.lr * warm * (0.02 + 0.98 * min(1.0, 4 * (1 - self.done())))

    def run(self, losses_at: Callable[[int], dict[str, Tensor]]) -> None:
        """Train to the end of the budget; `losses_at(step)` returns named losses whose sum is minimised."""
        self.worker.train()
        saved = time.monotonic()
        while self.done() < 1:
            started = CLOCK()
            self.update(losses_at(self.progress.step))
            self.progress.seconds += CLOCK() - started
            if self.progress.step % 50 == 0:
                self.log()
            if time.monotonic() - saved > SAVE_SECONDS or self.done() >= 1:
                self.save()
                saved = time.monotonic()

    def update(self, losses: dict[str, Tensor]) -> None:
        torch.stack([*losses.values()]).sum().backward()
        self.collect_gradients()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.refresh_worker()
        self.progress.step += 1
        self.follow()
        for key, value in losses.items():
            before = self.progress.losses.get(key, value.item())
            self.progress.losses[key] = 0.99 * before + 0.01 * value.item()

    @torch.no_grad()
    def follow(self) -> None:
        """Move the average towards the weights; the young average forgets faster."""
        decay = min(self.decay, (1 + self.progress.step) / (10 + self.progress.step))
        averages, weights = list(self.average.parameters()), list(self.module.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def log(self) -> None:
        losses = "  ".join(f"{key} {value:.4f}" for key, value in self.progress.losses.items())
        pace = self.progress.seconds / self.progress.step
        LOG.info("%s step %d  %.0f %%  %.3f s/step  %s", self.name, self.progress.step, 100 * self.done(), pace, losses)

    def save(self) -> None:
        """Tensors first, then the JSON that makes them count, each by rename."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{key}": value for key, value in self.module.state_dict().items()}
        tensors |= {f"average.{key}": value for key, value in self.average.state_dict().items()}
        for key, parameter in self.parameters.items():
            state = self.optimizer.state[parameter]
            tensors |= {f"{kind}.{key}": state[kind] for kind in ("step", "exp_avg", "exp_avg_sq")}
        tensors |= {f"state.{key}": value for key, value in self.state.items()}
        file = f"{self.name}-{self.progress.step}.safetensors"
        save_file({key: value.clone().contiguous() for key, value in tensors.items()}, self.folder / file)
        record = asdict(self.progress) | {"file": file}
        replace_text(self.folder / f"{self.name}.json", json.dumps(record))
        for old in self.folder.glob(f"{self.name}-*.safetensors"):
            if old.name != file:
                old.unlink()

    def load(self) -> None:
        record = json.loads((self.folder / f"{self.name}.json").read_text("utf-8"))
        tensors = load_file(self.folder / record.pop("file"))
        self.progress = Progress(**record)
        self.module.load_state_dict(part(tensors, "model."))
        self.average.load_state_dict(part(tensors, "average."))
        for key, value in part(tensors, "state.").items():
            self.state[key].copy_(value)
        for kind in ("step", "exp_avg", "exp_avg_sq"):
            for key, value in part(tensors, f"{kind}.").items():
                self.optimizer.state[self.parameters[key]][kind] = value.to(DEVICE)
        LOG.info("%s resumes at step %d, %.1f minutes", self.name, self.progress.step, self.progress.seconds / 60)


def bf16_is_fast() -> bool:
    """True where the hardware computes in bf16: a step is 1.7x faster with AMX, and many times slower without."""
    return DEVICE.type == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def replace_text(path: Path, text: str) -> None:
    """Write beside and rename: a killed run leaves the old file or the new one."""
    beside = path.with_suffix(".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def generator(seed: int, step: int) -> torch.Generator:
    """Randomness as a function of (seed, step), so that a resumed run draws what an unbroken one would."""
    return torch.Generator().manual_seed((seed << 32) + step)


def load_average(work_dir: Path, name: str) -> dict[str, Tensor]:
    """The averaged weights in the newest saved state of a training run."""
    record = json.loads((work_dir / "training" / f"{name}.json").read_text("utf-8"))
    return part(load_file(work_dir / "training" / record["file"]), "average.")
