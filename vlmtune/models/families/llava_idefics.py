"""LLaVA (CLIP or SigLIP tower, projector, language model) and Idefics3/SmolVLM, Idefics2."""

from __future__ import annotations

from vlmtune.models.family import Family

LANGUAGE_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LANGUAGE_MLP = ("gate_proj", "up_proj", "down_proj")
VISION_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
VISION_MLP = ("fc1", "fc2")

ATTENTION = {"vision": VISION_ATTENTION, "language": LANGUAGE_ATTENTION}
MLP = {"vision": VISION_MLP, "language": LANGUAGE_MLP}

LLAVA = Family(
    name="LLaVA",
    model_types=("llava",),
    parts={
        "vision": ("model.vision_tower",),
        "connector": ("model.multi_modal_projector",),
        "language": ("model.language_model",),
        "lm_head": ("lm_head",),
    },
    attention=ATTENTION,
    mlp=MLP,
    positions="text",
    takes_features=True,
)

IDEFICS = Family(
    name="Idefics",
    model_types=("smolvlm", "idefics3", "idefics2"),
    parts={
        "vision": ("model.vision_model",),
        "connector": ("model.connector",),
        "language": ("model.text_model",),
        "lm_head": ("lm_head",),
    },
    attention=ATTENTION,
    mlp=MLP,
    media_layout="stacked",
    positions="text",
    takes_features=True,
)
