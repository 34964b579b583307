"""One step of the adversarial phase, in the order in which it happens: paint, judge, describe, descend, average."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mirror_modules.adversarial import discriminator_loss, generator_loss, mismatch
from mirror_modules.data import CaptionBatch, image_pyramid
from mirror_modules.stem import kl_divergence
from mirror_modules.stream import append_end, balance_gradients
from mirror_modules.training.recipes import AdversarialRecipe
from mirror_modules.training.state import AdversarialState, Painting
from mirror_modules.training.trainee import Outcome, autocast, untouched_unless


class Part(NamedTuple):
    """A part of the batch, with all that is drawn for it. A step has one part, or several to save memory."""

    real: list[Tensor]
    """Real images, coarse to fine."""
    words: Tensor
    sentence: Tensor
    tokens: Tensor
    word_mask: Tensor
    noise: Tensor
    condition_noise: Tensor
    wrong: Tensor | None
    """Rows that have a mismatched sentence; None if no part of any rank has one."""
    wrong_sentence: Tensor
    """That sentence, for these rows."""


def adversarial_step(state: AdversarialState, batch: CaptionBatch, recipe: AdversarialRecipe) -> Outcome:
    """Train discriminators and generator on one batch of real pairs."""
    resolutions, redescription = state.model.config.resolutions, state.redescription
    parts = set_up(state, batch, recipe)
    words_of_part = torch.stack([part.word_mask.sum() + len(part.word_mask) for part in parts])
    pairs_of_part = torch.tensor([0 if part.wrong is None else len(part.wrong) for part in parts])
    word_shares, pair_shares = state.world.shares(words_of_part), state.world.shares(pairs_of_part)
    penalize = recipe.r1_weight > 0 and state.steps_done % recipe.r1_every == 0
    losses: dict[str, Tensor] = {}

    networks = [trainee.module for trainee in state.trainees().values()]
    with untouched_unless(networks) as finite:
        # Paint. The graph of one part is kept for the generator; of several, each is painted again.
        with torch.set_grad_enabled(len(parts) == 1):
            paintings = [paint(state, part) for part in parts]

        # Judge: each discriminator learns from real, generated and mismatched pairs.
        for i, (judge, resolution) in enumerate(zip(state.judges, resolutions)):
            judge.optimizer.zero_grad()
            total = torch.zeros((), device=state.world.device)
            for j, (part, painting) in enumerate(zip(parts, paintings)):
                with judge.part(last=j == len(parts) - 1):
                    with autocast(state.engine, state.world.device):
                        fake = painting.images[i].detach()
                        verdicts = judge.parallel(
                            part.real[i], fake, part.sentence, part.wrong, part.wrong_sentence, penalize
                        )
                        loss = discriminator_loss(
                            *verdicts[:3],
                            weighting=recipe.adversarial_weighting,
                            objective=recipe.adversarial_objective,
                            mismatched_weight=pair_shares[j],
                        )
                    penalty = recipe.r1_every * recipe.r1_weight * verdicts.penalty
                    judge.backward((loss + penalty) / len(parts))
                total += (loss + penalty).detach() / len(parts)
            norm, good = judge.descend(total)
            finite.append(good)
            losses[f"discriminator_{resolution}"] = total
            losses[f"discriminator_gradient_norm_{resolution}"] = norm
            losses[f"accuracy_real_{resolution}"] = (verdicts.real.realism > 0).float().mean()
            losses[f"accuracy_generated_{resolution}"] = (verdicts.fake.realism < 0).float().mean()
            if len(verdicts.mismatched):
                losses[f"accuracy_mismatched_{resolution}"] = (verdicts.mismatched < 0).float().mean()

        # Describe, and judge the new images by the discriminators that have just learned.
        painter = state.painter
        painter.optimizer.zero_grad()
        for judge in state.judges:
            judge.module.requires_grad_(False)
        for j, (part, painting) in enumerate(zip(parts, paintings)):
            with painter.part(last=j == len(parts) - 1):
                if len(parts) > 1:
                    painting = paint(state, part)
                terms = {"kl": kl_divergence(painting.mean, painting.log_variance)}
                total = recipe.kl_weight * terms["kl"]
                *coarser, finest = painting.images
                judged, read = finest, finest
                if redescription is not None and recipe.redescription_ratio is not None:
                    judged, read = balance_gradients(finest, recipe.redescription_ratio)
                with autocast(state.engine, state.world.device):
                    for discriminator, resolution, image in zip(state.discriminators, resolutions, [*coarser, judged]):
                        loss = generator_loss(
                            discriminator(image, part.sentence),
                            weighting=recipe.adversarial_weighting,
                            objective=recipe.adversarial_objective,
                        )
                        terms[f"generator_{resolution}"] = loss
                        total = total + loss
                    if redescription is not None:
                        loss = redescription(read, *append_end(part.tokens, part.word_mask))
                        # A mean over words, of which the parts of a batch have different numbers.
                        share = word_shares[j] if recipe.redescription_reduction == "word" else 1.0
                        terms["redescription"] = share * loss
                        # With a ratio, balance_gradients has scaled it.
                        weight = 1.0 if recipe.redescription_weight is None else recipe.redescription_weight
                        total = total + weight * terms["redescription"]
                terms["generator_total"] = total
                painter.backward(total / len(parts))
            for name, term in terms.items():
                losses[name] = losses.get(name, 0) + term.detach() / len(parts)
        for judge in state.judges:
            judge.module.requires_grad_(True)

        # Descend.
        losses["generator_gradient_norm"], good = painter.descend(losses["generator_total"], finite)
        finite.append(good)

    # Average.
    whole = torch.stack(finite).all()
    state.average.update(painter.module, whole)
    state.steps_done += 1
    return Outcome(losses, whole)


def set_up(state: AdversarialState, batch: CaptionBatch, recipe: AdversarialRecipe) -> list[Part]:
    """Read the captions, and draw noise and mismatched pairs."""
    world, config, count = state.world, state.model.config, len(batch.images)
    words, sentence = state.text(batch)
    noise, condition_noise = state.draw(count, config.noise_dim), state.draw(count, config.condition_dim)
    # A partner may be with another rank.
    sentences = world.gather(sentence)
    partner, valid = mismatch(world.gather(batch.class_ids), generator=state.random)
    has_wrong = recipe.mismatched_pairs and bool(valid.any())
    partner, valid = world.rows(partner), world.rows(valid)
    real = image_pyramid(batch.images, config.resolutions)
    parts = []
    for rows in torch.arange(count).chunk(recipe.accumulate):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        wrong = valid[part].nonzero().flatten() if has_wrong else None
        theirs = partner[part][wrong] if wrong is not None else partner[:0]
        parts.append(
            Part(
                real=[images[part] for images in real],
                words=words[part],
                sentence=sentence[part],
                tokens=batch.tokens[part],
                word_mask=batch.word_mask[part],
                noise=noise[part],
                condition_noise=condition_noise[part],
                wrong=None if wrong is None else wrong.to(sentences.device, non_blocking=True),
                wrong_sentence=sentences[theirs.to(sentences.device, non_blocking=True)],
            )
        )
    return parts


def paint(state: AdversarialState, part: Part) -> Painting:
    """Generate images from the captions of a part."""
    network = state.painter.parallel if torch.is_grad_enabled() else state.painter.module
    with autocast(state.engine, state.world.device):
        return network(part.noise, part.condition_noise, part.words, part.sentence, part.word_mask)
