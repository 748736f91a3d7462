"""Other models that a pipeline's requests go on with, or begin with: see serving/cascade.py."""

from __future__ import annotations

import os
from typing import Any

from fastldm.errors import InputError
from fastldm.priors import KandinskyPrior, check_fits, describe_prior
from fastldm.runtime.stages import Stages
from fastldm.serving.cascade import check_device
from fastldm.serving.session import Session


class CascadeLoader:
    """What `Pipeline` has of other models that its requests have stages on."""

    stages: Stages
    _session: Session
    _refiner: Any = None
    _upscalers: tuple[Any, ...] = ()

    def _beside(self, source: Any, options: dict[str, Any], *, shares_text: bool = False) -> Any:
        """A loaded pipeline, or what `from_pretrained` takes with options, on this one's device and in its dtype.
        shares_text: without a text encoder, if it may read this one's text."""
        raise NotImplementedError

    # --- a refiner

    @property
    def refiner_session(self) -> Session | None:
        """Its session, which requests of its own share with those that come from here."""
        return self._session.refiner

    def attach_refiner(self, path_or_pipeline: Any, **options: Any) -> None:
        """Have another model go on with the latents of each request from now on, at `refiner_switch_at` of the noise,
        as SDXL's refiner does with its base's: a loaded pipeline, or what `from_pretrained` takes with options.

        InputError for one that is on another device, or whose latents are not this model's; and what loading raises.
        """
        refiner = self._beside(path_or_pipeline, options)
        self._session.refiner = refiner.session
        self._refiner = refiner

    def detach_refiner(self) -> None:
        """Make requests from now on alone; those that were submitted keep it."""
        self._session.refiner = self._refiner = None

    # --- a prior

    def attach_prior(self, path_or_prior: str | os.PathLike[str] | KandinskyPrior, **options: Any) -> None:
        """Have a prior make the vectors that Kandinsky 2.2 reads, of the prompts of each request from now on: a loaded
        one, or what `KandinskyPrior.from_pretrained` takes with options. Its steps are shared as a model's are.

        InputError for another kind of model, and for a prior that is on another device or makes other vectors; and what
        loading raises.
        """
        stages, unet, prior = self.stages, self.stages.spec.unet, path_or_prior
        if not isinstance(prior, KandinskyPrior):
            describe_prior(prior, unet, **options)  # a mistake is found before a weight is read
            placed = {"device": stages.device, "dtype": stages.dtype if stages.backend == "torch" else None}
            prior = KandinskyPrior.from_pretrained(prior, **{**placed, **options})
        check_device(stages, prior.stages, "prior")
        check_fits(prior.stages.model.config, unet)
        stages.prior = prior.stages

    def detach_prior(self) -> None:
        """Read vectors from now on, and no prompts; requests that were submitted keep the prior."""
        if self.stages.spec.prior is not None:
            raise InputError(f"{self.stages.name} has a prior of its own, without which it reads nothing")
        self.stages.prior = None

    # --- upscalers

    @property
    def upscaler_sessions(self) -> tuple[Session, ...]:
        """Their sessions, which requests of their own share with those that come from here."""
        return self._session.upscalers

    def attach_upscaler(self, path_or_pipeline: Any, **options: Any) -> None:
        """Have another model enlarge the images of each request from now on, behind those that do already: a loaded
        pipeline, or what `from_pretrained` takes with options. It reads the same prompts, and has its own defaults, see
        `Request.upscaler_options`. DeepFloyd IF's second stage is loaded without a text encoder then, for it reads the
        text of the first, and of a picture to start from it starts too.

        InputError for one that is on another device, enlarges nothing, or reads other latents; and what loading raises.
        """
        upscaler = self._beside(path_or_pipeline, options, shares_text=self.stages.spec.unet.pools_text)
        self._session.upscalers = (*self._session.upscalers, upscaler.session)
        self._upscalers = (*self._upscalers, upscaler)

    def detach_upscalers(self) -> None:
        """Make requests from now on without them; those that were submitted keep them."""
        self._session.upscalers = self._upscalers = ()
