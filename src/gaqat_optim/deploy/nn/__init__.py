"""The deployed layers, which compute on integers. Importing this registers them all."""

from . import attention, conv, embedding, library_layers, linear  # noqa: F401
