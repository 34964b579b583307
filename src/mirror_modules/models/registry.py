"""The systems by name, as configurations, files and the command line name them."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, TypeVar

from mirror_modules.models.config import ModelConfig
from mirror_modules.stem import Vocabulary

if TYPE_CHECKING:
    from mirror_modules.models.text_to_image import TextToImage

SystemType = TypeVar("SystemType", bound="type[TextToImage]")
_SYSTEMS: dict[str, type[TextToImage]] = {}


def register_system(system: SystemType) -> SystemType:
    """Register a system by the name in its configuration, so that recipes, files and the command line know it.

    Use it as a decorator of the class.

    Args:
        system: The class, derived from `TextToImage`. Its `config_type` is a dataclass derived from `ModelConfig`,
            whose attribute `system` is the name.

    Returns:
        The class itself.

    Raises:
        ValueError: It is no such class, the configuration has no name, or the name belongs to another system.

    Examples:
        >>> from dataclasses import dataclass
        >>> from mirror_modules.models import AttnGAN, AttnGANConfig, get_system, register_system
        >>> @dataclass(frozen=True)
        ... class TwinConfig(AttnGANConfig):
        ...     system = "twin"
        >>> @register_system
        ... class Twin(AttnGAN):
        ...     config_type = TwinConfig
        >>> get_system("twin").__name__
        'Twin'
    """
    config_type = getattr(system, "config_type", None)
    if not isinstance(system, type) or not isinstance(config_type, type) or not issubclass(config_type, ModelConfig):
        given = f"the class {system.__name__}" if isinstance(system, type) else f"of the type {type(system).__name__}"
        raise ValueError(
            "register_system: expected a class derived from TextToImage, with a dataclass derived from ModelConfig as "
            f"config_type, but it is {given}, with config_type={config_type!r}."
        )
    if "__dataclass_params__" not in vars(config_type):
        # Without the decorator, defaults and fields of its own would be ignored.
        raise ValueError(
            f"register_system: {config_type.__name__} must be a dataclass itself; decorate it with "
            "@dataclass(frozen=True)."
        )
    name = config_type.system
    if not isinstance(name, str) or not name:
        raise ValueError(f"register_system: {config_type.__name__}.system must be the system's name, not {name!r}.")
    # A class that is defined again, as in a notebook, replaces the earlier one.
    if name in _SYSTEMS and _SYSTEMS[name].__qualname__ != system.__qualname__:
        raise ValueError(
            f"register_system: {name!r} is the name of {_SYSTEMS[name].__name__}; give {system.__name__} another "
            f"one, in {system.config_type.__name__}.system."
        )
    _SYSTEMS[name] = system
    return system


def get_system(name: str) -> type[TextToImage]:
    """A registered system.

    Args:
        name: "mirrorgan", "attngan" or another name in config.json.

    Raises:
        ValueError: No system of this name is registered.

    Examples:
        >>> from mirror_modules.models import get_system
        >>> get_system("attngan").__name__
        'AttnGAN'
    """
    if not isinstance(name, str) or name not in _SYSTEMS:
        close = get_close_matches(str(name), _SYSTEMS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else " Import the module that registers it."
        raise ValueError(f"unknown system {name!r}; there are {', '.join(_SYSTEMS)}.{hint}")
    return _SYSTEMS[name]


def build_model(config: ModelConfig, vocabulary: Vocabulary, *, pretrained: bool = True) -> TextToImage:
    """Build the system of a configuration.

    Args:
        config: Sizes and options; its type determines the system.
        vocabulary: See `TextToImage`.
        pretrained: See `TextToImage`.

    Raises:
        ValueError: The config is none, or its system is not registered; or as in `TextToImage`.
        FileNotFoundError: As in `TextToImage`.
        ImportError: As in `TextToImage`.

    Examples:
        >>> from mirror_modules import MirrorGANConfig, Vocabulary
        >>> from mirror_modules.models import build_model
        >>> config = MirrorGANConfig(channels=4, resolutions=(8,), captioner_backbone="conv")
        >>> type(build_model(config, Vocabulary.build(["a flower"]))).__name__
        'MirrorGAN'
    """
    if not isinstance(config, ModelConfig):
        raise ValueError(f"build_model: config must be that of a system, such as MirrorGANConfig(), not {config!r}.")
    return get_system(config.system)(config, vocabulary, pretrained=pretrained)
