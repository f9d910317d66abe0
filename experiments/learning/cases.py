"""The runs of run.py: what each is trained with, how many seeds it gets, what is compared with what."""

from __future__ import annotations

from dataclasses import dataclass

from experiments import ROOT

BASE = ROOT / "assets/tiny-sdxl-icons"
CLASS = ROOT / "assets/icons-class"
GUIDE_STEPS = 2000  # of the runs whose warm-ups the presets of the Fourier loss name

COMMON = (
    f"--pretrained_model_name_or_path={BASE}", f"--dataset_name={ROOT / 'assets/icons-3d'}", "--caption_column=text",
    "--instance_prompt=3d icon in the style of TOK", "--resolution=64", "--train_batch_size=3", "--cache_latents",
    "--random_flip", "--lr_warmup_steps=0", "--report_to=none", "--checkpointing_steps=100",
    "--checkpoints_total_limit=1", "--resume_from_checkpoint=latest",
)
ADAMW = ("--learning_rate=1e-3", "--adam_beta2=0.99")
PRODIGY = ("--optimizer=prodigy", "--learning_rate=1", "--adam_beta2=0.99", "--adam_weight_decay=0.01")
RANK_8 = ("--rank=8", "--lora_layers=all-linear")
TOKENS = ("--train_text_encoder_ti", "--text_encoder_lr=1e-3")
PRIOR = ("--with_prior_preservation", f"--class_data_dir={CLASS}", "--class_prompt=icon", "--num_class_images=48")


@dataclass(frozen=True)
class Case:
    """One way to train.

    seeds   how many it gets, 0, 1, …; --seeds may lower it
    warmup  optimizer steps before its Fourier loss counts, in a run of GUIDE_STEPS
    """

    flags: tuple[str, ...]
    seeds: int = 3
    warmup: int | None = None

    def line(self, steps: int) -> list[str]:
        """Its own flags of the trainer, for a run of `steps` steps."""
        if self.warmup is None:
            return [*self.flags]
        return [*self.flags, f"--fourier_warmup_steps={round(self.warmup * steps / GUIDE_STEPS)}"]


def fourier(preset: str, warmup: int, *more: str, seeds: int = 3) -> Case:
    """A preset of the Fourier loss; all else as `lora`, which is l2."""
    flags = (*RANK_8, *ADAMW, "--loss_type=fourier", f"--fourier_config={preset}", *more)
    return Case(flags, seeds, warmup)


def hina(recipe: str) -> Case:
    """A recipe for HinaAdaptive at the rate and decays of `lora`, so that only the optimizer differs.

    The recipes themselves name 1e-4, "large" 8e-5: for 2,000 steps and more of a large model.
    """
    return Case((*RANK_8, *ADAMW, "--optimizer=hina_adaptive", f"--optimizer_args={recipe}"))


PRESETS = {  # three seeds each, the strongest more on request, with their warm-ups
    "conservative": 500, "balanced": 300, "aggressive": 200, "super_resolution": 400, "fine_detail": 100,
}
UNIFIED = {  # one seed each
    "unified_basic": 250, "unified_balanced": 250, "unified_detail": 200, "unified_adaptive": 300,
    "unified_custom": 250,
}
FOURIER = (
    {f"fourier_{name}": fourier(name, warmup, seeds=6 if name == "aggressive" else 3)
     for name, warmup in PRESETS.items()}
    | {f"fourier_{name}": fourier(name, warmup, seeds=1) for name, warmup in UNIFIED.items()}
    | {"fourier_balanced_complex": fourier("balanced", PRESETS["balanced"], "--fourier_metric=complex", seeds=1),
       "fourier_balanced_x0": fourier("balanced", PRESETS["balanced"], "--fourier_space=x0", seeds=1)}
)
HINA = {
    "hina_lora": hina("lora_rank_penalty=True rank_penalty_strength=0.01 low_rank_emphasis=1.2 edge_suppression=True "
                      "edge_penalty=0.08 memory_efficient=True vram_budget_gb=8.0"),
    "hina_fast": hina("edge_suppression=True edge_penalty=0.1 memory_efficient=True vram_budget_gb=6.0"),
    "hina_large": hina("edge_suppression=True edge_penalty=0.12 spatial_awareness=True frequency_penalty=0.06 "
                       "background_regularization=True use_dynamic_adaptation=True memory_efficient=True "
                       "vram_budget_gb=16.0 reduce_precision=True cpu_offload_states=True"),
}
CASES: dict[str, Case] = {
    "lora": Case((*RANK_8, *ADAMW), seeds=6),
    "ti": Case((*RANK_8, *ADAMW, *TOKENS)),
    "prior": Case((*RANK_8, *ADAMW, *PRIOR)),
    "prodigy": Case((*RANK_8, *PRODIGY)),
    "edm": Case((*RANK_8, *ADAMW, "--do_edm_style_training")),
    "snr": Case((*RANK_8, *ADAMW, "--snr_gamma=5")),
    "lora4": Case(("--rank=4", *ADAMW)),
    "dora4": Case(("--rank=4", *ADAMW, "--use_dora")),
    "dropout": Case((*RANK_8, *ADAMW, "--caption_dropout_rate=0.1")),
    **FOURIER,
    **HINA,
}


@dataclass(frozen=True)
class Comparison:
    """A table: a row a case, the first being what the others are compared with.

    columns  of experiments.learning.results.COLUMNS
    changes  columns of a second table, of differences from the first case, seed by seed
    """

    title: str
    cases: tuple[str, ...]
    columns: tuple[str, ...] = ("closed", "drift", "seconds")
    changes: tuple[str, ...] = ()


SPECTRA = Comparison(
    "Fourier loss: its presets for l2 (lora)", ("lora", *FOURIER),
    ("style", "closed", "high", "high_vae", "spectrum", "spectrum_vae", "drift", "step"),
    ("style", "closed", "high", "spectrum", "spectrum_vae", "drift"))
METHODS = {  # a row of learning.png each
    "lora": "LoRA", "ti": "LoRA + new tokens", "edm": "LoRA, EDM", "snr": "LoRA, Min-SNR", "prodigy": "LoRA, Prodigy",
    "prior": "LoRA, prior kept", "lora4": "LoRA rank 4", "dora4": "DoRA rank 4",
}
COMPARISONS = (
    Comparison("Pivotal tuning: two new tokens beside the LoRA, in the first half of the steps", ("lora", "ti")),
    Comparison("DoRA at rank 4, attention layers", ("lora4", "dora4")),
    Comparison("Prior preservation with 48 real class images", ("lora", "prior")),
    Comparison("Prodigy for AdamW", ("lora", "prodigy")),
    Comparison("EDM noise levels and weights on this ε model", ("lora", "edm")),
    Comparison("Min-SNR, γ 5", ("lora", "snr")),
    Comparison("Caption dropout 0.1", ("lora", "dropout"), changes=("closed", "drift")),
    SPECTRA,
    Comparison("HinaAdaptive for AdamW (lora)", ("lora", *HINA), ("style", "closed", "drift", "bytes", "step"),
               ("style", "closed", "drift")),
)
