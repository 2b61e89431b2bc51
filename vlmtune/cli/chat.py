"""`vlmtune chat TARGET ["question"]`: one streamed answer, or a small conversation."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmtune.cli.common import (
    DebugOption,
    DtypeOption,
    JsonOption,
    QuietOption,
    command,
    print_json,
    split_settings,
)
from vlmtune.errors import VlmtuneError

if TYPE_CHECKING:
    from vlmtune.evaluation.dialogue import Dialogue


SLASH_COMMANDS = {
    "/image": "PATH: show a picture with the next question",
    "/reset": "forget the conversation",
    "/quit": "leave (Ctrl-D too)",
}


RECIPE_KEYS = ("eval.max_new_tokens", "quantization_bit", "trust_remote_code")
"""The recipe's keys that have an effect on a conversation."""


@command
def chat_command(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET|QUESTION|KEY.SUB=VALUE",
            help="A run folder, an adapter folder, or a model (folder or hub id). QUESTION is "
            "answered once; without it a conversation starts, one question per line. Keys of the "
            "recipe that can be set: " + ", ".join(RECIPE_KEYS) + ".",
            show_default=False,
        ),
    ],
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", metavar="PICTURE", help="Repeat it for more pictures."),
    ] = None,
    dtype: DtypeOption = "auto",
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Ask a run, an adapter or a model about pictures."""
    from vlmtune.recipe.load import load_settings
    from vlmtune.sessions.preload import preload

    words, settings = split_settings(arguments)
    if not 1 <= len(words) <= 2:
        raise VlmtuneError(
            "wrong number of arguments", got=" ".join(words), expected="TARGET, or TARGET QUESTION"
        )
    target, question = words[0], words[1] if len(words) == 2 else None
    values = {"eval": {"max_new_tokens": 256}}
    recipe, given = load_settings(settings, taken=RECIPE_KEYS, values=values)
    if json and question is None:
        raise VlmtuneError(
            "--json needs a question to answer", got="none", do="give the question after TARGET"
        )
    if question is not None and not question.strip():
        raise VlmtuneError("the question is empty", do="ask something, or leave it out to talk")
    _check_pictures(image or [])

    preload("vlmtune.evaluation.dialogue", "vlmtune.models.open")
    from vlmtune.evaluation.dialogue import Dialogue
    from vlmtune.sessions.target import answering_encoder, max_image_pixels, open_for_answers

    opened = open_for_answers(
        target,
        dtype=dtype,
        quantization_bit=recipe.quantization_bit if "quantization_bit" in given else None,
        trust_remote_code=recipe.trust_remote_code,
    )
    dialogue = Dialogue(
        opened.vlm,
        encoder=answering_encoder(opened),
        max_new_tokens=recipe.eval.max_new_tokens,
        max_image_pixels=max_image_pixels(opened),
    )
    for path in image or []:
        dialogue.add_image(path)
    if question is None:
        _converse(dialogue, quiet)
        return
    answer = dialogue.ask(question, on_text=(lambda text: None) if json else _stream)
    if json:
        print_json({"answer": answer.text})
    else:
        print()
    if not answer.is_complete:
        raise KeyboardInterrupt


def _check_pictures(paths: list[Path]) -> None:
    for path in paths:
        if not path.expanduser().is_file():
            raise VlmtuneError("no such picture file", file=path, expected="a picture file")


def _stream(text: str) -> None:
    print(text, end="", flush=True)


def _converse(dialogue: Dialogue, quiet: bool) -> None:
    """Read questions until the end of input; answers go to stdout, the rest to stderr."""
    with contextlib.suppress(ImportError):  # Windows has no readline
        import readline  # noqa: F401 - it gives `input` line editing
    prompt = "> " if sys.stdin.isatty() else ""
    if not quiet:
        _print_help()
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            _say("\nCtrl-D or /quit leaves")
            continue
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                _obey(dialogue, line)
            elif line:
                answer = dialogue.ask(line, on_text=_stream)
                print(flush=True)
                if not answer.is_complete:
                    _say("(stopped)")
        except VlmtuneError as error:  # said, and the conversation goes on
            _say(str(error))


def _obey(dialogue: Dialogue, line: str) -> None:
    name, _, rest = line.partition(" ")
    path = rest.strip().strip("'\"")
    if name == "/image" and path:
        _check_pictures([Path(path)])
        dialogue.add_image(Path(path))
        _say(f"shown with the next question: {path}")
    elif name == "/reset":
        dialogue.reset()
        _say("forgotten")
    elif name == "/image":
        _say("/image needs a path")
    else:
        _say(f"unknown command {name}")
        _print_help()


def _print_help() -> None:
    for name, text in SLASH_COMMANDS.items():
        _say(f"  {name} {text}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
