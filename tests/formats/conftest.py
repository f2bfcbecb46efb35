"""Fixtures of the hub tests, for every module in this folder that asks for them."""

from hub_fixtures import isolated, local, opened, server

__all__ = ["isolated", "local", "opened", "server"]
