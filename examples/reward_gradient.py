"""Two balanced rewards, through the last steps of sampling (ReFL, Xu et al. 2023; DRaFT-K, Clark et al. 2024).

A captioner's likelihood of the prompt and the saturation of the image fine-tune the UNet of a Stable Diffusion
pipeline. The pipeline is tiny and random, the captioner has learned the colors of drawn flowers: the numbers show
what balancing does to the two rewards, not what rewards do to images.
"""

import copy

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from mirror_modules import Captioner, RedescriptionScore, Vocabulary
from mirror_modules.data import ATTRIBUTES, SyntheticFlowers, to_float
from mirror_modules.functional import append_end, balance_gradients, redescription_loss
from mirror_modules.stem import ConvBackbone

PROMPTS = [f"a {color} flower" for color in ATTRIBUTES["petal_color"]]
STEPS, LAST = 5, 2  # of sampling; only the last ones have a gradient


def tiny_pipeline():
    """Build a random Stable Diffusion pipeline for images of 32 pixels."""
    words = ["<pad>", "<s>", "</s>", *sorted({word for prompt in PROMPTS for word in prompt.split()})]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", model_max_length=8)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=len(words), max_position_embeddings=8, bos_token_id=1, eos_token_id=2, **sizes)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    small = {"block_out_channels": (16, 16), "cross_attention_dim": 16, "attention_head_dim": 4, "layers_per_block": 1}
    unet = UNet2DConditionModel(sample_size=8, norm_num_groups=8, **small, **blocks)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae = AutoencoderKL(block_out_channels=(16, 16, 16), norm_num_groups=8, **blocks)
    parts = (vae, CLIPTextModel(text), tokenizer, unet, DDIMScheduler(clip_sample=False, steps_offset=1))
    return StableDiffusionPipeline(*parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def train_score(steps, size=1000):
    """Train a captioner on the colors of drawn flowers, and return its likelihood of a prompt as a score."""
    flowers = list(SyntheticFlowers(size, resolution=32, captions_per_image=1))
    images = to_float(torch.from_numpy(np.stack([flower.image for flower in flowers])))
    vocabulary = Vocabulary.build(PROMPTS)
    tokens, _ = append_end(*vocabulary.encode([f"a {flower.attributes['petal_color']} flower" for flower in flowers]))
    captioner = Captioner(ConvBackbone(8, blocks=3), len(vocabulary), embedding_dim=32, hidden_dim=32)
    optimizer = torch.optim.AdamW(captioner.parameters(), lr=1e-2)
    for _ in range(steps):
        rows = torch.randint(size, (32,))
        optimizer.zero_grad()
        redescription_loss(captioner(images[rows], tokens[rows]), tokens[rows]).backward()
        optimizer.step()
    return RedescriptionScore(captioner, encode=lambda captions: append_end(*vocabulary.encode(captions)))


def sample(pipeline, prompts, generator):
    """Generate images (B, 3, H, W) in [-1, 1]; the last steps have a gradient."""
    words = pipeline.encode_prompt(prompts, pipeline.device, 1, False)[0]
    latents = torch.randn(len(prompts), 4, *[pipeline.unet.config.sample_size] * 2, generator=generator).to(words)
    pipeline.scheduler.set_timesteps(STEPS)
    for t in pipeline.scheduler.timesteps:
        with torch.set_grad_enabled(torch.is_grad_enabled() and t in pipeline.scheduler.timesteps[-LAST:]):
            noise = pipeline.unet(latents, t, encoder_hidden_states=words).sample
            latents = pipeline.scheduler.step(noise, t, latents).prev_sample
    return pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample.clamp(-1, 1)


def saturation(images):
    """Compute the mean saturation of each image, (B,): the largest channel minus the smallest."""
    return (images.amax(dim=1) - images.amin(dim=1)).mean(dim=(1, 2)) / 2


def fine_tune(pipeline, score, ratio, steps):
    """Fine-tune the UNet on the sum of both rewards; with a ratio, on their balanced gradients."""
    optimizer = torch.optim.AdamW(pipeline.unet.requires_grad_(True).parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for_score = for_saturation = images = sample(pipeline, PROMPTS, generator)
        if ratio is not None:
            # Neither reward is the reference: the gradient of either may vanish at an image. So the norm is a constant,
            # and the first copy is not used. Its scale is that of a mean over the batch; Adam ignores it.
            _, for_score, for_saturation = balance_gradients(images, (0, 1, ratio), reference=1 / len(images))
        optimizer.zero_grad()
        (-score(for_score, PROMPTS).mean() - saturation(for_saturation).mean()).backward()
        optimizer.step()


@torch.no_grad()
def rewards(pipeline, score, copies=8):
    """Measure both rewards on other noise than in training."""
    images = sample(pipeline, PROMPTS * copies, torch.Generator().manual_seed(1))
    return f"{score(images, PROMPTS * copies).mean():13.3f}  {saturation(images).mean():10.3f}"


def main(score_steps=250, steps=30):
    torch.set_num_threads(1)  # more are slower for models this small, not for real weights
    torch.manual_seed(0)
    # For real weights: StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    pipeline = tiny_pipeline()
    score = train_score(score_steps)  # and RedescriptionScore(captioner_from(model, processor)), as in best_of_n.py
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.requires_grad_(False)

    images = sample(pipeline, PROMPTS, torch.Generator().manual_seed(0)).requires_grad_(True)
    gradients = (torch.autograd.grad(r.sum(), images)[0] for r in (saturation(images), score(images, PROMPTS)))
    low, high = torch.div(*(gradient.flatten(1).norm(dim=1) for gradient in gradients)).aminmax()
    print(f"Gradient norm of saturation / of redescription: {low:.3f} to {high:.3f}, by image\n")
    print(f"{'':20}  redescription  saturation\n{'before':20}  {rewards(pipeline, score)}")
    unet = pipeline.unet
    for name, ratio in (("sum of the rewards", None), ("balanced, ratio 0.1", 0.1), ("balanced, ratio 0.3", 0.3)):
        pipeline.unet = copy.deepcopy(unet)
        fine_tune(pipeline, score, ratio, steps)
        print(f"{name:20}  {rewards(pipeline, score)}")


if __name__ == "__main__":
    main()
