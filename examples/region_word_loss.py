"""Region-word contrastive learning of CLIP: MatchingLoss beside the loss of whole images and whole sentences.

CLIP learns from one feature per image and one per caption. MatchingLoss also attends from each word to the patches of
the image. A tiny CLIP learns from drawn flowers by the sentence terms, and is then fine-tuned by the same terms or by
all four. Only the latter can retrieve captions by their words, at some cost to retrieval by the sentence.

For real weights, change the lines of `make_tokenizer()`, `make_clip()` and `Preprocess` in `main`.
"""

import copy

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from mirror_modules import ImageFeatures, MatchingLoss, TextFeatures
from mirror_modules.data import SyntheticFlowers, to_float
from mirror_modules.functional import r_precision, word_region_similarity
from mirror_modules.interop import Preprocess

RESOLUTION, CANDIDATES = 32, 100


def make_tokenizer(captions):
    """Make a tokenizer of Hugging Face from the words of captions."""
    words = ["<pad>", "<unk>", "<start>", "<end>", *sorted({word for caption in captions for word in caption.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def make_clip(vocabulary_size):
    """Make a CLIP with its text and vision models, tiny and with random weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": vocabulary_size, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    text = {**sizes, **ids, "max_position_embeddings": 32}
    vision = {**sizes, "image_size": RESOLUTION, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def encode(clip, pixels, tokens, attention_mask):
    """Project the patches and words of CLIP as it projects its image and sentence."""
    image = clip.vision_model(pixel_values=pixels)
    text = clip.text_model(input_ids=tokens, attention_mask=attention_mask)
    patches = clip.vision_model.post_layernorm(image.last_hidden_state[:, 1:])  # without the class token
    regions, whole = clip.visual_projection(patches), clip.visual_projection(image.pooler_output)
    words, sentence = clip.text_projection(text.last_hidden_state), clip.text_projection(text.pooler_output)
    return ImageFeatures(regions, whole), TextFeatures(words, sentence)


def train(clip, data, with_words, steps, batch_size=32):
    matching, generator = MatchingLoss(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(data[0]), (batch_size,), generator=generator)
        pixels, tokens, word_mask = (part[rows] for part in data)
        terms = matching(*encode(clip, pixels, tokens, word_mask), word_mask)
        loss = terms.total if with_words else terms.caption_by_sentence + terms.image_by_sentence
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def evaluate(clip, data):
    """Compute the share of images that find their caption among 100, by sentence and by words."""
    (regions, image), (words, sentence) = encode(clip, *data)
    by_sentence = r_precision(image, sentence, candidates=CANDIDATES, generator=torch.Generator().manual_seed(0)).top1
    hits = [
        word_region_similarity(*parts).argmax(dim=1) == torch.arange(len(parts[0]))
        for parts in zip(*(part.split(CANDIDATES) for part in (regions, words, data[2])))
    ]
    return by_sentence, torch.cat(hits).float().mean().item()


def load(size, split):
    """Draw flowers: images (N, 3, H, W) in [-1, 1], and a caption of each."""
    flowers = list(SyntheticFlowers(size, resolution=RESOLUTION, split=split, captions_per_image=1))
    images = to_float(torch.from_numpy(np.stack([flower.image for flower in flowers])))
    return images, [flower.captions[0] for flower in flowers]


def main(steps=400, fine_tuning_steps=200):
    torch.manual_seed(0)
    images, captions = load(2000, "train")
    held_out_images, held_out_captions = load(500, "validation")

    # For real weights: AutoTokenizer.from_pretrained(name), CLIPModel.from_pretrained(name), and CLIP's mean and std.
    tokenizer = make_tokenizer(captions)
    clip = make_clip(len(tokenizer))
    preprocess = Preprocess(clip.config.vision_config.image_size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

    def prepare(images, captions):
        text = tokenizer(captions, padding=True, return_tensors="pt")
        return preprocess(images), text["input_ids"], text["attention_mask"]

    data, held_out = prepare(images, captions), prepare(held_out_images, held_out_captions)
    results = {"random weights": evaluate(clip, held_out)}
    train(clip, data, with_words=False, steps=steps)
    results["trained by the sentence terms"] = evaluate(clip, held_out)
    for name, with_words in (("the sentence terms", False), ("all terms", True)):
        tuned = copy.deepcopy(clip)
        train(tuned, data, with_words, steps=fine_tuning_steps)
        results[f"fine-tuned by {name}"] = evaluate(tuned, held_out)

    print(f"Images that find their caption among {CANDIDATES}:")
    print(f"{'':32}  by sentence  by words")
    for name, (by_sentence, by_words) in results.items():
        print(f"{name:32}  {by_sentence:11.1%}  {by_words:8.1%}")


if __name__ == "__main__":
    main()
