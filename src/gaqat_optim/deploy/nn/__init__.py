"""The deployed layers, which compute on integers. Importing this registers them all."""

from . import attention, conv, embedding, linear  # noqa: F401
