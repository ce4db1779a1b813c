"""Adapters for training frameworks that leave no room for a second pass. Importing this imports none of them."""

from .transformers_trainer import TwoPassTrainerMixin

__all__ = ["TwoPassTrainerMixin"]
