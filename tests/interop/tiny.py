"""Tiny models of Hugging Face with random weights and real classes, built without network access."""

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    GemmaTokenizerFast,
    GitConfig,
    GitForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
WORDS = "a small large red blue flower bird with five petals describe the image yes no Yes does this figure show ? . :"
MEAN, STD = (0.4, 0.5, 0.6), (0.3, 0.2, 0.25)
SIZE = 16


def make_tokenizer(kind=PreTrainedTokenizerFast, **options):
    words = SPECIAL + list(dict.fromkeys(WORDS.split())) + ["\n", "USER", "ASSISTANT", '"']
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return kind(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        **options,
    )


VOCABULARY = 48
TEXT = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"intermediate_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": SIZE, "patch_size": 8}


def image_processor(kind):
    size = {"size": {"height": SIZE, "width": SIZE}, "image_mean": list(MEAN), "image_std": list(STD)}
    return kind(**size, **({"do_center_crop": False} if kind is CLIPImageProcessor else {}))


class PairProcessor:
    """A processor; those of BLIP and GIT accept only tokenizers of certain classes in some versions."""

    def __init__(self, images, tokenizer):
        self.image_processor, self.tokenizer = images, tokenizer


def blip():
    text = TEXT | {"sep_token_id": 2, "label_smoothing": 0.0, "encoder_hidden_size": 16}
    config = BlipConfig(text_config=text, vision_config=VISION, image_text_hidden_size=16, projection_dim=16)
    return BlipForConditionalGeneration(config), PairProcessor(image_processor(BlipImageProcessor), make_tokenizer())


def git():
    config = GitConfig(vision_config=VISION, **TEXT)
    return GitForCausalLM(config), PairProcessor(image_processor(CLIPImageProcessor), make_tokenizer())


def encoder_decoder():
    decoder = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2, add_cross_attention=True
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**VISION), decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    return VisionEncoderDecoderModel(config), PairProcessor(image_processor(ViTImageProcessor), make_tokenizer())


def blip2():
    text = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=24,
        word_embed_proj_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = Blip2Config(
        text_config=text.to_dict(),
        vision_config=VISION,
        qformer_config={
            "vocab_size": 11,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "encoder_hidden_size": 16,
        },
        num_query_tokens=3,
        image_token_index=SPECIAL.index("<image>"),
    )
    processor = Blip2Processor(image_processor(BlipImageProcessor), make_tokenizer(), num_query_tokens=3)
    return Blip2ForConditionalGeneration(config), processor


def llava():
    text = LlamaConfig(**TEXT, num_key_value_heads=1)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=text,
        image_token_index=SPECIAL.index("<image>"),
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    processor = LlavaProcessor(
        image_processor(CLIPImageProcessor),
        make_tokenizer(extra_special_tokens={"image_token": "<image>"}),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(
            "{% for m in messages %}USER : {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
            "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}ASSISTANT :"
        ),
    )
    return LlavaForConditionalGeneration(config), processor


def paligemma():
    config = PaliGemmaConfig(
        text_config=TEXT | {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 8},
        vision_config=VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=SPECIAL.index("<image>"),
        projection_dim=16,
        hidden_size=16,
    )
    images = image_processor(SiglipImageProcessor)
    images.image_seq_length = 4
    # Version 4 of transformers accepts this class alone.
    kind = GemmaTokenizerFast if transformers.__version__.startswith("4.") else PreTrainedTokenizerFast
    tokenizer = make_tokenizer(kind, extra_special_tokens={"image_token": "<image>"})
    return PaliGemmaForConditionalGeneration(config), PaliGemmaProcessor(images, tokenizer)


MODELS = {
    "blip": blip,
    "git": git,
    "vision-encoder-decoder": encoder_decoder,
    "blip-2": blip2,
    "llava": llava,
    "paligemma": paligemma,
}


def make(name):
    """A model in evaluation mode and its processor."""
    torch.manual_seed(0)
    model, processor = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than the usual initialization, so that every input matters.
            parameter.normal_(std=0.3)
    return model.eval(), processor


def clip(kind="clip"):
    """A model of CLIP or SigLIP with its tokenizer, whose words are letters, and its image processor."""
    # CLIP takes the word of the largest id for the end if the id of the end is 2.
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "-", "</s>", *"abcdefghijklmnopqrstuvwxyz"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="</s>", eos_token="</s>", unk_token="<unk>")
    text = TEXT | {"vocab_size": len(vocabulary), "max_position_embeddings": 67, "eos_token_id": 3, "pad_token_id": 3}
    if kind == "siglip":
        config = SiglipConfig(text_config=text | {"projection_size": 16}, vision_config=VISION)
        model, images = SiglipModel(config), image_processor(SiglipImageProcessor)
    else:
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=11))
        images = image_processor(CLIPImageProcessor)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        if kind == "clip":
            # Otherwise the cosines of images and captions are negative, and their CLIPScore is 0.
            model.text_projection.weight.neg_()
    return model.eval(), tokenizer, images


def save_clip(folder, kind="clip"):
    """A checkpoint as published."""
    for part in clip(kind):
        part.save_pretrained(folder)
    return folder
