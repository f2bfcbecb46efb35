"""The tiers as data: one YAML recipe per tier and model."""
