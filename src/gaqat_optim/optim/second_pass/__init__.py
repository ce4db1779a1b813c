"""The second pass: its gradients, the state that it must not change, and the state of a step."""
