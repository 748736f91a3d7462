"""Tokens of textual inversion on a loaded model, which requests may be running on: a part of `Pipeline`.

The encoder's weights are not touched. A stage of text is replaced by one that knows other tokens, between two steps:
what was encoded before stays as it was, and what is encoded after reads the new vectors beside the table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fastldm import checks
from fastldm.adapters.family import family_of_spec
from fastldm.adapters.textual_inversion import check_encoders, check_token, read_textual_inversion
from fastldm.checks import show
from fastldm.conditioning.text import TextStage
from fastldm.errors import InputError
from fastldm.loading.spec import check_options
from fastldm.runtime.stages import Stages
from fastldm.serving.session import Session

Source = str | os.PathLike[str] | Mapping[str, Tensor] | Tensor
TextStages = tuple[TextStage, ...]

MAX_FILES = 1000  # in one call


class TextualInversionLoader:
    """What `Pipeline` has of textual inversion, with diffusers' names."""

    stages: Stages

    @property
    def session(self) -> Session:
        """The pipeline's."""
        raise NotImplementedError

    @property
    def text_encoder(self) -> Any:
        """The text encoder, SDXL's first; None of SDXL's refiner."""
        stage = self.stages.encoders.get("text_encoder")
        return stage and stage.model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        stage = self.stages.encoders.get("text_encoder")
        return stage and stage.tokenizer

    @property
    def text_encoder_2(self) -> Any:
        """SDXL's second text encoder, else None."""
        stage = self.stages.encoders.get("text_encoder_2")
        return stage and stage.model

    @property
    def tokenizer_2(self) -> Any:
        """Its tokenizer, else None."""
        stage = self.stages.encoders.get("text_encoder_2")
        return stage and stage.tokenizer

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Source | Sequence[Source],
        token: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        allow_pickle: bool = False,
        **where: Any,
    ) -> None:
        """Add tokens whose vectors were learned by textual inversion. Prompts then use them as words: weights, long
        prompts and negatives too. Requests under way go on as they were encoded.

        pretrained_model_name_or_path: a file, a folder, a hub id, a dict of tensors or a tensor, or a list of those;
            the formats are in adapters/textual_inversion.py. SDXL's `clip_l` and `clip_g` change both text encoders, of
            its refiner the one that it has.
        token: the name in prompts, in place of the file's own; a list for a list of files, or for the rows of one.
        tokenizer, text_encoder: which of the pipeline's is meant, by default the first.
        weight_name, subfolder: of the file in a folder or on the hub. allow_pickle: whether pickles are read. where:
            revision, cache_dir and local_files_only.

        All is loaded, or on an error nothing. CheckpointError for a file that is damaged or for another model;
        InputError for a token that the tokenizer knows, for a bundle, for Karlo, and for arguments that do not fit.
        """
        self.stages.need_torch("whose text encoder takes no new tokens: load them into the model, and export that")
        check_encoders(self.stages.spec.text)
        if self.stages.projection is not None:
            raise InputError("textual inversion is not for unCLIP's networks, which read texts without added tokens")
        sources, tokens = _listed(pretrained_model_name_or_path, token)
        encoder = self._encoder(tokenizer, text_encoder)
        checks.known(where, ("revision", "cache_dir", "local_files_only"))
        check_options(where)
        where = {**where, "weight_name": weight_name, "subfolder": subfolder, "allow_pickle": allow_pickle}
        embeddings = [read_textual_inversion(source, **where) for source in sources]
        if len(embeddings) == 1 and len(tokens) > 1:
            embeddings = embeddings[0].rows()
            if len(embeddings) != len(tokens):
                raise InputError(f"token has {len(tokens)} texts for {len(embeddings)} vectors: give one, or one each")
        widths = {name: stage.model.config.hidden for name, stage in self.stages.encoders.items()}
        family, dtype = family_of_spec(self.stages.spec), self.stages.dtype
        added: dict[str, dict[str, Tensor]] = {name: {} for name in widths}
        hashes: dict[str, str] = {}
        for embedding, given in zip(embeddings, tokens, strict=True):
            if given is None and embedding.token is None:
                raise InputError(f"{embedding.source} does not say its token: pass token=")
            name = check_token(embedding.token, embedding.source) if given is None else check_token(given)
            for component, vectors in embedding.fit(widths, family, encoder, dtype).items():
                if name in added[component]:
                    raise InputError(f"the token {show(name)} is there twice: give each another name")
                added[component][name] = vectors
            if embedding.short_hash is not None:
                hashes[name] = embedding.short_hash
        self._replace_text_stages(
            lambda stages: tuple(
                stage.with_tokens(_joined(stage.added, own), hashes) if own else stage
                for stage, own in zip(stages, added.values(), strict=True)
            )
        )

    def unload_textual_inversion(
        self, tokens: str | Sequence[str] | None = None, tokenizer: Any = None, text_encoder: Any = None
    ) -> None:
        """Forget tokens that were loaded, with all their vectors: these, or None for all.

        tokenizer, text_encoder: which of the pipeline's is meant, by default all.
        InputError for a token that is not loaded; nothing changes then.
        """
        encoder = self._encoder(tokenizer, text_encoder)
        names = None if tokens is None else checks.texts("tokens", tokens, MAX_FILES, checks.MAX_PROMPT_LENGTH)

        def change(stages: TextStages) -> TextStages:
            names_of = self.stages.encoders
            meant = [stage for name, stage in zip(names_of, stages, strict=True) if encoder in (None, name)]
            loaded = list(dict.fromkeys(token for stage in meant for token in stage.added))
            for name in names or ():
                if name not in loaded:
                    known = f"loaded are {', '.join(map(show, loaded[:8]))}" if loaded else "none is loaded"
                    raise InputError(f"{show(name)} is no token of textual inversion that was loaded: {known}")
            gone = loaded if names is None else names
            return tuple(
                stage.with_tokens({token: vectors for token, vectors in stage.added.items() if token not in gone})
                if stage in meant and any(token in gone for token in stage.added)
                else stage
                for stage in stages
            )

        self._replace_text_stages(change)

    def _encoder(self, tokenizer: Any, text_encoder: Any) -> str | None:
        """The name of the text encoder that is meant; None if none was given."""
        for name, stage in self.stages.encoders.items():
            if text_encoder is stage.model or (text_encoder is None and tokenizer is stage.tokenizer):
                return name
        if text_encoder is not None:
            raise InputError(f"text_encoder is {show(text_encoder)}: expected pipe.text_encoder or pipe.text_encoder_2")
        if tokenizer is not None:
            raise InputError(
                f"tokenizer is {show(tokenizer)}: expected pipe.tokenizer or pipe.tokenizer_2, as they are now"
            )
        return None

    def _replace_text_stages(self, change: Callable[[TextStages], TextStages]) -> None:
        """Compute new stages in this thread, and put them in place between two requests' encodings; again if another
        thread was first."""
        stages = self.stages
        replaced = False
        while not replaced:
            before = stages.text_stages
            after = change(before)

            def replace(before: TextStages = before, after: TextStages = after) -> bool:
                if stages.text_stages is not before:
                    return False
                stages.text_stages = after
                return True

            replaced = self.session.call(replace)


def _listed(source: Any, token: Any) -> tuple[list[Any], list[str | None]]:
    """Files, and for each its token or None; or one file, and a token for each of its rows."""
    sources = [*source] if isinstance(source, list | tuple) else [source]
    if not 0 < len(sources) <= MAX_FILES:
        raise InputError(f"pretrained_model_name_or_path is a list of {len(sources)}: expected 1 to {MAX_FILES} files")
    if token is None:
        return sources, [None] * len(sources)
    tokens = checks.texts("token", token, MAX_FILES, checks.MAX_PROMPT_LENGTH)
    if len(sources) > 1 and len(tokens) != len(sources):
        raise InputError(f"token has {len(tokens)} texts for {len(sources)} files: give one each, or None")
    if len(set(tokens)) < len(tokens):
        raise InputError("token has a text twice: each token needs its own name")
    return sources, [*tokens]


def _joined(loaded: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for token in new:
        if token in loaded:
            raise InputError(f"the token {show(token)} is loaded already: unload it first, or give another name")
    return {**loaded, **new}
