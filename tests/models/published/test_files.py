"""Files of every torch version are read; damaged ones, and those that hold code, are refused."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

from mirror_modules.models.published import load_published
from tests.recordings import entries, read


class OldTensor:
    """Pickles like a tensor of torch before 0.4: without `requires_grad`."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __reduce__(self):
        sizes = (self.tensor.size(), self.tensor.stride())
        return torch._utils._rebuild_tensor, (self.tensor._typed_storage(), 0, *sizes)


@pytest.mark.parametrize("era", ["today", "before 1.6", "before 0.4"])
def test_files_of_every_torch_version_are_loaded(tmp_path, era):
    state = entries(read("text_encoder"), "state/")
    saved = {name: OldTensor(tensor) for name, tensor in state.items()} if era == "before 0.4" else state
    torch.save(saved, tmp_path / "text_encoder.pth", _use_new_zipfile_serialization=era == "today")
    loaded = load_published(tmp_path / "text_encoder.pth")
    assert loaded.keys() == state.keys()
    assert all(loaded[name].equal(state[name]) for name in state)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"netG\.pth does not exist; expected a published \.pth file"):
        load_published(tmp_path / "netG.pth")


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "netG.pth"
    torch.save({"weight": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"netG\.pth is damaged, or holds more than tensors"):
        load_published(path)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: torch.save(nn.Linear(2, 3), path), r"it refers to torch\.nn\.modules\.linear\.Linear"),
        (lambda path: torch.save({"weight": np.ones(3)}, path), r"it refers to numpy\."),
        (lambda path: torch.jit.save(torch.jit.script(nn.Linear(2, 3)), path), r"Cannot use .* TorchScript archives"),
        (lambda path: path.write_text("<html>Download quota exceeded</html>"), r"Weights only load failed"),
        (lambda path: path.write_bytes(b""), r"EOFError"),
    ],
)
def test_the_reason_has_no_color_codes_and_no_advice_to_load_unsafely(tmp_path, write, reason):
    write(tmp_path / "netG.pth")
    with pytest.raises(ValueError, match=rf"more than tensors \({reason}[^()]*\); download it again\.$") as caught:
        load_published(tmp_path / "netG.pth")
    assert str(caught.value).isprintable()
    assert "False" not in str(caught.value)
    assert "safe_globals" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "entry"),
    [
        ({"state_dict": {"weight": torch.ones(2)}, "epoch": 600}, "'state_dict': dict"),
        ({"weight": torch.ones(2), "epoch": 600}, "'epoch': int"),
        ({3: torch.ones(2)}, "3: Tensor"),
    ],
)
def test_the_first_entry_that_is_no_named_tensor_is_shown(tmp_path, content, entry):
    torch.save(content, tmp_path / "netG.pth")
    with pytest.raises(
        ValueError, match=f"holds a dict, expected a dict of tensors .* but it contains {entry}; if one"
    ):
        load_published(tmp_path / "netG.pth")


class Trap:
    def __reduce__(self):
        return print, ("code in a file was executed",)


def test_code_in_a_file_is_not_executed(tmp_path, capsys):
    path = tmp_path / "netG.pth"
    path.write_bytes(pickle.dumps(Trap(), protocol=2))
    with pytest.raises(ValueError, match=r"netG\.pth is damaged, or holds more than tensors"):
        load_published(path)
    torch.save({"weight": Trap()}, path)
    with pytest.raises(ValueError, match=r"netG\.pth is damaged, or holds more than tensors"):
        load_published(path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "kind"), [([torch.ones(2)], "list"), ({"epoch": 600}, "dict"), (torch.ones(2), "Tensor")]
)
def test_files_of_other_content_are_refused(tmp_path, content, kind):
    torch.save(content, tmp_path / "netG.pth")
    with pytest.raises(ValueError, match=f"holds a {kind}, expected a dict of tensors"):
        load_published(tmp_path / "netG.pth")
