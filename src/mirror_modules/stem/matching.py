"""Text-image matching (DAMSM, from AttnGAN): which caption belongs to which image? (MirrorGAN, Sec. 3.1)

Shape suffixes: I images, J captions, R regions, L words, D features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mirror_modules._checks import at_least_float32, check_batch, check_word_mask, shape_of
from mirror_modules.kernels import choose_implementation
from mirror_modules.stem.image_encoder import ImageFeatures
from mirror_modules.stem.text_encoder import TextFeatures

# Attention maps of so many elements are held at a time: large enough to keep the matrix products efficient.
ELEMENTS_PER_CHUNK = 2**24
# Features shorter than this have no direction; their cosine fades to 0.
SMALLEST_LENGTH = 1e-8


class MatchingTerms(NamedTuple):
    """The four cross entropies of text-image matching; each is a scalar, log(B) at chance."""

    caption_by_words: Tensor
    """Find the caption of each image by its words."""
    image_by_words: Tensor
    """Find the image of each caption by its words."""
    caption_by_sentence: Tensor
    """Find the caption of each image by the sentence."""
    image_by_sentence: Tensor
    """Find the image of each caption by the sentence."""

    @property
    def total(self) -> Tensor:
        """The sum of the four."""
        return torch.stack(tuple(self)).sum()


def word_region_similarity(
    regions: Tensor,
    words: Tensor,
    word_mask: Tensor | None = None,
    *,
    gamma_attention: float = 4.0,
    gamma_word: float = 5.0,
    impl: str = "auto",
) -> Tensor:
    """Similarity of every image with every caption by their regions and words (AttnGAN, eq. 7 to 10).

        scores[l, r]  = w_l . v_r
        attention[l]  = softmax_r(gamma_attention * softmax_l(scores)[l])
        context[l]    = sum_r attention[l, r] * v_r
        similarity    = log sum_l exp(gamma_word * cos(context[l], w_l))

    Args:
        regions: Region features v, (I, R, D).
        words: Word features w, (J, L, D).
        word_mask: True for a real word, (J, L); None if all are.
        gamma_attention: Sharpness of the attention over regions.
        gamma_word: Weight of the best matching words.
        impl: "auto", "torch" or "triton"; a named implementation runs or raises.

    Returns:
        Similarity, (I, J), between -gamma_word and gamma_word + log L.

    Raises:
        ValueError: A caption has no real word, or sizes disagree.
        NotImplementedError: `impl` names an implementation that cannot run.
    """
    owner = "word_region_similarity"
    if regions.ndim != 3 or words.ndim != 3 or regions.shape[2] != words.shape[2]:
        raise ValueError(
            f"{owner}: regions must be (I, R, D) and words (J, L, D) with the same D, but they are "
            f"{shape_of(regions)} and {shape_of(words)}."
        )
    check_word_mask(owner, words, word_mask)
    choose_implementation(owner, impl)
    if word_mask is None:
        word_mask = torch.ones(words.shape[:2], dtype=torch.bool, device=words.device)
    per_caption = max(1, regions.shape[0] * regions.shape[1] * words.shape[1])
    captions = max(1, ELEMENTS_PER_CHUNK // per_caption)
    columns = [
        _similarity_of_chunk(regions, chunk, mask, gamma_attention, gamma_word)
        for chunk, mask in zip(words.split(captions), word_mask.split(captions))
    ]
    return torch.cat(columns, dim=1)


def _similarity_of_chunk(
    regions_IRD: Tensor, words_JLD: Tensor, mask_JL: Tensor, gamma_attention: float, gamma_word: float
) -> Tensor:
    """(I, J). No context (I, J, L, D) is formed: both its product with the word and its length follow from the maps,

    context[l] . w_l = sum_r attention[l, r] * scores[l, r],    |context[l]|^2 = attention[l]^T V V^T attention[l]
    """
    scores_IRJL = _scores(regions_IRD, words_JLD)
    attention_IRJL = _attention(scores_IRJL, mask_JL, gamma_attention)
    product_IJL = (attention_IRJL * scores_IRJL).sum(dim=1)
    gram_IRR = at_least_float32(regions_IRD @ regions_IRD.mT)
    gram_attention_IRJL = (gram_IRR @ attention_IRJL.flatten(2)).view_as(attention_IRJL)
    context_length_IJL = (attention_IRJL * gram_attention_IRJL).sum(dim=1).clamp_min(SMALLEST_LENGTH**2).sqrt()
    word_length_JL = at_least_float32(words_JLD).norm(dim=2).clamp_min(SMALLEST_LENGTH)
    # Regions that cancel each other leave a length of rounding errors alone, and a cosine of any size.
    cosine_IJL = (product_IJL / (context_length_IJL * word_length_JL)).clamp(-1.0, 1.0)
    return (gamma_word * cosine_IJL).masked_fill(~mask_JL, float("-inf")).logsumexp(dim=2)


def word_region_attention(regions: Tensor, words: Tensor, word_mask: Tensor, *, gamma_attention: float = 4.0) -> Tensor:
    """Share of each region in each word, for every image with every caption: `attention` of `word_region_similarity`.

    Args:
        regions: (I, R, D).
        words: (J, L, D).
        word_mask: True for a real word, (J, L).
        gamma_attention: Sharpness.

    Returns:
        (I, J, L, R), float32 or wider; sums to 1 over R.
    """
    attention_IRJL = _attention(_scores(regions, words), word_mask, gamma_attention)
    return rearrange(attention_IRJL, "i r j l -> i j l r")


def _scores(regions_IRD: Tensor, words_JLD: Tensor) -> Tensor:
    scores_IRN = regions_IRD @ words_JLD.flatten(0, 1).mT
    return at_least_float32(scores_IRN).unflatten(2, words_JLD.shape[:2])


def _attention(scores_IRJL: Tensor, mask_JL: Tensor, gamma_attention: float) -> Tensor:
    share_IRJL = torch.softmax(scores_IRJL.masked_fill(~mask_JL, float("-inf")), dim=3)
    return torch.softmax(gamma_attention * share_IRJL, dim=1)


def matching_loss(
    image_features: ImageFeatures,
    text_features: TextFeatures,
    word_mask: Tensor | None = None,
    class_ids: Tensor | None = None,
    *,
    gamma_attention: float = 4.0,
    gamma_word: float = 5.0,
    gamma_loss: float = 10.0,
    impl: str = "auto",
) -> MatchingTerms:
    """Cross entropy of finding the right caption and the right image within a batch (AttnGAN, eq. 11 to 13).

        logits[i, j] = gamma_loss * R(i, j),    R by words (`word_region_similarity`) and by cos(image_i, sentence_j)

    Args:
        image_features: Regions (B, R, D) and image (B, D).
        text_features: Words (B, L, D) and sentence (B, D); row i belongs to image i.
        word_mask: True for a real word, (B, L); None if all are.
        class_ids: (B,); pairs of one class are left out of each other's negatives. None leaves out nothing.
        gamma_attention: See `word_region_similarity`.
        gamma_word: See `word_region_similarity`.
        gamma_loss: Sharpness of the cross entropy.
        impl: "auto", "torch" or "triton".

    Returns:
        The four terms.

    Raises:
        ValueError: A caption has no real word, or sizes disagree.
    """
    owner = "matching_loss"
    regions, image = image_features
    words, sentence = text_features
    check_batch(owner, regions=regions, image=image, words=words, sentence=sentence)
    if image.ndim != 2 or image.shape != sentence.shape:
        raise ValueError(
            f"{owner}: image and sentence must both be (B, D), but they are {shape_of(image)} and {shape_of(sentence)}."
        )
    batch = sentence.shape[0]
    if class_ids is not None and class_ids.shape != (batch,):
        raise ValueError(f"{owner}: class_ids must be ({batch},), one per caption, but they are {shape_of(class_ids)}.")
    by_words = word_region_similarity(
        regions, words, word_mask, gamma_attention=gamma_attention, gamma_word=gamma_word, impl=impl
    )
    by_sentence = image_sentence_similarity(image, sentence)
    return MatchingTerms(
        *contrastive_terms(by_words, class_ids, gamma_loss=gamma_loss),
        *contrastive_terms(by_sentence, class_ids, gamma_loss=gamma_loss),
    )


def image_sentence_similarity(images: Tensor, sentences: Tensor) -> Tensor:
    """Cosine of every global image feature (I, D) with every sentence feature (J, D): (I, J)."""
    images, sentences = at_least_float32(images), at_least_float32(sentences)
    return F.cosine_similarity(images.unsqueeze(1), sentences.unsqueeze(0), dim=2)


def contrastive_terms(
    similarity: Tensor, class_ids: Tensor | None = None, *, gamma_loss: float = 10.0
) -> tuple[Tensor, Tensor]:
    """Cross entropy of finding column i in row i, and row i in column i, of a similarity (B, B).

    Args:
        similarity: Row i is image i, column j is caption j.
        class_ids: (B,); other pairs of one class are left out. None leaves out nothing.
        gamma_loss: Sharpness.

    Returns:
        Two scalars: find the caption of each image, find the image of each caption.
    """
    labels = torch.arange(len(similarity), device=similarity.device)
    logits = gamma_loss * similarity
    if class_ids is not None:
        same_class = class_ids.unsqueeze(1) == class_ids.unsqueeze(0)
        others = ~torch.eye(len(similarity), dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(same_class & others, float("-inf"))
    return F.cross_entropy(logits, labels), F.cross_entropy(logits.mT, labels)


class MatchingLoss(nn.Module):
    """`matching_loss` with its three gammas (AttnGAN's DAMSM; MirrorGAN, Sec. 3.1).

    Args:
        gamma_attention: Sharpness of the attention over regions; 4 in the published code, 5 in the AttnGAN paper.
        gamma_word: Weight of the best matching words.
        gamma_loss: Sharpness of the cross entropy.
        impl: "auto", "torch" or "triton".
    """

    def __init__(
        self,
        gamma_attention: float = 4.0,
        gamma_word: float = 5.0,
        gamma_loss: float = 10.0,
        *,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        choose_implementation("MatchingLoss", impl)
        self.gamma_attention, self.gamma_word, self.gamma_loss, self.impl = (
            gamma_attention,
            gamma_word,
            gamma_loss,
            impl,
        )

    def forward(
        self,
        image_features: ImageFeatures,
        text_features: TextFeatures,
        word_mask: Tensor | None = None,
        class_ids: Tensor | None = None,
    ) -> MatchingTerms:
        """See `matching_loss`."""
        return matching_loss(
            image_features,
            text_features,
            word_mask,
            class_ids,
            gamma_attention=self.gamma_attention,
            gamma_word=self.gamma_word,
            gamma_loss=self.gamma_loss,
            impl=self.impl,
        )
