"""Two passes around any optimizer, and frozen scales. It knows a scale only as a parameter with a name."""
