"""The bars of a tier: what `verify` demands of the forward pass and of a continuation. Recipes state them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, le=1)]


class Bars(BaseModel):
    """What a file of one tier must reach. A bar that is absent (None) is not judged."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    cosine_mean: Share | None = None
    """The smallest mean cosine, over positions, of a layer's output with the source's."""
    cosine_min: Share | None = None
    """The smallest cosine at any position of any layer."""
    kld_mean: Annotated[float, Field(ge=0)] | None = None
    """The largest mean KL divergence of the next-token distributions, in nats."""
    top1: Share | None = None
    """The smallest share of positions at which both models' most probable token is the same."""
    routing: Share | None = None
    """The smallest share of routed experts that both models chose."""
    coherence: bool = False
    """Whether the continuation of a prompt must pass the coherence gate."""
