"""GLAM, image out: the global-local collaborative attentive module (MirrorGAN, Sec. 3.2)."""

from mirror_modules._placing import crop_box, keypoint_gate, keypoint_maps, place_in_box
from mirror_modules.glam.attention import (
    GlobalLocalAttention,
    GlobalLocalContext,
    WordAttention,
    WordContext,
    global_local_attention,
    sentence_attention,
    word_attention,
)
from mirror_modules.glam.block import GlamBlock
from mirror_modules.glam.colors import color_consistency_loss
from mirror_modules.glam.deconvolution import DeconvolutionGenerator
from mirror_modules.glam.generator import CascadedGenerator, GeneratedImages
from mirror_modules.glam.keypoints import KeypointGenerator, complete_keypoints
from mirror_modules.glam.located import KeypointImageGenerator, LocatedGenerator
from mirror_modules.glam.placing import KeypointGate, KeypointMaps, TextPlacer
from mirror_modules.glam.refinement import ImageRefinementStage
from mirror_modules.glam.stages import StageAttention, StageContext

__all__ = [
    "CascadedGenerator",
    "DeconvolutionGenerator",
    "GeneratedImages",
    "GlamBlock",
    "GlobalLocalAttention",
    "GlobalLocalContext",
    "ImageRefinementStage",
    "KeypointGate",
    "KeypointGenerator",
    "KeypointImageGenerator",
    "KeypointMaps",
    "LocatedGenerator",
    "StageAttention",
    "StageContext",
    "TextPlacer",
    "WordAttention",
    "WordContext",
    "color_consistency_loss",
    "complete_keypoints",
    "crop_box",
    "global_local_attention",
    "keypoint_gate",
    "keypoint_maps",
    "place_in_box",
    "sentence_attention",
    "word_attention",
]
