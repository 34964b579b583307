"""A latent diffusion model trained with its denoising loss and balanced redescription (as CoMat, Jiang et al. 2024).

A captioner sees the decoded one-step prediction of the clean image; the likelihood of the caption trains the UNet. The
pipeline is tiny and random, the captioner is a BLIP that learns the colors of drawn flowers in seconds: the numbers
show how gradients arrive, not what real images gain.
"""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
)

from mirror_modules import RedescriptionScore
from mirror_modules.data import SyntheticFlowers, to_float
from mirror_modules.functional import balance_gradients, redescription_loss
from mirror_modules.interop import captioner_from

RATIO, CLEAR = 0.25, 700  # one-step predictions of later time steps are too blurred to caption
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def tiny_pipeline(captions):
    """Build a random Stable Diffusion pipeline for images of 32 pixels."""
    words = ["<pad>", "<s>", "</s>", *sorted({word for caption in captions for word in caption.split()})]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", model_max_length=8)
    text = CLIPTextConfig(vocab_size=len(words), max_position_embeddings=8, bos_token_id=1, eos_token_id=2, **SIZES)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    small = {"block_out_channels": (16, 16), "cross_attention_dim": 32, "attention_head_dim": 4, "layers_per_block": 1}
    unet = UNet2DConditionModel(sample_size=8, norm_num_groups=8, **small, **blocks)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae = AutoencoderKL(block_out_channels=(16, 16, 16), norm_num_groups=8, **blocks)
    parts = (vae, CLIPTextModel(text), tokenizer, unet, DDPMScheduler(clip_sample=False, steps_offset=1))
    return StableDiffusionPipeline(*parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def train_captioner(tokenizer, images, captions, steps=250):
    """Train a tiny BLIP, through the same adapter as it is used."""
    text = SIZES | {"vocab_size": len(tokenizer), "encoder_hidden_size": 32, "bos_token_id": 1, "sep_token_id": 2}
    text |= {"pad_token_id": 0, "initializer_range": 0.1}  # larger than usual, for so small a model
    vision = SIZES | {"image_size": 32, "patch_size": 8, "initializer_range": 0.1}
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
    captioner = captioner_from(model, tokenizer, image_processor=BlipImageProcessor(size={"height": 32, "width": 32}))
    tokens, word_mask = captioner.encode(captions)
    optimizer = torch.optim.AdamW(captioner.parameters(), lr=1e-2)
    for _ in range(steps):
        rows = torch.randint(len(images), (32,))
        logits = captioner(images[rows], tokens[rows], word_mask[rows])
        optimizer.zero_grad()
        redescription_loss(logits, tokens[rows], word_mask[rows]).backward()
        optimizer.step()
    return captioner


def losses(pipeline, score, images, captions, timesteps):
    """Compute both losses, and the tensors at which their gradients can be measured: balanced, and before that."""
    with torch.no_grad():
        words = pipeline.encode_prompt(captions, pipeline.device, 1, False)[0]
        latents = pipeline.vae.encode(images).latent_dist.mode() * pipeline.vae.config.scaling_factor
    noise = torch.randn_like(latents)
    noisy = pipeline.scheduler.add_noise(latents, noise, timesteps)
    predicted = pipeline.unet(noisy, timesteps, encoder_hidden_states=words).sample
    # Balanced where the losses part: at the predicted noise, the last tensor that both depend on. The denoising loss
    # has no gradient at the image, and the decoder decides what a norm there becomes at the UNet. At the predicted
    # latent the ratios would be the same: it is the noise times a number per image, plus a constant.
    for_denoising, for_captioner = balance_gradients(predicted, RATIO)
    denoising = F.mse_loss(for_denoising, noise)
    signal = pipeline.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    latents = (noisy - (1 - signal).sqrt() * for_captioner) / signal.sqrt()
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    # The weight 0 removes the gradient of an image. Other weights have no effect: only the direction counts.
    redescription = (-score(decoded, captions) * (timesteps < CLEAR)).mean()
    return denoising, redescription, predicted, for_captioner


def main():
    torch.set_num_threads(1)  # more are slower for models this small, not for real weights
    torch.manual_seed(0)
    flowers = list(SyntheticFlowers(1000, resolution=32, captions_per_image=1))
    images = to_float(torch.from_numpy(np.stack([flower.image for flower in flowers])))
    captions = ["a {size} {petal_color} flower".format(**flower.attributes) for flower in flowers]
    # For real weights: StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    pipeline = tiny_pipeline(captions)
    # and captioner_from(BlipForConditionalGeneration.from_pretrained(name), AutoProcessor.from_pretrained(name))
    score = RedescriptionScore(train_captioner(pipeline.tokenizer, images, captions))
    pipeline.vae.requires_grad_(False)

    timesteps = torch.linspace(20, 980, 8).long()
    denoising, redescription, noise, for_captioner = losses(pipeline, score, images[:8], captions[:8], timesteps)
    pairs = ((denoising, noise), (redescription, for_captioner), (denoising + redescription, noise))
    first, second, both = (torch.autograd.grad(*pair, retain_graph=True)[0].flatten(1) for pair in pairs)
    print("Gradient norm of redescription / of denoising, at the predicted noise\n  time step  unbalanced  balanced")
    for t, unit, before, after in zip(timesteps, *(norms.norm(dim=1) for norms in (first, second, both - first))):
        print(f"{t:11}  {before / unit:10.3f}  {after / unit:8.3f}")

    optimizer = torch.optim.AdamW(pipeline.unet.parameters(), lr=2e-3)
    history = []
    for rows in torch.randint(len(images), (20, 8)):
        some = [captions[row] for row in rows]
        denoising, redescription, *_ = losses(pipeline, score, images[rows], some, torch.randint(1000, (8,)))
        optimizer.zero_grad()
        (denoising + redescription).backward()
        optimizer.step()
        history.append(denoising.item())
    print(f"\nDenoising loss of the first and the last of {len(history)} steps: {history[0]:.3f}, {history[-1]:.3f}")


if __name__ == "__main__":
    main()
