"""CLIP's byte-pair tokenizer, from files or from the merges that ship with fastldm; and BERT's, T5's and GLIDE's, from
files.

BERT's splits words into the longest pieces that its vocabulary has (WordPiece), T5's into the likeliest (Unigram),
GLIDE's is GPT-2's, of byte pairs. All are of the library tokenizers: no other package is needed.

Over 500 lines, for all kinds share how files of tokenizers, of any of their formats, are read.
"""

from __future__ import annotations

import base64
import copy
import gzip
import io
import itertools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastldm import checks
from fastldm.conditioning.sentencepiece import sentencepiece
from fastldm.errors import CheckpointError, InputError
from fastldm.reading import read_file, read_json
from fastldm.system import ASSETS

if TYPE_CHECKING:
    import tokenizers

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
CLIP_VOCABULARY = 49408
CLIP_WINDOW = 77
GLIDE_WINDOW = 128

_MERGES = ASSETS / "clip_bpe" / "merges.txt.gz"
_DEFAULTS = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# CLIP's words (simple_tokenizer.py of openai/CLIP), split as in transformers' CLIPTokenizer
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """CLIP's byte-pair tokenizer: ids equal those of transformers' CLIPTokenizer on the same folder. Thread-safe."""

    kind = "CLIP"
    class_name = "CLIPTokenizer"
    """transformers' class."""
    tokens_named: Mapping[str, str] = _DEFAULTS
    """Special tokens of files that do not name them."""
    around: tuple[str | None, str | None] = ("bos_token", "eos_token")
    """Those before and after a text."""

    max_length: int
    """Tokens per window, including bos and eos."""
    bos: int | None
    """None where nothing is before a text, as `eos` where nothing is behind one."""
    eos: int | None
    pad: int
    """Fills a window after eos: eos itself in CLIP-L, `!` (id 0) in OpenCLIP's encoders."""
    size: int
    """One more than the highest id: the least number of embeddings of a text encoder."""

    def __init__(self, folder: Path | str | None = None, *, pad_token: str | None = None) -> None:
        """Read `tokenizer.json`, or `vocab.json` and `merges.txt`, with the config files beside them.

        folder: None for CLIP's tokenizer, which is built in.
        pad_token: overrides the one in the config; "!" gives the tokenizer of SD 2 and of SDXL's second encoder.
        Raises CheckpointError if the files are missing, damaged, or not a byte-pair tokenizer's.
        """
        source = _MERGES if folder is None else Path(folder)
        try:
            files = _bundled_files() if folder is None else _read_files(source, self.tokens_named, self._vocabulary)
            if pad_token is not None:
                files = files._replace(names={**files.names, "pad_token": {"content": pad_token}})
            self._backend, self._files = _with_tokens(self._splitter(files), files), files
            ids = {token.content: k for k, token in self._backend.get_added_tokens_decoder().items()}
            first, last = self.around
            self.bos, self.eos = (None if end is None else ids[files.names[end]["content"]] for end in (first, last))
            self.pad = ids[files.names["pad_token"]["content"]]
            self.size = 1 + max(*files.vocab.values(), *ids.values())
            self._vectors = _vectors(ids)
        except CheckpointError:
            raise
        except Exception as error:  # files may have any content, and tokenizers raises bare Exception
            raise CheckpointError(f"the tokenizer in {source} is not one of {self.kind}'s kind: {error!r}") from error
        self.max_length = files.max_length

    def _vocabulary(self, folder: Path, serialized: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """Tokens with their ids, and merges; serialized: the content of `tokenizer.json`, if there is one."""
        return _read_bpe(folder) if serialized is None else _serialized_bpe(folder, serialized)

    def _splitter(self, files: _Files) -> tokenizers.Tokenizer:
        """What splits a text, without the added tokens."""
        return _byte_pairs(files)

    @property
    def ends(self) -> int:
        """Tokens of a window that are no text's."""
        return (self.bos is not None) + (self.eos is not None)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text of any length, without bos, eos and padding."""
        return [id for token in self.tokens(text) for id in token]

    def tokens(self, text: str) -> list[tuple[int, ...]]:
        """The same by token: most have one id.

        A token of several vectors, which textual inversion adds as `<x>`, `<x>_1`, `<x>_2` and so on, is expanded to
        all of them (diffusers' `maybe_convert_prompt`), unless the text already contains all of them.
        """
        ids = self._backend.encode(text, add_special_tokens=False).ids
        tokens, k = [], 0
        while k < len(ids):
            token = (ids[k], *self._vectors.get(ids[k], ()))
            tokens.append(token)
            k += len(token) if tuple(ids[k : k + len(token)]) == token else 1
        return tokens

    def with_tokens(self, tokens: Mapping[str, int]) -> Tokenizer:
        """One that knows more tokens, each of so many vectors: their ids begin at `size`, in this order.

        InputError for a token that already is one, or would change what others mean.
        """
        names = {token: _vector_names(token, vectors) for token, vectors in tokens.items()}
        known = {self._normalized(token.content) for token in self._backend.get_added_tokens_decoder().values()}
        for token, own in names.items():
            for name in own:
                normalized = self._normalized(name)  # as which a text has it
                if normalized in known or None is not self._backend.token_to_id(normalized):
                    raise InputError(f"the token {checks.show(name)} is in the tokenizer already: give another name")
                known.add(normalized)
            longer = f"{token}_{len(own)}"
            if self._normalized(longer) in known:
                raise InputError(f"{checks.show(longer)} is a token: it would become a vector of {checks.show(token)}")
        extended = copy.copy(self)
        extended._backend = copy.deepcopy(self._backend)
        flat = [name for own in names.values() for name in own]
        extended._backend.add_tokens(flat)
        if [extended._backend.token_to_id(name) for name in flat] != [*range(self.size, self.size + len(flat))]:
            raise InputError("the tokenizer of this model has gaps in its ids: no token can be added")
        ids = {token.content: k for k, token in extended._backend.get_added_tokens_decoder().items()}
        extended.size, extended._vectors = self.size + len(flat), _vectors(ids)
        before = {**self._vectors, **{ids[token]: tuple(ids[name] for name in own[1:]) for token, own in names.items()}}
        for token, id in ids.items():
            if extended._vectors.get(id, ()) != before.get(id, ()):
                raise InputError(f"a new token would become a vector of {checks.show(token)}: give it another name")
        return extended

    def save_pretrained(self, folder: Path | str) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which this class and transformers read, to a folder that
        exists."""
        named = {name: token["content"] for name, token in self._files.names.items()}
        extra = [named.pop(name) for name in [*named] if name.startswith("extra_")]
        config = {"tokenizer_class": self.class_name, "model_max_length": self.max_length, **named}
        config |= {"additional_special_tokens": extra} if extra else {}
        config |= self._files.options
        (Path(folder) / "tokenizer.json").write_text(self._backend.to_str(), encoding="utf-8")
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """All that ids depend on, as JSON has it: for other languages, such as fastldm/assets/web/fastldm.js.

        InputError for BERT's, which that does not read."""
        serialized = json.loads(self._backend.to_str())
        model = serialized["model"]
        return {
            "vocab": model["vocab"],
            "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
            "added": serialized["added_tokens"],
            "vectors": self._vectors,
            "bos": self.bos,
            "eos": self.eos,
            "pad": self.pad,
            "unk": self._backend.token_to_id(model["unk_token"]),
        }

    def _normalized(self, token: str) -> str:
        return self._backend.normalizer.normalize_str(token)


class BertTokenizer(Tokenizer):
    """BERT's: ids equal those of transformers' BertTokenizer on the same folder, in windows as long as CLIP's."""

    kind = "BERT"
    class_name = "BertTokenizer"
    tokens_named: Mapping[str, str] = {
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "mask_token": "[MASK]",
    }
    around = ("cls_token", "sep_token")

    def __init__(self, folder: Path | str) -> None:
        """Read `tokenizer.json`, or `vocab.txt`, with the config files beside them. CheckpointError if they are
        missing, damaged, or not BERT's."""
        super().__init__(folder)
        self.max_length = min(self.max_length, CLIP_WINDOW)  # as diffusers' pipeline has it

    def to_dict(self) -> dict[str, Any]:
        raise InputError("the tokenizer is BERT's, and what runs elsewhere reads CLIP's")

    def _vocabulary(self, folder: Path, serialized: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
        if serialized is not None:
            model = serialized["model"]
            if model.get("type", "WordPiece") != "WordPiece":
                raise CheckpointError(
                    f"{folder / 'tokenizer.json'} is a {checks.show(model.get('type'))} tokenizer: expected BERT's, "
                    "which is of word pieces (WordPiece)"
                )
            return dict(model["vocab"]), []
        path = folder / "vocab.txt"
        if not path.is_file():
            raise CheckpointError(f"no tokenizer in {folder}: expected vocab.txt, or tokenizer.json")
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # a token may hold other ends of lines
        return {token: k for k, token in enumerate(lines)}, []

    def _splitter(self, files: _Files) -> tokenizers.Tokenizer:
        from tokenizers import Tokenizer as Backend
        from tokenizers import normalizers, pre_tokenizers
        from tokenizers.models import WordPiece

        options = {**BERT_OPTIONS, **files.options}
        backend = Backend(WordPiece(files.vocab, unk_token=files.names["unk_token"]["content"]))
        backend.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=options["tokenize_chinese_chars"],
            strip_accents=options["strip_accents"],
            lowercase=options["do_lower_case"],
        )
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return backend


class T5Tokenizer(Tokenizer):
    """T5's: ids equal those of transformers' T5Tokenizer on the same folder, in windows of 77 as of DeepFloyd IF, whose
    texts are in lower case, without space around them. Nothing is before a text."""

    kind = "T5"
    class_name = "T5Tokenizer"
    tokens_named: Mapping[str, str] = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    around = (None, "eos_token")

    def __init__(self, folder: Path | str) -> None:
        """Read `tokenizer.json`, or `spiece.model`, with the config files beside them. CheckpointError if they are
        missing, damaged, or not T5's."""
        self._pieces: list[tuple[str, float]] = []
        self._characters = b""  # sentencepiece's table by which a text is normalised
        super().__init__(folder)
        self.max_length = CLIP_WINDOW

    def to_dict(self) -> dict[str, Any]:
        raise InputError("the tokenizer is T5's, and what runs elsewhere reads CLIP's")

    def tokens(self, text: str) -> list[tuple[int, ...]]:
        return super().tokens(text.lower().strip())

    def _vocabulary(self, folder: Path, serialized: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
        if serialized is None:
            path = folder / "spiece.model"
            if not path.is_file():
                raise CheckpointError(f"no tokenizer in {folder}: expected spiece.model, or tokenizer.json")
            self._pieces, self._characters = sentencepiece(path.read_bytes())
        else:
            model = serialized["model"]
            if model.get("type", "Unigram") != "Unigram":
                raise CheckpointError(
                    f"{folder / 'tokenizer.json'} is a {checks.show(model.get('type'))} tokenizer: expected T5's, "
                    "which is of likely pieces (Unigram)"
                )
            self._pieces = [(piece, float(score)) for piece, score in model["vocab"]]
            normalizer = serialized.get("normalizer") or {}
            for step in normalizer.get("normalizers", [normalizer]):
                if step.get("type") == "Precompiled":
                    self._characters = base64.b64decode(step["precompiled_charsmap"])
        return {piece: k for k, (piece, _) in enumerate(self._pieces)}, []

    def _splitter(self, files: _Files) -> tokenizers.Tokenizer:
        from tokenizers import Tokenizer as Backend
        from tokenizers import normalizers, pre_tokenizers
        from tokenizers.models import Unigram

        unknown = files.vocab[files.names["unk_token"]["content"]]
        backend = Backend(Unigram(self._pieces, unk_id=unknown, byte_fallback=False))
        backend.normalizer = normalizers.Sequence(
            [normalizers.Precompiled(self._characters)] if self._characters else []
        )
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.WhitespaceSplit(),
                pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
            ]
        )
        return backend


class GlideTokenizer(Tokenizer):
    """GLIDE's, which is GPT-2's of texts in lower case: ids equal those of transformers' GPT2Tokenizer on the same
    vocabulary. Nothing is before or behind a text, and a window has 128 tokens."""

    kind = "GPT-2"
    class_name = "GPT2Tokenizer"
    tokens_named: Mapping[str, str] = {"pad_token": EOS, "unk_token": EOS}
    around = (None, None)

    def __init__(self, folder: Path | str) -> None:
        """Read `encoder.json` and `vocab.bpe`, each also as `.gz`, or `vocab.json` and `merges.txt`. CheckpointError if
        they are missing, damaged, or not GPT-2's."""
        super().__init__(folder)
        self.max_length = GLIDE_WINDOW
        self._backend.encode_special_tokens = True  # a text that says what padding is called has it letter by letter

    def to_dict(self) -> dict[str, Any]:
        raise InputError("the tokenizer is GPT-2's, and what runs elsewhere reads CLIP's")

    def tokens(self, text: str) -> list[tuple[int, ...]]:
        return super().tokens(text.lower())

    def _vocabulary(self, folder: Path, serialized: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
        if serialized is not None:
            return _serialized_bpe(folder, serialized)
        paths = [(folder / name, folder / f"{name}.gz") for name in ("encoder.json", "vocab.bpe")]
        files = [next((path for path in pair if path.is_file()), None) for pair in paths]
        if None in files:
            if (folder / "merges.txt").is_file():
                return _read_bpe(folder)
            raise CheckpointError(
                f"no tokenizer in {folder}: expected GPT-2's encoder.json and vocab.bpe, of GLIDE's repository, beside "
                "the weights, or vocab.json and merges.txt"
            )
        vocab, merges = (_unzipped(read_file(file)).decode() for file in files if file is not None)
        lines = [line for line in merges.split("\n") if line and not line.startswith("#version")]
        return json.loads(vocab), [(left, right) for left, right in (line.split(" ") for line in lines)]

    def _splitter(self, files: _Files) -> tokenizers.Tokenizer:
        from tokenizers import Tokenizer as Backend
        from tokenizers import normalizers, pre_tokenizers
        from tokenizers.models import BPE

        backend = Backend(BPE(vocab=files.vocab, merges=files.merges))
        backend.normalizer = normalizers.Lowercase()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return backend


def _unzipped(data: bytes) -> bytes:
    """The content of a file, of gzip's too, as far as a vocabulary goes."""
    if not data.startswith(b"\x1f\x8b"):
        return data
    with gzip.open(io.BytesIO(data)) as file:
        return file.read(2**26)


BERT_OPTIONS: dict[str, Any] = {"do_lower_case": True, "tokenize_chinese_chars": True, "strip_accents": None}
"""Keys of its tokenizer_config.json, and what they are without."""


def _vector_names(token: str, vectors: int) -> list[str]:
    return [token, *(f"{token}_{k}" for k in range(1, vectors))]


def _vectors(added: Mapping[str, int]) -> dict[int, tuple[int, ...]]:
    """For added tokens `<x>`: the ids of `<x>_1`, `<x>_2` and so on, by the id of `<x>`."""
    vectors = {}
    for content, token in added.items():
        rest = itertools.takewhile(added.__contains__, (f"{content}_{k}" for k in itertools.count(1)))
        if ids := tuple(added[name] for name in rest):
            vectors[token] = ids
    return vectors


def clip_vocabulary(size: int = CLIP_VOCABULARY) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary (token to id) and merges, built from the merges that ship with fastldm.

    size: 514 to 49,408 tokens. A smaller vocabulary has the 512 bytes, the `size - 514` most common merges, and
    the two special tokens at its end.
    """
    with gzip.open(_MERGES, "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()[1:]  # the first is "#version: 0.2"
    merges = [(left, right) for left, right in (line.split(" ") for line in lines[: size - 514])]
    # GPT-2's order of bytes: printable ones first, the rest as characters from 256
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + k) for k in range(256 - len(printable))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(left + right for left, right in merges), BOS, EOS]
    return {token: k for k, token in enumerate(tokens)}, merges


class _Files(NamedTuple):
    """The content of a tokenizer's files in any format. Tokens are AddedToken's arguments."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    added: list[dict[str, Any]]  # matched in a text before splitting
    names: dict[str, dict[str, Any]]  # likewise; special tokens by "bos_token" and so on
    max_length: int
    options: dict[str, Any]  # of BERT_OPTIONS, those that there are


def _bundled_files() -> _Files:
    vocab, merges = clip_vocabulary()
    return _Files(vocab, merges, [], {name: {"content": token} for name, token in _DEFAULTS.items()}, CLIP_WINDOW, {})


Vocabulary = Callable[[Path, Any], tuple[dict[str, int], list[tuple[str, str]]]]


def _read_files(folder: Path, defaults: Mapping[str, str], vocabulary: Vocabulary) -> _Files:
    """Read files as transformers does: vocabulary and merges come from `tokenizer.json` if there is one, but not its
    normaliser and splitter; `added_tokens_decoder` replaces the older files of special tokens."""
    serialized = _read_json(folder / "tokenizer.json")
    config = _read_json(folder / "tokenizer_config.json") or {}
    vocab, merges = vocabulary(folder, serialized)

    named = {**defaults, **{name: value for name, value in config.items() if value is not None}}
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
    options = {name: config[name] for name in BERT_OPTIONS if name in config}
    return _Files(vocab, merges, [added[k] for k in sorted(added)], names, _window_length(config), options)


def _serialized_bpe(folder: Path, serialized: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = serialized["model"]
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'} is a {checks.show(model.get('type'))} tokenizer: expected CLIP's, which is "
            "byte-pair (BPE)"
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
    """The file's content, or None if it does not exist."""
    return read_json(path) if os.path.lexists(path) else None


def _token(value: Any) -> dict[str, Any]:
    """AddedToken's arguments, from a string or a dict in the files."""
    if isinstance(value, str):
        return {"content": value}
    return {k: value[k] for k in ("content", "single_word", "lstrip", "rstrip", "normalized", "special") if k in value}


def _window_length(config: Mapping[str, Any]) -> int:
    length = config.get("model_max_length", config.get("max_len"))
    # transformers writes 1e30 for no limit
    return int(length) if isinstance(length, (int, float)) and 3 <= length <= 1e6 else CLIP_WINDOW


def _byte_pairs(files: _Files) -> tokenizers.Tokenizer:
    # Imported here so that `import fastldm` and the command's help do not need it.
    from tokenizers import Regex, normalizers, pre_tokenizers
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
    return backend


def _with_tokens(backend: tokenizers.Tokenizer, files: _Files) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken

    # Named tokens are always special, so that they match a text without normalisation.
    named = {token["content"]: token for token in files.names.values()}
    added = {token["content"]: token for token in files.added}
    tokens = [{**token, "special": token.get("special", False) or content in named} for content, token in added.items()]
    tokens += [{**token, "special": True} for content, token in named.items() if content not in added]
    backend.add_tokens([AddedToken(**token) for token in tokens])
    return backend
