"""The recipe's fields, their types, ranges, defaults and effects. Defaults live here and nowhere
else.

`docs/recipe.md` is generated from the descriptions below. Loading (YAML, overrides, line numbers)
is `load.py`, and what must hold between keys `rules.py`; this file only knows values.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from vlmtune.recipe.data_section import (
    FREE,
    DataSection,
    Effect,
    Entries,
    ImageSection,
    Name,
    Names,
    Not,
    Section,
    VideoSection,
)


def _whole_above_one(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("a number of steps must be whole")
    return value


FractionOrSteps = Annotated[float, AfterValidator(_whole_above_one)]
Rate = Annotated[float, Field(gt=0)]
PartName = Literal["vision", "connector", "language", "lm_head"]
Task = Literal["vqa", "caption", "choice", "classification", "grounding", "retrieval"]

LORA = {"lora_target": Not([]), "adalora": None}  # LoRA and its kin, but not AdaLoRA
WITH_ADAPTER = Effect(needs={"lora_target": Not([])})
WITH_DATA_EVAL = Effect(needs={"data.eval": Not(None)})
ONLY_4_BIT = Effect(needs={"quantization_bit": 4})
ONLY_SAMPLE = Effect(needs={"eval.decoding.method": "sample"})
NEEDS_RETRIEVAL = ({"eval.task": "retrieval"}, {"eval.guard.task": "retrieval"})
NEEDS_LIKELIHOOD = tuple({**each, "eval.scorer": "likelihood"} for each in NEEDS_RETRIEVAL)
NEEDS_EMBEDDING = tuple({**each, "eval.scorer": "embedding"} for each in NEEDS_RETRIEVAL)
NEEDS_ANSWERS = (
    {"eval.task": Not("retrieval"), "eval.metrics": Not(["choice_likelihood"])},
    {"eval.guard": Not(None), "eval.guard.task": Not("retrieval")},
)
"""Answers are generated: neither retrieval nor the likelihood of given options needs them."""


class AdaLoraSection(Section):
    """If present, AdaLoRA (Zhang et al. 2023, arXiv 2303.10512) is used instead of LoRA."""

    initial_rank: int = Field(
        default=12, ge=1, description="Rank of each adapted module at the start of training."
    )
    target_rank: int = Field(
        default=8,
        ge=1,
        description="Mean rank of the adapted modules at the end of training. Must be below "
        "`initial_rank`.",
    )
    warmup: FractionOrSteps = Field(
        default=0.1,
        ge=0,
        description="Optimizer steps before the pruning of ranks starts (t_i in the paper). Below "
        "1: a fraction of all steps. From 1: a number of steps.",
    )
    final: FractionOrSteps = Field(
        default=0.3,
        ge=0,
        description="Optimizer steps at the end in which the ranks no longer change (t_f in the "
        "paper). Below 1: a fraction of all steps. From 1: a number of steps.",
    )
    interval: int = Field(
        default=10, ge=1, description="Optimizer steps from one pruning to the next."
    )
    beta1: float = Field(
        default=0.85, gt=0, lt=1, description="Decay of the running average of the importance."
    )
    beta2: float = Field(
        default=0.85,
        gt=0,
        lt=1,
        description="Decay factor of the running average of the uncertainty of the importance.",
    )
    orthogonal_weight: float = Field(
        default=0.1,
        ge=0,
        description="Weight of the orthogonality penalty (gamma in the paper), which is added to "
        "the loss once per optimizer step.",
    )


class ContrastiveSection(Section):
    """InfoNCE between the embeddings of pictures and texts (van den Oord et al. 2018,
    arXiv 1807.03748). Needs `objective: contrastive`."""

    initial_temperature: float = Field(
        default=0.05,
        gt=0,
        description="Temperature at the start: the similarities are divided by it. It is trained "
        "with the model.",
    )
    temperature_learning_rate: float = Field(
        default=1e-2,
        gt=0,
        description="Peak learning rate of the temperature (its logarithm is what is trained).",
    )


class QuantizationSection(Section):
    """How the base model is quantised. Needs `quantization_bit: 4` or `8`."""

    double_quant: Annotated[bool, ONLY_4_BIT] = Field(
        default=True, description="4-bit only: quantise the quantisation constants too."
    )
    compute_dtype: Annotated[Literal["bfloat16", "float16", "float32"], ONLY_4_BIT] = Field(
        default="bfloat16",
        description="4-bit only: dtype of the matrix products. `float32` is faster on a CPU "
        "without bf16 instructions. A GPU of compute capability below 8.0 needs `float16`.",
    )
    skip: Annotated[Names, Effect(needs={"quantization_bit": (4, 8)})] = Field(
        default=["vision", "connector", "lm_head"],
        description="What is not quantised: parts (`vision`, `connector`, `language`, `lm_head`), "
        "groups (`vision.attn`) or full module paths. A name that matches nothing is an error.",
    )


class TrainSection(Section):
    """How the model is trained."""

    epochs: Annotated[
        float | None, Effect(needs={"train.max_steps": None, "data.streaming": False})
    ] = Field(
        default=None,
        gt=0,
        description="Passes over the training data. Give this or `max_steps`; with neither, 3 "
        "epochs are trained.",
    )
    max_steps: Annotated[int | None, Effect(needs={"train.epochs": None})] = Field(
        default=None, ge=1, description="Number of optimizer steps. Give this or `epochs`."
    )
    batch_size: int = Field(
        default=16,
        ge=1,
        description="Samples per optimizer step, over all processes and micro-batches together.",
    )
    micro_batch_tokens: int = Field(
        default=4096,
        ge=1,
        description="Maximum number of tokens, padding included, in one forward pass of one "
        "process. A lower value saves memory. A single sample with more tokens is a micro-batch "
        "of its own.",
    )
    micro_batch_supervised_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of supervised tokens in one forward pass of one process. "
        "Null: no limit.",
    )
    packing: bool = Field(
        default=True,
        description="Put samples one after the other in a row without padding, each attending "
        "only to itself, if the model family supports it. If not, rows of similar length are "
        "padded. The loss is the same.",
    )
    vision_cache: Annotated[Literal["auto", "memory", "disk", "off"], FREE] = Field(
        default="auto",
        description="Run a frozen vision tower only once per picture, and keep its features for "
        "later epochs. (If the connector is trained, what is kept is the tower's output before "
        "it.) `memory`: for this run. `disk`: in files below `data.cache_dir`, for later runs and "
        "other processes too. `auto`: in memory, then on disk (with several processes, first on "
        "disk); off if the tower is trained. With `memory` or `disk`, a tower that is trained is "
        "an error. The loss is the same.",
    )
    vision_cache_bytes: Annotated[
        int, Effect(needs={"train.vision_cache": Not("off")}, changes_step=False)
    ] = Field(
        default=4_000_000_000,
        ge=1,
        description="Maximum size of the vision cache in bytes: once in memory (of all processes "
        "together, and at most half of the memory that is free at the start) and once on disk. "
        "When the memory is full, no more features are kept in it; on disk, those of other towers "
        "are deleted first. A picture of 300 tokens takes about 1.2 MB at width 2048 in bf16.",
    )
    learning_rate: float = Field(
        default=2e-4, gt=0, description="Peak learning rate, reached at the end of the warm-up."
    )
    part_learning_rates: dict[PartName, Rate] = Field(
        default={},
        description="Peak learning rates of single parts of the model, instead of "
        "`learning_rate`; for example `{vision: 2e-5}`.",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine",
        description="Learning rate after the warm-up: `constant`, or falling to 0 as a line or as "
        "a half cosine.",
    )
    warmup: FractionOrSteps = Field(
        default=0.03,
        ge=0,
        description="Optimizer steps in which the learning rate rises from 0 to its peak. Below "
        "1: a fraction of all steps. From 1: a number of steps.",
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        default="paged_adamw_8bit",
        description="AdamW; `8bit`: with 8-bit instead of 32-bit state; `paged`: the state moves "
        "to host memory when GPU memory is short. On a CPU, the unpaged optimizer is used and a "
        "log line says so.",
    )
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="Decoupled weight decay. Biases, norms and the tensors of AdaLoRA never decay.",
    )
    max_grad_norm: float | None = Field(
        default=1.0,
        gt=0,
        description="Maximum global norm of the gradient; a larger gradient is scaled down to it. "
        "Null: no clipping.",
    )
    gradient_checkpointing: bool = Field(
        default=True,
        description="Recompute activations in the backward pass: takes less memory and more time.",
    )
    precision: Literal["bf16", "fp16", "fp32"] = Field(
        default="bf16",
        description="Dtype that everything is computed in that is not quantised. Adapters are "
        "always kept in float32. `fp32` is the fastest on a CPU without bf16 instructions. A GPU "
        "of compute capability below 8.0 (T4, V100) needs `fp16`.",
    )
    log_every: Annotated[int, FREE] = Field(
        default=10, ge=1, description="Optimizer steps from one logged line to the next."
    )
    eval_every: Annotated[
        FractionOrSteps,
        Effect(needs=({"data.eval": Not(None)}, {"eval.guard": Not(None)}), changes_step=False),
    ] = Field(
        default=0.25,
        gt=0,
        description="How often the model is evaluated. Up to 1: after each such fraction of "
        "training (0.25: four times). Above 1: a number of optimizer steps.",
    )
    save_every: Annotated[FractionOrSteps, FREE] = Field(
        default=0.25,
        gt=0,
        description="How often a checkpoint is written; as `eval_every`.",
    )
    keep_checkpoints: Annotated[int, FREE] = Field(
        default=2,
        ge=1,
        description="Number of newest checkpoints that are kept; older ones are deleted.",
    )


class DecodingSection(Section):
    """How answers are generated in evaluation."""

    method: Literal["greedy", "sample", "beam"] = Field(
        default="greedy",
        description="`greedy`: always the likeliest token. `sample`: tokens are drawn at random, "
        "each answer with its own seed, so that the batch size and the number of processes do not "
        "change it. `beam`: beam search.",
    )
    temperature: Annotated[float, ONLY_SAMPLE] = Field(
        default=1.0, gt=0, description="`sample` only: the logits are divided by it."
    )
    top_p: Annotated[float, ONLY_SAMPLE] = Field(
        default=1.0,
        gt=0,
        le=1,
        description="`sample` only: draw from the likeliest tokens that together have this "
        "probability. 1: from all tokens.",
    )
    top_k: Annotated[int, ONLY_SAMPLE] = Field(
        default=0,
        ge=0,
        description="`sample` only: draw from this number of likeliest tokens. 0: from all tokens.",
    )
    num_beams: Annotated[int, Effect(needs={"eval.decoding.method": "beam"})] = Field(
        default=4, ge=2, description="`beam` only: number of beams."
    )
    stop: Names = Field(
        default=[],
        description="Texts that end an answer, as its end token does. The answer does not contain "
        "them.",
    )


class GuardSection(Section):
    """A second set of samples, on which the model must not become worse (forgetting)."""

    data: Entries = Field(description="The samples; written as `data.train`.")
    task: Task = Field(default="vqa", description="What is measured; as `eval.task`.")
    metric: Annotated[Name | None, Effect(belongs_to="eval.guard.task")] = Field(
        default=None, description="The metric that must not fall. Null: the first of the task."
    )
    max_drop: float = Field(
        default=0.02,
        ge=0,
        description="How far the metric may fall below its value before training, in its own unit "
        "(0.02 is two percentage points of an accuracy). If it falls further, training ends with "
        "a message and exit code 1.",
    )
    max_samples: int | None = Field(
        default=None,
        ge=1,
        description="Measure on this number of samples, chosen at random once. Null: on all.",
    )


class EvalSection(Section):
    """Evaluation during training and by `vlmtune eval`."""

    task: Task = Field(
        default="vqa",
        description="What is measured. From generated answers: `vqa`, `caption`, `choice` (rows "
        "with `options`), `classification`, `grounding` (boxes as text). From similarities: "
        "`retrieval` of texts by pictures and of pictures by texts.",
    )
    metrics: Annotated[Names, Effect(belongs_to="eval.task")] = Field(
        default=[], description="Names of metrics. `[]`: those of the task."
    )
    max_new_tokens: Annotated[int, Effect(needs=NEEDS_ANSWERS)] = Field(
        default=32, ge=1, description="Maximum length of a generated answer, in tokens."
    )
    batch_size: int = Field(
        default=16, ge=1, description="Number of questions that one process answers at once."
    )
    max_samples: Annotated[int | None, WITH_DATA_EVAL] = Field(
        default=None,
        ge=1,
        description="During training: evaluate on this number of samples, chosen at random once. "
        "Null: on all.",
    )
    before: Annotated[bool, WITH_DATA_EVAL] = Field(
        default=True,
        description="Evaluate before the first step too, to see what the model could do before.",
    )
    best_metric: Annotated[Name | None, WITH_DATA_EVAL] = Field(
        default=None,
        description="The result is the checkpoint at which this metric of `data.eval` was best. "
        "`loss` is best where it is lowest. Null: the result is the last step.",
    )
    patience: Annotated[int | None, Effect(needs={"eval.best_metric": Not(None)})] = Field(
        default=None,
        ge=1,
        description="Stop when `best_metric` has not improved in this number of evaluations in a "
        "row. Null: never.",
    )
    scorer: Annotated[Literal["likelihood", "embedding"], Effect(needs=NEEDS_RETRIEVAL)] = Field(
        default="likelihood",
        description="Retrieval: how a picture and a text are compared. `likelihood`: by "
        "log p(text | picture) per token. `embedding`: by the cosine of the last hidden states "
        "after `embedding_prompt`.",
    )
    subtract_prior: Annotated[bool, Effect(needs=NEEDS_LIKELIHOOD)] = Field(
        default=False,
        description="Retrieval by likelihood, from picture to text: subtract log p(text) without "
        "the picture. This can help if the model was not trained on such texts and prefers "
        "common ones; a trained model usually ranks worse with it.",
    )
    embedding_prompt: Annotated[
        Name,
        Effect(
            needs=(*NEEDS_EMBEDDING, {"objective": "contrastive"}),
            changes_step={"objective": "contrastive"},
        ),
    ] = Field(
        default="Summarize the above in one word:",
        description="Text that is put after a picture or a text to get its embedding, in "
        "retrieval by embedding and with `objective: contrastive`.",
    )
    decoding: Annotated[DecodingSection, Effect(needs=NEEDS_ANSWERS)] = DecodingSection()
    guard: GuardSection | None = Field(
        default=None,
        description="A second set of samples, on which the model must not become worse.",
    )


class Recipe(Section):
    """A whole training run."""

    model: Name = Field(
        description="The base model: an id on the hub, or a folder (relative to the recipe)."
    )
    revision: Annotated[Name | None, Effect(belongs_to="model")] = Field(
        default=None,
        description="Branch, tag or commit of the model on the hub. The commit that is used is "
        "recorded in the run folder.",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run Python code that comes with the model. Only for sources that you trust.",
    )
    quantization_bit: Annotated[
        Literal[4, 8, 16],
        Effect(
            needs={"modules_to_save": Not("all")},
            off=16,
            do={"modules_to_save": "set 16: quantised weights cannot be trained"},
        ),
    ] = Field(
        default=16,
        description="Bits per weight of the base model: 4 (NF4), 8 (LLM.int8()), or 16: not "
        "quantised.",
    )
    lora_target: Annotated[Names, Effect(needs={"modules_to_save": Not("all")}, off=[])] = Field(
        default=["all-linear"],
        description="Modules that get an adapter: groups (`language.attn`, `language.mlp`, "
        "`vision.attn`, `vision.mlp` or `vision_mlp`, `connector`, or `all-linear`, which is every "
        "linear layer of the language part except `lm_head`), names of layers in the language "
        "part (`q_proj`), full module paths (every linear layer in the module), or `re:` and a "
        "regular expression for full paths. `[]`: no adapter, only `modules_to_save` is trained.",
    )
    rank: Annotated[int, Effect(needs=LORA, do={"adalora": "set adalora.initial_rank instead"})] = (
        Field(
            default=16,
            ge=1,
            description="Rank of the adapter. With `adalora`, see `adalora.initial_rank`.",
        )
    )
    alpha: Annotated[float, WITH_ADAPTER] = Field(
        default=32, gt=0, description="The adapter's output is multiplied by alpha / rank."
    )
    dropout: Annotated[float, WITH_ADAPTER] = Field(
        default=0.0, ge=0, lt=1, description="Probability of dropout on the adapter's input."
    )
    use_dora: Annotated[bool, Effect(needs=LORA, off=False)] = Field(
        default=False,
        description="DoRA (Liu et al. 2024, arXiv 2402.09353): train the magnitudes of the "
        "weights apart from their directions.",
    )
    use_rslora: Annotated[bool, Effect(needs=LORA)] = Field(
        default=False,
        description="rsLoRA (Kalajdzievski 2023, arXiv 2312.03732): multiply the adapter's output "
        "by alpha / sqrt(rank) instead.",
    )
    objective: Literal["next_token", "contrastive"] = Field(
        default="next_token",
        description="What is optimised. `next_token`: the cross-entropy of the answers. "
        "`contrastive`: the similarity of each sample's picture to its own answer, compared with "
        "the other samples of the step; for retrieval by embedding. A larger `train.batch_size` "
        "gives more samples to compare with and takes no more memory.",
    )
    adalora: Annotated[
        AdaLoraSection | None,
        Effect(needs={"objective": "next_token", "use_dora": False, "lora_target": Not([])}),
    ] = Field(
        default=None,
        description="With this section, AdaLoRA is used instead of LoRA, and `rank` has no effect.",
    )
    modules_to_save: Annotated[
        Names, Effect(needs=({"lora_target": []}, {"modules_to_save": Not("all")}), off=[])
    ] = Field(
        default=[],
        description="Modules that are trained in full and saved with the adapter: `embeddings`, "
        "`lm_head`, `connector`, `vision`, `language`, or full module paths. `[all]`: full "
        "fine-tuning, without an adapter.",
    )
    parts: dict[PartName, Annotated[Names, Field(min_length=1)]] | None = Field(
        default=None,
        description="Module paths of each part, for a model of a family that vlmtune does not "
        "know.",
    )
    output_dir: Annotated[Name, FREE] = Field(
        description="The run folder (relative to the working directory)."
    )
    seed: int = Field(
        default=42, ge=0, le=2**32 - 1, description="Seed of everything that is random."
    )
    contrastive: Annotated[ContrastiveSection, Effect(needs={"objective": "contrastive"})] = (
        ContrastiveSection()
    )
    quantization: QuantizationSection = QuantizationSection()
    image: ImageSection = ImageSection()
    video: VideoSection = VideoSection()
    data: DataSection
    train: TrainSection = TrainSection()
    eval: Annotated[EvalSection, FREE] = EvalSection()


LOWER_IS_BETTER = ("loss", "rank", "unparsed")
"""How the names of figures end that are better where they are lower (`median_rank`)."""


def is_lower_better(figure: str) -> bool:
    return figure.endswith(LOWER_IS_BETTER)
