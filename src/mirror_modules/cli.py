"""The command line: parse, call, print. Errors are one line, or tyro's box, with exit status 2."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from mirror_modules.training.recipes import PHASES, Recipe, get_recipe, load_recipe

USAGE = """\
usage: mirror-modules COMMAND ...

  train [RECIPE]                 train a model, evaluate it, and write a report
  generate MODEL_DIR CAPTION...  generate images from captions
  describe MODEL_DIR IMAGE...    caption images
  evaluate RUN_DIR               evaluate a trained run again, and write its report
  data inspect PATH              summarize a folder of captioned images and list its damaged files
  data prepare PATH OUT          decode and resize a folder of captioned images once, for faster loading
  ablate [RECIPE]                train and evaluate the paper's ablation over several seeds

`mirror-modules COMMAND --help` lists every option with its default."""

Device = Literal["auto", "cpu", "cuda"]

# What an interrupted command leaves on disk.
_KEPT = {
    "train": "; finished phases and checkpoints are kept",
    "ablate": "; finished phases and checkpoints are kept",
    "data prepare": "; finished files are kept, and the same command continues with them",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": _train,
        "generate": _generate,
        "describe": _describe,
        "evaluate": _evaluate,
        "data": _data,
        "ablate": _ablate,
    }
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    if words[0] not in commands:
        print(f"mirror-modules: unknown command {words[0]!r}; there are {', '.join(commands)}.", file=sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names and captions may hold characters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            commands[words[0]](words[1:])
        except (ValueError, OSError, ImportError, NotImplementedError, MemoryError, OverflowError) as error:
            reason = str(error) or "there is not enough memory"
            print(f"mirror-modules {words[0]}: {' '.join(reason.splitlines())}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            kept = _KEPT.get(" ".join(words[:2] if words[0] == "data" else words[:1]), "")
            print(f"mirror-modules {words[0]}: interrupted{kept}.", file=sys.stderr)
            return 130
        except RuntimeError as error:
            # Imported here because most commands run without the training code.
            from mirror_modules.training.errors import Interrupted, TrainingError, is_out_of_memory

            if not isinstance(error, TrainingError) and not is_out_of_memory(error):
                raise
            reason = str(error) if isinstance(error, TrainingError) else f"there is not enough memory ({error})"
            print(f"mirror-modules {words[0]}: {' '.join(reason.splitlines())}", file=sys.stderr)
            return error.status if isinstance(error, Interrupted) else 2
    return 0


def _train(arguments: list[str]) -> None:
    from mirror_modules.evaluation.evaluation import evaluate
    from mirror_modules.training.distributed import is_main_process
    from mirror_modules.training.loop import train

    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "demo"
    base = get_recipe(name)
    if (file := _option("--config", arguments)) is not None:
        if not Path(file).is_file():
            raise FileNotFoundError(f"--config {file}: there is no such file; expected JSON with fields of a recipe.")
        base = load_recipe(file, base)
    if (steps := _integer(_option("--steps", arguments))) is not None:
        changes: dict[str, Any] = {phase: replace(base.phase(phase), steps=steps) for phase in PHASES}
        base = replace(base, **changes)
    options = _parse(TrainOptions, arguments, f"mirror-modules train {name}", default=TrainOptions(base))
    recipe = options.resolve()
    device = _device(options.device)
    out = options.out or Path("runs") / name
    phases = options.phases or PHASES
    folder = train(recipe, out, phases=phases, device=device, resume=options.resume)
    if not is_main_process():
        return
    if all(folder.weights(phase).exists() for phase in PHASES):
        _print_metrics(evaluate(out, device=device))
        print(f"Open {folder.report}")
    else:
        print(f"Phases {', '.join(phases)} are in {folder.path}; the other phases are not trained yet.")


@dataclass(frozen=True)
class TrainOptions:
    """Train a model phase by phase, evaluate it, and write a report. Finished phases are kept and reused."""

    recipe: Recipe
    out: Path | None = None
    """Folder of the run; runs/RECIPE by default."""
    data: Path | None = None
    """Folder of the photographs, for recipes that train on photographs."""
    steps: int | None = None
    """Optimizer steps of every phase, instead of the recipe's; --glam.steps and the like override it for one phase."""
    device: Device = "auto"
    """Device; auto uses a GPU if there is one."""
    phases: tuple[Literal["stem", "stream", "glam", "evaluator"], ...] = ()
    """Phases to train; all by default."""
    resume: bool = False
    """Continue an interrupted run from its newest checkpoint; in a new folder, start the run."""
    config: Path | None = None
    """JSON file with the fields that differ from the recipe's, or a run's config.json; command-line options win."""

    def resolve(self) -> Recipe:
        """The recipe with the path given as --data."""
        if self.data is None:
            return self.recipe
        return replace(self.recipe, data=replace(self.recipe.data, path=str(self.data)))


@dataclass(frozen=True)
class GenerateOptions:
    """Generate images from captions. The same seed and captions give the same file."""

    model_dir: Path
    """Folder of the model, such as runs/demo/model."""
    captions: tuple[str, ...]
    """Captions; one image each."""
    out: Path = Path("generated.png")
    """PNG file to write: all images side by side, with captions."""
    separate: bool = False
    """Write one numbered file per image instead, without captions."""
    seed: int = 0
    """Seed of the noise."""
    scale: int = 4
    """Pixels of the picture per pixel of an image."""
    device: Device = "auto"
    """Device; auto uses a GPU if there is one."""


def _generate(arguments: list[str]) -> None:
    from mirror_modules.models import MirrorGAN

    options = _parse(GenerateOptions, arguments, "mirror-modules generate", positional=("model_dir", "captions"))
    if not options.captions:
        raise ValueError("there is no caption; add at least one after the model's folder.")
    model = MirrorGAN.from_pretrained(options.model_dir, device=_device(options.device))
    images = model.generate(options.captions, seed=options.seed).images[-1].cpu()

    from mirror_modules.pictures.grids import captioned_grid, grid, write_png

    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.separate:
        files = [options.out.with_name(f"{options.out.stem}-{i:03}.png") for i in range(len(images))]
        for file, image in zip(files, images):
            write_png(grid(image.unsqueeze(0), columns=1, gap=0), file)
    else:
        files = [options.out]
        columns = min(len(images), 4)
        write_png(captioned_grid(images, list(options.captions), columns=columns, scale=options.scale), options.out)
    for file in files:
        print(file)


@dataclass(frozen=True)
class DescribeOptions:
    """Caption images."""

    model_dir: Path
    """Folder of the model, such as runs/demo/model."""
    images: tuple[Path, ...]
    """Image files; the central square is captioned."""
    beam_width: int = 3
    """Width of the beam search; 1 is greedy."""
    device: Device = "auto"
    """Device; auto uses a GPU if there is one."""


def _describe(arguments: list[str]) -> None:
    import torch

    from mirror_modules.data.readers.images import read_square
    from mirror_modules.data.transforms import to_float
    from mirror_modules.models import MirrorGAN

    options = _parse(DescribeOptions, arguments, "mirror-modules describe", positional=("model_dir", "images"))
    if not options.images:
        raise ValueError("there is no image; add at least one file after the model's folder.")
    model = MirrorGAN.from_pretrained(options.model_dir, device=_device(options.device))
    pixels = [torch.from_numpy(read_square(path, model.config.resolutions[-1])) for path in options.images]
    for path, caption in zip(
        options.images, model.describe(to_float(torch.stack(pixels)), beam_width=options.beam_width)
    ):
        print(f"{path}: {caption}")


@dataclass(frozen=True)
class EvaluateOptions:
    """Evaluate a trained run again; writes evaluation.json, pictures and report.html."""

    run_dir: Path
    """Folder of the run, such as runs/demo."""
    device: Device = "auto"
    """Device; auto uses a GPU if there is one."""
    fit_classifier: bool = False
    """Train the classifier for FID, KID, Inception Score, diversity and the attribute accuracy of drawn flowers."""
    inception: bool = False
    """Use torchvision's Inception v3 for FID, KID, Inception Score and diversity; its weights are downloaded."""


def _evaluate(arguments: list[str]) -> None:
    from mirror_modules.evaluation.evaluation import evaluate

    options = _parse(EvaluateOptions, arguments, "mirror-modules evaluate", positional=("run_dir",))
    metrics = evaluate(
        options.run_dir,
        device=_device(options.device),
        fit_classifier=options.fit_classifier,
        inception=options.inception,
    )
    _print_metrics(metrics)
    print(f"Open {options.run_dir / 'report.html'}")


@dataclass(frozen=True)
class InspectOptions:
    """Summarize a folder of captioned images, and list its damaged files."""

    path: Path
    """Folder of the data set."""
    source: Literal["auto", "oxford-flowers", "birds", "coco", "folder", "webdataset", "prepared"] = "auto"
    """Format of the data set; auto recognizes it."""
    out: Path = Path("contact.png")
    """PNG file to write: some images of both splits, with captions."""
    resolution: int | None = None
    """Height and width of the images in it; 64 by default, or less if the folder was prepared at less."""
    max_words: int = 18
    """Captions with more words count as long."""
    min_count: int = 1
    """Minimum number of occurrences of a word in the vocabulary."""


@dataclass(frozen=True)
class PrepareOptions:
    """Decode and resize a folder of captioned images once. After an interruption, the same command continues."""

    path: Path
    """Folder of the data set."""
    out: Path
    """Folder to create."""
    resolution: int
    """Height and width of the images; data.augment needs 19/16 of the model's resolution."""
    source: Literal["auto", "oxford-flowers", "birds", "coco", "folder", "webdataset"] = "auto"
    """Format of the data set; auto recognizes it."""
    on_error: Literal["stop", "skip"] = "stop"
    """Whether a damaged file ends the command, or is skipped and listed as long as at most 5 % are damaged."""
    shard_size: int = 2000
    """Images per file; a split in a single file is memory-mapped instead of copied."""


def _data(arguments: list[str]) -> None:
    commands = {"inspect": _inspect, "prepare": _prepare}
    if not arguments or arguments[0] not in commands:
        given = repr(arguments[0]) if arguments else "nothing"
        raise ValueError(
            f"expected inspect or prepare, but got {given}; write `mirror-modules data inspect PATH` or "
            "`mirror-modules data prepare PATH OUT --resolution N`."
        )
    commands[arguments[0]](arguments[1:])


def _prepare(arguments: list[str]) -> None:
    options = _parse(PrepareOptions, arguments, "mirror-modules data prepare", positional=("path", "out"))
    from tqdm import tqdm

    from mirror_modules.data import prepare_captions

    with tqdm(unit=" images", dynamic_ncols=True, disable=None) as bar:

        def show(split: str, done: int, total: int) -> None:
            bar.set_description(f"{split} images", refresh=False)
            bar.total = total
            bar.update(done - bar.n)

        made = prepare_captions(
            options.path,
            options.out,
            resolution=options.resolution,
            source=options.source,
            on_error=options.on_error,
            shard_size=options.shard_size,
            progress=show,
        )
    counts = ", ".join(f"{count:,} {split}" for split, count in made.images.items())
    print(f"{made.folder}: {counts} images of {made.resolution} x {made.resolution} pixels, from {made.source!r}")
    if made.skipped:
        print(f"skipped: {len(made.skipped):,}, listed in {made.folder / 'prepared.json'}")


def _inspect(arguments: list[str]) -> None:
    options = _parse(InspectOptions, arguments, "mirror-modules data inspect", positional=("path",))
    from mirror_modules.data.inspection import inspect_folder
    from mirror_modules.pictures.grids import sample_sheet, write_png

    # Checked before all files are read, which may take long.
    if options.out.is_dir():
        raise ValueError(f"--out {options.out} is a folder; give the name of a PNG file.")
    above = next(folder for folder in options.out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"--out {options.out}: nothing can be written into {above}; name another file.")
    found = inspect_folder(
        options.path,
        source=options.source,
        resolution=options.resolution,
        max_words=options.max_words,
        min_count=options.min_count,
    )
    print(found.text)
    if not found.samples:
        return
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_png(sample_sheet(found.samples), options.out)
    except OSError as error:
        raise OSError(f"--out {options.out} cannot be written ({error.strerror or error}).") from error
    print(f"Open {options.out}")


def _ablate(arguments: list[str]) -> None:
    from mirror_modules.evaluation.ablation import ablate, ablation_cells

    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "ablation"
    options = _parse(AblateOptions, arguments, f"mirror-modules ablate {name}", default=AblateOptions(get_recipe(name)))
    cells = {cell.name: cell for cell in ablation_cells()}
    for wanted in options.cells:
        if wanted not in cells:
            close = get_close_matches(wanted, cells, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(map(repr, cells))}."
            raise ValueError(f"--cells: unknown cell {wanted!r}; {hint}")
    out = options.out or Path("runs") / name
    chosen = [cell for cell in cells.values() if not options.cells or cell.name in options.cells]
    ablate(options.recipe, out, cells=chosen, seeds=options.seeds, jobs=options.jobs, device=_device(options.device))
    print((out / "ablation.md").read_text(encoding="utf-8"), end="")
    print(f"Open {out / 'ablation.png'}")


@dataclass(frozen=True)
class AblateOptions:
    """Train and evaluate the paper's ablation: equal data, seeds and steps, with one change at a time.

    After an interruption, the same command continues.
    """

    recipe: Recipe
    out: Path | None = None
    """Folder of all runs; runs/RECIPE by default."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of data, weights and noise; one run per seed and cell."""
    cells: tuple[str, ...] = ()
    """Names of the cells to train; all by default."""
    jobs: int = 1
    """Cells trained at the same time."""
    device: Device = "auto"
    """Device; auto uses a GPU if there is one."""


def _parse(
    options: type, arguments: list[str], program: str, *, positional: Sequence[str] = (), default: Any = None
) -> Any:
    try:
        import tyro
    except ImportError as error:
        raise ImportError("The command line needs more packages: pip install 'mirror-modules[train]'") from error
    # Annotated here and not in the classes, so that a missing tyro is a one-line error.
    for name, hint in get_type_hints(options).items():
        if name in positional:
            options.__annotations__[name] = Annotated[hint, tyro.conf.Positional]
    if default is None:
        return tyro.cli(options, args=arguments, prog=program)
    options.__annotations__["recipe"] = Annotated[Recipe, tyro.conf.arg(name="")]
    return tyro.cli(options, args=arguments, prog=program, default=default)


def _option(name: str, arguments: Sequence[str]) -> str | None:
    """The last value of an option that must be known before the others are parsed."""
    value = None
    for word, following in zip(arguments, [*arguments[1:], ""]):
        if word == name:
            value = following
        elif word.startswith(f"{name}="):
            value = word.removeprefix(f"{name}=")
    return value


def _device(name: str) -> str:
    # Imported here because it imports torch.distributed.
    from mirror_modules.training.distributed import resolve_device

    return resolve_device(name)


def _integer(text: str | None) -> int | None:
    """The integer in a text, as tyro parses it; None for other texts, which tyro reports."""
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def _print_metrics(metrics: dict[str, Any]) -> None:
    print(f"R-precision among {metrics['candidates']} captions (chance {metrics['chance']:.1%}), top 1 / 2 / 3:")
    for name, value in metrics["r_precision"].items():
        print(f"  {name:<10} {value['top1']:6.1%} {value['top2']:6.1%} {value['top3']:6.1%}")
    print("Word accuracy of the captioner:")
    for name, value in metrics["word_accuracy"].items():
        print(f"  {name:<10} {value:6.1%}")
    print("Pointwise mutual information of image and caption under the captioner, nats per token:")
    for name, value in metrics["image_information"].items():
        # Adding 0.0 turns -0.0 into 0.0.
        print(f"  {name:<10} {round(value, 2) + 0.0:6.2f}")
    for method, title in (
        ("classifier", "by the attribute classifier"),
        ("measured_colors", "colors measured in pixels"),
    ):
        shares = {
            name: each[method]["all"]["share"] for name, each in metrics.get("attributes", {}).items() if method in each
        }
        if shares:
            print(f"Attribute accuracy, {title}:")
            for name, share in shares.items():
                print(f"  {name:<10} {share:6.1%}")
    if "features" in metrics:
        print(f"Features of a {metrics['extractor']}:")
        for name, figures in metrics["features"].items():
            print(
                f"  {name:<10} "
                + ", ".join(f"{figure.replace('_', ' ')} {value:.4g}" for figure, value in figures.items())
            )
    if "not_measured" in metrics:
        print(f"Without the metrics of --fit-classifier: {metrics['not_measured']}")
    if any(metrics["skipped"].values()):
        counts = ", ".join(f"{count:,} of the {split} split" for split, count in metrics["skipped"].items())
        print(f"Damaged samples skipped: {counts}")


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"mirror-modules: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
