"""An opened target and what it is asked: conversations to a report, answers kept on the way."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.cli.processes import Processes
from vlmtune.cli.progress import progress

if TYPE_CHECKING:
    from vlmtune.data.encode import Encoder
    from vlmtune.data.types import Conversation
    from vlmtune.evaluation.answers import KeptAnswers
    from vlmtune.evaluation.types import EvalReport
    from vlmtune.models.open import OpenTarget
    from vlmtune.recipe.schema import EvalSection

logger = logging.getLogger("vlmtune")


@dataclass(frozen=True)
class Plan:
    """What is asked of every target. `guesses` are the majority answers, with `--blind`."""

    conversations: Sequence[Conversation]
    data: Sequence[Path]
    section: EvalSection
    seed: int
    guesses: Sequence[str] | None
    with_guard: bool
    dtype: str
    quantization_bit: int | None
    trust_remote_code: bool
    quiet: bool
    processes: Processes


@dataclass(frozen=True)
class Asked:
    """An opened target and how it is asked."""

    target: str
    opened: OpenTarget
    plan: Plan

    def settings(
        self, conversations: Sequence[Conversation], section: EvalSection, encoder: Encoder
    ) -> dict[str, Any]:
        from vlmtune.evaluation.fingerprint import answer_settings
        from vlmtune.models.open import result_of_run

        opened = self.opened
        folder = Path(self.target).expanduser()
        trained_bit = 16 if opened.recipe is None else opened.recipe.quantization_bit
        return answer_settings(
            opened.vlm,
            conversations,
            folders=[
                result_of_run(folder) if opened.kind == "run" else folder,
                Path(opened.vlm.source).expanduser(),
            ],
            quantization_bit=self.plan.quantization_bit or trained_bit,
            encoder=encoder,
            section=section,
            seed=self.plan.seed,
        )

    def report(
        self,
        conversations: Sequence[Conversation],
        section: EvalSection,
        encoder: Encoder,
        folder: Path,
        *,
        what: str = "",
        shown: Sequence[Conversation] | None = None,
    ) -> EvalReport:
        """Answers and scores; `shown` are the conversations as the model sees them, where these
        are not the ones to score; `what` goes before the progress. A collective."""
        from vlmtune.evaluation.answers import KeptAnswers
        from vlmtune.evaluation.runner import evaluate, num_to_do

        processes = self.plan.processes
        rank, world_size = processes.rank, processes.world_size
        told = f"{what}pictures scored" if section.task == "retrieval" else f"{what}answered"
        num_mine = num_to_do(conversations, section.task, rank=rank, world_size=world_size)
        with contextlib.ExitStack() as stack:
            kept = None
            if section.task != "retrieval":
                settings = self.settings(shown or conversations, section, encoder)
                kept = stack.enter_context(KeptAnswers(folder, settings, rank=rank))
                if processes.is_main:
                    _tell_kept(kept, len(conversations), folder)
            quiet = self.plan.quiet or not processes.is_main
            on_progress = stack.enter_context(progress(told, num_mine, quiet=quiet))
            return evaluate(
                self.opened.vlm,
                conversations,
                shown=shown,
                encoder=encoder,
                section=section,
                seed=self.plan.seed,
                on_progress=on_progress,
                rank=rank,
                world_size=world_size,
                gather=processes.gather,
                kept=kept,
            )

    def digest(self, settings: Mapping[str, Any]) -> str:
        """A short name for whatever decides the report."""
        from vlmtune.evaluation.fingerprint import references_digest, settings_digest

        section = self.plan.section.model_dump(exclude={"batch_size", "guard"})
        also = {
            "section": section,
            "references": references_digest(self.plan.conversations),
            "seed": self.plan.seed,
            "blind": self.plan.guesses,
            "guard": self.plan.with_guard,
        }
        return settings_digest({**settings, **also})

    def about(self) -> dict[str, Any]:
        """What was evaluated, on what, and how."""
        from vlmtune.evaluation.fingerprint import decoding_in_effect
        from vlmtune.models.processor import pixel_budget

        vlm, plan = self.opened.vlm, self.plan
        about = {
            "target": self.target,
            "kind": self.opened.kind,
            "model_commit": vlm.commit,
            "data": [str(file.absolute()) for file in plan.data],
            "dtype": str(vlm.model.dtype).removeprefix("torch."),
            "pixel_budget": pixel_budget(vlm.processor),  # reports compare only at the same one
            "seed": plan.seed,
        }
        if plan.section.task == "retrieval":
            about["scorer"] = plan.section.scorer
            if plan.section.scorer == "likelihood":
                about["subtract_prior"] = plan.section.subtract_prior
            return about
        return about | {
            "max_new_tokens": plan.section.max_new_tokens,
            "decoding": decoding_in_effect(plan.section.decoding),
        }


def _tell_kept(kept: KeptAnswers, total: int, folder: Path) -> None:
    if kept.texts:
        logger.info("%d of %d answers are kept from an earlier start", len(kept.texts), total)
    if kept.dropped:
        logger.warning(
            "%s holds answers of an earlier start with other settings (%s); they are made anew",
            folder,
            ", ".join(sorted(kept.dropped)),
        )
