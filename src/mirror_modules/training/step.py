"""One step of the adversarial phase, in the order in which it happens: paint, judge, describe, descend, average."""

from __future__ import annotations

import torch
from torch import Tensor

from mirror_modules.adversarial import PairedDiscriminator, PairedLogits, discriminator_loss, generator_loss, mismatch
from mirror_modules.data.batching import CaptionBatch
from mirror_modules.data.transforms import image_pyramid
from mirror_modules.stem import kl_divergence
from mirror_modules.stream import append_end
from mirror_modules.training.recipes import AdversarialRecipe
from mirror_modules.training.state import AdversarialState


def adversarial_step(state: AdversarialState, batch: CaptionBatch, recipe: AdversarialRecipe) -> dict[str, Tensor]:
    """Train discriminators and generator on one batch of real pairs; returns the losses, detached."""
    model, config = state.model, state.model.config
    losses: dict[str, Tensor] = {}

    # Paint.
    real_images = image_pyramid(batch.images, config.resolutions)
    with torch.no_grad():
        words, sentence = model.text_encoder(batch.tokens, batch.word_mask)
    noise = _normal(state, len(words), config.noise_dim)
    condition_noise = _normal(state, len(words), config.condition_dim)
    condition = state.painter.conditioning(sentence, noise=condition_noise)
    images = state.painter.generator(noise, condition.sample, words, batch.word_mask).images

    # Judge: each discriminator learns from real, generated and mismatched pairs.
    partner, valid = mismatch(batch.class_ids, generator=state.random)
    wrong = valid.nonzero().flatten() if recipe.mismatched_pairs else valid.new_empty(0, dtype=torch.long)
    for discriminator, optimizer, real, image in zip(
        state.discriminators, state.discriminator_optimizers, real_images, images
    ):
        optimizer.zero_grad()
        verdicts = judge(discriminator, real, image.detach(), sentence, partner, wrong)
        loss = discriminator_loss(*verdicts, weighting=recipe.adversarial_weighting)
        loss.backward()
        optimizer.step()
        losses[f"discriminator_{real.shape[2]}"] = loss.detach()
        real_verdict, fake_verdict, _ = verdicts
        losses[f"realism_gap_{real.shape[2]}"] = (real_verdict.realism.mean() - fake_verdict.realism.mean()).detach()

    # Describe, and judge the new images by the discriminators that have just learned.
    state.painter_optimizer.zero_grad()
    total = recipe.kl_weight * kl_divergence(condition.mean, condition.log_variance)
    losses["kl"] = total.detach() / max(recipe.kl_weight, 1e-12)
    for discriminator, image in zip(state.discriminators, images):
        discriminator.requires_grad_(False)
        loss = generator_loss(discriminator(image, sentence), weighting=recipe.adversarial_weighting)
        losses[f"generator_{image.shape[2]}"] = loss.detach()
        total = total + loss
    if state.redescription is not None:
        loss = state.redescription(images[-1], *append_end(batch.tokens, batch.word_mask))
        losses["redescription"] = loss.detach()
        total = total + recipe.redescription_weight * loss

    # Descend.
    total.backward()
    state.painter_optimizer.step()
    for discriminator in state.discriminators:
        discriminator.requires_grad_(True)

    # Average.
    state.average.update_parameters(state.painter)
    losses["generator_total"] = total.detach()
    return losses


def judge(
    discriminator: PairedDiscriminator, real: Tensor, fake: Tensor, sentence: Tensor, partner: Tensor, wrong: Tensor
) -> tuple[PairedLogits, PairedLogits, Tensor]:
    """Judge real, generated and mismatched pairs; the features of the real images serve twice."""
    real_features, fake_features = discriminator.features(real), discriminator.features(fake)
    real_verdict = discriminator.judge(real_features, sentence)
    fake_verdict = discriminator.judge(fake_features, sentence)
    mismatched = real.new_empty(0)
    if len(wrong):
        mismatched = discriminator.judge(real_features[wrong], sentence[partner[wrong]]).consistency
    return real_verdict, fake_verdict, mismatched


def _normal(state: AdversarialState, *size: int) -> Tensor:
    device = state.model.device
    return torch.randn(*size, generator=state.random, device=state.random.device).to(device)
