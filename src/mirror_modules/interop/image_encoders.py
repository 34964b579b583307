"""Image encoders of Hugging Face, timm and torchvision, and any Module, as image encoders of this package.

Shape suffixes: B batch, R regions, N tokens of an image model, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from mirror_modules._checks import (
    check_images,
    check_precision,
    shape_of,
)
from mirror_modules.interop.adapters import (
    FAILURES,
    Adapter,
    Pooling,
    arguments_of,
    check_module,
    check_pooling,
    choose_pooling,
    example_of,
    pool,
)
from mirror_modules.interop.pixels import Preprocess
from mirror_modules.stem import ImageFeatures

PROBE_SIZE = 224
"""Height and width of the image that measures a model, where neither the preprocessing nor the model fixes them."""


def image_encoder_from(
    model: nn.Module,
    image_processor: Any = None,
    *,
    image: Pooling | None = None,
    layer: int | None = None,
    prefix_tokens: int | None = None,
    trainable: bool = False,
) -> ImageEncoderAdapter:
    """Use an image encoder as a backbone of this package: `images in [-1, 1] -> ImageFeatures`, with gradients.

        pixels = preprocess(images)
        regions = positions of the last map, or tokens of the patches, in row-major order
        image = pooled output, its projection, or the mean of the regions

    - Hugging Face, such as `CLIPVisionModel`, `SiglipVisionModel`, `Dinov2Model`: `last_hidden_state`, and
      `pooler_output` as the pooled output.
    - timm: `forward_features`, and `forward_head(..., pre_logits=True)`.
    - torchvision and other classifiers that `torch.fx` can trace: the last map, or the tokens of a `VisionTransformer`,
      and the first vector after it.
    - any Module that returns a map (B, C, h, w) or tokens (B, N, C): its output, without a pooled one.
    - any Module that returns `ImageFeatures`: its regions and image.

    Of a `CLIPModel` or `SiglipModel`, the vision side is taken. Class and register tokens are no regions.

    Args:
        model: The image encoder. Unless `trainable`, it is frozen in place.
        image_processor: What to do with images before the model sees them: an image processor of Hugging Face (or a
            processor, which contains one), a data configuration of timm, a `Preprocess`, or any Module or function
            from images in [-1, 1] to pixel values. None takes the configuration that a timm model carries, ImageNet's
            mean and standard deviation at the images' own size for a torchvision model, and the images as they are for
            any other Module; models of Hugging Face need their image processor.
        image: "pooled" is the pooled output; "projection" is CLIP's projection of it to the space shared with text, not
            normalized; "mean" is the mean of the regions. None takes the first of these that the model has.
        layer: Of a timm model, the layer whose map gives the regions, counted as timm's `forward_intermediates` does,
            from 0, or from -1 backwards; None takes the last map.
        prefix_tokens: Number of tokens before those of the patches. None reads it from the model; a custom Module that
            returns tokens has none.
        trainable: Leave the parameters and the mode of the model to the caller instead of freezing them.

    Returns:
        The adapter; see `ImageEncoderAdapter`.

    Raises:
        ValueError: `model` is not an image encoder as above, its output is not finite, or it lacks the `image` or the
            `layer` asked for; `image` is unknown, or the image processor is missing or of an unknown kind.

    Examples:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from mirror_modules.interop import image_encoder_from
        >>> encoder = image_encoder_from(resnet18())
        >>> features = encoder(torch.rand(2, 3, 64, 96) * 2 - 1)
        >>> features.regions.shape, features.image.shape  # 2 x 3 regions
        (torch.Size([2, 6, 512]), torch.Size([2, 512]))
        >>> encoder.region_dim, encoder.image_dim, encoder.image_kind
        (512, 512, 'pooled')
    """
    return ImageEncoderAdapter(
        model, image_processor, image=image, layer=layer, prefix_tokens=prefix_tokens, trainable=trainable
    )


class ImageEncoderAdapter(Adapter):
    """An image encoder of another library as a backbone of this package; `image_encoder_from` builds it.

    Args:
        model: See `image_encoder_from`, as for the other arguments.
        image_processor: What to do with images before the model sees them.
        image: "pooled", "projection", "mean", or None for the first that the model has.
        layer: Of a timm model, the layer whose map gives the regions; None takes the last map.
        prefix_tokens: Number of tokens before those of the patches; None reads it from the model.
        trainable: Leave the parameters and the mode of the model to the caller.

    Attributes:
        model: The encoder itself; of a model of text and images, its vision side, and of a classifier, its trunk.
        preprocess: From images in [-1, 1] to pixel values.
        region_dim: Features D of a region.
        image_dim: Features D' of the image.
        image_kind: "pooled", "projection" or "mean".
        prefix_tokens: Number of tokens before those of the patches.

    Raises:
        ValueError: See `image_encoder_from`.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from mirror_modules import Captioner
        >>> from mirror_modules.interop import ImageEncoderAdapter
        >>> encoder = ImageEncoderAdapter(nn.Conv2d(3, 8, kernel_size=16, stride=16))
        >>> encoder(torch.rand(2, 3, 64, 96) * 2 - 1).regions.shape  # 4 x 6 regions
        torch.Size([2, 24, 8])
        >>> Captioner(encoder, vocabulary_size=50)(torch.zeros(2, 3, 64, 96), torch.tensor([[5, 9], [8, 1]])).shape
        torch.Size([2, 2, 50])
    """

    def __init__(
        self,
        model: nn.Module,
        image_processor: Any = None,
        *,
        image: Pooling | None = None,
        layer: int | None = None,
        prefix_tokens: int | None = None,
        trainable: bool = False,
    ) -> None:
        super().__init__(trainable)
        owner = "image_encoder_from"
        check_pooling(owner, "image", image)
        check_module(owner, model)
        # Hugging Face wraps models of timm.
        model = getattr(model, "timm_model", model)
        self._read = _reader_of(owner, model)
        if layer is not None:
            self._read = _layer_reader_of(owner, model, layer)
        self.preprocess = _preprocess_of(owner, model, image_processor)
        self.model: nn.Module = getattr(model, "vision_model", model)
        if isinstance(self.preprocess, nn.Module):
            self.preprocess.to(example_of(self.model).device)
        self.projection: nn.Module | None = getattr(model, "visual_projection", None)
        if not trainable:
            self._freeze()
        with self._probing(self.model):
            output, pixels = self._measure(owner, model)
            own_tokens = _own_prefix_tokens(self._read, self.model, output.features, pixels)
            self.prefix_tokens = _check_prefix_tokens(owner, model, output.features, own_tokens, prefix_tokens)
            if prefix_tokens is None and self._read in (_read_huggingface, _read_timm):
                _check_grid(owner, model, output.features, own_tokens, pixels)
            regions = _regions_of(output.features, self.prefix_tokens)
            self.image_kind = choose_pooling(owner, "image", image, model, output.pooled, self.projection)
            image_feature = pool(self.image_kind, regions, output.pooled, self.projection)
        if self.image_kind != "projection":
            self.projection = None
        self.region_dim, self.image_dim = regions.shape[2], image_feature.shape[1]

    def forward(self, images: Tensor) -> ImageFeatures:
        """Encode images.

        Args:
            images: In [-1, 1], (B, 3, H, W), of any size that the preprocessing or the model takes.

        Returns:
            Regions (B, R, D) and image (B, D').

        Raises:
            ValueError: `images` are not floats (B, 3, H, W) in the precision and on the device of the weights.
        """
        check_images("ImageEncoderAdapter", images)
        check_precision("ImageEncoderAdapter", self.model, images=images)
        weight = next(self.model.parameters(), None)
        if weight is not None and weight.device != images.device:
            raise ValueError(
                f"ImageEncoderAdapter: images are on {images.device}, but the weights of the "
                f"{type(self.model).__name__} are on {weight.device}; move one of them with .to(device)."
            )
        self._keep_frozen()
        # `Preprocess` computes in float32.
        features, pooled = self._read(self.model, self.preprocess(images).to(images.dtype))
        regions = _regions_of(features, self.prefix_tokens)
        return ImageFeatures(regions, pool(self.image_kind, regions, pooled, self.projection))

    def _measure(self, owner: str, model: nn.Module) -> tuple[_Output, Tensor]:
        """Run the model on blank images; a classifier is replaced by its trunk."""
        size = _input_size_of(model) or (PROBE_SIZE, PROBE_SIZE)
        # Two images, because a batch of one looks like other tensors in the graph of a classifier.
        images = example_of(self.model).new_zeros(2, 3, *size)
        pixels = self.preprocess(images)
        if not isinstance(pixels, Tensor) or pixels.ndim < 2 or len(pixels) != len(images):
            came = shape_of(pixels) if isinstance(pixels, Tensor) else f"a {type(pixels).__name__}"
            raise ValueError(
                f"{owner}: image_processor must turn images {shape_of(images)} into pixel values of as many images, "
                f"such as (B, C, H, W), but it returned {came}."
            )
        pixels = pixels.to(images.dtype)
        try:
            output = self._read(self.model, pixels)
            is_vector = _is_of_batch(output.features, pixels) and output.features.ndim == 2 and output.pooled is None
            if is_vector and self._read is _read_module:
                self.model, self._read = _trunk_of(self.model, pixels), _read_trunk
                output = self._read(self.model, pixels)
        except FAILURES as error:
            raise ValueError(
                f"{owner}: model must be an image encoder that takes pixel values (B, 3, H, W), but "
                f"{type(model).__name__} failed on {shape_of(pixels)}; if it takes another size, pass an "
                f"image_processor with that size. The error: {error}"
            ) from error
        if not isinstance(output.features, Tensor) or output.features.ndim not in (3, 4):
            kind = type(output.features).__name__
            came = shape_of(output.features) if isinstance(output.features, Tensor) else f"a {kind}"
            raise ValueError(
                f"{owner}: the model {type(model).__name__} must return a map (B, C, h, w), tokens (B, N, C) or "
                f"ImageFeatures, but it returned {came}; wrap it in a Module that does."
            )
        _check_output(owner, model, output, len(images))
        computed = [output.features] if output.pooled is None else [output.features, output.pooled]
        if output.features.device.type != "meta" and not all(bool(each.isfinite().all()) for each in computed):
            raise ValueError(
                f"{owner}: the features that {type(model).__name__} computes of blank images are not all finite; its "
                "weights are damaged, or not yet loaded, or its precision is too low."
            )
        return output, pixels


def _check_output(owner: str, model: nn.Module, output: _Output, count: int) -> None:
    """Require float features of `count` images, with at least one position, and a vector of each as pooled output."""
    features, pooled = output
    if not features.is_floating_point() or len(features) != count or features.numel() == 0:
        raise ValueError(
            f"{owner}: the model {type(model).__name__} must return floats of each image, with at least one position, "
            f"but of {count} images it returned {features.dtype} {shape_of(features)}."
        )
    if pooled is not None and (not isinstance(pooled, Tensor) or pooled.ndim != 2 or len(pooled) != count):
        came = shape_of(pooled) if isinstance(pooled, Tensor) else f"of the type {type(pooled).__name__}"
        raise ValueError(
            f"{owner}: the image feature that the model {type(model).__name__} returns must be (B, D), but of {count} "
            f"images it is {came}."
        )


class _Output(NamedTuple):
    """What an image encoder returns of a batch of pixel values."""

    features: Tensor
    """A map (B, C, h, w) or tokens (B, N, C)."""
    pooled: Tensor | None
    """One feature per image, (B, D); None if the model has none."""


Reader = Callable[[nn.Module, Tensor], _Output]


def _read_huggingface(model: nn.Module, pixels: Tensor) -> _Output:
    output = model(pixel_values=pixels)
    pooled = getattr(output, "pooler_output", None)
    # Convolutional networks return (B, D, 1, 1).
    return _Output(output.last_hidden_state, None if pooled is None else pooled.flatten(1))


def _read_timm(model: Any, pixels: Tensor) -> _Output:
    features = model.forward_features(pixels)
    pooled = model.forward_head(features, pre_logits=True)
    if features.ndim == 4 and getattr(model, "output_fmt", "NCHW") == "NHWC":
        features = features.permute(0, 3, 1, 2)
    # With `global_pool=""`, the head does not pool.
    return _Output(features, pooled if pooled.ndim == 2 else None)


@dataclass(frozen=True)
class _ReadTimmLayer:
    """Reads the regions from one layer of a timm model, and the pooled output after the last."""

    layer: int

    def __call__(self, model: Any, pixels: Tensor) -> _Output:
        last, maps = model.forward_intermediates(pixels, indices=[self.layer], output_fmt="NCHW")
        pooled = model.forward_head(last, pre_logits=True)
        return _Output(maps[0], pooled if pooled.ndim == 2 else None)


def _layer_reader_of(owner: str, model: nn.Module, layer: int) -> Reader:
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise ValueError(f"{owner}: layer must be a whole number, or None for the last map, but it is {layer!r}.")
    if not _is_timm(model) or not hasattr(model, "forward_intermediates"):
        raise ValueError(
            f"{owner}: layer={layer} needs a timm model with `forward_intermediates`, which {type(model).__name__} is "
            "not; use layer=None, or pass a Module that returns the map."
        )
    layers = len(getattr(model, "feature_info", ()) or ())
    if layers and not -layers <= layer < layers:
        raise ValueError(
            f"{owner}: layer must be from {-layers} to {layers - 1} for {type(model).__name__}, but it is {layer}."
        )
    return _ReadTimmLayer(layer)


def _read_module(model: nn.Module, pixels: Tensor) -> _Output:
    output = model(pixels)
    if hasattr(output, "regions") and hasattr(output, "image"):
        return _Output(output.regions, output.image)
    return _Output(output, None)


def _read_trunk(model: nn.Module, pixels: Tensor) -> _Output:
    output = model(pixels)
    return _Output(output["features"], output.get("pooled"))


def _reader_of(owner: str, model: nn.Module) -> Reader:
    """The function that runs a model: by its methods and arguments, not its class, so that no library is imported."""
    if _is_timm(model):
        return _read_timm
    vision = getattr(model, "vision_model", model)
    arguments = arguments_of(vision)
    if "input_ids" in arguments:
        raise ValueError(
            f"{owner}: model must be an image encoder, but {type(model).__name__} takes `input_ids`; for a text "
            "encoder, use text_encoder_from."
        )
    # A wrapper of a model, such as a compiled one, has its configuration but not its arguments.
    is_of_huggingface = "pixel_values" in arguments or hasattr(getattr(vision, "config", None), "model_type")
    return _read_huggingface if is_of_huggingface else _read_module


def _is_timm(model: nn.Module) -> bool:
    return hasattr(model, "forward_features") and hasattr(model, "forward_head")


def _is_of_torchvision(model: nn.Module) -> bool:
    return any(base.__module__.startswith("torchvision.models.") for base in type(model).__mro__)


def _preprocess_of(owner: str, model: nn.Module, image_processor: Any) -> Any:
    """The function or Module from images in [-1, 1] to the pixel values that a model takes."""
    if image_processor is None:
        return _default_preprocess_of(owner, model)
    image_processor = getattr(image_processor, "image_processor", image_processor)
    if isinstance(image_processor, dict):
        return Preprocess.of_timm(image_processor)
    if hasattr(image_processor, "model_input_names"):
        return Preprocess.of_processor(image_processor)
    if not callable(image_processor):
        raise ValueError(
            f"{owner}: image_processor must be an image processor of Hugging Face, a data configuration of timm, a "
            f"Preprocess, or another function of images, but it is a {type(image_processor).__name__}."
        )
    return image_processor


def _default_preprocess_of(owner: str, model: nn.Module) -> Any:
    if _is_timm(model):
        config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
        if not config:
            raise ValueError(f"{owner}: {type(model).__name__} has no pretrained_cfg; pass an image_processor.")
        size = _input_size_of(model)
        return Preprocess.of_timm(config if size is None else {**config, "input_size": (3, *size)})
    if _reader_of(owner, model) is _read_huggingface:
        raise ValueError(
            f"{owner}: image_processor is needed for {type(model).__name__}, because the model does not know the size, "
            "mean and standard deviation of its images; pass AutoImageProcessor.from_pretrained(...)."
        )
    return Preprocess.imagenet(_input_size_of(model)) if _is_of_torchvision(model) else nn.Identity()


def _input_size_of(model: nn.Module) -> tuple[int, int] | None:
    """The height and width that a model requires; None if it does not say."""
    config = getattr(getattr(model, "vision_model", model), "config", None)
    patches = getattr(model, "patch_embed", None)
    for owner, name in ((patches, "img_size"), (config, "image_size"), (model, "image_size")):
        size = getattr(owner, name, None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, Sequence) and len(size) == 2:
            return int(size[0]), int(size[1])
    return None


def _trunk_of(model: nn.Module, pixels: Tensor) -> nn.Module:
    """A classifier up to its last map or tokens, and to the first vector (B, D) after them."""
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    quiet = {"suppress_diff_warning": True}
    train_names, names = get_graph_node_names(model, **quiet)
    # All nodes but the input.
    nodes = {name: name for name in names[1:]}
    everything = create_feature_extractor(
        model, train_return_nodes={train_names[-1]: "output"}, eval_return_nodes=nodes, **quiet
    )
    values = {name: value for name, value in everything.eval()(pixels).items() if _is_of_batch(value, pixels)}
    maps = [name for name, value in values.items() if value.ndim == 3 or _is_map(value)]
    if not maps:
        raise ValueError(f"{type(model).__name__} has no layer that returns a map (B, C, h, w) or tokens (B, N, C).")
    after = list(values)[list(values).index(maps[-1]) + 1 :]
    # The output itself is one.
    vector = next(name for name in after if values[name].ndim == 2)
    channels = _regions_of(values[maps[-1]], 0).shape[2]
    # A vector of another size is a map that was flattened without pooling, as in VGG.
    pooled = {vector: "pooled"} if values[vector].shape[1] == channels else {}
    return create_feature_extractor(model, {maps[-1]: "features", **pooled}, **quiet)


def _is_map(value: Tensor) -> bool:
    # Pooled maps are (B, C, 1, 1), or (B, 1, 1, C) inside a normalization.
    return value.ndim == 4 and value.shape[1] > 1 and value.shape[2:].numel() > 1


def _is_of_batch(value: object, pixels: Tensor) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape[:1] == pixels.shape[:1]


def _own_prefix_tokens(read: Reader, model: nn.Module, features: Tensor, pixels: Tensor) -> int:
    """The number of tokens before those of the patches, such as class and register tokens, as the model has them."""
    if features.ndim == 4:
        return 0
    if read is _read_timm:
        return int(getattr(model, "num_prefix_tokens", 0))
    if read is _read_trunk:
        return int(isinstance(getattr(model, "class_token", None), Tensor))
    patch = getattr(getattr(model, "config", None), "patch_size", None)
    if read is not _read_huggingface or patch is None:
        return 0
    height, width = (patch, patch) if isinstance(patch, int) else patch
    patches = (pixels.shape[2] // height) * (pixels.shape[3] // width)
    # Models that merge patches have fewer tokens and none before them.
    return max(0, features.shape[1] - patches)


def _check_prefix_tokens(owner: str, model: nn.Module, features: Tensor, own: int, given: int | None) -> int:
    if given is None:
        return own
    most = 0 if features.ndim == 4 else features.shape[1] - 1
    if not isinstance(given, int) or not 0 <= given <= most:
        raise ValueError(
            f"{owner}: prefix_tokens must be a whole number from 0 to {most}, because {type(model).__name__} returns "
            f"{'a map' if features.ndim == 4 else 'tokens'} {shape_of(features)}, but it is {given!r}."
        )
    return given


def _check_grid(owner: str, model: nn.Module, features: Tensor, prefix_tokens: int, pixels: Tensor) -> None:
    """Require that the tokens of a square image form a square, or else some of them are no patches."""
    regions = features.shape[1] - prefix_tokens
    is_square = pixels.shape[2] == pixels.shape[3]
    if features.ndim == 3 and is_square and (regions < 2 or math.isqrt(regions) ** 2 != regions):
        raise ValueError(
            f"{owner}: {type(model).__name__} returns tokens {shape_of(features)}, of which not all are patches; pass "
            "the number of those before the patches as prefix_tokens."
        )


def _regions_of(features: Tensor, prefix_tokens: int) -> Tensor:
    """Positions of a map (B, C, h, w) in row-major order, or tokens (B, N, C) without those before the patches."""
    return features.flatten(2).mT if features.ndim == 4 else features[:, prefix_tokens:]
