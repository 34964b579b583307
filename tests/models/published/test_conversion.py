"""Published names become ours, and those that another part has are refused."""

import re

import pytest
import torch

from mirror_modules.models.published import (
    convert_captioner,
    convert_conditioning,
    convert_discriminator,
    convert_generator,
)
from tests.recordings import entries, read


def test_counters_are_kept_or_start_at_zero():
    state = {"img_code_s32_1.1.running_var": torch.ones(3)}
    assert convert_discriminator(state)["trunk.15.num_batches_tracked"].equal(torch.tensor(0))
    state["img_code_s32_1.1.num_batches_tracked"] = torch.tensor(41)
    assert convert_discriminator(state)["trunk.15.num_batches_tracked"].equal(torch.tensor(41))


def test_a_generator_state_holds_two_parts():
    state = entries(read("generator"), "state/")
    assert sorted(convert_conditioning(state)) == ["linear.bias", "linear.weight"]
    assert not any("ca_net" in name or name.startswith("linear") for name in convert_generator(state))


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(ValueError, match=re.escape("'img_net.img.0.weight' is unexpected")):
        convert_generator({"img_net1.img.0.weight": torch.ones(2), "img_net.img.0.weight": torch.ones(2)})


def test_a_number_below_the_first_is_refused():
    with pytest.raises(ValueError, match=re.escape("convert_captioner: 'cnn.resnet.3.weight' is unexpected")):
        convert_captioner({"resnet.3.weight": torch.ones(2)}, {})
