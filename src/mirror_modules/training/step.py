"""One step of an adversarial phase: update the discriminators, the generator, and the generator's moving average."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mirror_modules.adversarial import (
    PairedLogits,
    discriminator_loss,
    generator_loss,
    mismatch,
    mode_seeking_loss,
)
from mirror_modules.adversarial.losses import WEIGHTINGS
from mirror_modules.data import CaptionBatch, image_pyramid
from mirror_modules.glam import color_consistency_loss
from mirror_modules.models import ModelConfig
from mirror_modules.stem import TextFeatures, interpolate_sentences, kl_divergence
from mirror_modules.stream import append_end, balance_gradients
from mirror_modules.training.network import StepResult, autocast, frozen, restoring_buffers
from mirror_modules.training.recipes import AdversarialRecipe
from mirror_modules.training.recipes.phases import SHARE_OF_PAIRS
from mirror_modules.training.state import AdversarialState, DiscriminatorOutputs, GeneratedBatch


class Part(NamedTuple):
    """A part of the batch with its random draws. A step has one part, or several to save memory."""

    real: list[Tensor]
    """Real images, coarse to fine."""
    words: Tensor
    sentence: Tensor
    tokens: Tensor
    word_mask: Tensor
    class_ids: Tensor
    """On the CPU."""
    location: Tensor | None
    """Where the subject of each image is; None for systems that do not read it."""
    noise: Tensor
    """Of the images, and after these of the images of mixed sentences, or of further images of the first captions."""
    condition_noise: Tensor
    is_mixed: bool
    """Whether the further images, if any, are of mixed sentences."""
    mismatched_rows: Tensor | None
    """Rows with a mismatched sentence; None if no part of any rank has one."""
    partners: Tensor
    """Of these rows, the rows of the whole batch whose sentences they take."""
    word_weight: Tensor
    """Weight of this part's mean over words within the mean over all words, see `ProcessGroup.mean_weights`."""
    pair_weight: Tensor
    """The same for mismatched pairs."""


def adversarial_step(state: AdversarialState, batch: CaptionBatch, recipe: AdversarialRecipe) -> StepResult:
    """Train discriminators and generator on one batch of real pairs."""
    state.set_stages(recipe)
    parts = divide(state, batch, recipe)
    with restoring_buffers([network.module for network in state.networks().values()]) as finite:
        # The graph of a single part is reused by the generator update; of several parts, each is generated again.
        with torch.set_grad_enabled(len(parts) == 1):
            generated = [generate(state, part) for part in parts]
        losses = update_discriminators(state, parts, generated, recipe, finite)
        losses |= update_generator(state, parts, generated, recipe, finite)
    all_finite = torch.stack(finite).all()
    update_average(state, all_finite)
    state.steps_done += 1
    return StepResult(losses, all_finite)


def update_discriminators(
    state: AdversarialState,
    parts: Sequence[Part],
    generated: Sequence[GeneratedBatch],
    recipe: AdversarialRecipe,
    finite: list[Tensor],
) -> dict[str, Tensor]:
    """Update each discriminator on real, generated and mismatched pairs; appends to the finiteness flags."""
    has_penalty = recipe.r1_weight > 0 and state.steps_done % recipe.r1_every == 0
    texts = [first_rows(fake.text, len(part.tokens)).detach() for part, fake in zip(parts, generated)]
    # The partner of a row may be in another part or on another rank.
    all_texts = state.group.all_gather(torch.cat(texts))
    losses: dict[str, Tensor] = {}
    networks, flags = state.discriminators[: state.stages], []
    for i, (network, resolution) in enumerate(zip(networks, state.resolutions)):
        network.optimizer.zero_grad()
        loss = torch.zeros((), device=state.group.device)
        for part, text, fake in zip(parts, texts, generated):
            with network.accumulation(last=part is parts[-1]):
                with autocast(state.engine, state.group.device):
                    outputs = network.parallel(
                        part.real[i],
                        first_rows(fake.images[i], len(text)).detach(),
                        text,
                        part.mismatched_rows,
                        all_texts[part.partners],
                        has_penalty,
                        part.location,
                    )
                    adversarial = discriminator_loss(
                        outputs.real,
                        outputs.fake,
                        mismatched_logits(outputs, part, state, recipe),
                        **adversarial_options(state, recipe),
                        mismatched_weight=part.pair_weight,
                    )
                part_loss = adversarial + recipe.r1_every * recipe.r1_weight * outputs.penalty
                network.backward(part_loss / len(parts))
            loss += part_loss.detach() / len(parts)
        norm, is_finite = network.clip_gradients(loss)
        flags.append(is_finite)
        losses[f"discriminator_{resolution}"] = loss
        losses[f"discriminator_gradient_norm_{resolution}"] = norm
        losses |= {f"{name}_{resolution}": accuracy for name, accuracy in accuracies(outputs).items()}
    # The flags of all discriminators are reduced together, so their updates wait for the last one.
    flags = list(state.group.all(torch.stack(flags)))
    for network, is_finite in zip(networks, flags):
        network.update_weights(is_finite)
    finite += flags
    return losses


def update_generator(
    state: AdversarialState,
    parts: Sequence[Part],
    generated: Sequence[GeneratedBatch],
    recipe: AdversarialRecipe,
    finite: list[Tensor],
) -> dict[str, Tensor]:
    """Update the generator against the discriminators just updated; appends to the finiteness flags."""
    losses: dict[str, Tensor] = {}
    state.generator.optimizer.zero_grad()
    with frozen(state.discriminators):
        for part, fake in zip(parts, generated):
            with state.generator.accumulation(last=part is parts[-1]):
                if len(parts) > 1:
                    fake = generate(state, part)
                terms = generator_terms(state, part, fake, recipe)
                state.generator.backward(terms["generator_total"] / len(parts))
            for name, term in terms.items():
                losses[name] = losses.get(name, 0) + term.detach() / len(parts)
    norm, is_finite = state.generator.optimizer_step(losses["generator_total"], finite)
    finite.append(is_finite)
    return {**losses, "generator_gradient_norm": norm}


def generator_terms(
    state: AdversarialState, part: Part, fake: GeneratedBatch, recipe: AdversarialRecipe
) -> dict[str, Tensor]:
    """The terms of the generator's loss, unweighted, and their weighted sum `generator_total`."""
    terms: dict[str, Tensor] = {}
    total = torch.zeros((), device=state.group.device)
    if fake.conditions:
        terms["kl"] = torch.stack([kl_divergence(each.mean, each.log_variance) for each in fake.conditions]).sum()
        total = recipe.kl_weight * terms["kl"]
    rows = len(part.tokens)
    for_discriminator, for_captioner, for_encoder, for_diversity = balance(
        fake.images[-1], recipe, recipe.fine_ratios if state.stages == len(state.resolutions) else 1.0
    )
    options = adversarial_options(state, recipe)
    scored = len(fake.text) if part.is_mixed else rows
    text, location = first_rows(fake.text, scored), [first_rows(each, scored) for each in location_of(part)]
    with autocast(state.engine, state.group.device):
        for discriminator, images in zip(state.paired_discriminators, [*fake.images[:-1], for_discriminator]):
            logits = discriminator(first_rows(images, scored), text, *location)
            of_captions, of_mixtures = split_logits(logits, rows)
            terms[f"generator_{discriminator.resolution}"] = loss = generator_loss(of_captions, **options)
            total = total + loss
            if of_mixtures is not None:
                terms[f"interpolation_{discriminator.resolution}"] = loss = generator_loss(of_mixtures, **options)
                total = total + recipe.interpolation_weight * loss
        if state.redescription is not None:
            described = as_learned(first_rows(for_captioner, rows), state.model.config, "captioner_backbone")
            redescription = state.redescription(described, *append_end(part.tokens, part.word_mask))
            # The parts of a batch have different numbers of words to average over.
            share = part.word_weight if recipe.redescription_reduction == "word" else 1.0
            terms["redescription"] = share * redescription
            # With a ratio, balance_gradients scales the gradient.
            weight = 1.0 if recipe.redescription_weight is None else recipe.redescription_weight
            total = total + weight * terms["redescription"]
        if state.matching is not None:
            encoded = as_learned(first_rows(for_encoder, rows), state.model.config, "image_backbone")
            captions = TextFeatures(part.words, part.sentence)
            terms["matching"] = state.matching(encoded, captions, part.word_mask, part.class_ids)
            total = total + (1.0 if recipe.matching_ratio else recipe.matching_weight) * terms["matching"]
    if recipe.diversity_ratio is not None and len(for_diversity) > rows:
        images, others = for_diversity.split([rows, len(for_diversity) - rows])
        terms["diversity"] = mode_seeking_loss(images, others, target=recipe.diversity_target)
        total = total + terms["diversity"]
    if recipe.color_weight > 0 and len(fake.images) > 1:
        pairs = pairwise(fake.images)
        terms["color"] = torch.stack([color_consistency_loss(fine, coarse) for coarse, fine in pairs]).sum()
        total = total + recipe.color_weight * terms["color"]
    return {**terms, "generator_total": total}


def as_learned(images: Tensor, config: ModelConfig, backbone: str) -> Tensor:
    """Images of a coarse stage at the size from which the network has learned, unless it resizes its input itself."""
    size = config.resolutions[-1]
    if images.shape[2] == size or getattr(config, backbone).input_size is not None:
        return images
    return F.interpolate(images, size=size, mode="bilinear")


def balance(images: Tensor, recipe: AdversarialRecipe, factor: float = 1.0) -> list[Tensor]:
    """The finest images for discriminator, captioner, matching encoder and diversity; those with a ratio are balanced.

    Ratios, times a factor, are fractions of the discriminator's gradient norm alone: losses with a weight do not change
    it.
    """
    given = [factor * ratio for ratio in recipe.ratios if ratio is not None]
    if not given:
        return [images] * (1 + len(recipe.ratios))
    for_discriminator, *balanced = balance_gradients(images, (1.0, *given))
    return [for_discriminator, *(images if ratio is None else balanced.pop(0) for ratio in recipe.ratios)]


def adversarial_options(state: AdversarialState, recipe: AdversarialRecipe) -> dict[str, Any]:
    """Weights of the adversarial terms, the recipe's or those of the system, and the objective."""
    weighting = recipe.adversarial_weighting or state.model.config.weighting(state.phase)
    return {"weighting": weighting, "objective": recipe.adversarial_objective}


def mismatched_logits(
    outputs: DiscriminatorOutputs, part: Part, state: AdversarialState, recipe: AdversarialRecipe
) -> Tensor | PairedLogits:
    """The consistency logits of mismatched pairs; with a weight for it, the realism of their real images as well."""
    weighting = adversarial_options(state, recipe)["weighting"]
    weights = WEIGHTINGS.get(weighting, weighting)
    if weights.mismatched_realism == 0 or part.mismatched_rows is None or outputs.real.realism is None:
        return outputs.mismatched
    return PairedLogits(outputs.real.realism[part.mismatched_rows], outputs.mismatched)


def accuracies(outputs: DiscriminatorOutputs) -> dict[str, Tensor]:
    """Share of real, generated and mismatched pairs with logits of the right sign; realism where there is one."""
    real, fake = (
        logits.consistency if logits.realism is None else logits.realism for logits in (outputs.real, outputs.fake)
    )
    found = {"accuracy_real": (real > 0).float().mean(), "accuracy_generated": (fake < 0).float().mean()}
    if len(outputs.mismatched):
        found["accuracy_mismatched"] = (outputs.mismatched < 0).float().mean()
    return found


def update_average(state: AdversarialState, finite: Tensor) -> None:
    """Update the moving average of the generator, unless the step was skipped."""
    state.average.update(state.generator.module, finite)


def divide(state: AdversarialState, batch: CaptionBatch, recipe: AdversarialRecipe) -> list[Part]:
    """Encode the captions, draw noise and mismatched pairs, and divide everything into the parts of the step."""
    group, config, count = state.group, state.model.config, len(batch.images)
    words, sentence = state.text(batch)
    noise, condition_noise = state.draw(count, config.noise_dim), state.draw(count, config.condition_noise_dim)
    ids = group.all_gather(torch.stack((batch.class_ids, batch.caption_ids), dim=1))
    partner, valid = mismatch(*ids.unbind(dim=1), generator=state.random)
    has_mismatched = recipe.mismatched_pairs and bool(valid.any())
    pairs_of_batch = valid.sum() if has_mismatched else torch.tensor(0)
    partner, valid = group.local_rows(partner), group.local_rows(valid)
    real = image_pyramid(batch.images, state.resolutions)
    location = state.model.locate(batch.boxes, batch.points, count)
    if location is not None:
        location = location.to(group.device, non_blocking=True)
    slices = [slice(int(rows[0]), int(rows[-1]) + 1) for rows in torch.arange(count).chunk(recipe.accumulate)]
    mismatched_of_part = [valid[rows].nonzero().flatten() if has_mismatched else None for rows in slices]
    # Each caption's end token counts as a word.
    words_of_part = torch.stack([batch.word_mask[rows].sum() + rows.stop - rows.start for rows in slices])
    pairs_of_part = torch.tensor([0 if rows is None else len(rows) for rows in mismatched_of_part])
    # Every rank has drawn the pairs of the whole batch, so their number needs no reduction.
    word_weights, pair_weights = group.mean_weights(words_of_part), group.mean_weights(pairs_of_part, pairs_of_batch)
    # Further images draw their noise after all others.
    share = 2 if recipe.interpolation_weight > 0 else SHARE_OF_PAIRS
    has_further = recipe.interpolation_weight > 0 or recipe.diversity_ratio is not None
    further = [(rows.stop - rows.start) // share if has_further else 0 for rows in slices]
    further_noise = state.draw(sum(further), config.noise_dim).split(further)
    further_condition_noise = state.draw(sum(further), config.condition_noise_dim).split(further)
    parts = []
    for i, rows in enumerate(slices):
        mismatched, device = mismatched_of_part[i], sentence.device
        partners = partner[:0] if mismatched is None else partner[rows][mismatched]
        parts.append(
            Part(
                real=[images[rows] for images in real],
                words=words[rows],
                sentence=sentence[rows],
                tokens=batch.tokens[rows],
                word_mask=batch.word_mask[rows],
                class_ids=batch.class_ids[rows],
                location=None if location is None else location[rows],
                noise=torch.cat((noise[rows], further_noise[i])),
                condition_noise=torch.cat((condition_noise[rows], further_condition_noise[i])),
                is_mixed=recipe.interpolation_weight > 0,
                mismatched_rows=None if mismatched is None else mismatched.to(device, non_blocking=True),
                partners=partners.to(device, non_blocking=True),
                word_weight=word_weights[i],
                pair_weight=pair_weights[i],
            )
        )
    return parts


def generate(state: AdversarialState, part: Part) -> GeneratedBatch:
    """Generate images from the captions of a part; where gradients are enabled, through the parallel wrapper.

    Further images follow in the same forward pass, and thus have the same batch statistics.
    """
    network = state.generator.parallel if torch.is_grad_enabled() else state.generator.module
    words, sentence, word_mask = part.words, part.sentence, part.word_mask
    if further := len(part.noise) - len(sentence):
        # Words and places of the first captions; of mixed sentences, those of the first of each pair.
        words, word_mask = torch.cat((words, words[:further])), torch.cat((word_mask, word_mask[:further]))
        others = interpolate_sentences(sentence) if part.is_mixed else sentence[:further]
        sentence = torch.cat((sentence, others))
    with autocast(state.engine, state.group.device):
        return network(part.noise, part.condition_noise, words, sentence, word_mask, *location_of(part))


def location_of(part: Part) -> tuple[Tensor, ...]:
    """The location of the subject of each generated image, in systems that read it."""
    if part.location is None:
        return ()
    further = len(part.noise) - len(part.location)
    return (torch.cat((part.location, part.location[:further])),)


def first_rows(tensor: Tensor, rows: int) -> Tensor:
    """The first rows; the tensor itself if it has no others."""
    return tensor if len(tensor) == rows else tensor[:rows]


def split_logits(logits: PairedLogits, rows: int) -> tuple[PairedLogits, PairedLogits | None]:
    """The logits of the first rows, and those of the others if any."""
    if len(logits.consistency) == rows:
        return logits, None
    realism, consistency = logits.realism, logits.consistency
    before, after = (None, None) if realism is None else (realism[:rows], realism[rows:])
    return PairedLogits(before, consistency[:rows]), PairedLogits(after, consistency[rows:])
