"""From a trained network to the integers that run."""
