"""The recipe's fields, their types, ranges and defaults. Defaults live here and nowhere else.

`docs/recipe.md` is generated from the descriptions below. Loading (YAML, overrides, line numbers)
is `load.py`; this file only knows values.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PART_NAMES = ("vision", "connector", "language", "lm_head")

Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class AdaLoraSection(Section):
    """Present: AdaLoRA (Zhang et al. 2023, arXiv 2303.10512) instead of LoRA."""

    initial_rank: int = Field(12, ge=1, description="Rank of each module at the start.")
    target_rank: int = Field(
        8, ge=1, description="Mean rank per module at the end; below `initial_rank`."
    )
    warmup: float = Field(
        0.1,
        ge=0,
        description="t_i: optimizer steps before pruning starts; a fraction of training below 1, "
        "a step count from 1.",
    )
    final: float = Field(
        0.3,
        ge=0,
        description="t_f: optimizer steps at the end with the final ranks; a fraction of training "
        "below 1, a step count from 1.",
    )
    interval: int = Field(10, ge=1, description="Optimizer steps between two prunings.")
    beta1: float = Field(
        0.85, gt=0, lt=1, description="Decay of the running average of the importance."
    )
    beta2: float = Field(
        0.85, gt=0, lt=1, description="Decay of the running average of its uncertainty."
    )
    orthogonal_weight: float = Field(
        0.1,
        ge=0,
        description="gamma: weight of the orthogonality penalty, added once per optimizer step.",
    )

    @model_validator(mode="after")
    def _ranks_fall(self) -> AdaLoraSection:
        if self.target_rank >= self.initial_rank:
            raise ValueError(
                f"target_rank ({self.target_rank}) must be below initial_rank "
                f"({self.initial_rank}): AdaLoRA only takes ranks away"
            )
        return self


class QuantizationSection(Section):
    """How the base model is quantised; used where `quantization_bit` is 4 or 8."""

    double_quant: bool = Field(
        True, description="4-bit only: quantise the quantisation constants too."
    )
    compute_dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16",
        description="4-bit only: dtype of the matrix products. `float32` is faster on a CPU "
        "without bf16 instructions.",
    )
    skip: list[str] = Field(
        ["vision", "connector", "lm_head"],
        description="Parts (`vision`, `connector`, `language`, `lm_head`) or full module paths "
        "kept in 16 bit. An entry that matches nothing is an error.",
    )


class ImageSection(Section):
    """The pixel budget of a picture, applied by the processor."""

    min_pixels: int | None = Field(
        None,
        ge=1,
        description="Smaller pictures are enlarged to this area, in pixels. "
        "Unset: the processor's own.",
    )
    max_pixels: int | None = Field(
        None,
        ge=1,
        description="Larger pictures are shrunk to this area, in pixels. "
        "Unset: the processor's own.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> ImageSection:
        low, high = self.min_pixels, self.max_pixels
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_pixels ({low}) must not exceed max_pixels ({high})")
        return self


class DataSection(Section):
    """What is trained and evaluated on."""

    train: str | list[str] = Field(description="Training file or files, relative to the recipe.")
    eval: str | list[str] | None = Field(
        None, description="Evaluation file or files, relative to the recipe."
    )
    max_tokens: int = Field(
        2048, ge=8, description="Longest sample in tokens, image tokens included."
    )
    over_length: Literal["error", "drop", "shrink_images", "trim_text"] = Field(
        "error",
        description="What happens to a longer sample: stop; leave it out and count it; shrink its "
        "pictures until it fits; cut text at the end. A cut never goes through a picture.",
    )
    on_bad_sample: Literal["error", "skip"] = Field(
        "error",
        description="A sample that cannot be used: stop, or write it to `skipped.jsonl`.",
    )
    max_bad_fraction: Fraction = Field(
        0.01, description="With `skip`: the fraction of bad samples beyond which the run stops."
    )
    max_image_pixels: int = Field(
        100_000_000,
        ge=1,
        description="A picture with more pixels than this is refused before it is decoded "
        "(decompression bombs).",
    )
    num_workers: int = Field(
        2, ge=0, description="Processes that decode and encode ahead of the step; 0: in line."
    )


class TrainSection(Section):
    """The optimisation."""

    epochs: float | None = Field(
        None, gt=0, description="Passes over the training data. Either this or `max_steps`."
    )
    max_steps: int | None = Field(
        None, ge=1, description="Optimizer steps. Either this or `epochs`; neither: 3 epochs."
    )
    batch_size: int = Field(
        16,
        ge=1,
        description="Samples per optimizer step, over all processes: the effective batch.",
    )
    micro_batch_tokens: int = Field(
        4096,
        ge=1,
        description="Memory knob: tokens, padding included, in one forward pass of one process. "
        "A single longer sample still makes a micro-batch of its own.",
    )
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate.")
    part_learning_rates: dict[Literal["vision", "connector", "language", "lm_head"], float] = Field(
        {}, description="Peak learning rates of single parts, e.g. `{vision: 2e-5}`."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Course of the learning rate after the warm-up, down to 0."
    )
    warmup: float = Field(
        0.03,
        ge=0,
        description="Linear warm-up: a fraction of training below 1, optimizer steps from 1.",
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        "paged_adamw_8bit",
        description="AdamW with 32- or 8-bit state; `paged`: state moves to host memory when the "
        "GPU's is short (CUDA only; on a CPU the unpaged kind is used, with a notice).",
    )
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="Decoupled weight decay; never on biases, norms or AdaLoRA's tensors.",
    )
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="Global gradient norm is clipped to this; null: never."
    )
    gradient_checkpointing: bool = Field(
        True, description="Recompute activations in the backward pass: less memory, more time."
    )
    precision: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16",
        description="Compute dtype of the 16-bit parts. Adapters are kept in float32 in all three. "
        "`fp32` is the fastest on a CPU without bf16 instructions.",
    )
    log_every: int = Field(10, ge=1, description="Optimizer steps between two logged lines.")
    eval_every: float = Field(
        0.25, gt=0, description="Evaluation: a fraction of training up to 1, steps above."
    )
    save_every: float = Field(
        0.25,
        gt=0,
        description="Checkpoints: a fraction of training up to 1, steps above.",
    )
    keep_checkpoints: int = Field(2, ge=1, description="Newest checkpoints kept.")

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs and max_steps exclude each other; give one")
        for part, rate in self.part_learning_rates.items():
            if rate <= 0:
                raise ValueError(f"part_learning_rates.{part} must be above 0, got {rate}")
        return self


class EvalSection(Section):
    """Evaluation by generated answers, during training and by `vlmtune eval`."""

    task: Literal["vqa"] = Field("vqa", description="What is measured.")
    max_new_tokens: int = Field(32, ge=1, description="Longest generated answer, in tokens.")
    batch_size: int = Field(16, ge=1, description="Questions answered at once by one process.")
    max_samples: int | None = Field(
        None, ge=1, description="During training: only the first so many samples; null: all."
    )


class Recipe(Section):
    """A whole training run."""

    model: str = Field(min_length=1, description="Hub id or folder (relative to the recipe).")
    revision: str | None = Field(
        None, description="Hub revision; the commit it resolved to is recorded."
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Only for sources you trust."
    )
    quantization_bit: Literal[4, 8, 16] = Field(
        16, description="Base model: 4 = NF4, 8 = LLM.int8(), 16 = not quantised."
    )
    lora_target: list[str] = Field(
        ["all-linear"],
        description="Modules that get an adapter: groups (`language.attn`, `language.mlp`, "
        "`vision.attn`, `vision.mlp` or `vision_mlp`, `connector`, `all-linear`), leaf names in "
        "the language part (`q_proj`), full module paths, `re:` patterns over full paths. "
        "`[]`: no adapter; `modules_to_save` is trained in full.",
    )
    rank: int = Field(16, ge=1, description="Rank of the adapter.")
    alpha: float = Field(32, gt=0, description="The adapter's output is scaled by alpha / rank.")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout on the adapter's input, a probability."
    )
    use_dora: bool = Field(
        False, description="DoRA (Liu et al. 2024, arXiv 2402.09353): train magnitudes too."
    )
    use_rslora: bool = Field(
        False,
        description="rsLoRA (Kalajdzievski 2023, arXiv 2312.03732): scale by alpha / sqrt(rank).",
    )
    adalora: AdaLoraSection | None = Field(
        None, description="Present: AdaLoRA instead of LoRA; `rank` is then not used."
    )
    modules_to_save: list[str] = Field(
        [],
        description="Trained in full and saved with the adapter: `embeddings`, `lm_head`, "
        "`connector`, `vision`, `language`, or full module paths. `[all]` with `lora_target: []`: "
        "full fine-tuning.",
    )
    parts: dict[Literal["vision", "connector", "language", "lm_head"], list[str]] | None = Field(
        None, description="Module paths of each part, for a model that no family file knows."
    )
    output_dir: str = Field(description="The run folder (relative to the working directory).")
    seed: int = Field(42, ge=0, description="Seed of every random choice.")
    quantization: QuantizationSection = QuantizationSection()
    image: ImageSection = ImageSection()
    data: DataSection
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()

    @model_validator(mode="after")
    def _nothing_unused(self) -> Recipe:
        """A key that would have no effect is an error, not a comment."""
        given = self.model_fields_set
        if self.adalora is not None:
            for key, use in (("rank", "adalora.initial_rank"), ("use_rslora", None)):
                if key in given:
                    raise ValueError(
                        f"{key} has no effect with adalora; "
                        + (f"set {use} instead" if use else "remove it")
                    )
            if self.use_dora:
                raise ValueError("use_dora and adalora exclude each other")
        if self.quantization_bit == 16 and "quantization" in given:
            raise ValueError(
                "quantization has no effect with quantization_bit: 16; set 4 or 8, or remove it"
            )
        if not self.lora_target:
            self._check_full_fine_tuning(given)
        elif "all" in self.modules_to_save:
            raise ValueError("modules_to_save: [all] is full fine-tuning; set lora_target: []")
        return self

    def _check_full_fine_tuning(self, given: set[str]) -> None:
        if not self.modules_to_save:
            raise ValueError(
                "nothing would be trained: lora_target and modules_to_save are both empty"
            )
        for key in ("rank", "alpha", "dropout", "use_dora", "use_rslora", "adalora"):
            if key in given:
                raise ValueError(f"{key} has no effect with lora_target: []; remove it")
        if self.quantization_bit != 16 and "all" in self.modules_to_save:
            raise ValueError("quantised weights cannot be trained: set quantization_bit: 16")
