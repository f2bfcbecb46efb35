"""The text of a model card: the hub's header, and a page of Markdown in which no text of strangers becomes markup."""

from __future__ import annotations

import html
import math
import shlex
from collections.abc import Sequence
from importlib.resources import files as resources

from ...formats.engine_rules import CONTEXT
from ...formats.text import printable
from ...texts import EVALUATION_SHA256
from ..evaluate.pictures import BY_SIZE, BY_TOKENS
from ..evaluate.result import EvaluatedFile, Evaluation
from ..spec.running import NOTE
from .base_model import BaseModel
from .facts import CardFile, Origin

LIBRARY = "hipfire"
TAGS = ("hipfire", "hfq", "mq-quant", "quantized", "moe", "minimax_m2")
SPACE = "\u00a0"
"""A space at which no line is broken."""
_CAPTIONS = {
    BY_SIZE: "KL divergence against file size",
    BY_TOKENS: "KL divergence against calibration tokens",
}
_MARKS = str.maketrans({c: f"\\{c}" for c in "|*_[]`\\"})


def render_card(
    files: Sequence[CardFile],
    origin: Origin,
    base: BaseModel,
    evaluation: Evaluation | None = None,
    measured: Sequence[EvaluatedFile] = (),
    pictures: Sequence[str] = (),
) -> str:
    """The text of README.md; `files` and `measured` stand in the card in their order."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters.update(
        md=_md, code=_code, sh=shlex.quote, n=_number, pm=_with_error, gb=_gb, percent=_percent
    )
    template = environment.from_string(
        resources(__name__.rpartition(".")[0]).joinpath("card.md.jinja").read_text("utf-8")
    )
    return template.render(
        header=_header(origin, base),
        model=origin.model,
        repository=origin.repository,
        versions=sorted({f.program or "of an unknown version" for f in files}),
        files=[{**vars(f), "name": f.name, "purpose": _purpose(f)} for f in files],
        memory_note=NOTE.removeprefix("fits in: "),
        evaluation=evaluation if measured else None,
        text_note=_text_note(evaluation),
        measured=measured,
        pictures=[(p, _CAPTIONS[p.removesuffix(".png")]) for p in pictures if p.endswith(".png")],
        limits=_limits(files, measured),
        license_note=_license_note(base),
    )


def _header(origin: Origin, base: BaseModel) -> str:
    from huggingface_hub import ModelCardData

    named = base.repository or origin.repository
    data = ModelCardData(
        base_model=named,
        base_model_relation="quantized" if named else None,
        license=base.license,
        license_name=base.license_name,
        license_link=base.license_link,
        language=list(base.languages) or None,
        library_name=LIBRARY,
        pipeline_tag=base.pipeline,
        tags=list(TAGS),
    )
    return f"---\n{data.to_yaml()}\n---"


def _purpose(file: CardFile) -> str:
    return (
        f"{file.tier}: {file.description}"
        if file.tier and file.description
        else file.tier or "of an unknown recipe"
    )


def _text_note(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return ""
    tokens = evaluation.tokens
    whose = (
        "the evaluation text that comes with mq-quant (prose, code, mathematics, chat, nine languages)"
        if tokens.text == EVALUATION_SHA256
        else f"a text of the publisher's (token ids with SHA-256 `{tokens.sha256[:16]}…`)"
    )
    return f"{whose}, in sequences of {tokens.length} tokens"


def _limits(files: Sequence[CardFile], measured: Sequence[EvaluatedFile]) -> list[str]:
    limits = [
        "They run in hipfire and in no other engine."
        if len(files) > 1
        else "It runs in hipfire and in no other engine.",
        f"hipfire clamps the context of this architecture to {CONTEXT:,} tokens, with a Q8 cache.",
    ]
    for fact in dict.fromkeys(fact for f in files for fact in f.concerns):
        names = ", ".join(f"`{_code(f.name)}`" for f in files if fact in f.concerns)
        limits.append(f"{names}: {_md(fact.warning)}.")
    if measured:
        limits.append(
            "KLD was measured in short sequences, with the weights as they are stored and sums in f32. It says "
            "nothing of long contexts, nor of what the engine's own arithmetic adds."
        )
    return limits


def _license_note(base: BaseModel) -> str | None:
    if base.license is None:
        return None
    name = base.license_name or base.license
    of = f"[{_md(name)}]({base.license_link})" if base.license_link else _md(name)
    return f"The licence of the base model holds here too: {of}."


def _md(text: str) -> str:
    """Text of strangers for Markdown: it becomes no markup, no HTML and no new line."""
    return html.escape(printable(text), quote=False).translate(_MARKS)


def _code(text: str) -> str:
    """Text of strangers between two backticks, in a table too."""
    return printable(text).replace("`", "'").replace("|", "\\|")


def _number(value: float) -> str:
    return f"{value:#.4g}" if math.isfinite(value) and value else "0" if value == 0 else "–"


def _with_error(value: float, error: float) -> str:
    """A figure with its standard error, to the second digit of that."""
    if not (math.isfinite(error) and error > 0):
        return _number(value)
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f}{SPACE}±{SPACE}{error:.{decimals}f}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}{SPACE}%"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}{SPACE}GB" if size >= 1e9 else f"{size / 1e6:.1f}{SPACE}MB"
