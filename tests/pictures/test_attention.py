"""Attention maps show the weights of the finest stage, over the image that they belong to."""

import numpy as np
import pytest
import torch

from mirror_modules import GeneratedImages, MirrorGAN, MirrorGANConfig, Vocabulary
from mirror_modules.pictures.attention import attention_maps, attention_sheet, draw_attention

CAPTIONS = ["a red flower", "white something", "five petals", "a leaf", "more green"]
WORDS = [["a", "red", "flower"], ["white", "<unknown>"], ["five", "petals"], ["a", "leaf"], ["more", "green"]]
N, L, C = len(CAPTIONS), 3, 7


@pytest.fixture
def generated():
    random = torch.Generator().manual_seed(0)
    images = [torch.rand(N, 3, size, size, generator=random) * 2 - 1 for size in (4, 8, 16)]
    words = [torch.rand(N, L, size, size, generator=random).softmax(1) for size in (4, 8)]
    sentence = [torch.rand(N, C, size, size, generator=random).softmax(1) for size in (4, 8)]
    return GeneratedImages(images, words, sentence)


def brightest(picture):
    return np.unravel_index(picture.astype(int).sum(axis=2).argmax(), picture.shape[:2])


def test_each_word_and_the_sentence_have_a_map(generated):
    maps = attention_maps(CAPTIONS, WORDS, generated)
    assert [entry.caption for entry in maps] == CAPTIONS[:4]
    for entry, words in zip(maps, WORDS):
        assert [each.name for each in entry.maps] == [*words, "sentence"]
        assert all(each.picture.shape == (16, 16, 3) for each in entry.maps)
    peak = float(generated.word_weights[-1][1, 0].max())
    assert maps[1].maps[0].note == f"{peak:.0%}"


def test_a_map_is_brightest_at_the_largest_weight_of_the_finest_stage(generated):
    finest = torch.full((N, L, 8, 8), 0.1)
    finest[:, 1, 2, 5] = 0.8
    coarse = torch.full((N, L, 4, 4), 1 / 3)
    red = attention_maps(CAPTIONS, WORDS, generated._replace(word_weights=[coarse, finest]))[0].maps[1]
    assert red.note == "80%"
    row, column = brightest(red.picture)
    assert row in (4, 5)
    assert column in (10, 11)


def test_the_sentence_map_shows_the_strongest_channel(generated):
    weights = torch.full((N, C, 8, 8), 1 / C)
    weights[:, :, 6, 1] = 0.04
    weights[:, 3, 6, 1] = 0.76
    sentence = attention_maps(CAPTIONS, WORDS, generated._replace(sentence_weights=[weights]))[0].maps[-1]
    assert sentence.note == "14% to 76%"
    row, column = brightest(sentence.picture)
    assert row in (12, 13)
    assert column in (2, 3)


def test_maps_of_large_images_have_a_moderate_size(generated):
    large = generated._replace(images=[torch.zeros(N, 3, 256, 256)])
    assert attention_maps(CAPTIONS, WORDS, large)[0].maps[0].picture.shape == (128, 128, 3)


def test_without_sentence_attention_only_words_have_maps(generated):
    maps = attention_maps(CAPTIONS, WORDS, generated._replace(sentence_weights=[]))
    assert [each.name for each in maps[0].maps] == WORDS[0]


def test_without_attention_there_are_no_maps(generated):
    assert attention_maps(CAPTIONS, WORDS, generated._replace(word_weights=[], sentence_weights=[])) == []


@pytest.mark.parametrize(("captions", "words", "images"), [(N - 1, N, N), (N, N - 1, N), (N, N, N - 1)])
def test_captions_words_and_images_must_have_equal_counts(generated, captions, words, images):
    message = rf"attention_maps: {captions} captions and the words of {words} for {images} images; give both for each"
    fewer = generated._replace(images=[batch[:images] for batch in generated.images])
    with pytest.raises(ValueError, match=message):
        attention_maps(CAPTIONS[:captions], WORDS[:words], fewer)


def test_a_sheet_has_a_row_per_caption_and_a_column_per_map(generated):
    maps = attention_maps(CAPTIONS, WORDS, generated)
    sheet = draw_attention(maps)
    # The image, three words and the sentence; tiles of 128 pixels with gaps of 12.
    assert sheet.shape[1] == 5 * (128 + 12) - 12
    assert sheet.shape[0] > 4 * 128
    # The second caption has a word less: its last column is white.
    height = sheet.shape[0] // 4
    assert (sheet[height : 2 * height, -128:] == 255).all()
    assert not (sheet[:height, -128:] == 255).all()


@pytest.mark.parametrize("attention", ["global-local", "none"])
def test_a_model_without_attention_has_no_sheet(attention):
    sizes = {"embedding_dim": 5, "word_dim": 6, "noise_dim": 4, "condition_dim": 3, "channels": 2, "residual_blocks": 1}
    captioner = {"captioner_backbone": "conv", "captioner_embedding_dim": 4, "captioner_hidden_dim": 5}
    config = MirrorGANConfig(resolutions=(4, 8), attention=attention, **sizes, **captioner)
    model = MirrorGAN(config, Vocabulary(["a", "red", "flower"])).eval()
    captions = ["a red flower", "red"]
    sheet = attention_sheet(model, captions, model.generate_stages(captions, seed=0, need_weights=True))
    assert (sheet is None) == (attention == "none")
