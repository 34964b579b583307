"""Save and load weights and model folders: safetensors and JSON, never pickle."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from mirror_modules._files import read_json, write_json, write_whole
from mirror_modules.models.config import ModelConfig
from mirror_modules.stem import Vocabulary
from mirror_modules.stem.vocabulary import VOCABULARY_FILE

FORMAT = "mirror-modules model 1"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


def save_weights(module: nn.Module, path: Path) -> None:
    """Write the state of a Module to a safetensors file atomically.

    Raises:
        OSError: The file cannot be written.
    """
    safetensors = _safetensors()
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    try:
        write_whole(path, lambda temporary: safetensors.torch.save_file(state, str(temporary)))
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def load_weights(module: nn.Module, path: Path, *, parts: Collection[str] | None = None) -> None:
    """Load the state of a Module from a safetensors file; on any error the Module is unchanged.

    Args:
        module: Receives the state.
        path: The file.
        parts: First components of the names of the tensors that are read, such as "generator"; None reads all.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, or its tensors do not fit.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected the weights of a {type(module).__name__}.")
    try:
        with _safetensors().safe_open(str(path), framework="pt") as file:
            names = [name for name in file.keys() if parts is None or name.partition(".")[0] in parts]  # noqa: SIM118
            state = {name: file.get_tensor(name) for name in names}
    except Exception as error:
        raise ValueError(
            f"{path} is damaged, or not a safetensors file ({error}); restore it, or remove it and train or save again."
        ) from error
    check_state(type(module).__name__, module, state, str(path))
    module.load_state_dict(state)


def check_state(owner: str, module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Require that a state has the tensor names and shapes of the Module's own state.

    Raises:
        ValueError: A tensor is missing, unknown or of another shape; the message names it.
    """
    expected = module.state_dict()
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    if missing or unknown:
        raise ValueError(
            f"{owner}: {source} holds the weights of another module: {len(missing)} tensors are missing"
            f"{_first(missing)}, {len(unknown)} are unknown{_first(unknown)}."
        )
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{owner}: {name} in {source} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}; "
                "the configuration or the vocabulary belongs to another model."
            )


class SavedModel(NamedTuple):
    """Contents of a model folder, with the weights still on disk."""

    system: str
    """Name of the system."""
    config: dict[str, Any]
    """Fields of its configuration."""
    vocabulary: Vocabulary
    weights: Path
    """The safetensors file."""


def save_model(model: nn.Module, config: ModelConfig, vocabulary: Vocabulary, folder: str | Path) -> None:
    """Write config.json, vocabulary.json and model.safetensors."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "system": config.system, "vocabulary_size": len(vocabulary), **config.to_dict()}
    # Weights first: on a full disk this is the write that fails, and the previous model in the folder is still intact.
    save_weights(model, folder / WEIGHTS_FILE)
    write_whole(folder / VOCABULARY_FILE, vocabulary.save)
    write_json(folder / CONFIG_FILE, content)


def read_model_folder(folder: str | Path) -> SavedModel:
    """Read the configuration and the vocabulary of a folder that `save_model` wrote.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or the vocabulary belongs to another model.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, VOCABULARY_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a model folder: {name} is missing; {_hint(folder)}")
    fields = read_json(folder / CONFIG_FILE)
    if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
        raise ValueError(f"{folder / CONFIG_FILE} is not a {FORMAT!r} file; save the model again.")
    vocabulary = Vocabulary.load(folder / VOCABULARY_FILE)
    size = fields.pop("vocabulary_size", None)
    if size != len(vocabulary):
        raise ValueError(
            f"{folder / VOCABULARY_FILE} has {len(vocabulary)} entries but the model was saved with {size}; "
            "restore the vocabulary that belongs to these weights."
        )
    # Files without it were written before there were other systems.
    system = fields.pop("system", "mirrorgan")
    if not isinstance(system, str):
        raise ValueError(f"{folder / CONFIG_FILE} is not a valid model configuration: its system is {system!r}.")
    return SavedModel(system, fields, vocabulary, folder / WEIGHTS_FILE)


def _hint(folder: Path) -> str:
    """What to pass instead of a folder that holds no model: people pass the run's folder, or the weights."""
    for near in (folder / "model", folder.parent, folder.parent / "model"):
        if all((near / name).is_file() for name in (CONFIG_FILE, VOCABULARY_FILE, WEIGHTS_FILE)):
            return f"did you mean {near}?"
    return "expected a folder that save_pretrained or `mirror-modules train` wrote, such as runs/demo/model."


def _first(names: list[str]) -> str:
    return f" (such as {names[0]})" if names else ""


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("Model files need safetensors: pip install 'mirror-modules[hub]'") from error
    return safetensors
