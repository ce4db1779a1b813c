"""Adapters for training frameworks whose loops have no place for a second pass. No framework is imported here."""

from .transformers_trainer import TwoPassTrainerMixin

__all__ = ["TwoPassTrainerMixin"]
