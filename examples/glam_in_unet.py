"""GLAM in a U-Net of diffusers: a GlamBlock after the cross-attention of the middle block.

The block is zero at the start: inserting it does not change the output of a trained U-Net. A tiny U-Net learns to
denoise drawn flowers from their captions, first alone, then with the block. The loss with the captions of other flowers
shows how much of it depends on the text. The training is too short to compare the block with cross-attention.

For real weights, change the line of `make_unet()` in `main` and take the words from the text encoder of the pipeline.
"""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn

from mirror_modules import GlamBlock, TextEncoder, Vocabulary
from mirror_modules.data import SyntheticFlowers, to_float

RESOLUTION, WORD_DIM = 16, 32


class AttentionWithGlam(nn.Module):
    """An attention block of a U-Net and a GlamBlock after it, called as the attention block is."""

    def __init__(self, attention, block):
        super().__init__()
        self.attention, self.block = attention, block

    def forward(self, hidden_states, encoder_hidden_states, encoder_attention_mask=None, **options):
        words = encoder_hidden_states
        text = {"encoder_hidden_states": words, "encoder_attention_mask": encoder_attention_mask}
        features = self.attention(hidden_states, **text, **options)[0]
        # The U-Net converts its mask to a bias of the scores, (B, 1, L), which is 0 for a real word.
        bias = words.new_zeros(words.shape[:2]) if encoder_attention_mask is None else encoder_attention_mask.squeeze(1)
        word_mask = bias == 0
        weights = word_mask / word_mask.sum(1, keepdim=True)
        sentence = (weights.to(words.dtype).unsqueeze(2) * words).sum(1)
        return (self.block(features, words, sentence, word_mask),)


def make_unet():
    """Make a U-Net of the class of Stable Diffusion's, tiny and with random weights."""
    return UNet2DConditionModel(
        sample_size=RESOLUTION,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WORD_DIM,
        attention_head_dim=2,
        norm_num_groups=8,
    )


def load(size, split):
    """Draw flowers: images (N, 3, H, W) in [-1, 1], and a caption of each."""
    flowers = list(SyntheticFlowers(size, resolution=RESOLUTION, split=split, captions_per_image=1))
    images = to_float(torch.from_numpy(np.stack([flower.image for flower in flowers])))
    return images, [flower.captions[0] for flower in flowers]


def main(steps=120, batch_size=16):
    torch.manual_seed(0)
    images, captions = load(1024, "train")
    vocabulary = Vocabulary.build(captions)
    tokens, word_mask = vocabulary.encode(captions)
    held_out_images, held_out_captions = load(256, "validation")
    held_out_tokens, held_out_mask = vocabulary.encode(held_out_captions)

    # For real weights: unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet").
    unet = make_unet()
    text_encoder = TextEncoder(len(vocabulary), embedding_dim=32, feature_dim=WORD_DIM, dropout=0.0)
    scheduler = DDPMScheduler(prediction_type="sample")

    def denoise(images, tokens, word_mask, generator=None):
        times = torch.randint(scheduler.config.num_train_timesteps, (len(images),), generator=generator)
        noisy = scheduler.add_noise(images, torch.randn(images.shape, generator=generator), times)
        return unet(noisy, times, text_encoder(tokens, word_mask).words, encoder_attention_mask=word_mask).sample

    def train():
        optimizer = torch.optim.AdamW([*unet.parameters(), *text_encoder.parameters()], lr=2e-3)
        for _ in range(steps):
            rows = torch.randint(len(images), (batch_size,))
            optimizer.zero_grad()
            F.mse_loss(denoise(images[rows], tokens[rows], word_mask[rows]), images[rows]).backward()
            optimizer.step()

    @torch.no_grad()
    def evaluate(name, shift=0):
        text = held_out_tokens.roll(shift, 0), held_out_mask.roll(shift, 0)
        outputs[name, shift] = denoise(held_out_images, *text, generator=torch.Generator().manual_seed(0))

    outputs, names = {}, ["random", "trained", "with a GlamBlock", "trained with it"]
    for name in names:
        if name == "with a GlamBlock":
            channels, text_dim = unet.config.block_out_channels[-1], unet.config.cross_attention_dim
            block = GlamBlock(channels, text_dim, sentence_dim=text_dim)
            unet.mid_block.attentions[0] = AttentionWithGlam(unet.mid_block.attentions[0], block)
        elif name != "random":
            train()
        evaluate(name)
        evaluate(name, shift=1)

    print(f"{'U-Net':18}  loss with its captions  with those of other flowers")
    for name in names:
        losses = [F.mse_loss(outputs[name, shift], held_out_images).item() for shift in (0, 1)]
        print(f"{name:18}  {losses[0]:22.4f}  {losses[1]:27.4f}")
    change = (outputs["with a GlamBlock", 0] - outputs["trained", 0]).abs().max().item()
    print(f"\nLargest change of the output when the block is inserted: {change}")
    cross_attention = unet.mid_block.attentions[0].attention.transformer_blocks[0].attn2
    for name, part in (("cross-attention", cross_attention), ("the block", block)):
        norm = torch.stack([parameter.grad.norm() for parameter in part.parameters()]).norm()
        print(f"Gradient norm of {name} in the last step: {norm.item():.1e}")


if __name__ == "__main__":
    main()
