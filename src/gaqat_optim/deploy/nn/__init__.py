"""The deployed layers, which compute on integers."""
