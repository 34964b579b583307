"""The settings of a recipe that belong to no phase: evaluation, engine and logging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mirror_modules._checks import check_positive
from mirror_modules.training.recipes.fields import check_above_zero, check_not_negative, harmless


@dataclass(frozen=True)
class EvaluationRecipe:
    """Evaluation at the end of a run."""

    candidates: int = 100
    """Candidate captions per image for R-precision, its own included; at most as many as there are unseen validation
    captions."""
    report_images: int = 24
    """Captions shown in the report."""

    def __post_init__(self) -> None:
        check_positive("EvaluationRecipe", candidates=self.candidates, report_images=self.report_images)
        if self.candidates < 2:
            raise ValueError(f"EvaluationRecipe: candidates must be at least 2, but it is {self.candidates}.")


@dataclass(frozen=True)
class EngineRecipe:
    """Precision, layout, data loading and checkpoints."""

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of convolutions and matrix products, by autocast; weights, statistics and losses stay in float32."""
    channels_last: bool = True
    """Channels-last memory format: faster on CPUs, and on GPUs with tensor cores."""
    compile: bool = False
    """Compile generator and discriminators with torch.compile; needs a C++ compiler, or Triton on a GPU."""
    deterministic: bool = False
    """Raise an error in operations that are not deterministic; on a CPU, all operations used here are."""
    synchronize_batch_norm: bool = False
    """Compute batch-norm statistics over the images of all processes instead of each process by itself."""
    threads: int | None = harmless(None)
    """Threads of each process on the CPU; None takes torch's default."""
    loader_workers: int = harmless(0)
    """Processes that load batches; 0 loads them in the training process."""
    cached_features_mib: int = 1024
    """Features of frozen encoders are computed once per caption or image and cached if they fit into this many MiB:
    those of captions in memory, those of images in files of the run's folder."""
    features_folder: str | None = harmless(None)
    """Folder of the files of cached features, which runs with the same images and backbones can share; None keeps them
    in the run's folder until the phases that read them are trained."""
    cached_crops: int = 4
    """With random crops, features of frozen encoders are cached for this many fixed crops of each image and their
    mirror images, instead of a new crop in each step."""
    max_skipped_steps: int = 20
    """Stop after this many consecutive non-finite steps; shorter streaks are skipped and counted."""
    checkpoint_every: int = harmless(250)
    """Steps between two checkpoints."""
    checkpoints_kept: int = harmless(2)
    """Newest checkpoints kept per phase, in addition to the best one."""

    def __post_init__(self) -> None:
        check_positive(
            "EngineRecipe",
            max_skipped_steps=self.max_skipped_steps,
            checkpoint_every=self.checkpoint_every,
            checkpoints_kept=self.checkpoints_kept,
            cached_crops=self.cached_crops,
            **({} if self.threads is None else {"threads": self.threads}),
        )
        check_not_negative("EngineRecipe", self, "loader_workers", "cached_features_mib")


@dataclass(frozen=True)
class LoggingRecipe:
    """Logging during training."""

    every: int = harmless(10)
    """Steps between two lines of metrics.jsonl."""
    summary_minutes: float = harmless(5.0)
    """Minutes between two printed lines if the output is not a terminal; terminals get a progress bar instead."""
    samples_every: int = harmless(250)
    """Steps of a generator's phase between two sheets of samples, of fixed captions and noise; 0 writes none."""
    validate_every: int = harmless(0)
    """Steps between two validations; 0 validates only where `keep_best` needs it, with each checkpoint."""
    tensorboard: bool = harmless(False)
    """Also write TensorBoard events, into the folder `tensorboard` of the run."""

    def __post_init__(self) -> None:
        check_positive("LoggingRecipe", every=self.every)
        check_above_zero("LoggingRecipe", self, "summary_minutes")
        check_not_negative("LoggingRecipe", self, "samples_every", "validate_every")
