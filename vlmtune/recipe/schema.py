"""The recipe's fields, their types, ranges and defaults. Defaults live here and nowhere else.

`docs/recipe.md` is generated from the descriptions below. Loading (YAML, overrides, line numbers)
is `load.py`; this file only knows values.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import (
    AfterValidator,
    Field,
    ValidationInfo,
    model_validator,
)

from vlmtune.recipe.data_section import (
    DataSection,
    Entries,
    ImageSection,
    Name,
    Names,
    Section,
    VideoSection,
)
from vlmtune.recipe.rules import WRITTEN_BY_US, check_rules


def _whole_above_one(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("a number of steps must be whole")
    return value


FractionOrSteps = Annotated[float, AfterValidator(_whole_above_one)]
Rate = Annotated[float, Field(gt=0)]
PartName = Literal["vision", "connector", "language", "lm_head"]
PART_NAMES: tuple[PartName, ...] = get_args(PartName)
Task = Literal["vqa", "caption", "choice", "classification", "grounding", "retrieval"]


class AdaLoraSection(Section):
    """Present: AdaLoRA (Zhang et al. 2023, arXiv 2303.10512) instead of LoRA."""

    initial_rank: int = Field(default=12, ge=1, description="Rank of each module at the start.")
    target_rank: int = Field(
        default=8, ge=1, description="Mean rank per module at the end; below `initial_rank`."
    )
    warmup: FractionOrSteps = Field(
        default=0.1,
        ge=0,
        description="t_i: optimizer steps before pruning starts; a fraction of training below 1, "
        "a step count from 1.",
    )
    final: FractionOrSteps = Field(
        default=0.3,
        ge=0,
        description="t_f: optimizer steps at the end with the final ranks; a fraction of training "
        "below 1, a step count from 1.",
    )
    interval: int = Field(default=10, ge=1, description="Optimizer steps between two prunings.")
    beta1: float = Field(
        default=0.85, gt=0, lt=1, description="Decay of the running average of the importance."
    )
    beta2: float = Field(
        default=0.85, gt=0, lt=1, description="Decay of the running average of its uncertainty."
    )
    orthogonal_weight: float = Field(
        default=0.1,
        ge=0,
        description="gamma: weight of the orthogonality penalty, added once per optimizer step.",
    )


class ContrastiveSection(Section):
    """InfoNCE between picture and text embeddings (van den Oord et al. 2018, arXiv 1807.03748)."""

    initial_temperature: float = Field(
        default=0.05, gt=0, description="The similarities are divided by it; it is learned."
    )
    temperature_learning_rate: float = Field(
        default=1e-2, gt=0, description="Peak learning rate of the logarithm of the temperature."
    )


class QuantizationSection(Section):
    """How the base model is quantised; used where `quantization_bit` is 4 or 8."""

    double_quant: bool = Field(
        default=True, description="4-bit only: quantise the quantisation constants too."
    )
    compute_dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16",
        description="4-bit only: dtype of the matrix products. `float32` is faster on a CPU "
        "without bf16 instructions; a GPU of compute capability below 8.0 takes `float16`.",
    )
    cache_dequantized: bool = Field(
        default=False,
        description="4-bit only: keep the weights dequantised in training beside the 4-bit ones. "
        "The loss is the same, bit for bit on a CPU; a step is faster and memory grows by that of "
        "the quantised layers in `compute_dtype` (and once more in the dtype of "
        "`train.precision`, where that is another).",
    )
    skip: list[Name] = Field(
        default=["vision", "connector", "lm_head"],
        description="Parts (`vision`, `connector`, `language`, `lm_head`), groups (`vision.attn`) "
        "or full module paths kept in 16 bit. An entry that matches nothing is an error.",
    )


class TrainSection(Section):
    """The optimisation."""

    epochs: float | None = Field(
        default=None, gt=0, description="Passes over the training data. Either this or `max_steps`."
    )
    max_steps: int | None = Field(
        default=None,
        ge=1,
        description="Optimizer steps. Either this or `epochs`; neither: 3 epochs.",
    )
    batch_size: int = Field(
        default=16,
        ge=1,
        description="Samples per optimizer step, over all processes: the effective batch.",
    )
    micro_batch_tokens: int = Field(
        default=4096,
        ge=1,
        description="Memory knob: tokens, padding included, in one forward pass of one process. "
        "A single longer sample still makes a micro-batch of its own.",
    )
    micro_batch_supervised_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Supervised tokens in one forward pass of one process; null: any number.",
    )
    packing: bool = Field(
        default=True,
        description="Lay samples one after the other without padding, each attending to itself "
        "only, where the model family can; otherwise rows of similar length are padded. The loss "
        "is the same.",
    )
    vision_cache: Literal["auto", "memory", "disk", "off"] = Field(
        default="auto",
        description="Run a frozen vision tower once a picture, and keep its features for later "
        "epochs; where only the connector trains, what the tower gives it. `memory`: in this run; "
        "`disk`: in files below `data.cache_dir`, for later runs and other processes too; `auto`: "
        "in memory, then on disk (of several processes the other way round), and off where the "
        "tower trains. With the others a tower that trains is an error. The loss is the same.",
    )
    vision_cache_bytes: int = Field(
        default=4_000_000_000,
        ge=1,
        description="Most bytes of features kept in memory, by all processes together and within "
        "half of what is free at the start, and as many on disk. Beyond, nothing more is kept; on "
        "disk, features of other towers give way first. A picture of 300 tokens takes about 1.2 MB "
        "at width 2048 in bf16.",
    )
    learning_rate: float = Field(default=2e-4, gt=0, description="Peak learning rate.")
    part_learning_rates: dict[PartName, Rate] = Field(
        default={}, description="Peak learning rates of single parts, e.g. `{vision: 2e-5}`."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="Course of the learning rate after the warm-up, down to 0."
    )
    warmup: FractionOrSteps = Field(
        default=0.03,
        ge=0,
        description="Linear warm-up: a fraction of training below 1, optimizer steps from 1.",
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        default="paged_adamw_8bit",
        description="AdamW with 32- or 8-bit state; `paged`: state moves to host memory when the "
        "GPU's is short (CUDA only; on a CPU the unpaged kind is used, with a notice).",
    )
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="Decoupled weight decay; never on biases, norms or AdaLoRA's tensors.",
    )
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, description="Global gradient norm is clipped to this; null: never."
    )
    gradient_checkpointing: bool = Field(
        default=True,
        description="Recompute activations in the backward pass: less memory, more time.",
    )
    precision: Literal["bf16", "fp16", "fp32"] = Field(
        default="bf16",
        description="Compute dtype of the 16-bit parts. Adapters are kept in float32 in all three. "
        "`fp32` is the fastest on a CPU without bf16 instructions; a GPU of compute capability "
        "below 8.0 (T4, V100) takes `fp16`.",
    )
    log_every: int = Field(
        default=10, ge=1, description="Optimizer steps between two logged lines."
    )
    eval_every: FractionOrSteps = Field(
        default=0.25, gt=0, description="Evaluation: a fraction of training up to 1, steps above."
    )
    save_every: FractionOrSteps = Field(
        default=0.25,
        gt=0,
        description="Checkpoints: a fraction of training up to 1, steps above.",
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="Newest checkpoints kept.")


class DecodingSection(Section):
    """How answers are generated in evaluation."""

    method: Literal["greedy", "sample", "beam"] = Field(
        default="greedy",
        description="`sample`: each answer is drawn with a seed of its own, so that neither the "
        "batch nor the number of processes changes it.",
    )
    temperature: float = Field(default=1.0, gt=0, description="`sample` only: divides the logits.")
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="`sample` only: from the likeliest tokens that together have this probability.",
    )
    top_k: int = Field(
        default=0, ge=0, description="`sample` only: from this many likeliest tokens; 0: all."
    )
    num_beams: int = Field(default=4, ge=2, description="`beam` only: number of beams.")
    stop: list[Name] = Field(
        default=[], description="An answer ends before any of these texts, besides its end token."
    )


class GuardSection(Section):
    """Present: a second set on which the model must not get worse (forgetting)."""

    data: Entries = Field(description="What it is measured on; as `data.train`.")
    task: Task = Field(default="vqa", description="What is measured on it.")
    metric: Name | None = Field(
        default=None, description="The metric that must not fall; null: the first of the task."
    )
    max_drop: float = Field(
        default=0.02,
        ge=0,
        description="How far it may fall below its value before training, in the metric's unit "
        "(0.02 is two points of an accuracy). Beyond: said at the end, and exit code 1.",
    )
    max_samples: int | None = Field(
        default=None, ge=1, description="A fixed random choice of so many samples; null: all."
    )


class EvalSection(Section):
    """Evaluation during training and by `vlmtune eval`."""

    task: Task = Field(
        default="vqa",
        description="What is measured: `vqa`, `caption`, `choice` (rows with `options`), "
        "`classification`, `grounding` (boxes as text) by generated answers; `retrieval` of texts "
        "by pictures and pictures by texts.",
    )
    metrics: list[Name] = Field(default=[], description="Names of metrics; `[]`: the task's own.")
    max_new_tokens: int = Field(
        default=32, ge=1, description="Longest generated answer, in tokens."
    )
    batch_size: int = Field(
        default=16, ge=1, description="Questions answered at once by one process."
    )
    max_samples: int | None = Field(
        default=None,
        ge=1,
        description="During training: a fixed random choice of so many samples; null: all.",
    )
    before: bool = Field(
        default=True,
        description="Evaluate before the first step too: what the model could do already.",
    )
    best_metric: Name | None = Field(
        default=None,
        description="Keep the checkpoint at which this metric of `data.eval` was best, and make "
        "it the result; `loss` counts as better where it is lower. Null: the last step's.",
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="With `best_metric`: stop after so many evaluations in a row without a new "
        "best. Null: never.",
    )
    scorer: Literal["likelihood", "embedding"] = Field(
        default="likelihood",
        description="Retrieval: log p(text | picture) per token, or the cosine of the last hidden "
        "states after `embedding_prompt`.",
    )
    subtract_prior: bool = Field(
        default=False,
        description="Retrieval by likelihood, picture to text: minus log p(text) without a "
        "picture. It can help a model that was not trained on such texts and ranks common ones "
        "first; a trained model usually ranks worse with it.",
    )
    embedding_prompt: Name = Field(
        default="Summarize the above in one word:",
        description="What follows a picture or a text whose embedding is taken, in retrieval by "
        "embedding and with `objective: contrastive`.",
    )
    decoding: DecodingSection = DecodingSection()
    guard: GuardSection | None = Field(
        default=None,
        description="A second set on which the model must not get worse.",
    )


class Recipe(Section):
    """A whole training run."""

    model: Name = Field(description="Hub id or folder (relative to the recipe).")
    revision: Name | None = Field(
        default=None, description="Hub revision; the commit it resolved to is recorded."
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run Python code that comes with the model. Only for sources you trust.",
    )
    quantization_bit: Literal[4, 8, 16] = Field(
        default=16, description="Base model: 4 = NF4, 8 = LLM.int8(), 16 = not quantised."
    )
    lora_target: list[Name] = Field(
        default=["all-linear"],
        description="Modules that get an adapter: groups (`language.attn`, `language.mlp`, "
        "`vision.attn`, `vision.mlp` or `vision_mlp`, `connector`, `all-linear`: every linear "
        "layer of the language part, not `lm_head`), leaf names in the language part (`q_proj`), "
        "full module paths (of a module: all linear layers in it), `re:` patterns over full paths. "
        "`[]`: no adapter; `modules_to_save` is trained in full.",
    )
    rank: int = Field(default=16, ge=1, description="Rank of the adapter.")
    alpha: float = Field(
        default=32, gt=0, description="The adapter's output is scaled by alpha / rank."
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Dropout on the adapter's input, a probability."
    )
    use_dora: bool = Field(
        default=False, description="DoRA (Liu et al. 2024, arXiv 2402.09353): train magnitudes too."
    )
    use_rslora: bool = Field(
        default=False,
        description="rsLoRA (Kalajdzievski 2023, arXiv 2312.03732): scale by alpha / sqrt(rank).",
    )
    objective: Literal["next_token", "contrastive"] = Field(
        default="next_token",
        description="`next_token`: the cross-entropy of the answers. `contrastive`: the picture "
        "and the answer of each sample are embedded apart and told from those of the other "
        "samples of the step (for retrieval by embedding); larger `train.batch_size`, more of "
        "them. Memory is that of one micro-batch.",
    )
    adalora: AdaLoraSection | None = Field(
        default=None, description="Present: AdaLoRA instead of LoRA; `rank` is then not used."
    )
    modules_to_save: list[Name] = Field(
        default=[],
        description="Trained in full and saved with the adapter: `embeddings`, `lm_head`, "
        "`connector`, `vision`, `language`, or full module paths. `[all]` with `lora_target: []`: "
        "full fine-tuning.",
    )
    parts: dict[PartName, Names] | None = Field(
        default=None,
        description="Module paths of each part, for a model that no family file knows.",
    )
    output_dir: Name = Field(description="The run folder (relative to the working directory).")
    seed: int = Field(default=42, ge=0, le=2**32 - 1, description="Seed of every random choice.")
    contrastive: ContrastiveSection = ContrastiveSection()
    quantization: QuantizationSection = QuantizationSection()
    image: ImageSection = ImageSection()
    video: VideoSection = VideoSection()
    data: DataSection
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()

    @model_validator(mode="after")
    def _keeps_the_rules(self, info: ValidationInfo) -> Recipe:
        check_rules(self, may_be_unused=bool(info.context and info.context[WRITTEN_BY_US]))
        return self


LOWER_IS_BETTER = ("loss", "rank", "unparsed")
"""How the names of figures end that are better where they are lower (`median_rank`)."""


def is_lower_better(figure: str) -> bool:
    return figure.endswith(LOWER_IS_BETTER)
