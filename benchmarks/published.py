"""The published formulations, implemented from their equations: two operations and one adversarial training step.

The operations and the step are mathematically equal to ours, with the same weights: the tests show equal results and
gradients. They differ in the computation:

- word attention: positions become rows (B * N, L) through transposed copies; in a training step, the caption masks are
  repeated in an order that assigns masks of other captions to rows (hidden if all captions have equal lengths);
- sentence attention: the sentence is repeated over all positions;
- doubling of maps: nearest-neighbor upsampling, and a 3x3 convolution of the larger map (`use_published_convolutions`);
- similarity of regions and words: a loop over captions, each cut to its real words and repeated for all images;
- discriminators: a probability from each head, each loss term separately, with cross entropy on probabilities;
- mismatched pairs: each real image except the last with the next caption;
- generator: by default, the backward pass also computes gradients of the discriminators' weights, which are discarded.
  Freezing the discriminators (`hold_discriminators`) is the stronger baseline.

Neither side includes the captioner, which would be the same network on both, nor the matching loss of the encoders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mirror_modules import GlobalLocalAttention, GlobalLocalContext, MirrorGAN, PairedDiscriminator
from mirror_modules._checks import at_least_float32
from mirror_modules.glam.stages import DoublingConv2d, RefinementStage, UpBlock

if TYPE_CHECKING:  # the operations are also measured without the packages for training
    from mirror_modules.data.in_memory import CaptionBatch
    from mirror_modules.training.recipes import AdversarialRecipe
    from mirror_modules.training.state import AdversarialState


def published_attention(
    features: Tensor,
    words: Tensor,
    sentence: Tensor,
    row_mask: Tensor | None = None,
    *,
    score_matrix: Tensor | None = None,
) -> GlobalLocalContext:
    """Word and sentence attention of a stage, with all attention weights.

    Args:
        features: Image features, (B, C, H, W).
        words: Word features already projected to the image channels, (B, L, C).
        sentence: Sentence feature already projected to the image channels, (B, C).
        row_mask: True for a real word, (B * H * W, L): one row per position, image by image. The published code repeats
            the caption masks in another order, `word_mask.repeat(H * W, 1)`, which is wrong if captions differ in
            length; the correct one is `word_mask.repeat_interleave(H * W, dim=0)`.
        score_matrix: Mixes the sentence scores over channels before the softmax, (C, C).
    """
    batch, channels, height, width = features.shape
    positions, length = height * width, words.shape[1]

    word_values = words.mT
    queries = features.view(batch, channels, positions).transpose(1, 2).contiguous()
    scores = torch.bmm(queries, word_values).view(batch * positions, length)
    if row_mask is not None:
        scores = scores.masked_fill(~row_mask, float("-inf"))
    weights = torch.softmax(scores, dim=1).view(batch, positions, length).transpose(1, 2).contiguous()
    word_context = torch.bmm(word_values, weights).view(batch, channels, height, width)

    sentence = sentence.view(batch, channels, 1, 1).repeat(1, 1, height, width)
    sentence_scores = features * sentence
    if score_matrix is not None:
        sentence_scores = F.conv2d(sentence_scores, score_matrix[:, :, None, None])
    sentence_weights = torch.softmax(sentence_scores, dim=1)
    return GlobalLocalContext(
        word_context, sentence * sentence_weights, weights.view(batch, length, height, width), sentence_weights
    )


def published_similarity(
    regions: Tensor,
    words: Tensor,
    word_mask: Tensor,
    *,
    gamma_attention: float = 4.0,
    gamma_word: float = 5.0,
    copies: bool = True,
) -> Tensor:
    """Similarity of every image with every caption, (I, J), in a loop over captions.

    Args:
        regions: Region features, (I, R, D).
        words: Word features, (J, L, D).
        word_mask: True for a real word, (J, L); the real words come first.
        gamma_attention: Sharpness of the attention over regions.
        gamma_word: Weight of the best matching words.
        copies: Copy transposed tensors for each caption, as published; autograd retains the copies. Without copies the
            loop is otherwise the same, and a stronger baseline.
    """

    def transposed(tensor: Tensor) -> Tensor:
        return tensor.mT.contiguous() if copies else tensor.mT

    images, count, _ = regions.shape
    maps = regions.mT.contiguous() if copies else regions.mT  # (I, D, R), the layout of the image encoder
    columns = []
    for caption, length in zip(words, word_mask.sum(dim=1).tolist()):
        word = caption[:length].mT.repeat(images, 1, 1)
        share = torch.softmax(torch.bmm(transposed(maps), word).view(images * count, length), dim=1)
        share = share.view(images, count, length).transpose(1, 2).contiguous().view(images * length, count)
        attention = torch.softmax(share * gamma_attention, dim=1).view(images, length, count)
        context = transposed(torch.bmm(maps, transposed(attention)))
        word = transposed(word)
        lengths = (word.norm(dim=2) * context.norm(dim=2)).clamp_min(1e-8)
        cosine = (word * context).sum(dim=2) / lengths
        columns.append((cosine * gamma_word).exp().sum(dim=1, keepdim=True).log())
    return torch.cat(columns, dim=1)


class PublishedAttention(GlobalLocalAttention):
    """`GlobalLocalAttention` in the published formulation, with the same parameters; always returns the weights."""

    def forward(
        self,
        features: Tensor,
        words: Tensor,
        condition: Tensor,
        word_mask: Tensor | None = None,
        *,
        need_weights: bool = False,
    ) -> GlobalLocalContext:
        positions = features.shape[2] * features.shape[3]
        word_values = F.conv2d(words.mT.unsqueeze(3), self.word_projection.weight[:, :, None, None]).squeeze(3)
        return published_attention(
            features,
            word_values.mT,
            self.sentence_projection(condition),
            # The published order of masks, see `published_attention`.
            None if word_mask is None else word_mask.repeat(positions, 1),
            score_matrix=None if self.score_projection is None else self.score_projection.weight,
        )


def use_published_attention(model: MirrorGAN) -> MirrorGAN:
    """Replace the attention of each generator stage by `PublishedAttention` with the same weights."""
    for stage in model.generator.refinements:
        if not isinstance(stage, RefinementStage) or not isinstance(stage.attention, GlobalLocalAttention):
            raise ValueError("use_published_attention: the model must be built with attention='global-local'.")
        ours = stage.attention
        published = PublishedAttention(
            ours.feature_dim,
            ours.word_dim,
            ours.condition_dim,
            sentence_bias=ours.sentence_projection.bias is not None,
            score_projection=ours.score_projection is not None,
        )
        published.load_state_dict(ours.state_dict())
        stage.attention = published
    return model


class PublishedDoubling(DoublingConv2d):
    """`DoublingConv2d` in the published formulation, with the same parameter."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(F.interpolate(input, scale_factor=2.0, mode="nearest"), self.weight, padding=1)


def use_published_convolutions(model: MirrorGAN) -> MirrorGAN:
    """Replace each doubling convolution of the generator by `PublishedDoubling` with the same weights."""
    for block in [part for part in model.generator.modules() if isinstance(part, UpBlock)]:
        published = PublishedDoubling(block.conv.in_channels, block.conv.out_channels)
        published.load_state_dict(block.conv.state_dict())
        block.conv = published
    return model


def realism(discriminator: PairedDiscriminator, features: Tensor) -> Tensor:
    """Probability that an image is real, (B,)."""
    head = discriminator.realism_head
    return _probability(F.conv2d(features, head.weight, head.bias))


def consistency(discriminator: PairedDiscriminator, features: Tensor, sentence: Tensor) -> Tensor:
    """Probability that image and sentence match, (B,)."""
    sentence_map = sentence.view(len(sentence), -1, 1, 1).repeat(1, 1, *features.shape[2:])
    convolution, norm, activation = discriminator.joint
    joint = F.conv2d(torch.cat((features, sentence_map), dim=1), convolution.weight, padding=1)
    head = discriminator.consistency_head
    return _probability(F.conv2d(activation(norm(joint)), head.weight, head.bias))


def published_discriminator_loss(
    discriminator: PairedDiscriminator, real: Tensor, fake: Tensor, sentence: Tensor
) -> Tensor:
    """Mean of the two terms with target 1 plus mean of the three terms with target 0."""
    real_features, fake_features = discriminator.features(real), discriminator.features(fake)
    consistent_real = _accept(consistency(discriminator, real_features, sentence))
    consistent_fake = _reject(consistency(discriminator, fake_features, sentence))
    consistent_wrong = _reject(consistency(discriminator, real_features[:-1], sentence[1:]))
    realistic_real = _accept(realism(discriminator, real_features))
    realistic_fake = _reject(realism(discriminator, fake_features))
    return (realistic_real + consistent_real) / 2 + (realistic_fake + consistent_fake + consistent_wrong) / 3


def published_generator_loss(discriminator: PairedDiscriminator, image: Tensor, sentence: Tensor) -> Tensor:
    """Sum of the two terms with target 1."""
    features = discriminator.features(image)
    return _accept(realism(discriminator, features)) + _accept(consistency(discriminator, features, sentence))


def published_step(
    state: AdversarialState,
    batch: CaptionBatch,
    recipe: AdversarialRecipe,
    *,
    hold_discriminators: bool = False,
    discriminator_loss: Callable[..., Tensor] = published_discriminator_loss,
    generator_loss: Callable[..., Tensor] = published_generator_loss,
) -> dict[str, Tensor]:
    """Train discriminators and generator on one batch, with the noise of `adversarial_step`; returns the losses.

    `discriminator_loss` and `generator_loss` are the functions of these names above, or the same ones compiled.
    """
    from mirror_modules.data.transforms import image_pyramid
    from mirror_modules.training.network import autocast

    model, config, device = state.model, state.model.config, state.group.device
    losses: dict[str, Tensor] = {}
    real_images = image_pyramid(batch.images, config.resolutions)
    with torch.no_grad():
        words, sentence = model.text_encoder(batch.tokens, batch.word_mask)
    noise = state.draw(len(words), config.noise_dim).to(words.dtype)
    condition_noise = state.draw(len(words), config.condition_dim).to(words.dtype)
    with autocast(state.engine, device):
        condition = model.conditioning(sentence, noise=condition_noise)
        images = model.generator(noise, condition.sample, words, batch.word_mask).images

    optimizers = [network.optimizer for network in state.discriminators]
    for discriminator, optimizer, real, image in zip(state.paired_discriminators, optimizers, real_images, images):
        optimizer.zero_grad()
        with autocast(state.engine, device):
            loss = discriminator_loss(discriminator, real, image.detach(), sentence)
        loss.backward()
        optimizer.step()
        losses[f"discriminator_{real.shape[2]}"] = loss.detach()

    for discriminator in state.paired_discriminators:
        discriminator.requires_grad_(not hold_discriminators)
    state.generator.optimizer.zero_grad()
    total = torch.zeros((), device=device)
    for discriminator, image in zip(state.paired_discriminators, images):
        with autocast(state.engine, device):
            loss = generator_loss(discriminator, image, sentence)
        losses[f"generator_{image.shape[2]}"] = loss.detach()
        total = total + loss
    mean, log_variance = (at_least_float32(each) for each in (condition.mean, condition.log_variance))
    kl = -0.5 * torch.mean(1 + log_variance - mean.pow(2) - log_variance.exp())
    losses["kl"] = kl.detach()
    total = total + recipe.kl_weight * kl
    total.backward()
    state.generator.optimizer.step()
    for discriminator in state.paired_discriminators:
        discriminator.requires_grad_(True)

    with torch.no_grad():
        for average, parameter in zip(state.average.module.parameters(), state.generator.module.parameters()):
            average.mul_(recipe.average_decay).add_(parameter, alpha=1 - recipe.average_decay)
    losses["generator_total"] = total.detach()
    return losses


def _probability(logits: Tensor) -> Tensor:
    # In bfloat16, a probability from 0.998 on rounds to 1, whose logarithm has no gradient.
    return torch.sigmoid(at_least_float32(logits)).view(-1)


def _accept(probabilities: Tensor) -> Tensor:
    return _cross_entropy(probabilities, torch.ones_like(probabilities))


def _reject(probabilities: Tensor) -> Tensor:
    return _cross_entropy(probabilities, torch.zeros_like(probabilities))


def _cross_entropy(probabilities: Tensor, targets: Tensor) -> Tensor:
    # On a GPU, autocast refuses cross entropy on probabilities, whatever their precision.
    with torch.autocast(probabilities.device.type, enabled=False):
        return F.binary_cross_entropy(probabilities, targets)
