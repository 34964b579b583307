"""Text-image matching (DAMSM, from AttnGAN): which caption belongs to which image? (MirrorGAN, Sec. 3.1)

Shape suffixes: I images, J captions, R regions, L words, D features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mirror_modules import kernels
from mirror_modules._checks import (
    at_least_float32,
    autocast_dtype,
    check_alike,
    check_batch,
    check_number,
    check_tensors,
    check_word_mask,
    shape_of,
    zero_padding,
)
from mirror_modules._tiles import (
    ELEMENTS_ON_A_GPU,
    TileIndices,
    is_transformed,
    recomputed_in_tiles,
    without_autocast,
)
from mirror_modules._typing import TypedCall
from mirror_modules.stem.image_encoder import ImageFeatures
from mirror_modules.stem.text_encoder import TextFeatures

OPERATION = "word_region_similarity"
ELEMENTS_ON_A_CPU = 2**21
"""Elements of the attention maps (images, captions, L, R) of a tile on a CPU."""
SHORTEST = 1e-8
"""Lower bound of the norms in a cosine; the cosine of shorter features tends to 0."""


class MatchingTerms(NamedTuple):
    """The four cross entropies of text-image matching; each is a scalar, log(B) at chance."""

    caption_by_words: Tensor
    """Retrieve the caption of each image by its words."""
    image_by_words: Tensor
    """Retrieve the image of each caption by its words."""
    caption_by_sentence: Tensor
    """Retrieve the caption of each image by the sentence."""
    image_by_sentence: Tensor
    """Retrieve the image of each caption by the sentence."""

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
    """Compute the similarity of every image with every caption from regions and words (AttnGAN, eq. 7 to 10).

        scores[l, r]  = w_l . v_r
        attention[l]  = softmax_r(gamma_attention * softmax_l(scores)[l])
        context[l]    = sum_r attention[l, r] * v_r
        similarity    = log sum_l exp(gamma_word * cos(context[l], w_l))

    Only the result is kept for all pairs. "torch" computes tiles of images and captions and recomputes them in the
    backward pass (a compiled graph takes all pairs at once, because its compiler plans its own memory); "triton" does
    the same with fused softmaxes. Under autocast, regions and words are cast as for a matrix product; scores are at
    least float32 in any case. On a GPU and in a compiled graph, where checking the mask would force a synchronization,
    a caption without a word raises no error: its similarity to any image is about -1e38, with a gradient of zero.

    Args:
        regions: Region features v, (I, R, D).
        words: Word features w, (J, L, D).
        word_mask: True for a real word, (J, L); None if all are. Padding has no influence, whatever it holds.
        gamma_attention: Inverse temperature of the attention over regions.
        gamma_word: Inverse temperature of the sum over words: large values emphasize the best match.
        impl: "auto", "torch" or "triton"; a named implementation runs or raises. `functional.explain` returns the
            choice of "auto" and its reason.

    Returns:
        Similarity, (I, J), float32 or wider, between -gamma_word and gamma_word + log L.

    Raises:
        ValueError: A caption has no real word; sizes, precisions or devices disagree; a gamma is not finite.
        NotImplementedError: `impl` names an implementation that cannot run.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import word_region_similarity
        >>> red, blue, round, star = 4 * torch.eye(4)
        >>> words = torch.stack((torch.stack((red, round)), torch.stack((blue, star))))
        >>> regions = torch.stack((torch.stack((star, blue, blue)), torch.stack((red, red, round))))
        >>> word_region_similarity(regions, words).argmax(dim=1)  # the caption of each image
        tensor([1, 0])
    """
    word_mask = _check_pairs(OPERATION, regions, words, word_mask)
    check_number(OPERATION, gamma_attention=gamma_attention, gamma_word=gamma_word)
    choice = choose_similarity(regions, words, gamma_attention=gamma_attention, impl=impl)
    regions, words, word_mask = _prepare(regions, words, word_mask)
    if choice.implementation == "triton":
        return kernels.word_region_similarity(regions, words, word_mask, gamma_attention, gamma_word)

    def similarity(regions: Tensor, words: Tensor, word_mask: Tensor) -> tuple[Tensor]:
        return (_similarity(regions, words, word_mask, gamma_attention, gamma_word),)

    whole = (regions.shape[0], words.shape[0])
    return recomputed_in_tiles(similarity, (regions, words, word_mask), lambda: _tiles(regions, words), whole)[0]


def choose_similarity(
    regions: Tensor,
    words: Tensor,
    word_mask: Tensor | None = None,
    *,
    gamma_attention: float = 4.0,
    gamma_word: float = 5.0,
    impl: str = "auto",
) -> kernels.Choice:
    """Choose the implementation that `word_region_similarity` runs for the same arguments."""
    options = {
        f"gamma_attention beyond {kernels.LARGEST_GAMMA}": abs(gamma_attention) > kernels.LARGEST_GAMMA,
        "transforms of torch.func and forward-mode derivatives": is_transformed(),
    }
    facts = kernels.Facts(
        kernels.machine_of(regions.device),
        dtypes=(autocast_dtype(regions), autocast_dtype(words)),
        sizes={"regions": regions.shape[1], "words": words.shape[1], "features": regions.shape[2]},
        options=tuple(name for name, is_used in options.items() if is_used),
    )
    return kernels.choose(OPERATION, impl, facts)


def _tiles(regions: Tensor, words: Tensor) -> list[TileIndices]:
    """Tiles of images by captions: all captions, unless they are too many even for a single image."""
    per_pair = max(1, regions.shape[1] * words.shape[1])
    elements = ELEMENTS_ON_A_CPU if regions.device.type == "cpu" else ELEMENTS_ON_A_GPU
    captions = max(1, elements // per_pair)
    images = max(1, captions // max(1, words.shape[0]))
    return [
        TileIndices((i, j), (i, j, j))
        for i in (slice(i, i + images) for i in range(0, regions.shape[0], images))
        for j in (slice(j, j + captions) for j in range(0, words.shape[0], captions))
    ]


def _similarity(
    regions_IRD: Tensor, words_JLD: Tensor, mask_JL: Tensor, gamma_attention: float, gamma_word: float
) -> Tensor:
    """Evaluate the equations, (I, J). With words before captions, both softmaxes run over whole rows."""
    words_LJD, padding_LJ = words_JLD.transpose(0, 1), ~mask_JL.mT
    attention_ILJR = _attention(regions_IRD, words_LJD, padding_LJ, gamma_attention)
    context_ILJD = (attention_ILJR.to(regions_IRD.dtype).flatten(1, 2) @ regions_IRD).unflatten(1, words_LJD.shape[:2])
    cosine_ILJ = F.cosine_similarity(at_least_float32(context_ILJD), at_least_float32(words_LJD), dim=3, eps=SHORTEST)
    # The lowest finite number instead of -inf, here and below: a caption without words must not give NaN.
    logits_ILJ = gamma_word * cosine_ILJ
    return logits_ILJ.masked_fill(padding_LJ, torch.finfo(logits_ILJ.dtype).min).logsumexp(dim=1)


def _attention(regions_IRD: Tensor, words_LJD: Tensor, padding_LJ: Tensor, gamma_attention: float) -> Tensor:
    # In float32, because scores beyond 65504 would overflow float16.
    words_KD, regions_IDR = at_least_float32(words_LJD.flatten(0, 1)), at_least_float32(regions_IRD.mT)
    scores_ILJR = (words_KD @ regions_IDR).unflatten(1, words_LJD.shape[:2])
    scores_ILJR = scores_ILJR.masked_fill(padding_LJ.unsqueeze(2), torch.finfo(scores_ILJR.dtype).min)
    return torch.softmax(gamma_attention * torch.softmax(scores_ILJR, dim=1), dim=3)


def _check_pairs(owner: str, regions: Tensor, words: Tensor, word_mask: Tensor | None) -> Tensor | None:
    check_tensors(owner, regions=regions, words=words)
    if regions.ndim != 3 or words.ndim != 3 or regions.shape[2] != words.shape[2]:
        raise ValueError(
            f"{owner}: regions must be (I, R, D) and words (J, L, D) with the same D, but they are "
            f"{shape_of(regions)} and {shape_of(words)}."
        )
    if regions.shape[1] == 0:
        raise ValueError(f"{owner}: images have no regions: {shape_of(regions)} (I, R, D); each needs at least one.")
    word_mask = check_word_mask(owner, words, word_mask, may_stall=False)
    check_alike(owner, word_mask, regions=regions, words=words)
    return word_mask


def _prepare(regions: Tensor, words: Tensor, word_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Cast regions and words as autocast does for a matrix product, zero the padding, and create a missing mask."""
    regions, words = (tensor.to(autocast_dtype(tensor)) for tensor in (regions, words))
    if word_mask is None:
        return regions, words, torch.ones(words.shape[:2], dtype=torch.bool, device=words.device)
    return regions, zero_padding(words, word_mask), word_mask


def word_region_attention(
    regions: Tensor, words: Tensor, word_mask: Tensor | None = None, *, gamma_attention: float = 4.0
) -> Tensor:
    """Compute the attention of each word over the regions, for every image and caption (AttnGAN, eq. 7 to 9).

        scores[l, r] = w_l . v_r
        attention[l] = softmax_r(gamma_attention * softmax_l(scores)[l])

    These are the maps inside `word_region_similarity`, which itself never holds them for all pairs.

    Args:
        regions: Region features v, (I, R, D).
        words: Word features w, (J, L, D).
        word_mask: True for a real word, (J, L); None if all are.
        gamma_attention: Inverse temperature of the attention over regions.

    Returns:
        (I, J, L, R), float32 or wider; sums to 1 over R. Rows of padding are uniform.

    Raises:
        ValueError: A caption has no real word; sizes, precisions or devices disagree; `gamma_attention` is not finite.

    Examples:
        >>> import torch
        >>> from mirror_modules.stem import word_region_attention
        >>> red, blue, round = 4 * torch.eye(3)
        >>> regions, words = torch.stack((red, round, blue)), torch.stack((red, blue))
        >>> attention = word_region_attention(regions.unsqueeze(0), words.unsqueeze(0))
        >>> attention.shape, attention.argmax(dim=3)  # the region of each word
        (torch.Size([1, 1, 2, 3]), tensor([[[0, 2]]]))
    """
    owner = "word_region_attention"
    word_mask = _check_pairs(owner, regions, words, word_mask)
    check_number(owner, gamma_attention=gamma_attention)

    def attention(regions: Tensor, words: Tensor, word_mask: Tensor) -> tuple[Tensor]:
        attention_ILJR = _attention(regions, words.transpose(0, 1), ~word_mask.mT, gamma_attention)
        return (rearrange(attention_ILJR, "i l j r -> i j l r"),)

    return without_autocast(attention, _prepare(regions, words, word_mask))[0]


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
    """Compute the cross entropies of retrieving captions by images and images by captions (AttnGAN, eq. 11 to 13).

        logits[i, j] = gamma_loss * R(i, j),    R by words (`word_region_similarity`) and by cos(image_i, sentence_j)

    Args:
        image_features: Regions (B, R, D) and image (B, D).
        text_features: Words (B, L, D) and sentence (B, D); row i belongs to image i.
        word_mask: True for a real word, (B, L); None if all are.
        class_ids: (B,); pairs of the same class are not negatives of each other. None: all other pairs are negatives.
        gamma_attention: See `word_region_similarity`.
        gamma_word: See `word_region_similarity`.
        gamma_loss: Inverse temperature of the cross entropy.
        impl: "auto", "torch" or "triton".

    Returns:
        The four terms.

    Raises:
        ValueError: A caption has no real word; sizes, precisions or devices disagree; a gamma is not finite.
        NotImplementedError: `impl` names an implementation that cannot run.

    Examples:
        >>> import torch
        >>> from mirror_modules import ImageFeatures, TextFeatures
        >>> from mirror_modules.functional import matching_loss
        >>> image_features = ImageFeatures(regions=torch.zeros(4, 9, 8), image=torch.zeros(4, 8))
        >>> text_features = TextFeatures(words=torch.zeros(4, 5, 8), sentence=torch.zeros(4, 8))
        >>> terms = matching_loss(image_features, text_features)
        >>> round(terms.image_by_words.item(), 4), round(terms.total.item(), 4)  # chance: log 4 each
        (1.3863, 5.5452)
    """
    owner = "matching_loss"
    regions, image = image_features
    words, sentence = text_features
    check_tensors(owner, image=image, sentence=sentence)
    word_mask = _check_pairs(owner, regions, words, word_mask)
    if image.ndim != 2 or sentence.ndim != 2 or image.shape[1] != sentence.shape[1]:
        raise ValueError(
            f"{owner}: image and sentence must both be (B, D), but they are {shape_of(image)} and {shape_of(sentence)}."
        )
    check_batch(owner, regions=regions, image=image, words=words, sentence=sentence)
    _check_class_ids(owner, class_ids, sentence.shape[0])
    by_words = word_region_similarity(
        regions, words, word_mask, gamma_attention=gamma_attention, gamma_word=gamma_word, impl=impl
    )
    by_sentence = image_sentence_similarity(image, sentence)
    return MatchingTerms(
        *contrastive_terms(by_words, class_ids, gamma_loss=gamma_loss),
        *contrastive_terms(by_sentence, class_ids, gamma_loss=gamma_loss),
    )


def image_sentence_similarity(images: Tensor, sentences: Tensor) -> Tensor:
    """Compute the cosine of every global image feature with every sentence feature (AttnGAN, Sec. 3.2).

        similarity[i, j] = v_i . s_j / (|v_i| |s_j|)

    Args:
        images: Global image features v, (I, D).
        sentences: Sentence features s, (J, D).

    Returns:
        Similarity, (I, J), float32 or wider, between -1 and 1.

    Raises:
        ValueError: Sizes disagree, or features are not floating point.

    Examples:
        >>> import torch
        >>> from mirror_modules.stem import image_sentence_similarity
        >>> images, sentences = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0]])
        >>> image_sentence_similarity(images, sentences).tolist()
        [[0.0], [1.0]]
    """
    check_tensors("image_sentence_similarity", images=images, sentences=sentences)
    if images.ndim != 2 or sentences.ndim != 2 or images.shape[1] != sentences.shape[1]:
        raise ValueError(
            "image_sentence_similarity: images must be (I, D) and sentences (J, D) with the same D, but they are "
            f"{shape_of(images)} and {shape_of(sentences)}."
        )
    for name, features in (("images", images), ("sentences", sentences)):
        if not features.is_floating_point():
            raise ValueError(
                f"image_sentence_similarity: {name} must be floating point, but they are {features.dtype}."
            )
    dtype = torch.promote_types(torch.promote_types(images.dtype, sentences.dtype), torch.float32)

    # Not `F.cosine_similarity`, which would hold the products of all pairs, (I, J, D).
    def similarity(images: Tensor, sentences: Tensor) -> tuple[Tensor]:
        unit_images, unit_sentences = (F.normalize(each, dim=1, eps=SHORTEST) for each in (images, sentences))
        return (unit_images @ unit_sentences.mT,)

    return without_autocast(similarity, (images.to(dtype), sentences.to(dtype)))[0]


def contrastive_terms(
    similarity: Tensor, class_ids: Tensor | None = None, *, gamma_loss: float | Tensor = 10.0
) -> tuple[Tensor, Tensor]:
    """Compute the cross entropies of both retrieval directions from any similarity (AttnGAN, eq. 11 and 12).

        caption = - mean_i log softmax_j(gamma_loss * similarity)[i, i]
        image   = - mean_i log softmax_j(gamma_loss * similarity^T)[i, i]

    Args:
        similarity: Row i is image i, column j is caption j, (B, B); matching pairs are on the diagonal.
        class_ids: (B,); pairs of the same class are not negatives of each other. None: all other pairs are negatives.
        gamma_loss: Inverse temperature of the cross entropy: a number, or a scalar tensor that is learned.

    Returns:
        Two scalars, float32 or wider: the loss of retrieving captions, and that of retrieving images.

    Raises:
        ValueError: `similarity` is not square, `class_ids` does not fit it, or `gamma_loss` is not finite.

    Examples:
        >>> import torch
        >>> from mirror_modules.stem import contrastive_terms
        >>> captions, images = contrastive_terms(torch.zeros(4, 4))
        >>> round(captions.item(), 4), round(images.item(), 4)  # chance: log 4
        (1.3863, 1.3863)
        >>> captions, _ = contrastive_terms(torch.zeros(4, 4), class_ids=torch.tensor([5, 5, 7, 7]))
        >>> round(captions.item(), 4)  # one negative less: log 3
        1.0986
    """
    check_tensors("contrastive_terms", similarity=similarity)
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"contrastive_terms: similarity must be (B, B), but it is {shape_of(similarity)}.")
    _check_class_ids("contrastive_terms", class_ids, similarity.shape[0])
    if not isinstance(gamma_loss, Tensor):
        check_number("contrastive_terms", gamma_loss=gamma_loss)
    labels = torch.arange(similarity.shape[0], device=similarity.device)
    logits = gamma_loss * at_least_float32(similarity)
    if class_ids is not None:
        is_same_class = class_ids.unsqueeze(1) == class_ids.unsqueeze(0)
        is_other_pair = ~torch.eye(similarity.shape[0], dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(is_same_class & is_other_pair, float("-inf"))
    return F.cross_entropy(logits, labels), F.cross_entropy(logits.mT, labels)


def _check_class_ids(owner: str, class_ids: Tensor | None, count: int) -> None:
    if class_ids is None:
        return
    check_tensors(owner, class_ids=class_ids)
    if class_ids.shape != (count,):
        raise ValueError(f"{owner}: class_ids must be ({count},), one per pair, but they are {shape_of(class_ids)}.")


class MatchingLoss(TypedCall, nn.Module):
    """Text-image matching loss (AttnGAN's DAMSM; MirrorGAN, Sec. 3.1): `matching_loss` as a Module.

    Args:
        gamma_attention: Inverse temperature of the attention over regions; 4 in the published code, 5 in the paper.
        gamma_word: Inverse temperature of the sum over words: large values emphasize the best match.
        gamma_loss: Inverse temperature of the cross entropy.
        impl: "auto", "torch" or "triton".

    Raises:
        ValueError: A gamma is not a finite number, or `impl` is unknown.

    Examples:
        >>> import torch
        >>> from mirror_modules import ImageEncoder, MatchingLoss, TextEncoder
        >>> image_encoder = ImageEncoder(feature_dim=8)
        >>> text_encoder = TextEncoder(vocabulary_size=50, feature_dim=8)
        >>> images, tokens = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randint(3, 50, (2, 7))
        >>> terms = MatchingLoss()(image_encoder(images), text_encoder(tokens))
        >>> len(terms), terms.total.shape
        (4, torch.Size([]))
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
        kernels.check_impl("MatchingLoss", impl)
        check_number("MatchingLoss", gamma_attention=gamma_attention, gamma_word=gamma_word, gamma_loss=gamma_loss)
        self.gamma_attention, self.gamma_word, self.gamma_loss = gamma_attention, gamma_word, gamma_loss
        self.impl = impl

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
