"""Saving and loading: safetensors and JSON, never pickle. A file appears whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mirror_modules.models.config import MirrorGANConfig
from mirror_modules.models.mirrorgan import MirrorGAN
from mirror_modules.stem import Vocabulary

FORMAT = "mirror-modules model 1"
CONFIG_FILE, VOCABULARY_FILE, WEIGHTS_FILE = "config.json", "vocabulary.json", "model.safetensors"


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: what stood there before is never half lost."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o644)
        flush_to_disk(Path(name))
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error}).") from error


def save_weights(module: nn.Module, path: Path) -> None:
    """Write the state of a Module as safetensors, whole or not at all.

    Raises:
        OSError: It cannot be written.
    """
    safetensors = _safetensors()
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    try:
        write_whole(path, lambda temporary: safetensors.torch.save_file(state, str(temporary)))
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def load_weights(module: nn.Module, path: Path) -> None:
    """Read the state of a Module from safetensors; on any error the Module stays as it was.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or its tensors do not fit.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected the weights of a {type(module).__name__}.")
    try:
        state = _safetensors().torch.load_file(str(path))
    except Exception as error:
        raise ValueError(f"{path} is damaged, or not a safetensors file ({error}); save the model again.") from error
    check_state(type(module).__name__, module, state, str(path))
    module.load_state_dict(state)


def check_state(owner: str, module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Require that a state has the names and shapes that the Module expects, and say which do not fit."""
    expected = module.state_dict()
    missing = [name for name in expected if name not in state]
    foreign = [name for name in state if name not in expected]
    if missing or foreign:
        raise ValueError(
            f"{owner}: {source} holds weights of something else: {len(missing)} tensors are missing"
            f"{_first(missing)}, {len(foreign)} are unknown{_first(foreign)}."
        )
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{owner}: {name} in {source} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}; "
                "the configuration or the vocabulary belongs to another model."
            )


def save_model(model: MirrorGAN, folder: str | Path) -> None:
    """Write config.json, vocabulary.json and model.safetensors."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "vocabulary_size": len(model.vocabulary), **model.config.to_dict()}
    # The weights first: if the disk fills up, it is here, and the model that stood in the folder is still whole.
    save_weights(model, folder / WEIGHTS_FILE)
    write_whole(folder / VOCABULARY_FILE, model.vocabulary.save)
    write_json(folder / CONFIG_FILE, content)


def load_model(folder: str | Path) -> MirrorGAN:
    """Read what `save_model` wrote."""
    folder = Path(folder)
    for name in (CONFIG_FILE, VOCABULARY_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is not a model folder: {name} is missing; expected a folder that save_pretrained or "
                "`mirror-modules train` wrote, such as runs/demo/model."
            )
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
    try:
        model = MirrorGAN(MirrorGANConfig.from_dict(fields), vocabulary)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} describes no model: {error}") from error
    load_weights(model, folder / WEIGHTS_FILE)
    return model.eval()


def _first(names: list[str]) -> str:
    return f" (such as {names[0]})" if names else ""


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("Model files need safetensors: pip install 'mirror-modules[hub]'") from error
    return safetensors
