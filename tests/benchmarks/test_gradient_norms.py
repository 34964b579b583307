import pytest
import torch
from torch.testing import assert_close

from benchmarks.gradient_norms import CHUNK, load_discriminator, main, measure
from mirror_modules import MirrorGAN, RedescriptionLoss
from mirror_modules.adversarial import generator_loss
from mirror_modules.functional import append_end
from mirror_modules.training.batches import load_splits
from mirror_modules.training.validation import generate_images, unseen_pairs


def test_the_norms_are_those_of_each_image_alone(tiny_run, monkeypatch):
    recipe, model = tiny_run.read_recipe(), MirrorGAN.from_pretrained(tiny_run.model)
    unseen = unseen_pairs(load_splits(recipe.data, recipe.model, recipe.seed), recipe.model.max_words).spread(5)
    assert CHUNK > 3
    monkeypatch.setattr("benchmarks.gradient_norms.CHUNK", 3)
    adversarial, redescription = measure(tiny_run, model, unseen, seed=7)
    discriminator, score = load_discriminator(tiny_run, model), RedescriptionLoss(model.captioner)
    images = generate_images(model, unseen.tokens, unseen.word_mask, 7)
    for i in range(5):
        tokens, word_mask = unseen.tokens[i : i + 1], unseen.word_mask[i : i + 1]
        image = images[i : i + 1].clone().requires_grad_(True)
        sentence = model.text_encoder(tokens, word_mask).sentence.detach()
        (gradient,) = torch.autograd.grad(generator_loss(discriminator(image, sentence)), image)
        assert_close(adversarial[i], gradient.norm(), rtol=1e-4, atol=1e-7)
        (gradient,) = torch.autograd.grad(score(image, *append_end(tokens, word_mask)), image)
        assert_close(redescription[i], gradient.norm(), rtol=1e-4, atol=1e-7)


def test_the_table_and_the_plot(tiny_run, tmp_path, monkeypatch, capsys):
    plot = tmp_path / "norms.png"
    monkeypatch.setattr("sys.argv", ["gradient_norms.py", str(tiny_run.path), "--images", "11", "--plot", str(plot)])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| adversarial", "| redescription", "| quotient"]
    assert all(line.split(" | ")[3] == "1.00" for line in lines[2:])
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_run_without_checkpoints_is_refused(run_copy):
    for path in run_copy.checkpoints.iterdir():
        path.unlink()
    with pytest.raises(SystemExit, match=r"has no checkpoint of phase glam, and so no discriminators; train it again"):
        load_discriminator(run_copy, MirrorGAN.from_pretrained(run_copy.model))
