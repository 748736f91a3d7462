"""From prompts to Conditioning: windows of token ids, and the text encoders' hidden states.

    text -> [(fragment, weight)] (prompt.py) -> windows of token ids -> hidden states (B, T, D), pooled vector (B, P)

A window is the input of a text encoder: bos, up to W - 2 tokens, eos, padding. W is 77 for Stable Diffusion and comes
from the tokenizer's files. A longer prompt is read in several windows, whose states are concatenated along T.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastldm import checks
from fastldm.conditioning.prompt import Fragments, parse
from fastldm.conditioning.tokenizer import Tokenizer
from fastldm.device import send, send_numbers
from fastldm.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from fastldm.models.interfaces import TextEncoder

logger = logging.getLogger("fastldm")

Call = Callable[..., Any]
"""Calls an encoder: (key of everything except the tensors, function, tensors) -> function(*tensors)."""

MAX_WINDOWS = 64
"""Beyond this, prompts of unequal lengths are brought to one length only approximately: see `encode_prompts`."""
MAX_PROMPT_WINDOWS = 128
"""Limit per prompt: cross-attention reads all windows in each step."""


@dataclass(frozen=True)
class Conditioning:
    """The U-Net's inputs from prompts, in the text encoder's dtype, on its device; no negatives without guidance."""

    hidden: Tensor  # (B, T, D)
    pooled: Tensor | None = None  # (B, P), SDXL
    negative_hidden: Tensor | None = None  # (B, T, D)
    negative_pooled: Tensor | None = None  # (B, P), SDXL
    lengths: Tensor | None = None  # (B,) int32: of T tokens those that are read, of Karlo; None: all
    negative_lengths: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """Apply `function` to every tensor that is not None."""
        optional = (self.pooled, self.negative_hidden, self.negative_pooled, self.lengths, self.negative_lengths)
        return Conditioning(function(self.hidden), *(None if x is None else function(x) for x in optional))

    def repeat(self, count: int) -> Conditioning:
        """Repeat every prompt `count` times, as diffusers does for num_images_per_prompt: (B * count, ...)."""
        return self.map(lambda x: x.repeat_interleave(count, dim=0))

    def select(self, rows: Sequence[int]) -> Conditioning:
        """Only these prompts, in this order: (len(rows), ...)."""
        return self.map(lambda x: x[list(rows)])

    def network_rows(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Hidden states (R, T, D), pooled vectors (R, P) and lengths (R,) of the U-Net's rows: all negatives if there
        are any, then all prompts.
        """
        if self.negative_hidden is None:
            return self.hidden, self.pooled, self.lengths
        pairs = ((self.negative_pooled, self.pooled), (self.negative_lengths, self.lengths))
        pooled, lengths = (None if a is None or b is None else torch.cat((a, b)) for a, b in pairs)
        return torch.cat((self.negative_hidden, self.hidden)), pooled, lengths


@dataclass(frozen=True, eq=False)
class TextStage:
    """One text encoder with its tokenizer. It never changes: textual inversion makes another, see `with_tokens`."""

    tokenizer: Tokenizer
    model: TextEncoder
    added: Mapping[str, Tensor] = field(default_factory=dict)
    """Tokens of textual inversion, each with its vectors (V, D) on the host, in the order of their ids."""
    model_tokenizer: Tokenizer | None = None
    """The tokenizer without them; None if there are none."""
    hashes: Mapping[str, str] = field(default_factory=dict)
    """The short hashes of the files that added tokens come from, of those that come from files."""

    def with_tokens(self, added: Mapping[str, Tensor], hashes: Mapping[str, str] | None = None) -> TextStage:
        """The same encoder with these added tokens in place of others. hashes: of files of new ones. InputError as
        `Tokenizer.with_tokens` raises."""
        base = self.model_tokenizer or self.tokenizer
        if not added:
            return TextStage(base, self.model)
        tokenizer = base.with_tokens({token: len(vectors) for token, vectors in added.items()})
        known = {token: digest for token, digest in {**self.hashes, **(hashes or {})}.items() if token in added}
        return TextStage(tokenizer, self.model, dict(added), base, known)

    def embed(self, ids: Tensor) -> Tensor:
        """The embeddings (N, W, D) of ids (N, W), some of which are added tokens'."""
        model: Any = self.model  # PyTorch's: a bundle's table is inside its network
        return model.embed(ids, self._vectors, self.first_added)

    @functools.cached_property
    def _vectors(self) -> Tensor:
        return send(torch.cat([*self.added.values()]), self.model.device)  # (V, D) of all added tokens

    @property
    def first_added(self) -> int:
        """The id of the first added token, which is no row of the encoder's table."""
        return (self.model_tokenizer or self.tokenizer).size

    @property
    def window(self) -> int:
        """Length of a window: the tokenizer's, or the encoder's number of positions if that is smaller."""
        return min(self.tokenizer.max_length, self.model.config.max_position)


def prompt_list(prompt: Any, name: str = "prompt") -> list[str]:
    """A prompt, or a list of them, as a list of texts.

    Raises InputError for anything else, an empty list, too many or too long texts, and text that has no UTF-8 form.
    """
    return checks.texts(name, prompt, checks.MAX_IMAGES, checks.MAX_PROMPT_LENGTH)


@torch.no_grad()
def encode_prompts(
    encoders: Sequence[TextStage],
    prompts: str | Sequence[str],
    negatives: str | Sequence[str] | None = None,
    *,
    prompts_2: str | Sequence[str] | None = None,
    negatives_2: str | Sequence[str] | None = None,
    clip_skip: int | None = None,
    literal: bool = False,
    zero_negative: bool = False,
    length: int | None = None,
    run: Call = lambda key, function, *inputs: function(*inputs),
) -> Conditioning:
    """Encode prompts and, for guidance, negative prompts.

    encoders: one, or SDXL's two. SDXL is recognised by its last encoder's projection: `hidden` then has the penultimate
        layers of all encoders, concatenated, without the final norm, and `pooled` is the last encoder's.
    prompts: B texts. negatives: one, or B; None without guidance.
    prompts_2, negatives_2: one, or B, for the second encoder; by default the same texts.
    clip_skip: number of encoder layers to skip at the end, counted as in diffusers: None and 0 are the same, SDXL's
        last layer is skipped in addition, and negatives are encoded without clip_skip.
    literal: brackets and BREAK are text.
    length: tokens per window, if less than the encoders' own.
    run: calls an encoder, see `Call`.
    zero_negative: if `negatives` is None, use zeros (SDXL's `force_zeros_for_empty_prompt`).

    A prompt that fits one window and has no weights gives the same as diffusers' `encode_prompt`. A longer one is read
    in windows of W - 2 tokens, each between bos and eos, concatenated along T; BREAK pads a window and starts the next.
    `pooled` comes from the first. All rows of a call need the same T. Attention does not change if all its keys are
    repeated, so a shorter prompt's windows are repeated, up to the least common multiple of the lengths: every image is
    the same as with its prompt alone. Only if that is more than MAX_WINDOWS, windows are repeated to the length of the
    longest prompt, with a warning.

    A token's weight w changes its state h to e + w (h - e), e being the state of the empty prompt at that position, as
    in ComfyUI and compel. AUTOMATIC1111's w h, followed by restoring the mean over all states, divides by a mean that
    may be close to zero, and changes tokens that have no weight.

    Raises InputError: prompts as in `prompt_list`, unequal numbers, a prompt of more than MAX_PROMPT_WINDOWS windows,
    clip_skip beyond the encoder's layers;
    CheckpointError: a token without embedding in the encoder.
    """
    texts = prompt_list(prompts)
    batch = len(texts)
    texts_2 = texts if prompts_2 is None else _broadcast(prompts_2, batch, "prompt_2")
    if negatives is not None:
        negative_texts = _broadcast(negatives, batch, "negative_prompt")
        texts_2 = texts_2 + (
            negative_texts if negatives_2 is None else _broadcast(negatives_2, batch, "negative_prompt_2")
        )
        texts = texts + negative_texts
    last = encoders[-1].model.config
    pooling = last.with_projection or last.pools
    least = 1 if last.with_projection else 0  # SDXL reads the penultimate layer
    skip = _check_clip_skip(clip_skip, min(stage.model.config.layers for stage in encoders) - least)

    windows = split_windows(encoders, list(zip(texts, texts_2, strict=True)), literal, length)
    total = _common_length([len(row) for row in windows[0]])
    hidden: list[Tensor] = []
    vectors: list[Tensor] = []
    for stage, rows in zip(encoders, windows, strict=True):
        # The encoder runs once for prompts and negatives together, unless clip_skip makes them differ.
        groups = [(rows, least)] if skip == 0 else [(rows[:batch], least + skip), (rows[batch:], least)]
        outputs = [_encode(stage, group, total, drop, last.final_norm, run) for group, drop in groups if group]
        hidden.append(torch.cat([states for states, _ in outputs]))
        vectors = [vector for _, vector in outputs if vector is not None]
    states = torch.cat(hidden, dim=-1).to(hidden[-1].dtype)  # (B or 2B, T, D)
    pooled = torch.cat(vectors) if pooling else None  # (B or 2B, P), the last encoder's

    encoded = Conditioning(states, pooled)
    if negatives is not None:
        first, second = encoded.map(lambda x: x[:batch]), encoded.map(lambda x: x[batch:])
    elif zero_negative:
        first, second = encoded, encoded.map(torch.zeros_like)
    else:
        return encoded
    return Conditioning(first.hidden, first.pooled, second.hidden, second.pooled)


class Window(NamedTuple):
    ids: tuple[int, ...]  # (W,)
    weights: tuple[float, ...]  # (W,)


def _broadcast(texts: str | Sequence[str], batch: int, name: str) -> list[str]:
    """A text per prompt, from one for all or one per prompt."""
    items = prompt_list(texts, name)
    if len(items) not in (1, batch):
        raise InputError(f"{name} has {len(items)} texts for {batch} prompts: give one, or one per prompt")
    return items * (batch // len(items))


def _check_clip_skip(clip_skip: int | None, limit: int) -> int:
    try:
        return checks.whole("clip_skip", 0 if clip_skip is None else clip_skip, 0, limit)
    except InputError as error:
        raise InputError(f"{error} for this model") from None


def split_windows(
    encoders: Sequence[TextStage], texts: Sequence[tuple[str, str]], literal: bool, length: int | None
) -> list[list[list[Window]]]:
    """Windows by encoder and by text. texts: pairs of the texts of the first and the second encoder.

    All encoders get the same number of windows per section of a text: if one needs fewer (`!!!` is one token in CLIP-L
    and three in SDXL's second encoder), empty windows are appended.
    """
    window = min(stage.window for stage in encoders)
    length = window if length is None else min(length, window)
    split = {}
    for pair in dict.fromkeys(texts):
        parsed = [parse(text, literal=literal) for text in pair[: len(encoders)]]
        section_count = max(len(sections) for sections in parsed)
        parsed = [sections + [[]] * (section_count - len(sections)) for sections in parsed]
        by_stage: list[list[Window]] = [[] for _ in encoders]
        for k in range(section_count):
            chunks = [
                _chunks(stage, sections[k], length - stage.tokenizer.ends)
                for stage, sections in zip(encoders, parsed, strict=True)
            ]
            last_is_empty = 0 < k == section_count - 1 and not any(chunks)  # after a BREAK at the end
            count = 0 if last_is_empty else max(1, *map(len, chunks))
            if len(by_stage[0]) + count > MAX_PROMPT_WINDOWS:
                limit = MAX_PROMPT_WINDOWS * (length - encoders[0].tokenizer.ends)
                raise InputError(f"a prompt, {checks.show(pair[0])}, has more than the {limit} tokens that it may have")
            for stage, windows, own in zip(encoders, by_stage, chunks, strict=True):
                windows.extend(_windows(stage.tokenizer, own, length, count))
        split[pair] = by_stage
    return [[split[pair][k] for pair in texts] for k in range(len(encoders))]


def _chunks(stage: TextStage, fragments: Fragments, content: int) -> list[list[tuple[int, float]]]:
    """Tokens and their weights by window, each at most `content`. A token of several vectors stays whole, if a window
    has room for it (as in AUTOMATIC1111): they were learned as neighbours."""
    chunks: list[list[tuple[int, float]]] = []
    for text, weight in fragments:
        for token in stage.tokenizer.tokens(text):
            if not chunks or len(chunks[-1]) + min(len(token), content) > content:
                chunks.append([])
            for id in token:
                if len(chunks[-1]) == content:
                    chunks.append([])
                chunks[-1].append((id, weight))
    return chunks


def _windows(
    tokenizer: Tokenizer, chunks: Sequence[Sequence[tuple[int, float]]], length: int, count: int
) -> list[Window]:
    """Chunks of tokens and their weights as `count` windows of `length`; the last ones may be empty."""
    windows = []
    for k in range(count):
        chunk = chunks[k] if k < len(chunks) else ()
        padding = length - tokenizer.ends - len(chunk)
        first = () if tokenizer.bos is None else (tokenizer.bos,)
        last = () if tokenizer.eos is None else (tokenizer.eos,)
        ids = (*first, *(token for token, _ in chunk), *last, *(tokenizer.pad,) * padding)
        weights = (*(1.0 for _ in first), *(weight for _, weight in chunk), *(1.0,) * (len(last) + padding))
        windows.append(Window(ids, weights))
    return windows


def _common_length(counts: Sequence[int]) -> int:
    """The number of windows of every row of a call; see `encode_prompts`."""
    common = math.lcm(*counts)
    if common <= max(MAX_WINDOWS, *counts):
        return common
    lengths = ", ".join(map(str, sorted(set(counts))))
    logger.warning("prompts of %s windows in one call: images may differ slightly from those of single calls", lengths)
    return max(counts)


def _read(encode: Callable[..., tuple[Tensor, Tensor | None]], *inputs: Tensor) -> tuple[Tensor, Tensor | None]:
    """An encoder's states and vectors of windows (N, W), in groups of MAX_WINDOWS, for which memory is planned."""
    if len(inputs[0]) <= MAX_WINDOWS:
        return encode(*inputs)
    groups = [encode(*group) for group in zip(*(x.split(MAX_WINDOWS) for x in inputs), strict=True)]
    vectors = [vector for _, vector in groups if vector is not None]
    return torch.cat([states for states, _ in groups]), torch.cat(vectors) if vectors else None


def _encode(
    stage: TextStage, rows: Sequence[Sequence[Window]], total: int, drop: int, final_norm: bool, run: Call
) -> tuple[Tensor, Tensor | None]:
    """Weighted hidden states (B, total * W, D) of B rows of windows, and the first windows' pooled vectors (B, P)."""
    model = stage.model
    empty = _windows(stage.tokenizer, [], len(rows[0][0].ids), 1)[0].ids
    weighted = any(weight != 1.0 for row in rows for window in row for weight in window.weights)
    # Each distinct window is encoded once: negatives are mostly equal, as are several images of a prompt.
    distinct = dict.fromkeys(window.ids for row in rows for window in row)
    if weighted:
        distinct[empty] = None
    index_of = {ids: k for k, ids in enumerate(distinct)}
    largest = max(map(max, index_of))
    if not stage.added and largest >= model.config.vocab:
        raise CheckpointError(
            f"the tokenizer gave id {largest} but the text encoder has {model.config.vocab} embeddings: "
            "tokenizer and text encoder are not of one model"
        )
    read = functools.partial(model, skip=drop, final_norm=final_norm)
    ids = send_numbers(list(index_of), torch.int64, model.device)
    # Added tokens are looked up here: inside, a graph would read vectors that may be unloaded.
    inputs = (ids, stage.embed(ids)) if stage.added and largest >= stage.first_added else (ids,)
    states, vectors = _read(functools.partial(run, (id(model), drop, final_norm), read), *inputs)
    repeated = [[row[k % len(row)] for k in range(total)] for row in rows]
    index = send_numbers([[index_of[window.ids] for window in row] for row in repeated], torch.int64, model.device)
    hidden = states[index]  # (B, total, W, D)
    if weighted:
        numbers = [[window.weights for window in row] for row in repeated]
        weights = send_numbers(numbers, torch.float32, model.device).unsqueeze(-1)
        base = states[index_of[empty]].float()  # (W, D)
        scaled = (base + weights * (hidden.float() - base)).to(hidden.dtype)
        hidden = torch.where(weights == 1.0, hidden, scaled)  # tokens without a weight stay bitwise the same
    return hidden.flatten(1, 2), None if vectors is None else vectors[index[:, 0]]
