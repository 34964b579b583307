"""The cost of the redescription score beside that of the bare model, interleaved in one process.

    python benchmarks/score_overhead.py [--rounds 15] [--batch 8] [--matrix 64]

The model is a BLIP of random weights: a vision transformer of 6 layers and a text decoder of 4, 384 wide, 224 pixels.
Two ratios are printed, each the median over rounds of the ratio within a round, with a 95 % bootstrap interval of that
median and the range of all rounds; which of the two comes first alternates:

- `score(images, tokens, word_mask)` over the model itself on the same pixels and tokens, in float32, no gradient;
- `score_matrix` over what cannot be avoided: the vision transformer once per image, the text decoder once per pair.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, PreTrainedTokenizerFast

from mirror_modules import RedescriptionScore
from mirror_modules.interop import captioner_from

WORDS, SIZE, LENGTH = 1000, 224, 12
PAIRS = 256


def main() -> None:
    """Print both ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--matrix", type=int, default=64)
    options = parser.parse_args()
    model = make_model()
    score = RedescriptionScore(captioner_from(model, make_tokenizer(), image_processor=make_processor()))
    with torch.no_grad():
        show("score / bare model", *compare_scores(model, score, options.batch), rounds=options.rounds)
        show(
            "score_matrix / parts", *compare_matrices(model, score, options.matrix), rounds=max(3, options.rounds // 5)
        )


def compare_scores(
    model: BlipForConditionalGeneration, score: RedescriptionScore, batch: int
) -> tuple[Callable, Callable]:
    """The score and the bare model with its own loss, on equal inputs."""
    images, tokens, word_mask = draw(batch)
    pixels = score.captioner.preprocess(images)
    start = torch.ones(batch, 1, dtype=torch.long)
    ids = torch.cat((start, tokens), dim=1)

    def bare() -> None:
        model(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)

    return lambda: score(images, tokens, word_mask), bare


def compare_matrices(
    model: BlipForConditionalGeneration, score: RedescriptionScore, size: int
) -> tuple[Callable, Callable]:
    """The matrix and its unavoidable parts, in equal batches."""
    images, tokens, word_mask = draw(size)
    some_images = max(1, PAIRS // size)
    pixels = score.captioner.preprocess(images)
    start = torch.ones(size * some_images, 1, dtype=torch.long)
    ids = torch.cat((start, tokens.repeat_interleave(some_images, dim=0)), dim=1)[:, :-1]

    def parts() -> None:
        for block in pixels.split(some_images):
            encoded = model.vision_model(pixel_values=block).last_hidden_state.repeat(size, 1, 1)
            # Which caption a row holds does not matter for its cost.
            rows = ids[: len(encoded)]
            model.text_decoder(
                input_ids=rows, attention_mask=torch.ones_like(rows), encoder_hidden_states=encoded, use_cache=False
            )

    return lambda: score.score_matrix(images, tokens, word_mask, batch_size=PAIRS), parts


def show(name: str, ours: Callable[[], object], theirs: Callable[[], object], *, rounds: int) -> None:
    """Time both in turn and print the ratio."""
    ours(), theirs()
    ratios = []
    for i in range(rounds):
        seconds = {}
        for call in (theirs, ours) if i % 2 else (ours, theirs):
            started = time.perf_counter()
            call()
            seconds[call] = time.perf_counter() - started
        ratios.append(seconds[ours] / seconds[theirs])
    rng = np.random.default_rng(0)
    low, high = np.quantile(np.median(rng.choice(ratios, (2000, rounds)), axis=1), [0.025, 0.975])
    print(
        f"{name}: {statistics.median(ratios):.3f} (median {low:.3f} to {high:.3f}, rounds {min(ratios):.3f} to "
        f"{max(ratios):.3f}), {rounds} rounds, {torch.get_num_threads()} threads",
        flush=True,
    )


def draw(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images of the model's size, tokens and a mask without padding."""
    images = torch.rand(batch, 3, SIZE, SIZE) * 2 - 1
    return images, torch.randint(5, WORDS, (batch, LENGTH)), torch.ones(batch, LENGTH, dtype=torch.bool)


def make_model() -> BlipForConditionalGeneration:
    """A BLIP of random weights."""
    wide = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
    text = wide | {"num_hidden_layers": 4, "vocab_size": WORDS, "encoder_hidden_size": 384}
    text |= {"bos_token_id": 1, "sep_token_id": 2, "label_smoothing": 0.0}
    vision = wide | {"num_hidden_layers": 6, "image_size": SIZE, "patch_size": 16}
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of as many words; only its special tokens matter here."""
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *map(str, range(WORDS - 4))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_processor() -> BlipImageProcessor:
    """The image processor of these sizes."""
    return BlipImageProcessor(size={"height": SIZE, "width": SIZE})


if __name__ == "__main__":
    main()
