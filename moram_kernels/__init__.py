"""Retrieval from a bank of rank-1 associative memory atoms: one operator, several backends."""

from .activation import SelfActivation
from .api import available_backends, retrieve
from .explain import explain

__all__ = ["SelfActivation", "available_backends", "explain", "retrieve"]
