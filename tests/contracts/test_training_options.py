"""Options of the command line reach the functions on which they act, through all layers between the two.

Spies record the arguments of these functions in a single run whose options all differ from their defaults: if a layer
drops an option, a default is recorded.
"""

import inspect
import json
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch

from mirror_modules import Captioner, MirrorGAN
from mirror_modules.cli import main
from mirror_modules.data.seeding import seeded
from mirror_modules.evaluation import ablation, evaluation, networks, retrieval
from mirror_modules.stream import redescription
from mirror_modules.training import batches, engine, features, loop, network, pretrain, state, step, validation
from mirror_modules.training.recipes import PHASES
from tests.layouts import make_folder, write_image
from tests.runs import make_tiny_recipe

SEED = 7
OPTIONS = [
    *("--seed", SEED, "--device", "cpu"),
    *("--data.source", "folder", "--data.training-images", 24, "--data.validation-images", 9, "--data.min-count", 2),
    *("--data.held-out-share", 0.3),
    *("--data.augment", "--data.on-error", "skip", "--data.long-captions", "subsample", "--model.max-words", 6),
    *("--engine.precision", "bfloat16", "--engine.no-channels-last", "--engine.compile", "--engine.deterministic"),
    *("--engine.loader-workers", 1, "--engine.cached-features-mib", 33, "--engine.checkpoints-kept", 5),
    *("--evaluation.candidates", 5, "--evaluation.report-images", 4),
    *("--logging.validate-every", 1, "--logging.samples-every", 0),
    *("--stem.steps", 1, "--stem.batch-size", 9, "--stem.learning-rate", 0.011, "--stem.max-grad-norm", 0.21),
    *("--stem.gamma-loss", 9.5, "--stem.word-pairs", 3),
    *("--stream.steps", 1, "--stream.batch-size", 8, "--stream.learning-rate", 0.012, "--stream.max-grad-norm", 0.22),
    *("--stream.accumulate", 2, "--stream.train-backbone"),
    *("--glam.steps", 2, "--glam.batch-size", 6, "--glam.accumulate", 3, "--glam.generator-learning-rate", 0.013),
    *("--glam.discriminator-learning-rate", 0.014, "--glam.max-grad-norm", 0.23, "--glam.average-decay", 0.77),
    *("--glam.adversarial-objective", "hinge", "--glam.adversarial-weighting", "release"),
    *("--glam.redescription-ratio", 0.37, "--glam.matching-ratio", 0.41, "--glam.redescription-reduction", "sentence"),
    *("--evaluator.steps", 1, "--evaluator.batch-size", 7, "--evaluator.learning-rate", 0.015),
    *("--evaluator.max-grad-norm", 0.24, "--evaluator.gamma-loss", 8.5, "--evaluator.word-weight", 0.1),
    *("--evaluator.word-pairs", 2),
]

Arguments = dict[str, Any]
SETUP, EVALUATION = "setup", "evaluation"


class Call(NamedTuple):
    """A recorded call."""

    stage: str
    """The phase of the training; "setup" before and between phases, "evaluation" after the training."""
    arguments: Arguments
    """All arguments by name, defaults included."""


@dataclass
class Spies:
    """Records the calls of functions, by names such as `step.generator_loss`."""

    patch: pytest.MonkeyPatch
    calls: dict[str, list[Call]] = field(default_factory=dict)
    stage: str = SETUP

    def watch(self, name: str, owner: Any, *, instead: Callable[..., Any] | None = None) -> None:
        """Record the calls of a function that `owner`, a module or a class, looks up; `instead` replaces it."""
        attribute = name.rpartition(".")[2]
        original = getattr(owner, attribute)
        signature, calls = inspect.signature(original), self.calls.setdefault(name, [])

        def spy(*arguments: Any, **options: Any) -> Any:
            bound = signature.bind(*arguments, **options)
            bound.apply_defaults()
            calls.append(Call(self.stage, dict(bound.arguments)))
            return (instead or original)(*arguments, **options)

        self.patch.setattr(owner, attribute, spy)

    def follow(self, owner: Any, attribute: str, stage: str) -> None:
        """Label the calls during a function with a stage."""
        original = getattr(owner, attribute)

        def enter(*arguments: Any, **options: Any) -> Any:
            self.stage = stage
            try:
                return original(*arguments, **options)
            finally:
                self.stage = SETUP

        self.patch.setattr(owner, attribute, enter)

    def values(self, function: str, read: Callable[[Arguments], Hashable]) -> dict[str, list[Hashable]]:
        """The distinct values in each stage, in the order of first occurrence; calls with None are skipped."""
        found: dict[str, dict[Hashable, None]] = {}
        for call in self.calls[function]:
            if (value := read(call.arguments)) is not None:
                found.setdefault(call.stage, {})[value] = None
        return {stage: list(values) for stage, values in found.items()}


def run_command(*words: Any) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with data, one file damaged, and the tiny recipe as a config file."""
    folder = tmp_path_factory.mktemp("options")
    make_folder(folder / "data", training=30, validation=11)
    (folder / "data" / "train" / "image2.png").write_bytes(b"")
    (folder / "tiny.json").write_text(json.dumps(make_tiny_recipe().to_dict()))
    return folder


@pytest.fixture(scope="module")
def spies(folder):
    """The calls of a run by the command line with `OPTIONS`."""
    with pytest.MonkeyPatch.context() as patch:
        spies = Spies(patch)
        for phase in PHASES:
            spies.follow(loop, f"train_{phase}", phase)
        spies.follow(evaluation, "evaluate", EVALUATION)
        # Compiled networks would need minutes of code generation.
        spies.watch("Module.compile", torch.nn.Module, instead=lambda *_, **__: None)
        for name, owner in {
            "batches.DataLoader": batches,
            "batches.InMemoryCaptions": batches,
            "batches.draw_held_out": batches,
            "batches.open_captions": batches,
            "engine.Checkpoints": engine,
            "engine.RepeatableBatches": engine,
            "engine.load_batches": engine,
            "evaluation.expected_hits": evaluation,
            "evaluation.generate_images": evaluation,
            "retrieval.r_precision_folds": retrieval,
            "features.Cache.plan": features.Cache,
            "loop.adversarial_step": loop,
            "loop.captioning_step": loop,
            "loop.matching_step": loop,
            "loop.start": loop,
            "loop.start_pretraining": loop,
            "nn.utils.clip_grads_with_norm_": network.nn.utils,
            "pretrain.contrastive_terms": pretrain,
            "pretrain.redescription_loss": pretrain,
            "pretrain.word_region_similarity": pretrain,
            "redescription.redescription_loss": redescription,
            "state.MovingAverage": state,
            "step.balance_gradients": step,
            "step.discriminator_loss": step,
            "step.generate": step,
            "step.generator_loss": step,
            "torch.autocast": torch,
            "torch.manual_seed": torch,
            "torch.optim.Adam": torch.optim,
            "torch.use_deterministic_algorithms": torch,
            "validation.Unseen.spread": validation.Unseen,
            "validation.r_precision": validation,
        }.items():
            spies.watch(name, owner)
        arguments = ["train", "demo", "--config", folder / "tiny.json", "--out", folder / "run", *OPTIONS]
        assert run_command(*arguments, "--data", folder / "data") == 0
    return spies


def argument(name: str) -> Callable[[Arguments], Any]:
    return lambda arguments: arguments[name]


def count(name: str) -> Callable[[Arguments], int]:
    return lambda arguments: len(arguments[name])


def by_split(name: str) -> Callable[[Arguments], tuple[str, Any]]:
    """An argument of `InMemoryCaptions` with the split, of which only the validation split is given a vocabulary."""
    return lambda arguments: ("training" if arguments["vocabulary"] is None else "validation", arguments[name])


def generator_seed(name: str) -> Callable[[Arguments], int]:
    return lambda arguments: arguments[name].initial_seed()


def dtype(name: str) -> Callable[[Arguments], torch.dtype]:
    """The dtype of a tensor, or of the first tensor in a tuple."""
    return lambda arguments: next(iter(arguments[name])).dtype


def autocast_dtype(arguments: Arguments) -> torch.dtype | None:
    return arguments["dtype"] if arguments["enabled"] else None


def trains_backbone(arguments: Arguments) -> bool | None:
    """Whether phase `stream` trains the captioner's image backbone; None in other phases."""
    captioner = getattr(arguments["module"], "captioner", None)
    return None if captioner is None else all(p.requires_grad for p in captioner.image_encoder.backbone.parameters())


def is_contiguous(arguments: Arguments) -> bool:
    """Whether the kernels of all networks of a step are contiguous rather than channels-last."""
    networks = arguments["state"]
    modules = [networks.network.module] if hasattr(networks, "network") else []
    if not modules:
        modules = [network.module for network in networks.networks().values()]
        modules += [networks.average.module, networks.redescription, networks.matching]
    kernels = [parameter for module in modules for parameter in module.parameters() if parameter.ndim == 4]
    assert any(kernel.shape[1] > 1 and kernel.shape[2] > 1 for kernel in kernels)
    return all(kernel.is_contiguous() for kernel in kernels)


def step_seed(phase: str) -> int:
    """Seed of the dropout of a phase."""
    return int(seeded(SEED, 5, PHASES.index(phase), 0).initial_seed())


def batch_seed(phase: str) -> int:
    return int(seeded(SEED, 6, PHASES.index(phase)).initial_seed())


def weight_seed(phase: str) -> int:
    """Seed of the initial weights of a phase."""
    return int(seeded(SEED, 7, PHASES.index(phase)).initial_seed())


def noise_seed() -> int:
    return int(seeded(SEED, 8, PHASES.index("glam")).initial_seed())


def in_phases(value: Any) -> dict[str, list[Any]]:
    return {phase: [value] for phase in PHASES}


def when_loading(*values: Any) -> dict[str, list[Any]]:
    """Values of the data, which are loaded for the training and again for the evaluation."""
    return {SETUP: list(values), EVALUATION: list(values)}


CASES: list[tuple[str, str, Callable[[Arguments], Any], dict[str, list[Any]]]] = [
    ("seed", "torch.manual_seed", argument("seed"), {SETUP: [weight_seed(phase) for phase in PHASES]}),
    ("seed", "torch.manual_seed", argument("seed"), {phase: [step_seed(phase)] for phase in PHASES}),
    ("seed", "engine.RepeatableBatches", argument("seed"), {phase: [batch_seed(phase)] for phase in PHASES}),
    ("seed", "loop.start", generator_seed("random"), {"glam": [noise_seed()]}),
    ("seed", "validation.r_precision", generator_seed("generator"), {p: [SEED] for p in ("stem", "glam", "evaluator")}),
    ("seed", "evaluation.generate_images", argument("seed"), {EVALUATION: [SEED]}),
    ("seed", "retrieval.r_precision_folds", generator_seed("generator"), {EVALUATION: [SEED]}),
    ("data", "batches.open_captions", lambda arguments: arguments["path"].rpartition("/")[2], when_loading("data")),
    ("data.source", "batches.open_captions", argument("source"), when_loading("folder")),
    ("data.on_error", "batches.open_captions", argument("on_error"), when_loading("skip")),
    (
        "data.augment",
        "batches.open_captions",
        lambda arguments: (arguments["split"], arguments["resolution"]),
        when_loading(("train", 19), ("validation", 16)),
    ),
    ("data.augment", "engine.RepeatableBatches", argument("crop"), in_phases(16)),
    ("data.training_images", "batches.InMemoryCaptions", count("dataset"), when_loading(24, 9)),
    ("data.held_out_share", "batches.draw_held_out", argument("share"), when_loading(0.3)),
    ("data.min_count", "batches.InMemoryCaptions", argument("min_count"), when_loading(2)),
    (
        "data.long_captions",
        "batches.InMemoryCaptions",
        by_split("long_captions"),
        when_loading(("training", "subsample"), ("validation", "cut")),
    ),
    ("model.max_words", "batches.InMemoryCaptions", argument("max_words"), when_loading(6)),
    ("engine.precision", "torch.autocast", autocast_dtype, in_phases(torch.bfloat16)),
    ("engine.precision", "step.balance_gradients", dtype("images"), {"glam": [torch.bfloat16]}),
    ("engine.precision", "step.discriminator_loss", dtype("real"), {"glam": [torch.bfloat16]}),
    ("engine.precision", "step.generator_loss", dtype("fake"), {"glam": [torch.bfloat16]}),
    ("engine.channels_last", "loop.matching_step", is_contiguous, {"stem": [True], "evaluator": [True]}),
    ("engine.channels_last", "loop.captioning_step", is_contiguous, {"stream": [True]}),
    ("engine.channels_last", "loop.adversarial_step", is_contiguous, {"glam": [True]}),
    (
        "engine.compile",
        "Module.compile",
        lambda arguments: type(arguments["self"]).__name__,
        {"glam": ["PairedDiscriminator", "ConditionedGenerator", "DiscriminatorPass"]},
    ),
    ("engine.deterministic", "torch.use_deterministic_algorithms", argument("mode"), {SETUP: [True, False]}),
    ("engine.loader_workers", "batches.DataLoader", argument("num_workers"), in_phases(1)),
    ("engine.cached_features_mib", "features.Cache.plan", argument("limit_mib"), {"glam": [33]}),
    ("engine.checkpoints_kept", "engine.Checkpoints", argument("kept"), in_phases(5)),
    ("steps", "engine.load_batches", argument("stop"), {**in_phases(1), "glam": [2]}),
    (
        "batch_size",
        "engine.RepeatableBatches",
        argument("batch_size"),
        {"stem": [9], "stream": [8], "glam": [6], "evaluator": [7]},
    ),
    (
        "learning_rate",
        "torch.optim.Adam",
        argument("lr"),
        {"stem": [0.011], "stream": [0.012], "glam": [0.013, 0.014], "evaluator": [0.015]},
    ),
    (
        "max_grad_norm",
        "nn.utils.clip_grads_with_norm_",
        argument("max_norm"),
        {"stem": [0.21], "stream": [0.22], "glam": [0.23], "evaluator": [0.24]},
    ),
    (
        "gamma_loss",
        "pretrain.contrastive_terms",
        argument("gamma_loss"),
        {"stem": [9.5], "glam": [9.5], "evaluator": [8.5]},
    ),
    ("word_pairs", "pretrain.word_region_similarity", count("regions"), {"stem": [3], "evaluator": [2]}),
    ("stream.accumulate", "pretrain.redescription_loss", count("tokens"), {"stream": [4]}),
    ("stream.train_backbone", "loop.start_pretraining", trains_backbone, {"stream": [True]}),
    ("glam.accumulate", "step.generate", lambda arguments: len(arguments["part"].noise), {"glam": [2]}),
    ("glam.average_decay", "state.MovingAverage", argument("decay"), {"glam": [0.77]}),
    ("glam.adversarial_objective", "step.discriminator_loss", argument("objective"), {"glam": ["hinge"]}),
    ("glam.adversarial_objective", "step.generator_loss", argument("objective"), {"glam": ["hinge"]}),
    ("glam.adversarial_weighting", "step.discriminator_loss", argument("weighting"), {"glam": ["release"]}),
    ("glam.adversarial_weighting", "step.generator_loss", argument("weighting"), {"glam": ["release"]}),
    ("glam.*_ratio", "step.balance_gradients", argument("ratios"), {"glam": [(1.0, 0.37, 0.41)]}),
    (
        "glam.redescription_reduction",
        "redescription.redescription_loss",
        argument("reduction"),
        {"glam": ["sentence"]},
    ),
    (
        "evaluation.candidates",
        "validation.r_precision",
        argument("candidates"),
        {phase: [5] for phase in ("stem", "glam", "evaluator")},
    ),
    ("evaluation.candidates", "retrieval.r_precision_folds", argument("candidates"), {EVALUATION: [5]}),
    ("evaluation.candidates", "evaluation.expected_hits", argument("candidates"), {EVALUATION: [5]}),
    ("evaluation.report_images", "validation.Unseen.spread", argument("count"), {EVALUATION: [4]}),
]


@pytest.mark.parametrize(
    ("function", "read", "expected"),
    [case[1:] for case in CASES],
    ids=[f"{option}-{function}" for option, function, *_ in CASES],
)
def test_an_option_of_train_reaches_its_function(spies, function, read, expected):
    values = spies.values(function, read)
    assert {stage: values.get(stage) for stage in expected} == expected


def test_options_of_drawn_flowers_and_max_skipped_steps(folder, tmp_path, monkeypatch, capsys):
    """Phase `stem` on drawn flowers, with NaN images: the run stops after the given number of skipped steps."""
    spies = Spies(monkeypatch)
    spies.watch("batches.SyntheticFlowers", batches)
    to_device = engine.to_device

    def poison(batch, device):
        batch = to_device(batch, device)
        return batch._replace(images=batch.images * float("nan"))

    monkeypatch.setattr(engine, "to_device", poison)
    options = ["--config", folder / "tiny.json", "--out", tmp_path / "run", "--device", "cpu", "--seed", SEED]
    options += ["--data.training-images", 25, "--data.validation-images", 14]
    options += ["--stem.steps", 5, "--engine.max-skipped-steps", 3, "--phases", "stem"]
    assert run_command("train", "demo", *options) == 2
    assert "3 consecutive steps up to step 3 had a non-finite value" in capsys.readouterr().err
    calls = [call.arguments for call in spies.calls["batches.SyntheticFlowers"]]
    assert [call["seed"] for call in calls] == [SEED, SEED]
    assert [call["size"] for call in calls] == [25, 14]


def test_options_of_generate_and_describe(spies, folder, tmp_path, monkeypatch):
    recorded = Spies(monkeypatch)
    recorded.watch("MirrorGAN.generate", MirrorGAN)
    recorded.watch("Captioner.search", Captioner)
    model, picture = folder / "run" / "model", write_image(tmp_path / "picture.png", 3)
    assert run_command("generate", model, "a red thing", "--out", tmp_path / "f.png", "--seed", 5) == 0
    assert run_command("describe", model, picture, "--beam-width", 2) == 0
    assert recorded.values("MirrorGAN.generate", lambda arguments: tuple(arguments["seed"])) == {SETUP: [(5,)]}
    assert recorded.values("Captioner.search", argument("beam_width")) == {SETUP: [2]}


@pytest.mark.parametrize(
    ("option", "called"), [("--fit-classifier", "fit_class_extractor"), ("--inception", "inception_extractor")]
)
def test_options_of_evaluate(spies, folder, monkeypatch, option, called):
    def fail(*_, **__):
        raise ValueError("not evaluated")

    recorded = Spies(monkeypatch)
    recorded.watch("fit_class_extractor", networks, instead=fail)
    recorded.watch("inception_extractor", networks, instead=fail)
    assert run_command("evaluate", folder / "run", "--device", "cpu", option) == 2
    assert [name for name, calls in recorded.calls.items() if calls] == [called]


def test_options_of_ablate(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("not trained")

    spies = Spies(monkeypatch)
    spies.watch("ablation.ablate", ablation, instead=fail)
    names = [cell.name for cell in ablation.ablation_cells()][1:3]
    options = ["--out", tmp_path, "--seeds", 4, 5, "--jobs", 2, "--cells", *names, "--device", "cpu"]
    assert run_command("ablate", *options, "--glam.steps", 9) == 2
    ((_, arguments),) = spies.calls["ablation.ablate"]
    assert [cell.name for cell in arguments["cells"]] == names
    assert (arguments["seeds"], arguments["jobs"], arguments["out"]) == ((4, 5), 2, tmp_path)
    assert arguments["recipe"].glam.steps == 9
