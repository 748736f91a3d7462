"""Prompts to Conditioning: tokenizer, windows, and the text encoders' states.

    text -> [(fragment, weight)] (prompt.py) -> windows of token ids -> hidden states (B, T, D), pooled vector (B, P)

A window is what a text encoder reads at once: bos, up to W - 2 tokens, eos, padding. W is 77 for Stable
Diffusion and comes from the tokenizer's files. A longer prompt is read in several windows, whose states are laid
side by side along T.
"""

from __future__ import annotations

import functools
import gzip
import itertools
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastldm import checks
from fastldm.conditioning.prompt import Fragments, parse
from fastldm.device import send_numbers
from fastldm.errors import CheckpointError, InputError
from fastldm.reading import read_json
from fastldm.system import ASSETS

if TYPE_CHECKING:
    import tokenizers

    from fastldm.models.interfaces import TextEncoder

logger = logging.getLogger("fastldm")

Run = Callable[..., Any]

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
CLIP_VOCABULARY = 49408
CLIP_WINDOW = 77
MAX_WINDOWS = 64
"""Beyond this, prompts of unequal length in one call are brought to one length approximately: `encode_prompts`."""
MAX_PROMPT_WINDOWS = 128
"""What a prompt may have: cross-attention reads all of it at each step."""

_MERGES = ASSETS / "clip_bpe" / "merges.txt.gz"
_DEFAULTS = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# CLIP's words (simple_tokenizer.py of openai/CLIP), as transformers' CLIPTokenizer splits them
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


# Tokenizer


class Tokenizer:
    """CLIP's byte-pair tokenizer: ids equal those of transformers' CLIPTokenizer on the same folder. Thread-safe."""

    max_length: int
    """Tokens in a window, bos and eos included."""
    bos: int
    eos: int
    pad: int
    """What fills a window after eos: eos itself in CLIP-L, `!` (id 0) in OpenCLIP's encoders."""
    size: int
    """One more than the highest id: the rows that a text encoder's embedding has to have."""

    def __init__(self, folder: Path | str | None = None, *, pad_token: str | None = None) -> None:
        """Read `tokenizer.json`, or `vocab.json` and `merges.txt`, with the settings that lie beside them.

        folder: None is CLIP's own tokenizer, which is built in.
        pad_token: in place of the one in the settings; "!" makes the built-in one that of SD 2 and of SDXL's
            second encoder.
        Raises CheckpointError where the files are missing, damaged, or not a byte-pair tokenizer's.
        """
        source = _MERGES if folder is None else Path(folder)
        try:
            files = _bundled_files() if folder is None else _read_files(source)
            if pad_token is not None:
                files = files._replace(names={**files.names, "pad_token": {"content": pad_token}})
            self._backend = _build(files)
            ids = {token.content: k for k, token in self._backend.get_added_tokens_decoder().items()}
            named = ("bos_token", "eos_token", "pad_token")
            self.bos, self.eos, self.pad = (ids[files.names[name]["content"]] for name in named)
            self.size = 1 + max(*files.vocab.values(), *ids.values())
            self._vectors = _vectors(ids)
        except CheckpointError:
            raise
        except Exception as error:  # files of any content end here, and tokenizers raises bare Exception
            raise CheckpointError(f"the tokenizer in {source} is not one of CLIP's kind: {error!r}") from error
        self.max_length = files.max_length

    def ids(self, text: str) -> list[int]:
        """Token ids of a text of any length, without bos, eos and padding.

        A token of several vectors, which textual inversion adds as `<x>`, `<x>_1`, `<x>_2` and so on, is read as all of
        them where `<x>` stands (diffusers' `maybe_convert_prompt`), or as they stand where all are spelled out.
        """
        ids = list(self._backend.encode(text, add_special_tokens=False).ids)
        if self._vectors.keys().isdisjoint(ids):
            return ids
        expanded = []
        for k, token in enumerate(ids):
            others = self._vectors.get(token, [])
            expanded += [token] if ids[k + 1 : k + 1 + len(others)] == others else [token, *others]
        return expanded


def _vectors(added: Mapping[str, int]) -> dict[int, list[int]]:
    """The ids of `<x>_1`, `<x>_2` and so on, as far as there are such, by that of `<x>`; of all added tokens."""
    vectors = {}
    for content, token in added.items():
        others = itertools.takewhile(added.__contains__, (f"{content}_{k}" for k in itertools.count(1)))
        if ids := [added[other] for other in others]:
            vectors[token] = ids
    return vectors


def clip_vocabulary(size: int = CLIP_VOCABULARY) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary (token to id) and merges, built from the merges that ship here.

    size: 514 to 49,408 tokens. A smaller vocabulary has the 512 bytes, the `size - 514` most common merges, and
    the two special tokens at its end.
    """
    with gzip.open(_MERGES, "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()[1:]  # the first is "#version: 0.2"
    merges = [(left, right) for left, right in (line.split(" ") for line in lines[: size - 514])]
    # GPT-2's order of the bytes: the printable ones first, the others as characters from 256 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + k) for k in range(256 - len(printable))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(left + right for left, right in merges), BOS, EOS]
    return {token: k for k, token in enumerate(tokens)}, merges


class _Files(NamedTuple):
    """What a tokenizer's files say, whichever files they were. Tokens are AddedToken's arguments."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    added: list[dict[str, Any]]  # taken out of a text before all else
    names: dict[str, dict[str, Any]]  # likewise; by "bos_token" and so on
    max_length: int


def _bundled_files() -> _Files:
    vocab, merges = clip_vocabulary()
    return _Files(vocab, merges, [], {name: {"content": token} for name, token in _DEFAULTS.items()}, CLIP_WINDOW)


def _read_files(folder: Path) -> _Files:
    """As transformers reads them: `tokenizer.json` gives vocabulary and merges where it is there, but not how to
    normalise and split; `added_tokens_decoder` replaces the older files of special tokens."""
    serialized = _read_json(folder / "tokenizer.json")
    config = _read_json(folder / "tokenizer_config.json") or {}
    vocab, merges = _read_bpe(folder) if serialized is None else _serialized_bpe(folder, serialized)

    named = {**_DEFAULTS, **{name: value for name, value in config.items() if value is not None}}
    added: dict[int, dict[str, Any]] = {}
    if "added_tokens_decoder" in config:
        added = {int(k): _token(value) for k, value in config["added_tokens_decoder"].items()}
    else:
        for name, value in (_read_json(folder / "special_tokens_map.json") or {}).items():
            named[name] = {**value, "special": True} if isinstance(value, Mapping) else value
        special = {_token(named[name])["content"] for name in _NAMED if name in named}
        for content, k in (_read_json(folder / "added_tokens.json") or {}).items():
            added[k] = {"content": content, "normalized": content not in special, "special": content in special}
        for value in (serialized or {}).get("added_tokens", ()):
            added[value["id"]] = _token(value)

    names = {name: _token(named[name]) for name in _NAMED if name in named}
    extra = named.get("additional_special_tokens") or named.get("extra_special_tokens") or []
    names |= {f"extra_{k}": _token(value) for k, value in enumerate(extra)}
    return _Files(vocab, merges, [added[k] for k in sorted(added)], names, _window_length(config))


def _serialized_bpe(folder: Path, serialized: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = serialized["model"]
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'} is a {model.get('type')} tokenizer: expected CLIP's, which is byte-pair (BPE)"
        )
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return model["vocab"], [(left, right) for left, right in pairs]


def _read_bpe(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    from tokenizers.models import BPE

    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocab.is_file() and merges.is_file()):
        raise CheckpointError(f"no tokenizer in {folder}: expected vocab.json and merges.txt, or tokenizer.json")
    return BPE.read_file(str(vocab), str(merges))


def _read_json(path: Path) -> Any:
    """The file's content, or None where there is no such file."""
    return read_json(path) if os.path.lexists(path) else None


def _token(value: Any) -> dict[str, Any]:
    """A token as the files write it, a string or a dict, as AddedToken's arguments."""
    if isinstance(value, str):
        return {"content": value}
    return {k: value[k] for k in ("content", "single_word", "lstrip", "rstrip", "normalized", "special") if k in value}


def _window_length(config: Mapping[str, Any]) -> int:
    length = config.get("model_max_length", config.get("max_len"))
    # transformers writes 1e30 where it knows none
    return int(length) if isinstance(length, (int, float)) and 3 <= length <= 1e6 else CLIP_WINDOW


def _build(files: _Files) -> tokenizers.Tokenizer:
    # Imported where it is used: `import fastldm` and the command's help do without.
    from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE

    bpe = BPE(
        vocab=files.vocab,
        merges=files.merges,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        unk_token=files.names["unk_token"]["content"],
    )
    backend = Backend(bpe)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    # The named tokens are special, whatever the files say of them, and so are found in a text as written.
    named = {token["content"]: token for token in files.names.values()}
    added = {token["content"]: token for token in files.added}
    tokens = [{**token, "special": token.get("special", False) or content in named} for content, token in added.items()]
    tokens += [{**token, "special": True} for content, token in named.items() if content not in added]
    backend.add_tokens([AddedToken(**token) for token in tokens])
    return backend


# Conditioning


@dataclass(frozen=True)
class Conditioning:
    """What the U-Net reads of the prompts, in the text encoder's dtype, on its device; no negatives when unguided."""

    hidden: Tensor  # (B, T, D)
    pooled: Tensor | None = None  # (B, P), SDXL
    negative_hidden: Tensor | None = None  # (B, T, D)
    negative_pooled: Tensor | None = None  # (B, P), SDXL

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """`function` of every tensor there is, such as `lambda x: x.to(device)`."""
        optional = (self.pooled, self.negative_hidden, self.negative_pooled)
        return Conditioning(function(self.hidden), *(None if x is None else function(x) for x in optional))

    def repeat(self, count: int) -> Conditioning:
        """Every prompt `count` times in a row, as diffusers does for num_images_per_prompt: (B * count, ...)."""
        return self.map(lambda x: x.repeat_interleave(count, dim=0))

    def select(self, rows: Sequence[int]) -> Conditioning:
        """These prompts only, in this order: (len(rows), ...)."""
        return self.map(lambda x: x[list(rows)])

    def network_rows(self) -> tuple[Tensor, Tensor | None]:
        """Hidden states (R, T, D) and pooled vectors (R, P) of the network's rows: all negatives, where there are any,
        then all prompts.
        """
        if self.negative_hidden is None:
            return self.hidden, self.pooled
        hidden = torch.cat((self.negative_hidden, self.hidden))
        if self.pooled is None or self.negative_pooled is None:
            return hidden, None
        return hidden, torch.cat((self.negative_pooled, self.pooled))


@dataclass(frozen=True)
class TextStage:
    """One text encoder with its tokenizer."""

    tokenizer: Tokenizer
    model: TextEncoder

    @property
    def window(self) -> int:
        """Tokens read at once: the tokenizer's, or the encoder's positions where those are fewer."""
        return min(self.tokenizer.max_length, self.model.config.max_position)


def prompt_list(prompt: Any, name: str = "prompt") -> list[str]:
    """A prompt, or a list of them, as a list of texts.

    Raises InputError for anything else, for an empty list, for too many and too long ones, and for text that has no
    UTF-8 form.
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
    run: Run = lambda key, work, *inputs: work(*inputs),
) -> Conditioning:
    """Encode prompts and, for guidance, negative prompts.

    encoders: one, or SDXL's two. SDXL is known by its last encoder's projection: `hidden` is then the penultimate
        layer's of every encoder side by side, without the final norm, and `pooled` the last encoder's.
    prompts: B texts. negatives: one, or B; None without guidance.
    prompts_2, negatives_2: one, or B, for the second encoder, in place of those.
    clip_skip: encoder layers left out at the end, counted as diffusers counts them: None and 0 are the same, SDXL's
        last layer is left out besides, and the negatives are read in full.
    literal: brackets and BREAK are text.
    length: tokens of a window; the encoders' own when None, or where it is more.
    run: how an encoder is called: (what says all but the tensors, work, tensors) -> work(*tensors).
    zero_negative: where `negatives` is None, zeros stand for them (SDXL's `force_zeros_for_empty_prompt`).

    A prompt that fits one window and has no weights gives what diffusers' `encode_prompt` gives. A longer one is
    read in windows of W - 2 tokens, each between bos and eos, laid side by side along T; BREAK fills up a window and
    begins the next. `pooled` comes from the first. All rows of a call need one T. Attention does not change when its
    whole set of keys is repeated, so a shorter prompt's windows are repeated, up to the least common multiple of the
    lengths: every picture is the one that its prompts give alone. Only where that is more than MAX_WINDOWS does the
    repetition stop at the longest prompt, with a warning.

    A token's weight w moves its state h away from the state e that the empty prompt has in that place,
    e + w (h - e), as ComfyUI and compel do. AUTOMATIC1111's way, w h and then the mean over all states restored,
    divides by a mean that may be near zero, and moves tokens that have no weight.

    Raises InputError: prompts as in `prompt_list`, unequal numbers, a prompt of more than MAX_PROMPT_WINDOWS windows,
    clip_skip beyond the encoder's layers;
    CheckpointError: a token that the encoder has no embedding for.
    """
    texts = prompt_list(prompts)
    batch = len(texts)
    texts_2 = texts if prompts_2 is None else _one_each(prompts_2, batch, "prompt_2")
    if negatives is not None:
        others = _one_each(negatives, batch, "negative_prompt")
        texts_2 = texts_2 + (others if negatives_2 is None else _one_each(negatives_2, batch, "negative_prompt_2"))
        texts = texts + others
    pooling = encoders[-1].model.config.with_projection
    least = 1 if pooling else 0  # SDXL reads the penultimate layer
    skip = _check_clip_skip(clip_skip, min(stage.model.config.layers for stage in encoders) - least)

    windows = _split(encoders, list(zip(texts, texts_2, strict=True)), literal, length)
    total = _common_length([len(row) for row in windows[0]])
    hidden: list[Tensor] = []
    vectors: list[Tensor] = []
    for stage, rows in zip(encoders, windows, strict=True):
        # The encoder runs once for prompts and negatives together, unless clip_skip makes them differ.
        parts = [(rows, least)] if skip == 0 else [(rows[:batch], least + skip), (rows[batch:], least)]
        outputs = [_encode(stage, part, total, drop, not pooling, run) for part, drop in parts if part]
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


class _Window(NamedTuple):
    ids: tuple[int, ...]  # (W,)
    weights: tuple[float, ...]  # (W,)


def _one_each(texts: str | Sequence[str], batch: int, name: str) -> list[str]:
    """A text for each prompt, from one for all or as many."""
    items = prompt_list(texts, name)
    if len(items) not in (1, batch):
        raise InputError(f"{name} has {len(items)} texts for {batch} prompts: give one, or one a prompt")
    return items * (batch // len(items))


def _check_clip_skip(clip_skip: int | None, most: int) -> int:
    try:
        return checks.whole("clip_skip", 0 if clip_skip is None else clip_skip, 0, most)
    except InputError as error:
        raise InputError(f"{error} for this model") from None


def _split(
    encoders: Sequence[TextStage], texts: Sequence[tuple[str, str]], literal: bool, length: int | None
) -> list[list[list[_Window]]]:
    """Windows by encoder and by text. texts: what the first encoder reads, and what the second does.

    All encoders get equally many windows of each part of a text: where one needs fewer (`!!!` is one token in CLIP-L
    and three in SDXL's second encoder), empty ones follow.
    """
    window = min(stage.window for stage in encoders)
    length = window if length is None else min(length, window)
    split = {}
    for pair in dict.fromkeys(texts):
        parts = [parse(text, literal=literal) for text in pair[: len(encoders)]]
        most = max(len(one) for one in parts)
        parts = [one + [[]] * (most - len(one)) for one in parts]
        by_stage: list[list[_Window]] = [[] for _ in encoders]
        for k in range(most):
            tokens = [_tokens(stage, one[k]) for stage, one in zip(encoders, parts, strict=True)]
            last_is_empty = 0 < k == most - 1 and not any(tokens)  # a BREAK at the end begins nothing
            count = 0 if last_is_empty else max(1, *(-(-len(one) // (length - 2)) for one in tokens))
            if len(by_stage[0]) + count > MAX_PROMPT_WINDOWS:
                limit = MAX_PROMPT_WINDOWS * (length - 2)
                raise InputError(f"a prompt, {checks.show(pair[0])}, has more than the {limit} tokens that it may have")
            for stage, windows, one in zip(encoders, by_stage, tokens, strict=True):
                windows.extend(_windows(stage.tokenizer, one, length, count))
        split[pair] = by_stage
    return [[split[pair][k] for pair in texts] for k in range(len(encoders))]


def _tokens(stage: TextStage, fragments: Fragments) -> list[tuple[int, float]]:
    return [(token, weight) for text, weight in fragments for token in stage.tokenizer.ids(text)]


def _windows(tokenizer: Tokenizer, tokens: Sequence[tuple[int, float]], length: int, count: int) -> list[_Window]:
    """Tokens and their weights cut into `count` windows of `length`; empty ones follow."""
    content = length - 2
    windows = []
    for k in range(count):
        part = tokens[k * content : (k + 1) * content]
        padding = content - len(part)
        ids = (tokenizer.bos, *(token for token, _ in part), tokenizer.eos, *(tokenizer.pad,) * padding)
        weights = (1.0, *(weight for _, weight in part), 1.0, *(1.0,) * padding)
        windows.append(_Window(ids, weights))
    return windows


def _common_length(counts: Sequence[int]) -> int:
    """How many windows every row of a call gets; see `encode_prompts`."""
    common = math.lcm(*counts)
    if common <= max(MAX_WINDOWS, *counts):
        return common
    lengths = ", ".join(map(str, sorted(set(counts))))
    logger.warning("prompts of %s windows in one call: pictures may differ a little from those made alone", lengths)
    return max(counts)


def _read(encode: Callable[[Tensor], tuple[Tensor, Tensor | None]], ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """An encoder's states and vectors of windows (N, W), a number of windows at once that memory was planned for."""
    if len(ids) <= MAX_WINDOWS:
        return encode(ids)
    groups = [encode(group) for group in ids.split(MAX_WINDOWS)]
    vectors = [vector for _, vector in groups if vector is not None]
    return torch.cat([states for states, _ in groups]), torch.cat(vectors) if vectors else None


def _encode(
    stage: TextStage, rows: Sequence[Sequence[_Window]], total: int, drop: int, final_norm: bool, run: Run
) -> tuple[Tensor, Tensor | None]:
    """Weighted hidden states (B, total * W, D) of B rows of windows, and the first windows' pooled vectors (B, P)."""
    model = stage.model
    empty = _windows(stage.tokenizer, [], len(rows[0][0].ids), 1)[0].ids
    weighted = any(weight != 1.0 for row in rows for window in row for weight in window.weights)
    # Each distinct window is read once: negatives are mostly alike, and so are several pictures of one prompt.
    distinct = dict.fromkeys(window.ids for row in rows for window in row)
    if weighted:
        distinct[empty] = None
    place = {ids: k for k, ids in enumerate(distinct)}
    largest = max(map(max, place))
    if largest >= model.config.vocab:
        raise CheckpointError(
            f"the tokenizer gave id {largest} but the text encoder has {model.config.vocab} embeddings: "
            "tokenizer and text encoder are not of one model"
        )
    read = functools.partial(model, skip=drop, final_norm=final_norm)
    ids = send_numbers(list(place), torch.int64, model.device)
    states, vectors = _read(lambda some: run((id(model), drop, final_norm), read, some), ids)
    repeated = [[row[k % len(row)] for k in range(total)] for row in rows]
    index = send_numbers([[place[window.ids] for window in row] for row in repeated], torch.int64, model.device)
    hidden = states[index]  # (B, total, W, D)
    if weighted:
        numbers = [[window.weights for window in row] for row in repeated]
        weights = send_numbers(numbers, torch.float32, model.device).unsqueeze(-1)
        base = states[place[empty]].float()  # (W, D)
        moved = (base + weights * (hidden.float() - base)).to(hidden.dtype)
        hidden = torch.where(weights == 1.0, hidden, moved)  # a token without a weight keeps its bits
    return hidden.flatten(1, 2), None if vectors is None else vectors[index[:, 0]]
